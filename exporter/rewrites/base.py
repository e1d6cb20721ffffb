# SPDX-License-Identifier: Apache-2.0
"""The type of a rewrite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.options import ExportOptions

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Rewrite:
    """An exact change of the network.

    `apply` replaces submodules of a segmentor in evaluation mode, in place, as the export's options need it, and
    returns whether it found any. It makes new tensors and leaves the old ones as they are, so that segmentors which
    share weights stay independent. `summary` is the line that `export-onnx --list-rewrites` shows.
    `needed_for_free_size` marks a rewrite without which a graph of free height and width is wrong.
    """

    name: str
    summary: str
    apply: Callable[[Segmentor, ExportOptions], bool]
    needed_for_free_size: bool = False


def modules_of(root: nn.Module, kind: type[Module]) -> Iterator[Module]:
    """Every submodule of exactly this class."""
    return (module for module in list(root.modules()) if type(module) is kind)
