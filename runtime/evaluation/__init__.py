# SPDX-License-Identifier: Apache-2.0
"""Scoring a model against label maps."""
