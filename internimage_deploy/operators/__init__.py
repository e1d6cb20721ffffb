# SPDX-License-Identifier: Apache-2.0
"""The custom ONNX operators: contract and definition in standard operators."""
