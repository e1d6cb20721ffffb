# SPDX-License-Identifier: Apache-2.0
"""Reading numbers off the names and shapes of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from internimage_deploy.errors import UserError

WANTED = "expected an InternImage segmentation checkpoint with a UPerHead, SegformerHead or Mask2FormerHead"

_MAX_WIDTH = 65_536  # channels or classes; the widest released layer has 12,288


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules under `prefix`, a regular expression, that are numbered 0, 1, ...; 0 if there are gaps."""
    pattern = re.compile(rf"{prefix}\.(\d{{1,4}})\.")
    found = {int(match[1]) for match in map(pattern.match, state) if match}
    return len(found) if found == set(range(len(found))) else 0


def size(state: Mapping[str, Tensor], name: str, axis: int, where: str) -> int:
    """Size of the tensor `name` along `axis`; `where` is the file's name.

    Raises:
        UserError: there is no such tensor, or it is no layer's.
    """
    tensor = state.get(name)
    if tensor is None:
        raise UserError(f"{where} has no tensor '{name}'; {WANTED}")
    if tensor.ndim <= axis or not tensor.shape[axis]:
        raise UserError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}; {WANTED}")
    if tensor.shape[axis] > _MAX_WIDTH:
        raise UserError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}, wider than any network; {WANTED}")
    return tensor.shape[axis]
