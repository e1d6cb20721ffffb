# SPDX-License-Identifier: Apache-2.0
"""The DCNv3 operator for TensorRT: contract, kernel, plugin, and the code that builds it. Never imports torch."""
