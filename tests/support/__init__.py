# SPDX-License-Identifier: Apache-2.0
"""What several tests share: golden files, small models, stand-ins, a running service."""
