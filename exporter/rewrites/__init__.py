# SPDX-License-Identifier: Apache-2.0
"""Algebraic rewrites that make the network cheaper without changing its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internimage_deploy.exporter.models import Segmentor
    from internimage_deploy.exporter.options import ExportOptions


@dataclass(frozen=True)
class Rewrite:
    """One rewrite: `apply` changes a segmentor in place and answers whether anything fitted."""

    name: str
    summary: str
    apply: Callable[[Segmentor, ExportOptions], bool]


REWRITES: dict[str, Rewrite] = {}


def apply(segmentor: Segmentor, options: ExportOptions) -> tuple[str, ...]:
    """Apply every rewrite that `options` leaves switched on; the names of those that changed something."""
    if options.plain:
        return ()
    chosen = (rewrite for name, rewrite in REWRITES.items() if name not in options.without)
    return tuple(rewrite.name for rewrite in chosen if rewrite.apply(segmentor, options))
