# SPDX-License-Identifier: Apache-2.0
"""Reading, counting, editing and writing ONNX files, weights left on disk."""
