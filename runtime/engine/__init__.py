# SPDX-License-Identifier: Apache-2.0
"""From an ONNX file to a TensorRT or TensorRT-RTX engine."""
