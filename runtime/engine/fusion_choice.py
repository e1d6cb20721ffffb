# SPDX-License-Identifier: Apache-2.0
"""Which form of the fusion convolutions is faster on the GPU at hand: engines, timed in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.engine_backend import EngineBackend
from internimage_deploy.runtime.engine.engine_files import Engine
from internimage_deploy.runtime.gpu.driver import gpu_problem

_RUNS = 50


def median_ms_on_gpu(engine: Path, backend: EngineBackend) -> float:
    """`median_ms` where the driver finds a GPU. Raises `UserError`."""
    if problem := gpu_problem():
        raise UserError(problem)
    return median_ms(engine, backend)


def median_ms(engine: Path, backend: EngineBackend) -> float:
    """Median time of a run of `engine` at the size it is tuned for, in milliseconds.

    The engine was built by this very process, so the code that it may carry is trusted.

    Raises:
        UserError: it cannot be run here; the message is the last line of the attempt.
    """
    command = [sys.executable, "-m", "internimage_deploy", "benchmark", str(engine), "--backend", backend]
    command += ["--json", "--trust-engine", "--runs", str(_RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(lines[-1].strip() if lines else f"exit code {done.returncode}")
    return float(json.loads(done.stdout)["backends"][backend]["median_ms"])


def choose_form(
    rewritten: Engine, build_plain: Callable[[], Engine], measure: Callable[[Path], float] | None
) -> tuple[Engine, str]:
    """The faster of two engines that differ in the form of their fusion convolutions, and a note about the choice.

    Args:
        rewritten: the engine of the model as it was exported.
        build_plain: builds the other one; called only where both can be timed.
        measure: returns the milliseconds that an engine takes; None where no engine can be run.
    """
    if measure is None:
        return rewritten, "--fusion auto kept the rewritten form, because no engine can be timed here"
    try:
        times = {rewritten.form: measure(rewritten.path)}  # before the other one is built: perhaps none can be timed
        try:
            plain = build_plain()
        except UserError as error:
            return rewritten, f"--fusion auto kept the rewritten form, because the plain one cannot be built ({error})"
        for engine in (plain, rewritten, plain):  # in turns: what slows the GPU down meets both
            form, found = engine.form, measure(engine.path)
            times[form] = min(found, times.get(form, found))
    except UserError as error:
        return rewritten, f"--fusion auto kept the rewritten form, because engines could not be timed ({error})"
    best = min((rewritten, plain), key=lambda engine: times[engine.form])
    best.record(times)
    shown = ", ".join(f"{form} {found:.3f} ms" for form, found in times.items())
    return best, f"--fusion auto kept the {best.form} form: {shown}"
