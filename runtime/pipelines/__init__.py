# SPDX-License-Identifier: Apache-2.0
"""Many image files, or a video, through one model."""
