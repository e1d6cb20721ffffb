# SPDX-License-Identifier: Apache-2.0
"""InternImage and its segmentation heads in PyTorch, inference only."""
