# SPDX-License-Identifier: Apache-2.0
"""The engines a network can run in, behind one interface."""
