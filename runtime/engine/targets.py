# SPDX-License-Identifier: Apache-2.0
"""Compute capabilities that TensorRT-RTX compiles for without a GPU, and why it does not for others."""

from __future__ import annotations

from collections.abc import Sequence

from internimage_deploy.errors import UserError

RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
TURING = "7.5"

_ELSEWHERE = {
    "7.0": "Volta",
    "7.2": "Xavier",
    "8.7": "Orin",
    "9.0": "Hopper",
    "10.0": "data-centre Blackwell",
    "10.1": "Thor",
    "10.3": "data-centre Blackwell",
    "11.0": "Thor",
}


def unsupported_family(capability: str) -> str:
    """The family of a GPU that TensorRT-RTX does not support, such as "Hopper"; empty for others."""
    return _ELSEWHERE.get(capability, "")


def parse(capabilities: str | Sequence[str]) -> tuple[str, ...]:
    """Capabilities from "8.6,8.9" or ("8.6", "8.9"), in order and each once.

    Raises:
        UserError: TensorRT-RTX does not compile for one of them; the message says why.
    """
    parts = capabilities.split(",") if isinstance(capabilities, str) else capabilities
    targets = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for target in targets:
        if target in RTX_TARGETS:
            continue
        if target in _ELSEWHERE:
            raise UserError(
                f"compute capability {target} is {_ELSEWHERE[target]}, and TensorRT-RTX is for desktop and workstation "
                f"GPUs ({', '.join(RTX_TARGETS)}); build with TensorRT on that device: --backend tensorrt"
            )
        raise UserError(
            f"'{target}' is not a compute capability of TensorRT-RTX, expected some of {', '.join(RTX_TARGETS)}"
        )
    if not targets:
        raise UserError(f"no compute capability given, expected some of {', '.join(RTX_TARGETS)}, such as 8.6,8.9")
    return targets
