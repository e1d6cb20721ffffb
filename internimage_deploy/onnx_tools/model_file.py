# SPDX-License-Identifier: Apache-2.0
"""Reading an ONNX file and its card, with a clear message for each way in which the file can be broken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from internimage_deploy.card import METADATA_KEY, ModelCard
from internimage_deploy.errors import UserError, is_plain_text, quoted
from internimage_deploy.files import require_file

if TYPE_CHECKING:
    import onnx


_MAX_NODES = 1_000_000  # with every function in the place of its calls; the largest released models have 30,000
_MAX_DEPTH = 20  # of functions that call functions, and of graphs in nodes; exports nest two
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


def read_model(path: Path) -> onnx.ModelProto:
    """The ONNX model in `path`; weights in external data stay on disk, but must be there.

    Raises:
        UserError: no such file, not ONNX, truncated, external data missing or too short, or functions that call each
            other without end.
    """
    import onnx
    from google.protobuf.message import DecodeError

    require_file(path, "a model file")
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"{path}: a checkpoint, which is not run or compiled directly; make it an ONNX file first with  "
            f"export-onnx --ckpt {path} -o {path.with_suffix('.onnx').name}"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path}: not an ONNX file, or a truncated one; export or copy it again") from error
    if not model.ir_version or not model.graph.node:
        raise UserError(f"{path}: not an ONNX file, or a truncated one (it holds no graph); export or copy it again")
    try:
        _check_functions(model)
        companions = external_files(model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, size in companions.items():
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
        UserError: the model has no card, so it is not an export of this program; or the card cannot be read, or does
            not fit the graph's input and output.
    """
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            card = ModelCard.from_json(entry.value, str(path))
            _check_interface(model, card, path)
            return card
    raise UserError(
        f"{path}: an ONNX file without a model card, so not one of export-onnx; "
        "export the checkpoint with  export-onnx --ckpt FILE.pth -o MODEL.onnx"
    )


def read_card(path: Path) -> ModelCard:
    """The model card of the ONNX file `path`, after a check that the file is whole. Raises `UserError`."""
    return card_of(read_model(path), path)


def external_files(model: onnx.ModelProto) -> dict[str, int]:
    """External data files that `model` refers to, with the number of bytes that each must hold at least.

    Raises:
        UserError: a reference is damaged, or leads out of the model's folder.
    """
    import onnx

    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if not _is_inside(name) or not entries.keys() <= _EXTERNAL_KEYS:
            raise UserError(
                f"weight '{quoted(tensor.name)}' is to lie in '{quoted(name)}', expected a file in the model's folder; "
                "export the model again"
            )
        end = 0
        for key in ("offset", "length"):
            text = entries.get(key) or "0"
            if len(text) > 18 or isinstance(text, bytes) or not (text.isascii() and text.isdigit()):
                raise UserError(
                    f"weight '{quoted(tensor.name)}' has the {key} '{quoted(text)}' in {name}, expected a number of "
                    "bytes; export the model again"
                )
            end += int(text)
        sizes[name] = max(sizes.get(name, 0), end)
    return sizes


def _check_functions(model: onnx.ModelProto) -> None:
    """Check what the model is once its functions stand where they are called: doubled 28 times, one node is 2**28.

    Runtimes replace calls when they load a file, and do not end with such a one. Raises `UserError`.
    """
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise UserError(
                f"its functions nest more than {_MAX_DEPTH} deep, or call themselves; export the model again"
            )
        total = 0
        for node in nodes:
            called = (node.domain, node.op_type, node.overload)
            if called in functions and called not in sizes:
                sizes[called] = size(functions[called].node, depth + 1)
            total += sizes.get(called, 1)
            for attribute in node.attribute:
                total += sum(size(graph.node, depth + 1) for graph in (attribute.g, *attribute.graphs))
        return total

    if functions and (total := size(model.graph.node, 0)) > _MAX_NODES:
        raise UserError(
            f"it has {total:,} nodes with its functions in place of their calls, expected at most {_MAX_NODES:,}; "
            "export the model again"
        )


_EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}


def _is_inside(location: str | bytes) -> bool:
    """Whether `location` names a file in the model's folder or below it, on every system."""
    if isinstance(location, bytes):  # what protobuf gives for text that is not UTF-8
        return False
    parts = re.split(r"[/\\]", location)
    plain = is_plain_text(location) and ":" not in location and all(len(part.encode()) <= 255 for part in parts)
    return 0 < len(location) <= 1000 and plain and ".." not in parts and "" not in parts


def _check_interface(model: onnx.ModelProto, card: ModelCard, path: Path) -> None:
    """Check that the graph's input and output are those of its card; see `card_of`."""
    import onnx

    stored = {tensor.name for tensor in model.graph.initializer}  # which old files list as inputs, too
    inputs = [value for value in model.graph.input if value.name not in stored]
    names = [value.name for value in inputs], [value.name for value in model.graph.output]
    if names != ([card.input.name], [card.output.name]):
        raise UserError(
            f"{path}: the graph maps {quoted(names[0])} to {quoted(names[1])}, its model card says "
            f"['{card.input.name}'] to ['{card.output.name}']; export the model again"
        )
    for role, value, spec in (("input", inputs[0], card.input), ("output", model.graph.output[0], card.output)):
        kind = value.type.tensor_type
        if kind.elem_type != onnx.TensorProto.DataType.Value(_ELEMENT_TYPES[spec.dtype]):
            raise UserError(
                f"{path}: {role} '{spec.name}' is not {spec.dtype} in the graph, as its model card says; "
                "export the model again"
            )
        found = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        stated = [side if isinstance(side, int) else None for side in spec.shape]
        # A graph may leave open what its card fixes; of outputs the card may leave open what the graph fixes.
        fits = len(found) == len(stated) and all(
            dim is None or dim == side or (side is None and role == "output")
            for dim, side in zip(found, stated, strict=True)
        )
        if kind.HasField("shape") and not fits:
            raise UserError(
                f"{path}: {role} '{spec.name}' is {quoted(found)} in the graph, its model card says {stated}; "
                "export the model again"
            )


_ELEMENT_TYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float32": "FLOAT", "float16": "FLOAT16"}
