# SPDX-License-Identifier: Apache-2.0
"""Time of the kernels at the shapes of networks: every tactic, its error and prediction, and other kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import candidates
from correctness import enqueue, served_by, undescribed
from cuda_timer import CudaTimer, Sets, micro, plan_sets
from dcnv3_operator import Dcnv3, Dcnv3Case, stage_case
from plugin_operators import Operator, operators, poison, tactics
from prediction import CANDIDATES_PER_CHANNEL, Gpu, Work, predict
from rows import OK, WRONG, Row
from task import Options, Task

Call = Callable[[], None]

DEVICE = "cuda"
TIMES = ("cold_us", "warm_us", "predicted_us")


@dataclass(frozen=True)
class Bench:
    """The timer, and what it found out about this GPU."""

    timer: CudaTimer
    gpu: Gpu


@functools.cache
def bench() -> Bench:
    """Made on the first call of a process."""
    timer = CudaTimer()
    return Bench(timer, timer.gpu())


def candidate_tasks(options: Options) -> Iterator[Task]:
    """InternImage-T's layers: ours first, then the others, in float16 and then in float32."""
    yield Task("this GPU", machine)
    operator = Dcnv3()
    for dtype in candidates.DTYPES[::-1]:
        for case in operator.network_cases():
            yield Task(f"ours {dtype} {case.label}", functools.partial(ours, operator, case, dtype))
        for name, folder in (("official", options.official), ("dcnv4", options.dcnv4)):
            for case in operator.network_cases():
                yield Task(f"{name} {dtype} {case.label}", functools.partial(candidate, name, folder, case, dtype))


def build_tasks(options: Options) -> Iterator[Task]:
    """Compile what DCNv3 is compared with."""
    for name, folder in (("official", options.official), ("dcnv4", options.dcnv4)):
        yield Task(f"compile {name}", functools.partial(build_candidate, name, folder))


def variant_tasks(options: Options) -> Iterator[Task]:
    """Every operator's variants side by side: float16 first, with DCNv3's ways to be called."""
    layers = [stage_case("t", 1, 8), stage_case("t", 3, 1), stage_case("h", 1, 8), stage_case("h", 3, 1)]
    ways = [
        changed
        for case in layers
        for changed in (
            case,
            replace(case, label=f"{case.label}, softmax", softmax=True),
            replace(case, label=f"{case.label}, softmax, packed", softmax=True, packed=True),
        )
    ]
    others = [stage_case("l", 1, 1), stage_case("l", 3, 8), stage_case("t", 1, 1, (1024, 2048))]
    for dtype in ("float16", "bfloat16", "float32"):
        for name, operator in operators().items():
            if operator is None:
                yield Task(f"{name}: no cases", functools.partial(undescribed, name))
                continue
            cases = [*ways, *others] if isinstance(operator, Dcnv3) else operator.network_cases()
            for case in cases:
                yield Task(f"{name} {dtype} {case.label}", functools.partial(ours, operator, case, dtype))


def machine() -> Row:
    """What the times depend on."""
    import torch

    found = bench()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": found.gpu.multiprocessors,
        "clock_mhz": found.gpu.clock_hz / 1e6,
        "l2_bytes": found.timer.l2_bytes,
        "copy_GB_per_s": found.gpu.copy_bytes_per_s / 1e9,
        "launch_us": found.timer.launch_us(),
    }


def ours(operator: Operator, case: Any, dtype: str) -> Row:
    """Error and time of every tactic of a kernel on one case."""
    import torch

    wanted = plan_sets(operator.work(case, dtype, None).bytes_moved, bench().timer.l2_bytes)
    sets = [operator.draw(case, dtype, DEVICE, seed) for seed in range(wanted.count)]
    blocks = [operator.params(case, operands) for operands in sets]
    expected = operator.reference(case, sets[0])
    chosen = tactics(operator, blocks[0], dtype)
    # The variant behind a tactic is the same at any size; only the default's depends on it.
    served = served_by(operator, operator.small(case), dtype, chosen[1:])
    found: dict[int, Row] = {}
    for tactic in chosen:
        calls = [functools.partial(enqueue, operator, block, dtype, tactic) for block in blocks]
        poison(sets[0]["output"])
        calls[0]()
        torch.cuda.synchronize()
        error, roundings = operator.difference(sets[0]["output"], expected, dtype)
        variant = served.get(tactic)
        row = {
            "error": error,
            "roundings": round(roundings, 3),
            "variant": None if variant is None else variant._asdict(),
        }
        row["right"] = roundings <= operator.allowance(variant)
        work = operator.work(case, dtype, variant)
        found[tactic] = row | bench().timer.cold_and_warm(calls, wanted.launches) | predict(work, bench().gpu)
    best = min(found, key=lambda tactic: found[tactic]["cold_us"])
    return {
        "status": OK if all(row["right"] for row in found.values()) else WRONG,
        "dtype": dtype,
        **_figures(operator.work(case, dtype, None), found[best]["cold_us"], wanted),
        "best_tactic": best,
        "best": {key: value for key, value in found[best].items() if key.endswith("_us")},
        "default_cold_us": found[0]["cold_us"],
        "tactics": found,
    }


def _figures(work: Work, cold_us: float, wanted: Sets) -> Row:
    bandwidth = work.bytes_moved / (cold_us * 1e-6)
    return {
        "bytes": work.bytes_moved,
        "sets": wanted.count,
        "GB_per_s": round(bandwidth / 1e9, 1),
        "share_of_copy": round(bandwidth / bench().gpu.copy_bytes_per_s, 3),
    }


def build_candidate(name: str, folder: Any) -> Row:
    """Compile a candidate; the part that times it waits for that."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"library": str(candidates.build(name, folder, f"{major}.{minor}"))}


def candidate(name: str, folder: Any, case: Dcnv3Case, dtype: str) -> Row:
    """Error and time of another kernel, and the time of the zeros that its entry point writes first."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    launch = candidates.load(name, folder, f"{major}.{minor}")
    operator, timer = Dcnv3(), bench().timer
    work = operator.work(case, dtype, None)
    wanted = plan_sets(work.bytes_moved, timer.l2_bytes)
    sets = [operator.draw(case, dtype, DEVICE, seed) for seed in range(wanted.count)]
    more: Row = {}
    if name == "official":
        calls = [candidates.official_call(launch, case, operands) for operands in sets]
    else:
        more = {"setting": best_setting(launch, case, dtype, sets[0])}
        calls = [candidates.dcnv4_call(launch, case, operands, *more["setting"]) for operands in sets]
    output = sets[0]["output"]
    poison(output)
    calls[0]()
    torch.cuda.synchronize()
    error, roundings = operator.difference(output, operator.reference(case, sets[0]), dtype)
    zeros = timer.time([functools.partial(torch.zeros, output.shape, dtype=output.dtype, device=DEVICE)])
    times = timer.cold_and_warm(calls, wanted.launches)
    instructions = CANDIDATES_PER_CHANNEL[name] * output.numel() if dtype == "float16" else None
    predicted = predict(replace(work, instructions=instructions), bench().gpu)
    figures = _figures(work, times["cold_us"], wanted)
    return {
        "dtype": dtype, "error": error, "roundings": round(roundings, 3), **times, "zeros_us": micro(zeros.median_ms),
        **predicted, **figures, **more,
    }  # fmt: skip


def best_setting(launch: Callable[..., int], case: Dcnv3Case, dtype: str, operands: dict[str, Any]) -> tuple[int, int]:
    """The fastest of DCNv4's settings for a case, those that its kernel refuses left out."""
    times: dict[tuple[int, int], float] = {}
    for setting in candidates.dcnv4_settings(case, dtype):
        call = candidates.dcnv4_call(launch, case, operands, *setting)
        try:
            call()
        except RuntimeError:
            continue
        times[setting] = bench().timer.time([call], launches=20, replays=5).median_ms
    if not times:
        raise RuntimeError(f"dcnv4 takes none of its settings for {case.label}")
    return min(times, key=lambda setting: times[setting])


def summary(rows: Sequence[Row]) -> list[str]:
    """One line per case: ours, and how many times as long the others take."""
    measured = {row["case"]: row for row in rows if row.get("cold_us") or row.get("best")}
    lines = []
    for name, row in measured.items():
        if "best" not in row:
            continue
        best = row["best"]
        times = [f"{best[key]:9.2f} {word}" for key, word in zip(TIMES, ("us cold", "warm", "predicted"), strict=True)]
        line = f"{name:48} {' '.join(times)} {row['share_of_copy']:6.0%} of a copy"
        for candidate in candidates.CANDIDATES:
            other = measured.get(name.replace("ours", candidate, 1)) if name.startswith("ours") else None
            if other:
                line += f"  {candidate} {other['cold_us'] / best['cold_us']:.2f}x"
        lines.append(line)
    return lines
