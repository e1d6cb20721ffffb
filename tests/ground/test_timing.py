# SPDX-License-Identifier: Apache-2.0
import subprocess
from pathlib import Path

import numpy as np
import pytest

from internimage_deploy.environment import environment
from internimage_deploy.timing import measure, summary

ROOT = Path(__file__).parents[2]


def test_the_timer_takes_turns_and_counts():
    calls = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {timing.runs for timing in times.values()} == {3}


def test_timing_figures_by_hand():
    timing = summary([10.0, 20.0, 30.0, 40.0, 100.0])
    assert (timing.median_ms, timing.p95_ms, timing.min_ms) == (30.0, 100.0, 10.0)
    assert timing.cv == pytest.approx(35.355 / 40, rel=1e-3)
    assert timing.unstable
    assert not summary([10.0, 10.1, 10.0]).unstable


def test_figures_keep_six_digits_for_json():
    figures = summary([0.0012345678] * 3, 1234567.8).asdict()
    assert figures["median_ms"] == 0.00123457
    assert figures["cpu_ms"] == 1234570
    assert figures["runs"] == 3


def test_a_report_names_the_machine(tmp_path, monkeypatch):
    nvidia = tmp_path / "nvidia-smi"
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA Thing, 580.1, 1 MiB'\n")
    nvidia.chmod(0o755)
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "")
        report = environment(ROOT)
    assert "gpu" not in report["machine"]
    assert "commit" not in report  # no git
    assert report["versions"]["numpy"] == np.__version__
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment()["machine"]["gpu"] == "NVIDIA Thing, 580.1, 1 MiB"


def test_a_report_names_the_commit():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone")
    assert done.stdout.startswith(environment(ROOT)["commit"])
