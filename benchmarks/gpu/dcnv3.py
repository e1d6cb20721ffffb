# SPDX-License-Identifier: Apache-2.0
"""The DCNv3 kernel against its rivals on this machine's GPU: correctness first, then time and bandwidth.

    python benchmarks/gpu/dcnv3.py -o out/dcnv3.json                  everything, about half an hour
    python benchmarks/gpu/dcnv3.py --models t --sizes 512x512 --batch 8 --dtypes float16
    python benchmarks/gpu/dcnv3.py --dry-run                          the cases and their bytes; needs no GPU

Rivals: the official DCNv3 kernel (--official: the ops_dcnv3 folder of an InternImage checkout, compiled here; or its
installed module `DCNv3`), DCNv4's kernel (`pip install dcnv4`) and PyTorch's grid-sample form. One that is missing is
named with the reason and gets no figures.

Every kernel is timed on the same operands by one timer (cuda_timer.py). Offsets are normally distributed with a
standard deviation of --spread pixels. `bytes` counts each operand once, read or written; `share` is the bandwidth
reached over the bandwidth that a large copy reaches on the same GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import report  # noqa: E402
from internimage_deploy.cache import run_compiler  # noqa: E402
from internimage_deploy.exporter.presets import BACKBONES  # noqa: E402
from internimage_deploy.trt_plugins import host  # noqa: E402
from internimage_deploy.trt_plugins.build import KERNEL_SOURCES, SOURCES  # noqa: E402
from internimage_deploy.trt_plugins.toolchain import find_nvcc  # noqa: E402

SCALAR_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Against float64; storage rounding is what is left when coordinates and sums are float32.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}
POINTS = 9

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One layer's shape: stage `stage` of `model` for an image of `size` (h, w)."""

    model: str
    size: tuple[int, int]
    stage: int
    batch: int
    dtype: str
    height: int
    width: int
    groups: int
    channels: int  # per group
    offset_scale: float

    @property
    def bytes_moved(self) -> int:
        """Input, offset and mask read once, output written once."""
        per_pixel = self.groups * (2 * self.channels + 3 * POINTS)
        return self.batch * self.height * self.width * per_pixel * SCALAR_BYTES[self.dtype]

    @property
    def label(self) -> str:
        """E.g. "t/512x512/stage1/b8/float16"."""
        return f"{self.model}/{self.size[0]}x{self.size[1]}/stage{self.stage + 1}/b{self.batch}/{self.dtype}"


def cases(models: list[str], sizes: list[tuple[int, int]], batches: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every stage of every model at every size, batch and type."""
    for model in models:
        backbone = BACKBONES[model]
        for size in sizes:
            for stage, groups in enumerate(backbone.groups):
                stride = 4 << stage
                channels = (backbone.channels << stage) // groups
                for batch in batches:
                    for dtype in dtypes:
                        yield Case(
                            model, size, stage, batch, dtype, size[0] // stride, size[1] // stride, groups, channels,
                            backbone.offset_scale,
                        )  # fmt: skip


class Operands:
    """Random operands of a case on the GPU, in every rival's layout."""

    def __init__(self, case: Case, spread: float) -> None:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(0)
        image, dtype = (case.batch, case.height, case.width), getattr(torch, case.dtype)

        def draw(depth: int) -> Any:
            return torch.randn(*image, depth, generator=generator, device="cuda", dtype=torch.float32)

        self.input = draw(case.groups * case.channels).to(dtype)
        self.offset = (spread * draw(case.groups * 2 * POINTS)).to(dtype)
        mask = draw(case.groups * POINTS).unflatten(-1, (case.groups, POINTS)).softmax(-1)
        self.mask = mask.flatten(-2).to(dtype)

    def packed(self, case: Case) -> Any:
        """DCNv4's one tensor: per group 18 offsets and 9 weights, padded to a multiple of 8."""
        import torch

        parts = (self.offset.unflatten(-1, (case.groups, -1)), self.mask.unflatten(-1, (case.groups, -1)))
        joined = torch.cat(parts, -1).flatten(-2)
        depth = math.ceil(joined.shape[-1] / 8) * 8
        return torch.nn.functional.pad(joined, (0, depth - joined.shape[-1])).contiguous()


class Rivals:
    """The kernels that could be made to run, and why the others could not."""

    def __init__(self, official: Path | None) -> None:
        self.missing: dict[str, str] = {}
        self.ours = self._compile()
        self.official = self._try("official", lambda: self._official(official))
        self.dcnv4 = self._try("dcnv4", self._dcnv4)

    def _try(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # whatever stops a rival, the others still run, and the report says so
            self.missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
            return None

    @staticmethod
    def _compile() -> ctypes.CDLL:
        import torch

        major, minor = torch.cuda.get_device_capability()
        folder = Path(tempfile.mkdtemp(prefix="dcnv3-benchmark-"))
        target = folder / "dcnv3.so"
        command = [
            *(str(find_nvcc().path), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"),
            *(f"-I{SOURCES}", str(HERE / "launch.cpp"), *(str(SOURCES / name) for name in KERNEL_SOURCES)),
            *("-o", str(target)),
        ]
        run_compiler(command, folder / "build.log")
        library = ctypes.CDLL(str(target))
        library.dcnv3_launch.argtypes = [ctypes.POINTER(host.Params), ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
        return library

    @staticmethod
    def _official(folder: Path | None) -> Any:
        if folder is None:
            import DCNv3

            return DCNv3
        from torch.utils import cpp_extension

        # The header it includes left PyTorch in 1.11; its one function lives on under another name.
        shim = Path(tempfile.mkdtemp(prefix="dcnv3-official-")) / "THC"
        shim.mkdir()
        (shim / "THCAtomics.cuh").write_text("#include <ATen/cuda/Atomic.cuh>\n")
        source = folder / "src"
        return cpp_extension.load(
            "official_dcnv3",
            [str(p) for p in (source / "vision.cpp", source / "cpu/dcnv3_cpu.cpp", source / "cuda/dcnv3_cuda.cu")],
            extra_include_paths=[str(source), str(shim.parent)],
            extra_cflags=["-DWITH_CUDA"],
            extra_cuda_cflags=["-DWITH_CUDA", "-O3"],
            with_cuda=True,
        )

    @staticmethod
    def _dcnv4() -> Any:
        from DCNv4.functions import DCNv4Function

        return DCNv4Function

    def calls(self, case: Case, operands: Operands) -> dict[str, tuple[Call, Any]]:
        """Name -> (a call that enqueues the kernel, the tensor it writes or None if the call returns it)."""
        import torch

        from internimage_deploy.exporter.models.dcnv3 import dcnv3

        output = torch.empty_like(operands.input)
        params = self._params(case, operands, output)
        dtype = host.DTYPES.index(case.dtype)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def ours(tactic: int) -> Call:
            def call() -> None:
                status = self.ours.dcnv3_launch(ctypes.byref(params), dtype, tactic, stream)
                if status:
                    raise RuntimeError(f"CUDA error {status} in {case.label}, tactic {tactic}")

            return call

        found: dict[str, tuple[Call, Any]] = {
            f"ours tactic {tactic}" if tactic else "ours default": (ours(tactic), output)
            for tactic in range(self.ours.dcnv3_tactics() + 1)
        }
        settings = (3, 3, 1, 1, 1, 1, 1, 1, case.groups, case.channels, case.offset_scale)
        if self.official is not None and case.dtype != "bfloat16":
            arguments = (operands.input, operands.offset, operands.mask, *settings, 256)
            found["official"] = (lambda: self.official.dcnv3_forward(*arguments), None)
        if self.dcnv4 is not None and case.dtype != "bfloat16":
            joined = operands.packed(case)
            found["dcnv4"] = (lambda: self.dcnv4.apply(operands.input, joined, *settings, 256, 0), None)
        found["grid sample"] = (
            lambda: dcnv3(
                operands.input, operands.offset, operands.mask, group=case.groups, offset_scale=case.offset_scale
            ),
            None,
        )
        return found

    @staticmethod
    def _params(case: Case, operands: Operands, output: Any) -> host.Params:
        params = host.Params(
            batch=case.batch, height=case.height, width=case.width, out_height=case.height, out_width=case.width,
            groups=case.groups, group_channels=case.channels, offset_scale=case.offset_scale,
        )  # fmt: skip
        for name, value in (("kernel", 3), ("stride", 1), ("pad", 1), ("dilation", 1)):
            setattr(params, f"{name}_h", value)
            setattr(params, f"{name}_w", value)
        tensors = {"input": operands.input, "offset": operands.offset, "mask": operands.mask, "output": output}
        for name, tensor in tensors.items():
            setattr(params, name, tensor.data_ptr())
            strides = getattr(params, f"{name}_strides")
            strides.image, strides.row, strides.pixel = tensor.stride()[:3]
        return params


def worst_error(case: Case, operands: Operands, result: Any) -> float:
    """Largest difference of the first image from the same operands in float64."""
    from internimage_deploy.exporter.models.dcnv3 import dcnv3

    first = (tensor[:1].double() for tensor in (operands.input, operands.offset, operands.mask))
    expected = dcnv3(*first, group=case.groups, offset_scale=case.offset_scale)
    return float((result[:1].double() - expected).abs().max())


def measure(case: Case, rivals: Rivals, timer: Any, copy_bandwidth: float, spread: float) -> dict[str, Any]:
    """Check and time every kernel on one case."""
    import torch

    operands = Operands(case, spread)
    row: dict[str, Any] = {"case": case.label, **asdict(case), "bytes": case.bytes_moved, "kernels": {}}
    for name, (call, written) in rivals.calls(case, operands).items():
        try:
            if written is not None:
                written.fill_(float("nan"))
            result = call()
            torch.cuda.synchronize()
            error = worst_error(case, operands, result if written is None else written)
            del result
            if name.startswith("ours") and not error <= TOLERANCE[case.dtype]:
                raise SystemExit(f"{case.label}: {name} is off by {error}; nothing is timed before it is right")
            timing = timer(call)
        except torch.OutOfMemoryError:
            row["kernels"][name] = {"failed": "out of memory"}
            torch.cuda.empty_cache()
            continue
        bandwidth = case.bytes_moved / (timing.median_ms * 1e-3)
        row["kernels"][name] = {
            **timing.asdict(), "error": error, "GB_per_s": bandwidth / 1e9, "share": bandwidth / copy_bandwidth,
        }  # fmt: skip
    tactics = {name: k for name, k in row["kernels"].items() if name.startswith("ours tactic") and "median_ms" in k}
    row["best_tactic"] = min(tactics, key=lambda name: tactics[name]["median_ms"]) if tactics else None
    return row


def summary(row: dict[str, Any]) -> str:
    """One line of the table."""
    kernels = row["kernels"]
    best = kernels[row["best_tactic"]] if row["best_tactic"] else {}

    def cell(kernel: dict[str, Any]) -> str:
        return f"{kernel['median_ms']:9.4f}" if "median_ms" in kernel else f"{'-':>9}"

    def ratio(kernel: dict[str, Any]) -> str:
        both = "median_ms" in kernel and "median_ms" in best
        return f"{kernel['median_ms'] / best['median_ms']:6.2f}x" if both else f"{'-':>7}"

    rivals = [kernels.get(name, {}) for name in ("official", "dcnv4", "grid sample")]
    shares = f"{best['GB_per_s']:8.0f} {100 * best['share']:5.0f}%" if best else ""
    cells = " ".join(f"{cell(kernel)} {ratio(kernel)}" for kernel in rivals)
    return f"{row['case']:32} {cell(best)} {cell(kernels.get('ours default', {}))} {shares} {cells}"


HEADER = (
    f"{'case':32} {'best ms':>9} {'default':>9} {'GB/s':>8} {'copy':>6} "
    f"{'official':>9} {'':>7} {'dcnv4':>9} {'':>7} {'grid':>9}"
)


def gpu_facts() -> dict[str, Any]:
    """What the figures depend on besides machine and versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": find_nvcc().version,
    }


def targets(rows: list[dict[str, Any]], l2_bytes: int) -> list[str]:
    """The issue's three targets, each with what was measured; a rival that did not run meets nothing."""
    lines = []

    def times(name: str, chosen: list[dict[str, Any]]) -> list[float]:
        return [
            row["kernels"][name]["median_ms"] / row["kernels"][row["best_tactic"]]["median_ms"]
            for row in chosen
            if row["best_tactic"] and "median_ms" in row["kernels"].get(name, {})
        ]

    half8 = [row for row in rows if row["dtype"] == "float16" and row["batch"] == 8]
    for name, chosen, target in (("official", half8, 3.0), ("dcnv4", rows, 1.0)):
        ratios = times(name, chosen)
        said = f"{min(ratios):.2f} to {max(ratios):.2f} times our time" if ratios else "not measured"
        met = "" if not ratios else (": met" if min(ratios) >= target else ": NOT met everywhere")
        lines.append(f"{name}, at least {target:g}x: {said}{met}")
    shares = [r["kernels"][r["best_tactic"]]["share"] for r in rows if r["best_tactic"] and r["bytes"] > l2_bytes]
    said = f"{100 * min(shares):.0f}% to {100 * max(shares):.0f}%" if shares else "not measured"
    met = "" if not shares else (": met" if min(shares) >= 0.6 else ": NOT met everywhere")
    lines.append(f"copy bandwidth beyond L2, at least 60%: {said}{met}")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--models", nargs="+", choices=list(BACKBONES), default=["t", "b", "l", "h"])
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x2048"], metavar="HxW")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--dtypes", nargs="+", choices=list(SCALAR_BYTES), default=["float32", "float16"])
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the offsets, in pixels")
    parser.add_argument("--official", type=Path, metavar="DIR", help="ops_dcnv3 of an InternImage checkout")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and stop")
    options = parser.parse_args(arguments)
    options.sizes = [(int(h), int(w)) for h, w in (text.split("x") for text in options.sizes)]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    chosen = list(cases(options.models, options.sizes, options.batch, options.dtypes))
    if options.dry_run:
        for case in chosen:
            print(f"{case.label:32} groups {case.groups:3} x {case.channels}  {case.bytes_moved / 1e6:9.1f} MB")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured (--dry-run lists the cases)", file=sys.stderr)
        return 1
    from cuda_timer import CudaTimer

    timer = CudaTimer()
    bandwidth = timer.copy_bandwidth()
    rivals = Rivals(options.official)
    facts = gpu_facts()
    print(f"{facts['gpu']}, CUDA {facts['cuda']}; copy {bandwidth / 1e9:.0f} GB/s")
    for name, reason in rivals.missing.items():
        print(f"not measured: {name} ({reason})")
    print(HEADER)
    rows = []
    for case in chosen:
        rows.append(measure(case, rivals, timer, bandwidth, options.spread))
        print(summary(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    verdicts = targets(rows, facts["l2_bytes"])
    print(*verdicts, sep="\n")
    if options.output:
        facts |= {"copy_GB_per_s": bandwidth / 1e9, "missing": rivals.missing, "targets": verdicts}
        report.write_to(options.output, **facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
