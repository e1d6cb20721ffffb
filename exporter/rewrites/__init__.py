# SPDX-License-Identifier: Apache-2.0
"""Algebraic rewrites that make the network cheaper without changing its answer."""
