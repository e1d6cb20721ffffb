# SPDX-License-Identifier: Apache-2.0
"""Segmenting folders and serving on a Ray cluster."""
