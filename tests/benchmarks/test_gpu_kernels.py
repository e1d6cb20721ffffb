# SPDX-License-Identifier: Apache-2.0
"""The checks of benchmarks/gpu on the host build of the kernels, other kernels' sources, NVIDIA's tools."""

import ctypes
import math

import candidates
import correctness
import nvidia_tools
import plugin_operators
import probe
import pytest
import torch
from dcnv3_operator import Dcnv3, Dcnv3Case, stage_case
from kernel_library import compile_cuda
from rows import OK, WRONG
from task import Unavailable
from upsample_argmax_operator import UpsampleArgmax

from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins.build import KERNELS
from internimage_deploy.trt_plugins.host_operators import BODIES, tactics
from internimage_deploy.trt_plugins.toolchain import find_nvcc

OPERATORS = plugin_operators.operators()


# Correctness


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cases_reach_every_variant_and_all_are_right(name):
    operator, reached = OPERATORS[name], set()
    for dtype in correctness.DTYPES:
        for case in operator.odd_cases():
            row = correctness.check_case(operator, case, dtype, "cpu", correctness.launch_on_host, reached)
            assert row["status"] == OK, (case, row)
            assert row["tactics"].keys() >= {0, 1}
    assert correctness.coverage(operator, reached)["variants"] == len(operator.host.variants())


def one_case():
    operator = Dcnv3()
    return operator, next(case for case in operator.odd_cases() if case.label == "C16")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("fault", ["off by two roundings", "an element that nobody wrote", "one tactic"])
def test_a_wrong_kernel_is_marked(fault, dtype):
    operator, case = one_case()
    written = []

    def launch(operator, params, dtype, tactic):
        correctness.launch_on_host(operator, params, dtype, tactic)
        width = {"float16": ctypes.c_uint16, "float32": ctypes.c_uint32}[dtype]
        first = ctypes.cast(params.output, ctypes.POINTER(width))
        written.append(tactic)
        if fault == "an element that nobody wrote":
            first[5] = {"float16": 0x7E00, "float32": 0x7FC00000}[dtype]
        elif fault == "off by two roundings" or tactic == 3:
            first[5] ^= {"float16": 1 << 5, "float32": 1 << 14}[dtype]

    row = correctness.check_case(operator, case, dtype, "cpu", launch, set())
    assert row["status"] == WRONG
    assert row["wrong_tactics"] == ([3] if fault == "one tactic" else written)


def test_a_variant_that_no_case_reaches_is_told():
    operator, case = one_case()
    reached = set()
    correctness.check_case(operator, case, "float32", "cpu", correctness.launch_on_host, reached)
    with pytest.raises(AssertionError, match=f"{len(operator.host.variants()) - len(reached)} variants"):
        correctness.coverage(operator, reached)


def test_a_kernel_without_a_description_fails_by_name(monkeypatch):
    monkeypatch.setattr(plugin_operators, "KERNELS", ("dcnv3", "new_kernel"))
    tasks = {task.label: task for task in correctness.tasks(None)}
    with pytest.raises(NotImplementedError, match="new_kernel"):
        tasks["new_kernel: no cases"].run()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_small_case_is_served_by_the_variants_of_the_large_one(name):
    operator = OPERATORS[name]
    case = operator.odd_cases()[0]
    for dtype in correctness.DTYPES:
        chosen = range(1, tactics() + 1)
        small = correctness.served_by(operator, operator.small(case), dtype, chosen)
        assert small == correctness.served_by(operator, case, dtype, chosen)


def test_labels_are_judged_by_the_logit_they_chose():
    operator = UpsampleArgmax()
    logits = torch.tensor([1.0, 3.0, 3.0, 2.5], dtype=torch.float64).view(1, 4, 1, 1)

    def judged(label):
        return operator.difference(torch.tensor([[[label]]], dtype=torch.int32), logits, "float16")

    assert judged(1) == (0, 0)
    assert judged(2) == (math.inf, math.inf)  # equal, and not the lowest
    assert judged(3)[0] == 0.5
    assert judged(3)[1] == pytest.approx(0.5 / (1e-5 * 4))
    assert all(math.isnan(value) for label in (-1, 4) for value in judged(label))


# Other kernels


def test_dcnv4_reads_offsets_and_weights_group_by_group():
    case = Dcnv3Case("x", 1, 2, 2, 3, 16)
    operands = Dcnv3().draw(case, "float32", "cpu", 0)
    joined = candidates.joined(case, operands)
    assert joined.shape == (1, 2, 2, 88)  # 3 * 27 = 81, padded
    assert joined.is_contiguous()
    torch.testing.assert_close(joined[..., 27:45], operands["offset"][..., 18:36])
    torch.testing.assert_close(joined[..., 45:54], operands["mask"][..., 9:18])
    assert not joined[..., 81:].any()


def test_settings_of_dcnv4_are_what_its_kernel_takes():
    case = stage_case("t", 3, 1)  # 32x32 pixels, 16 groups of 16
    settings = list(candidates.dcnv4_settings(case, "float16"))
    assert (8, 32) in settings  # 2 threads a group, 16 groups, one pixel
    assert (8, 1024) in settings
    assert (16, 16) not in settings  # half a warp
    for per_thread, threads in settings:
        pixels, rest = divmod(threads, 256 // per_thread)
        assert rest == 0
        assert 1024 % pixels == 0
        assert threads <= 1024
    assert {per_thread for per_thread, _ in candidates.dcnv4_settings(case, "float32")} == {2, 4, 8}


@pytest.mark.parametrize("place", ["", "DCNv4_op", "project/DCNv4_op"])
def test_the_sources_are_found_in_the_folder_or_below(place, tmp_path):
    source = tmp_path / place / "src"
    (source / "cuda").mkdir(parents=True)
    (source / "cuda" / "dcnv4_im2col_cuda.cuh").touch()
    assert candidates.sources_of("dcnv4", tmp_path) == source


def test_missing_sources_are_no_failure(tmp_path):
    with pytest.raises(Unavailable, match="--official DIR"):
        candidates.sources_of("official", None)
    with pytest.raises(Unavailable, match=r"no src/cuda/dcnv3_im2col_cuda\.cuh"):
        candidates.sources_of("official", tmp_path)


# As the headers of the two begin, and the function that the shims call.
INCLUDES = "#include <ATen/cuda/CUDAContext.h>\n#include <THC/THCAtomics.cuh>\n#include <c10/util/Half.h>\n"
OFFICIAL = """
template <typename T>
void dcnv3_im2col_cuda(cudaStream_t stream, const T* image, const T* offset, const T* mask, T* columns,
    const int kernel_h, const int kernel_w, const int stride_h, const int stride_w, const int pad_h, const int pad_w,
    const int dilation_h, const int dilation_w, const int group, const int group_channels, const int batch,
    const int height, const int width, const int height_out, const int width_out, const float offset_scale) {}
"""
DCNV4 = """
template <typename T>
void dcnv4_im2col_cuda(cudaStream_t stream, const T* value, const T* offset, T* output,
    const int kernel_h, const int kernel_w, const int stride_h, const int stride_w, const int pad_h, const int pad_w,
    const int dilation_h, const int dilation_w, const int group, const int group_channels, const int batch,
    const int height, const int width, const int height_out, const int width_out, const float offset_scale,
    const int remove_center, const int d_stride, const int block_thread, const bool softmax, const int depth) {}
"""


@pytest.mark.parametrize(("name", "header"), [("official", OFFICIAL), ("dcnv4", DCNV4)])
def test_the_shims_compile_without_what_pytorch_dropped(name, header, tmp_path, monkeypatch):
    """Against a header with the includes and the signature of the real one; the real ones were compiled by hand."""
    try:
        find_nvcc()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "src" / "cuda").mkdir(parents=True)
    (tmp_path / "src" / candidates.CANDIDATES[name]).write_text(INCLUDES + header)
    built = candidates.build(name, tmp_path, "9.0")
    assert hasattr(ctypes.CDLL(str(built)), f"{name}_launch")


def test_a_compiler_that_fails_leaves_its_output(tmp_path, monkeypatch):
    try:
        find_nvcc()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cu"
    source.write_text("this is no C++\n")
    with pytest.raises(UserError, match="broken"):
        compile_cuda("broken", [source], "9.0")
    assert list((tmp_path / "cache").rglob("*.log"))


# NVIDIA's tools


def test_the_verdict_of_compute_sanitizer():
    clean = "========= COMPUTE-SANITIZER\n468 launches, 0 failed\n========= ERROR SUMMARY: 0 errors\n"
    assert nvidia_tools.judge_sanitizer(0, clean) == {"status": OK, "errors": 0, "launches": 468}
    found = nvidia_tools.judge_sanitizer(9, "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n")
    assert (found["status"], found["errors"]) == (WRONG, 3)
    for broken in ("========= Error: Device not supported", "Traceback ...\n========= ERROR SUMMARY: 0 errors\n"):
        with pytest.raises(RuntimeError, match="did not finish"):
            nvidia_tools.judge_sanitizer(1, broken)


def test_reading_the_output_of_ncu():
    metrics = nvidia_tools.NCU_METRICS
    header = '"ID","Kernel Name","Block Size","Grid Size",' + ",".join(f'"{name}"' for name in metrics)
    units = '"","","","",' + ",".join('"%"' for _ in metrics)
    launch = '"0","dcnv3_kernel<Half, 8>(P)","(8, 8, 1)","(512, 1, 1)",' + ",".join('"1,234.5"' for _ in metrics)
    output = f"==PROF== Profiling\n3 launches, 0 failed\n{header}\n{units}\n{launch}\n"
    (found,) = nvidia_tools.parse_ncu(output)
    assert found["Kernel Name"] == "dcnv3_kernel<Half, 8>(P)"
    assert found["gpu__time_duration.sum"] == "1,234.5"
    assert nvidia_tools.parse_ncu("==ERROR== no permission") == []


class HostMemory(probe.Memory):
    """The memory of the probe on the host."""

    def __init__(self):
        super().__init__(None)
        self.arrays, self.blocks = [], []

    def filled(self, values):
        self.arrays.append(values.copy())
        return self.arrays[-1].ctypes.data

    def empty(self, nbytes):
        block = (ctypes.c_uint8 * nbytes)()
        self.blocks.append(block)
        return ctypes.addressof(block)


@pytest.mark.parametrize("dtype", probe.SIZES)
@pytest.mark.parametrize("channels", [16, 5])
def test_the_kernels_take_what_the_probe_gives_them(dtype, channels):
    memory, run = HostMemory(), []
    for name, params in probe.blocks(memory, dtype, channels, layer=False):
        OPERATORS[name].host.run(params, dtype)
        run.append(name)
    assert set(run) == set(KERNELS)
    assert all(any(block) for block in memory.blocks)  # written


def test_the_probe_of_a_layer_runs_every_body():
    memory = HostMemory()
    params = probe.dcnv3(memory, "float16", 16, layer=False, softmax=True)
    served = [OPERATORS["dcnv3"].host.run(params, "float16", tactic=tactic) for tactic in probe.LAYER_TACTICS]
    assert {(variant.body, variant.vectors) for variant in served} == {
        (body, vectors) for body in BODIES for vectors in (1, 2)
    }
