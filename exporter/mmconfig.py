# SPDX-License-Identifier: Apache-2.0
"""Reading the training config that mmsegmentation stores as text inside a checkpoint, without running it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping

from internimage_deploy.card import MAX_SIDE
from internimage_deploy.errors import UserError, quoted
from internimage_deploy.window import Window

# A released config has about 10 kB; more than this is not one.
_MAX_CHARACTERS = 1_000_000


def parse(text: str) -> dict[str, object]:
    """The config's top-level assignments: literals, `dict(...)` calls and names assigned before.

    Anything else (calls, arithmetic, imports) is left out, never evaluated. Text that is not Python gives {}.
    """
    if len(text) > _MAX_CHARACTERS:
        return {}
    try:
        with warnings.catch_warnings():  # about the config's style, which is not the user's matter
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = _value(node.value, values)
            except (ValueError, RecursionError):
                continue
    return values


def test_scale(config: Mapping[str, object]) -> tuple[int, int] | None:
    """(long, short) of the test pipeline's resize, in pixels, if the config names one."""
    pipeline = config.get("test_pipeline")
    for step in pipeline if isinstance(pipeline, list) else []:
        scale = step.get("img_scale", step.get("scale")) if isinstance(step, dict) else None
        if (
            isinstance(scale, tuple | list)
            and len(scale) == 2
            and all(type(s) is int and 0 < s <= MAX_SIDE for s in scale)
        ):
            return max(scale), min(scale)
    return None


def test_window(config: Mapping[str, object]) -> Window | None:
    """The sliding window that the model was evaluated with; None if it was evaluated on whole images.

    Raises:
        UserError: the config asks for a window that cannot be.
    """
    model = config.get("model")
    test = model.get("test_cfg") if isinstance(model, dict) else None
    if not isinstance(test, dict) or test.get("mode") != "slide":
        return None
    crop, stride = (_pair(test.get(name)) for name in ("crop_size", "stride"))
    if crop is None or stride is None:
        raise UserError(
            f"the sliding window of the training config has the crop {quoted(test.get('crop_size'))} and the stride "
            f"{quoted(test.get('stride'))}; expected (height, width) in pixels"
        )
    return Window(crop, stride)


def _pair(value: object) -> tuple[int, int] | None:
    sides = (value, value) if isinstance(value, int) else value
    match sides:
        case (int(height), int(width)) | [int(height), int(width)] if (
            min(height, width) > 0 and max(height, width) <= MAX_SIDE
        ):
            return height, width
    return None


def _value(node: ast.expr, names: Mapping[str, object]) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {k.value: _value(v, names) for k, v in zip(keys, values, strict=True) if isinstance(k, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {str(k.arg): _value(k.value, names) for k in keywords}
    raise ValueError("not a literal")
