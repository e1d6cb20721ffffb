# SPDX-License-Identifier: Apache-2.0
"""Compute capabilities that TensorRT-RTX compiles for without a GPU, and why others are refused."""

from __future__ import annotations

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


def parse(text: str) -> tuple[str, ...]:
    """ "8.6,8.9" as capabilities, in order and once each.

    Raises:
        UserError: TensorRT-RTX does not compile for one of them; the message says why.
    """
    targets = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for target in targets:
        if target in RTX_TARGETS:
            continue
        if target in _ELSEWHERE:
            raise UserError(
                f"compute capability {target} is {_ELSEWHERE[target]}, and TensorRT-RTX is for desktop and workstation "
                f"GPUs ({', '.join(RTX_TARGETS)}); build with TensorRT on that device: --backend tensorrt"
            )
        raise UserError(
            f"'{target}' is no compute capability of TensorRT-RTX, expected some of {', '.join(RTX_TARGETS)}"
        )
    if not targets:
        raise UserError(f"no compute capability given, expected some of {', '.join(RTX_TARGETS)}, such as 8.6,8.9")
    return targets
