# SPDX-License-Identifier: Apache-2.0
"""What a compiler's messages are answered with: only options that the user gave, or can give."""

import dataclasses

import pytest

from internimage_deploy.runtime.engine.protocol import ExpectedTensor, Job
from internimage_deploy.runtime.engine.remedies import remedy

JOB = Job("tensorrt", "m.onnx", "m.onnx", "m.engine", ExpectedTensor("image", "uint8", (1, 64, 64, 3)))
SIZE = (1, 64, 64, 3)
PROFILES = ({"min": SIZE, "opt": SIZE, "max": SIZE},)
LEAN = "Unable to load library: libnvinfer_lean.so.10"
NEEDS_LEAN = "; install TensorRT's lean runtime, a package of its own, in the same version, or leave {} out"


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("GPU out of memory", {}, "; free GPU memory or export the model for a smaller size"),
        (
            "OutOfMemory",
            {"workspace_mib": 64, "profiles": PROFILES},
            "; free GPU memory or lower --workspace or build for smaller inputs with --max",
        ),
        (
            "Could not find any implementation for node x",
            {"workspace_mib": 64, "profiles": PROFILES},
            "; raise --workspace or build for smaller inputs with --max",
        ),
        (LEAN, {"lean_options": ("--embed-plugin",)}, NEEDS_LEAN.format("--embed-plugin")),
        (LEAN, {"lean_options": ("--version-compatible",)}, NEEDS_LEAN.format("--version-compatible")),
        (
            LEAN,
            {"lean_options": ("--embed-plugin", "--version-compatible")},
            NEEDS_LEAN.format("--embed-plugin and --version-compatible"),
        ),
        ("Plugin not found", {}, "; build the plugin with  internimage-deploy build-plugin"),
        ("Unsupported SM: 0x705", {}, "; build on the GPU that is to run the engine"),
        ("anything else", {}, ""),
    ],
)
def test_remedies(text, changes, expected):
    assert remedy(text, dataclasses.replace(JOB, **changes)) == expected
