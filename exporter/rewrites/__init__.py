# SPDX-License-Identifier: Apache-2.0
"""Algebraic rewrites that make the network cheaper without changing its output.

They work on the PyTorch modules before tracing, so a rewritten segmentor also runs, and can be compared, in PyTorch.
"""

from __future__ import annotations

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite
from internimage_deploy.exporter.rewrites.batch_norm import BATCH_NORM
from internimage_deploy.exporter.rewrites.fine_map import FINE_MAP
from internimage_deploy.exporter.rewrites.fusion import PYRAMID_POOLING, UPERNET_FUSION
from internimage_deploy.exporter.rewrites.layer_scale import LAYER_SCALE
from internimage_deploy.exporter.rewrites.mask2former import (
    ATTENTION_MASKS,
    FIRST_QUERY,
    MASK_FEATURE,
    SAMPLING_GEMM,
)
from internimage_deploy.exporter.rewrites.pooling import ADAPTIVE_POOLING
from internimage_deploy.exporter.rewrites.sampling import MASK_SOFTMAX, OFFSET_MASK_GEMM, OFFSET_SCALE
from internimage_deploy.exporter.rewrites.segformer import SEGFORMER_FUSION
from internimage_deploy.exporter.rewrites.stem import STEM_NORMALISATION

__all__ = ["REWRITES", "Rewrite", "apply", "select"]

# In the order they are applied: batch norms before the convolutions they follow are taken apart, the offsets' scale
# before offsets and mask are joined, the mask embedding's last layer before the first query passes through it.
REWRITES: dict[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        STEM_NORMALISATION,
        LAYER_SCALE,
        OFFSET_SCALE,
        OFFSET_MASK_GEMM,
        MASK_SOFTMAX,
        BATCH_NORM,
        ADAPTIVE_POOLING,
        PYRAMID_POOLING,
        UPERNET_FUSION,
        SEGFORMER_FUSION,
        SAMPLING_GEMM,
        MASK_FEATURE,
        ATTENTION_MASKS,
        FIRST_QUERY,
        FINE_MAP,
    )
}


def select(options: ExportOptions) -> tuple[str, ...]:
    """The names of the rewrites that `options` selects, in order.

    Those that a graph of free size is wrong without are among them even when `options.plain`.

    Raises:
        UserError: `options.without` holds an unknown name, or one that a graph of free size needs.
    """
    without = set(options.without)
    unknown = without - REWRITES.keys()
    if unknown:
        raise UserError(f"no rewrite is called '{sorted(unknown)[0]}'; expected one of {', '.join(REWRITES)}")
    needed = {name for name, rewrite in REWRITES.items() if options.size is None and rewrite.needed_for_free_size}
    if without & needed:
        raise UserError(
            f"a graph of free size is wrong without the rewrite '{sorted(without & needed)[0]}': "
            "do not leave it out, or fix the size with --size"
        )
    return tuple(name for name in REWRITES if name in needed or not (options.plain or name in without))


def apply(segmentor: Segmentor, options: ExportOptions) -> tuple[str, ...]:
    """Rewrite `segmentor` in place; returns the names of the rewrites that found something to do.

    The segmentor's tensors are left as they are, its modules are replaced: keep a copy to compare with.

    Raises:
        UserError: `options.without` cannot be fulfilled; see `select`.
    """
    return tuple(name for name in select(options) if REWRITES[name].apply(segmentor, options))
