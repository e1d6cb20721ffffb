# SPDX-License-Identifier: Apache-2.0
"""Reading an ONNX file and its card, with a clear message for each way in which the file can be broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from internimage_deploy.card import METADATA_KEY, ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.files import require_file

if TYPE_CHECKING:
    import onnx


def read_model(path: Path) -> onnx.ModelProto:
    """The ONNX model in `path`; weights in external data stay on disk, but must be there.

    Raises:
        UserError: no such file, not ONNX, truncated, or external data missing or too short.
    """
    import onnx
    from google.protobuf.message import DecodeError

    require_file(path, "a model file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path}: not an ONNX file, or a truncated one; export or copy it again") from error
    if not model.ir_version or not model.graph.node:
        raise UserError(f"{path}: not an ONNX file, or a truncated one (it holds no graph); export or copy it again")
    for name, size in external_files(model).items():
        companion = path.parent / name
        if not companion.is_file():
            raise UserError(f"{path}: its weights are in {name}, which is not beside it; copy both files together")
        if companion.stat().st_size < size:
            raise UserError(
                f"{path}: its weights {name} hold {companion.stat().st_size:,} bytes, expected at least {size:,}; "
                "the file is truncated, copy it again"
            )
    return model


def card_of(model: onnx.ModelProto, path: Path) -> ModelCard:
    """The model card inside `model`; `path` names it in errors.

    Raises:
        UserError: the model has no card, so it is not an export of this program.
    """
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return ModelCard.from_json(entry.value, str(path))
    raise UserError(
        f"{path}: an ONNX file without a model card, so not one of export-onnx; "
        "export the checkpoint with  export-onnx --ckpt FILE.pth -o MODEL.onnx"
    )


def read_card(path: Path) -> ModelCard:
    """The model card of the ONNX file `path`, after a check that the file is whole. Raises `UserError`."""
    return card_of(read_model(path), path)


def external_files(model: onnx.ModelProto) -> dict[str, int]:
    """External data files that `model` refers to, with the number of bytes that each must hold at least."""
    import onnx

    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {entry.key: entry.value for entry in tensor.external_data}
        end = int(location.get("offset", 0)) + int(location.get("length", 0))
        name = location["location"]
        sizes[name] = max(sizes.get(name, 0), end)
    return sizes
