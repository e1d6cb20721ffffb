# SPDX-License-Identifier: Apache-2.0
"""The figures of benchmarks/gpu: predictions by hand, and rows of timings on the host build of the kernels."""

import ctypes
import json
from dataclasses import replace
from types import SimpleNamespace

import candidates
import correctness
import cuda_timer
import kernel_times
import plugin_operators
import prediction
import pytest
import torch
from dcnv3_operator import Dcnv3, Dcnv3Case, stage_case
from rows import OK, WRONG

from internimage_deploy.timing import summary
from internimage_deploy.trt_plugins.host_operators import BODIES, Variant

OPERATORS = plugin_operators.operators()


# Predictions


def test_predictions_by_hand():
    # InternImage-T, stage 1, batch 8: 128x128 pixels of 4 groups of 16 channels. An H200 has 132 multiprocessors, 1.98
    # GHz, and copies 4.3 TB/s.
    gpu = prediction.Gpu(132, 1.98e9, 4.3e12)
    operator, case = Dcnv3(), stage_case("t", 1, 8)
    pixels = 8 * 128 * 128
    narrow = prediction.predict(operator.work(case, "float16", Variant("float16", 8, 1, 16, False)), gpu)
    assert narrow["copy_us"] == pytest.approx(1e6 * pixels * 4 * (16 + 16 + 27) * 2 / 4.3e12, abs=0.01)
    # 36 corners of 2 bytes for each of 64 channels; 128 bytes per clock
    assert narrow["gather_us"] == pytest.approx(1e6 * pixels * 64 * 72 / (132 * 128 * 1.98e9), abs=0.01)
    # a thread for 8 channels, 1112 instructions each, 128 per clock
    assert narrow["issue_us"] == pytest.approx(1e6 * pixels * 8 * 1112 / (132 * 128 * 1.98e9), abs=0.01)
    packed = operator.work(case, "float16", Variant("float16", 8, 1, 16, True))
    assert packed.instructions == pixels * 8 * (1112 + 85)  # with the softmax
    assert (narrow["bound"], narrow["predicted_us"]) == ("issue", narrow["issue_us"])
    wide = prediction.predict(operator.work(case, "float16", Variant("float16", 8, 2, 16, False)), gpu)
    assert wide["issue_us"] == pytest.approx(27.2, abs=0.1)
    unknown = prediction.predict(operator.work(case, "float32", None), gpu)
    assert "issue_us" not in unknown
    assert unknown["bound"] == "gather"


def test_sets_of_operands_hold_twice_the_cache():
    assert cuda_timer.plan_sets(62_000_000, 60_000_000) == cuda_timer.Sets(2, 50)
    assert cuda_timer.plan_sets(1_000_000, 60_000_000) == cuda_timer.Sets(120, 120)
    assert cuda_timer.plan_sets(10_000_000, 60_000_000) == cuda_timer.Sets(12, 60)  # each equally often
    assert cuda_timer.plan_sets(1, 60_000_000).count == cuda_timer.MOST_LAUNCHES
    assert cuda_timer.plan_sets(20 << 30, 60_000_000).count == 1  # more would not fit


# Timing, on the host and with made-up times


class Timer:
    """Runs what it is given, and says that it took as many milliseconds as calls were made before."""

    l2_bytes = 100_000
    time_of = 0

    def time(self, calls, **options):
        for call in calls:
            call()
        self.time_of += 1
        return summary([float(self.time_of)])

    cold_and_warm = cuda_timer.CudaTimer.cold_and_warm


@pytest.fixture
def on_the_host(monkeypatch):
    bench = kernel_times.Bench(Timer(), prediction.Gpu(132, 1.98e9, 4.3e12))
    monkeypatch.setattr(kernel_times, "bench", lambda: bench)
    monkeypatch.setattr(kernel_times, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_times, "enqueue", correctness.launch_on_host)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


SMALL = Dcnv3Case("small", 1, 16, 16, 2, 16, softmax=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_row_of_a_kernel(name, on_the_host):
    operator = OPERATORS[name]
    case = SMALL if name == "dcnv3" else operator.odd_cases()[1]
    row = kernel_times.ours(operator, case, "float16")
    assert row["status"] == OK
    assert row["best_tactic"] == 0  # the first is the fastest by that clock
    assert row["default_cold_us"] == row["best"]["cold_us"] == 1000
    assert row["best"]["warm_us"] == 2000
    assert row["GB_per_s"] == pytest.approx(row["bytes"] / 1e-3 / 1e9, abs=0.05)
    assert row["sets"] == cuda_timer.plan_sets(row["bytes"], Timer.l2_bytes).count > 1
    for tactic, figures in row["tactics"].items():
        assert {"error", "roundings", "cold_p95_us", "warm_p95_us", "predicted_us", "bound"} <= figures.keys()
        assert (figures["variant"] is None) == (tactic == 0)
    json.dumps(row)
    if name == "dcnv3":
        bodies = {figures["variant"]["body"] for tactic, figures in row["tactics"].items() if tactic}
        assert bodies == set(BODIES)


def test_a_wrong_kernel_is_timed_and_marked(on_the_host, monkeypatch):
    def wrong(operator, params, dtype, tactic):
        correctness.launch_on_host(operator, params, dtype, tactic)
        if tactic == 2:
            ctypes.cast(params.output, ctypes.POINTER(ctypes.c_uint16))[0] ^= 1 << 8

    monkeypatch.setattr(kernel_times, "enqueue", wrong)
    row = kernel_times.ours(OPERATORS["dcnv3"], SMALL, "float16")
    assert row["status"] == WRONG
    assert [tactic for tactic, figures in row["tactics"].items() if not figures["right"]] == [2]


@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_the_row_of_another_kernel(name, on_the_host, monkeypatch):
    case = replace(SMALL, softmax=False)
    refused = []

    def launch(input, *rest):
        """Our kernel in the place of theirs; it takes the operands apart that DCNv4 has in one."""
        *tensors, output, sizes, scale, half, stream = rest
        operator = OPERATORS["dcnv3"]
        operands = operator.draw(case, "float16", "cpu", 0)
        params = operator.params(case, operands)
        params.input, params.output = input, output
        if name == "official":
            params.offset, params.mask = tensors
            assert list(sizes) == [1, 16, 16, 2, 16]
        else:
            depth = sizes[7]
            assert depth == 56
            if sizes[5] == 16:  # refuses this setting
                refused.append(sizes[6])
                return -1
            joined = ctypes.cast(tensors[0], ctypes.POINTER(ctypes.c_uint16 * (256 * depth))).contents
            both = torch.frombuffer(joined, dtype=torch.float16).view(1, 16, 16, depth)[..., :54].unflatten(-1, (2, 27))
            parts = both[..., :18].flatten(-2).contiguous(), both[..., 18:].flatten(-2).contiguous()
            params.offset, params.mask = (part.data_ptr() for part in parts)
        assert (scale, half, stream) == (1.0, 1, 0)
        operator.host.run(params, "float16")
        return 0

    monkeypatch.setattr(candidates, "load", lambda *arguments: launch)
    row = kernel_times.candidate(name, None, case, "float16")
    assert row["roundings"] < 1
    assert row["zeros_us"] > 0
    assert row["issue_us"] > 0
    if name == "dcnv4":
        assert refused
        assert tuple(row["setting"]) in set(candidates.dcnv4_settings(case, "float16"))
    json.dumps(row)


# The table


def test_the_summary_sets_others_beside_ours():
    best = {"cold_us": 20.0, "warm_us": 15.0, "predicted_us": 18.0}
    rows = [
        {"case": "ours float16 x", "status": OK, "best": best, "share_of_copy": 0.5},
        {"case": "official float16 x", "status": OK, "cold_us": 160.0},
        {"case": "this GPU", "status": OK},
    ]
    (line,) = kernel_times.summary(rows)
    assert "50% of a copy" in line
    assert line.endswith("official 8.00x")
