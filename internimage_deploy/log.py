# SPDX-License-Identifier: Apache-2.0
"""Logging of a command or a worker process."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Show what this package logs, from INFO on, and the warnings of others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("internimage_deploy").setLevel(logging.INFO)
