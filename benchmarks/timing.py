# SPDX-License-Identifier: Apache-2.0
"""The one timer is the runtime's: `internimage-deploy benchmark` and everything here use the same."""

from internimage_deploy.runtime.timing import Timing, measure, summary

__all__ = ["Timing", "measure", "summary"]
