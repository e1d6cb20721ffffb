# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as it stands there."""

import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from support.documents import DOCUMENTS, ROOT, section

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install '.[rtx]'")


def test_the_readmes_python_runs_word_for_word(tmp_path):
    checkpoint = ROOT / "examples" / "toy_street" / "toy_street.pth"
    shutil.copy(checkpoint, tmp_path / "upernet_internimage_t_512_160k_ade20k.pth")
    cv2.imwrite(str(tmp_path / "street.jpg"), np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    (code,) = re.findall(r"```python\n(.*?)```", section(DOCUMENTS["README.md"], "Python API"), re.S)
    checks = "\nassert result.labels.shape == (64, 96) and abs(sum(result.class_fractions().values()) - 1) < 1e-6"
    done = subprocess.run([sys.executable, "-c", code + checks], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.engine").stat().st_size > 0
    assert (tmp_path / "model.engine.json").exists()
