# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "onnx", "cv2", "onnxruntime")
    code = f"import internimage_deploy, sys; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
