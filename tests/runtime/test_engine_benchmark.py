# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/engine.py without a GPU: it starts, plans, and refuses to measure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "engine.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_plan():
    lines = run("--dry-run", "--batch", "1", "8", "--precision", "fp16").stdout.splitlines()
    assert len(lines) == 2 * (2 * 2 + 2 + 2)  # two compilers with and without graphs, two providers, PyTorch twice
    assert "tensorrt-rtx fp16 without CUDA graphs, batch 8" in lines


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="asks what happens without a GPU")
def test_without_a_gpu():
    result = run()
    assert result.returncode == 1
    assert result.stderr.startswith("error: this benchmark needs an NVIDIA GPU, and no NVIDIA driver is installed here")
