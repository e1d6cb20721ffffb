# SPDX-License-Identifier: Apache-2.0
"""What to do about a compiler's message, in the options that the user gave."""

from __future__ import annotations

import re
from collections.abc import Callable

from internimage_deploy.runtime.engine.protocol import Job


def remedy(text: str, job: Job) -> str:
    """ "; " and what to do about a compiler's message, empty where nothing is known to help."""
    for pattern, advise in _REMEDIES:
        if re.search(pattern, text):
            return f"; {advise(job)}"
    return ""


def _for_memory(job: Job) -> str:
    limits = [*(["lower --workspace"] if job.workspace_mib is not None else []), *_smaller_inputs(job)]
    return " or ".join(["free GPU memory", *limits])


def _for_kernels(job: Job) -> str:
    options = [*(["raise --workspace"] if job.workspace_mib is not None else []), *_smaller_inputs(job)]
    return " or ".join(options or ["free GPU memory"])


def _smaller_inputs(job: Job) -> list[str]:
    return ["build for smaller inputs with --max"] if job.profiles else ["export the model for a smaller size"]


def _for_lean_runtime(job: Job) -> str:
    options = " and ".join(job.lean_options)
    return f"install TensorRT's lean runtime, a package of its own, in the same version, or leave {options} out"


def _always(text: str) -> Callable[[Job], str]:
    return lambda job: text


# (pattern in a compiler's message, what to do about it)
_REMEDIES: tuple[tuple[str, Callable[[Job], str]], ...] = (
    (r"out of memory|OutOfMemory|insufficient (device )?memory", _for_memory),
    (r"[Cc]ould not find any implementation", _for_kernels),
    (r"FP32 GEMM is not supported", _always("for compute capability 7.5 build with --fp16")),
    (r"libnvinfer_lean", _for_lean_runtime),
    (
        r"[Pp]lugin not found|no (matching )?plugin|No importer registered|getPluginCreator",
        _always("build the plugin with  internimage-deploy build-plugin"),
    ),
    (
        r"STRONGLY_TYPED|strongly typed",
        _always("the graph's types do not fit together; export the model again in float32"),
    ),
    (r"Unsupported SM|compute capability", _always("build on the GPU that is to run the engine")),
)
