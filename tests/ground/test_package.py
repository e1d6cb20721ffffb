# SPDX-License-Identifier: Apache-2.0
import pickle
import subprocess
import sys

from internimage_deploy import MissingDependency, UserError


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "onnx", "cv2", "onnxruntime")
    code = f"import internimage_deploy, sys; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_errors_cross_processes():
    """What a worker raises arrives as an error with the same message."""
    for error in (UserError("no"), MissingDependency("ray", "ray", "segmenting on a cluster")):
        arrived = pickle.loads(pickle.dumps(error))
        assert isinstance(arrived, UserError)
        assert str(arrived) == str(error)
