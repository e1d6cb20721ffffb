# SPDX-License-Identifier: Apache-2.0
"""The commands, one file each. A room is imported only when one of its commands runs."""
