# SPDX-License-Identifier: Apache-2.0
"""PyTorch to ONNX: model code, checkpoints, export, rewrites, verification. Never imports TensorRT or CUDA."""
