# SPDX-License-Identifier: Apache-2.0
"""Every kernel, type, tactic and odd shape against the operator in float64."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from plugin_operators import Operator, operators, poison, tactics
from rows import OK, WRONG, Row
from task import Options, Task

from internimage_deploy.trt_plugins.host_operators import DTYPES as DTYPES_IN_ORDER

DTYPES = ("float16", "float32", "bfloat16")

Launch = Callable[[Operator, ctypes.Structure, str, int], None]
"""(operator, params, dtype, tactic): runs a kernel over the operands' memory and waits for it."""


def tasks(options: Options) -> Iterator[Task]:
    """One task per operator, case and type, and one per operator that tells what was not reached."""
    for name, operator in operators().items():
        if operator is None:
            yield Task(f"{name}: no cases", functools.partial(undescribed, name))
            continue
        reached: set[Any] = set()
        for dtype in DTYPES:
            for case in operator.odd_cases():
                check = functools.partial(check_case, operator, case, dtype, "cuda", launch_on_gpu, reached)
                yield Task(f"{name} {dtype} {case.label}", check)
        yield Task(f"{name}: every compiled variant was reached", functools.partial(coverage, operator, reached))


def undescribed(name: str) -> Row:
    """Complain about a kernel that the benchmarks do not know."""
    raise NotImplementedError(f"the kernel {name} has no description in benchmarks/gpu/plugin_operators.py")


def check_case(operator: Operator, case: Any, dtype: str, device: str, launch: Launch, reached: set[Any]) -> Row:
    """Run every tactic on one case and compare with float64. Adds the variants that served it to `reached`.

    Returns:
        `status`, `error` and `roundings` (the largest difference, and the same in roundings of the output's type over
        all tactics), `tactics` (roundings of each).
    """
    operands = operator.draw(case, dtype, device, seed=0)
    params = operator.params(case, operands)
    output, expected = operands["output"], operator.reference(case, operands)
    chosen = tactics(operator, params, dtype)
    served = served_by(operator, case, dtype, chosen)
    errors, roundings, wrong = [], {}, []
    for tactic in chosen:
        poison(output)
        launch(operator, params, dtype, tactic)
        error, rounds = operator.difference(output, expected, dtype)
        errors.append(error)
        roundings[tactic] = round(rounds, 3)
        if not (rounds <= operator.allowance(served.get(tactic)) and bool(output.isfinite().all())):
            wrong.append(tactic)
    reached.update(served.values())
    return {
        "status": WRONG if wrong else OK,
        **({"wrong_tactics": wrong} if wrong else {}),
        "error": max(errors),
        "roundings": max(roundings.values()),
        "tactics": roundings,
    }


def served_by(operator: Operator, case: Any, dtype: str, chosen: Sequence[int]) -> dict[int, Any]:
    """The variant behind each tactic of `chosen`, told by the host build, which makes the same choice."""
    operands = operator.draw(case, dtype, "cpu", seed=0)
    params = operator.params(case, operands)
    return {tactic: operator.host.run(params, dtype, tactic=tactic) for tactic in chosen}


def coverage(operator: Operator, reached: set[Any]) -> Row:
    """Whether the cases so far reached every compiled variant."""
    missing = [variant for variant in operator.host.variants() if variant not in reached]
    if missing:
        raise AssertionError(f"no case so far reached {len(missing)} variants, such as {missing[0]}")
    return {"status": OK, "variants": len(reached)}


def launch_on_host(operator: Operator, params: ctypes.Structure, dtype: str, tactic: int) -> None:
    """The kernel's host build, over operands in host memory."""
    operator.host.run(params, dtype, tactic=tactic)


def launch_on_gpu(operator: Operator, params: ctypes.Structure, dtype: str, tactic: int) -> None:
    """The CUDA kernel on PyTorch's current stream."""
    import torch

    enqueue(operator, params, dtype, tactic)
    torch.cuda.synchronize()


def enqueue(operator: Operator, params: ctypes.Structure, dtype: str, tactic: int) -> None:
    """Put the CUDA kernel on PyTorch's current stream."""
    import torch

    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    function = getattr(gpu_library(), f"{operator.name}_launch")
    status = function(ctypes.byref(params), DTYPES_IN_ORDER.index(dtype), tactic, stream)
    if status:
        raise RuntimeError(f"{operator.name}, tactic {tactic}: CUDA error {status}")


@functools.cache
def gpu_library() -> ctypes.CDLL:
    """The kernels, compiled for this GPU."""
    import torch
    from kernel_library import load_kernel

    major, minor = torch.cuda.get_device_capability()
    return load_kernel(f"{major}.{minor}")
