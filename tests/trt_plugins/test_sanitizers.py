# SPDX-License-Identifier: Apache-2.0
"""The kernels and both plugin classes once more, compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from internimage_deploy.cache import host_compiler

HERE = Path(__file__).parent


def sanitized(*arguments):
    """Run pytest in a process that starts with the sanitizers' runtime; conftest.py compiles accordingly."""
    runtime = subprocess.run([host_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip(f"{host_compiler()} has no AddressSanitizer runtime: install libasan")
    environment = os.environ | {
        "PLUGIN_TEST_SANITIZERS": "1",
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_and_plugins_are_clean():
    chosen = "not beyond_32 and not side_limit and not random_settings and not 4096"
    names = ("kernel", "variants", "plugin", "ms_deform_attn_kernel", "ms_deform_attn_plugin", "every_plugin")
    names += ("upsample_argmax_kernel", "upsample_argmax_plugin")
    files = [str(HERE / f"test_{name}.py") for name in names]
    done = sanitized("-k", chosen, *files)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 550


OUTSIDE = {
    "DCNv3": (
        "    arrays = [np.ones((1, 8, 8, c), np.float32) for c in (64, 72, 36)]\n"
        "    settings = dict(kernel=3, stride=1, pad=1, dilation=1, group=4, offset_scale=1.0)\n"
        "    params, output = host.make_params(*arrays, **settings)\n"
        "    params.input_strides.row *= 2\n"
        "    host.DCNV3.run(params, 'float32')\n"
    ),
    "MSDeformAttn": (
        "    value, places = np.ones((1, 64, 2, 32), np.float32), (1, 64, 2, 1, 4)\n"
        "    locations = np.full((*places, 2), [1.5 / 9, 7.5 / 8], np.float32)  # on the first cell behind the array\n"
        "    weights = np.ones(places, np.float32)\n"
        "    params, output, held = host.make_ms_deform_attn_params(value, [[8, 9]], [0], locations, weights)\n"
        "    params.keys *= 2\n"
        "    host.MS_DEFORM_ATTN.run(params, 'float32')\n"
    ),
}


@pytest.mark.parametrize("body", OUTSIDE.values(), ids=OUTSIDE)
def test_the_sanitizer_would_see_a_read_outside(tmp_path, body):
    # The same set-up on a call that lies about its input's size: without this, a clean run would prove nothing.
    (tmp_path / "test_outside.py").write_text(
        f"import numpy as np\nfrom internimage_deploy.trt_plugins import host\ndef test_outside():\n{body}"
    )
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    # Without -s the report would end in pytest's capture, which dies with the process.
    done = sanitized("-s", str(tmp_path / "test_outside.py"), "--rootdir", str(tmp_path))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout + done.stderr
