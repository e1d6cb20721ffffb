# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a backend loads it: with logits as its output where images are cut into crops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from internimage_deploy.card import ModelCard
from internimage_deploy.onnx_tools.model_file import card_of, read_model
from internimage_deploy.runtime.imaging.pipeline import WindowChoice, slides

if TYPE_CHECKING:
    import onnx


class OnnxFile(NamedTuple):
    """A model, its card, and whether the model in memory differs from the file."""

    model: onnx.ModelProto
    card: ModelCard
    changed: bool


def read_onnx(path: Path, window: WindowChoice) -> OnnxFile:
    """The model in `path`; its external weights stay on disk.

    The sliding window averages logits. A file that returns labels computes logits on the way: they become the output,
    and the card says so. A file without them stays as it is, for `ImagePipeline` to refuse.

    Args:
        path: an ONNX file.
        window: see `LoadOptions`.

    Raises:
        UserError: the file cannot be read, see `read_model` and `card_of`.
    """
    model = read_model(path)
    card = card_of(model, path)
    if not (card.emits_labels and slides(card, window)):
        return OnnxFile(model, card, changed=False)
    from internimage_deploy.onnx_tools.graph import Graph
    from internimage_deploy.onnx_tools.logits import return_logits

    changed = return_logits(Graph(model, path.parent), card)
    return OnnxFile(model, changed or card, changed=changed is not None)
