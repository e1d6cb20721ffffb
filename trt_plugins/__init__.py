# SPDX-License-Identifier: Apache-2.0
"""DCNv3 and MSDeformAttn for TensorRT: kernels, plugins, and the code that builds them. Never imports torch."""
