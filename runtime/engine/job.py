# SPDX-License-Identifier: Apache-2.0
"""What the build process is told, and what it answers. Both sides import this; it needs nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One compilation, as plain data that crosses a process border as JSON."""

    flavour: str
    model: str  # path of the ONNX file to parse
    weights_beside: str  # path whose folder holds the model's external data
    output: str
    input_name: str
    profiles: tuple[dict[str, tuple[int, ...]], ...] = ()  # full shapes under "min", "opt", "max"
    flags: tuple[str, ...] = ()  # names of BuilderFlag members to set
    strongly_typed: bool = True
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: str = ""  # path, or empty for none
    plugin: str = ""  # library to load before parsing
    embed_plugin: bool = False
    expected_input: tuple[str, str] = ("", "")  # (name, NumPy dtype) of the network, to be checked after parsing
    expected_output: tuple[str, str] = ("", "")

    def to_json(self) -> str:
        """As text for the other process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        data["profiles"] = tuple({k: tuple(v) for k, v in profile.items()} for profile in data["profiles"])
        for name in ("flags", "compute_capabilities", "expected_input", "expected_output"):
            data[name] = tuple(data[name])
        return Job(**data)


# Event kinds that the build process writes, one JSON object a line.
START, STEP, FINISH, LOG, FAILED, DONE = "start", "step", "finish", "log", "failed", "done"
