# SPDX-License-Identifier: Apache-2.0
"""The device layer: memory, streams, execution contexts, CUDA graphs, arrays of other libraries."""
