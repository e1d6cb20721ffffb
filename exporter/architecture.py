# SPDX-License-Identifier: Apache-2.0
"""Inferring a model's architecture from the names and shapes of its tensors.

What names and shapes do not show (offset_scale, the activation, which blocks the level-2 post-norms follow) comes from
the user, from the training config inside the checkpoint, or from the released variant of the same size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from internimage_deploy.errors import UserError, quoted
from internimage_deploy.exporter.models.config import BackboneConfig, HeadConfig, SegmentorConfig
from internimage_deploy.exporter.options import ACTIVATIONS, Activation
from internimage_deploy.exporter.presets import BACKBONES, Preset, known_variant

_MAX_WIDTH = 65_536  # channels or classes; the widest released layer has 12,288
_POINTS = 9  # every InternImage samples 3x3 points
_CLASSIFIER = "decode_head.conv_seg.weight"
_WANTED = "expected an InternImage segmentation checkpoint with a UPerHead or SegformerHead"

_OTHER_MODELS = (
    (r"decode_head\.(pixel_decoder|transformer_decoder)\.", "a Mask2Former checkpoint"),
    (r"(bbox_head|rpn_head|roi_head|mask_head|query_head|transformer)\.", "a detection checkpoint"),
    (r".*\.dcn\.offset_mask\.", "a DCNv4 checkpoint (FlashInternImage)"),
    (r"(head|conv_head|fc|clip_projector)\.", "a classification checkpoint"),
)

Value = TypeVar("Value")


@dataclass
class Hints:
    """Sources of the settings that tensors do not show, in the order of precedence."""

    user: Mapping[str, object] = field(default_factory=dict)  # values that the user set
    preset: Preset | None = None  # the released model that the user named
    config: Mapping[str, object] = field(default_factory=dict)  # the training config's top-level values
    notes: list[str] = field(default_factory=list)  # which setting was taken from where, for the user

    def section(self, name: str) -> Mapping[str, object]:
        """`model.NAME` of the training config, or {}."""
        model = self.config.get("model")
        section = model.get(name) if isinstance(model, dict) else None
        return section if isinstance(section, dict) else {}


def infer(state: Mapping[str, Tensor], hints: Hints, where: str) -> SegmentorConfig:
    """The architecture that `state`, tensors under mmsegmentation's names, belongs to; `where` is the file's name.

    Raises:
        UserError: it is another kind of model, or a setting cannot be inferred.
    """
    _refuse_other_models(state, where)
    return SegmentorConfig(_backbone(state, hints, where), _head(state, hints.section("decode_head"), where))


def _refuse_other_models(state: Mapping[str, Tensor], where: str) -> None:
    for pattern, kind in _OTHER_MODELS:
        if any(re.match(pattern, key) for key in state):
            raise UserError(f"{where} is {kind}; {_WANTED}")
    if not any(".dcn." in key for key in state):
        raise UserError(f"{where} is no InternImage checkpoint, it has no '...dcn...' tensors; {_WANTED}")
    if not any(key.startswith("decode_head.") for key in state):
        raise UserError(f"{where} holds a backbone without a decode head; {_WANTED}")


def _backbone(state: Mapping[str, Tensor], hints: Hints, where: str) -> BackboneConfig:
    levels = _count(state, r"backbone\.levels")
    depths = tuple(_count(state, rf"backbone\.levels\.{level}\.blocks") for level in range(levels))
    if len(depths) != 4 or not all(depths):
        raise UserError(f"{where} has blocks {depths} on its levels; expected four levels with blocks; {_WANTED}")
    first = "backbone.levels.0.blocks.0"
    channels = _size(state, f"{first}.dcn.input_proj.weight", 0, where)
    masks = [_size(state, f"backbone.levels.{level}.blocks.0.dcn.mask.weight", 0, where) for level in range(4)]
    for level, rows in enumerate(masks):
        if rows % _POINTS or not rows or (channels << level) % (rows // _POINTS):
            raise UserError(
                f"{where}: the mask of level {level} has {rows} rows for {channels << level} channels; "
                f"expected {_POINTS} rows for each of a number of groups that divides the channels"
            )
    found = BackboneConfig(
        channels=channels,
        depths=depths,
        groups=tuple(rows // _POINTS for rows in masks),
        mlp_ratio=_size(state, f"{first}.mlp.fc1.weight", 0, where) / channels,
        layer_scale=f"{first}.gamma1" in state,
        post_norm="backbone.levels.0.norm.0.weight" not in state,
        res_post_norm=f"{first}.res_post_norm1.0.weight" in state,
        dw_kernel_size=_size(state, f"{first}.dcn.dw_conv.0.weight", 2, where),
        center_feature_scale=f"{first}.dcn.center_feature_scale_proj_weight" in state,
        norm_layer="BN" if "backbone.patch_embed.norm1.0.running_mean" in state else "LN",
    )
    setting = _Settings(found, hints, where)
    found = replace(
        found,
        offset_scale=setting("offset_scale", _number, "set it with --offset-scale (L and XL: 2.0, others: 1.0)"),
        act_layer=_activation(hints, where),
    )
    if found.center_feature_scale and not found.res_post_norm:
        # With centre feature scale, levels have a closing norm either way, so its presence says nothing.
        found = replace(found, post_norm=setting("post_norm", _flag, "name the released model with --arch"))
    norms = _count(state, r"backbone\.levels\.2\.post_norms")
    if norms:
        remedy = "set the blocks with --post-norm-blocks 5,11,..."
        ids = setting("level2_post_norm_block_ids", _integers, remedy)
        if len(ids) != norms or not all(0 <= i < depths[2] for i in ids):
            raise UserError(
                f"{where}: level2_post_norm_block_ids {list(ids)} do not fit the weights; "
                f"expected {norms} block numbers from 0 to {depths[2] - 1} (--post-norm-blocks)"
            )
        found = replace(found, level2_post_norm_block_ids=ids)
    return found


class _Settings:
    """Finds settings that the tensors do not show; notes those that come from a released model."""

    def __init__(self, found: BackboneConfig, hints: Hints, where: str) -> None:
        variant = known_variant(found)
        self._hints, self._where = hints, where
        self._stored = hints.section("backbone")
        self._released = hints.preset.config.backbone if hints.preset else BACKBONES[variant] if variant else None
        self._origin = f"as in {hints.preset.name}" if hints.preset else f"as in InternImage-{(variant or '').upper()}"

    def __call__(self, name: str, read: Callable[[object], Value | None], remedy: str) -> Value:
        """The setting `name`; `read` returns None for what is no value of it, `remedy` is an error's next step."""
        if name in self._hints.user:
            value = read(self._hints.user[name])
            if value is None:
                raise UserError(f"{self._where}: {name} cannot be {quoted(self._hints.user[name])}; {remedy}")
            return value
        if self._hints.preset is None:
            value = read(self._stored.get(name))
            if value is not None:
                return value
        value = read(getattr(self._released, name, None))
        if value is None:
            raise UserError(
                f"{self._where}: {name} is not in the weights, the checkpoint's training config does not state it, "
                f"and no released model has these sizes; {remedy}"
            )
        self._hints.notes.append(f"{name} = {value}, {self._origin}")
        return value


def _number(value: object) -> float | None:
    fits = isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 1e6
    return float(value) if fits else None  # type: ignore[arg-type]


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _integers(value: object) -> tuple[int, ...] | None:
    fits = isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)
    return tuple(value) if fits else None  # type: ignore[arg-type]


def _activation(hints: Hints, where: str) -> Activation:
    """No tensor shows the activation; every released model has GELU."""
    name = hints.user.get("act_layer") or hints.section("backbone").get("act_layer", "GELU")
    for activation in ACTIVATIONS:
        if activation == name:
            return activation
    raise UserError(f"{where}: the activation is {quoted(name)}; expected one of {', '.join(ACTIVATIONS)}")


def _head(state: Mapping[str, Tensor], settings: Mapping[str, object], where: str) -> HeadConfig:
    if settings.get("align_corners"):
        raise UserError(f"{where}: the head was trained with align_corners=True; only False is supported")
    classes, channels = (_size(state, _CLASSIFIER, axis, where) for axis in (0, 1))
    if "decode_head.fusion_conv.conv.weight" in state:
        return HeadConfig("SegformerHead", channels, classes)
    if "decode_head.fpn_bottleneck.conv.weight" not in state:
        kind = quoted(settings.get("type", "an unknown decode head"))
        raise UserError(f"{where} has {kind}; {_WANTED}")
    scales = settings.get("pool_scales", HeadConfig.pool_scales)
    count = _count(state, r"decode_head\.psp_modules")
    if not isinstance(scales, list | tuple) or len(scales) != count or not all(isinstance(s, int) for s in scales):
        raise UserError(
            f"{where}: {count} pyramid pooling modules but pool_scales {quoted(scales)}; expected one scale for each"
        )
    return HeadConfig("UPerHead", channels, classes, tuple(map(int, scales)))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules under `prefix`, a regular expression, that are numbered 0, 1, ...; 0 if there are gaps."""
    pattern = re.compile(rf"{prefix}\.(\d{{1,4}})\.")
    found = {int(match[1]) for match in map(pattern.match, state) if match}
    return len(found) if found == set(range(len(found))) else 0


def _size(state: Mapping[str, Tensor], name: str, axis: int, where: str) -> int:
    tensor = state.get(name)
    if tensor is None:
        raise UserError(f"{where} has no tensor '{name}'; {_WANTED}")
    if tensor.ndim <= axis or not tensor.shape[axis]:
        raise UserError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}; {_WANTED}")
    if tensor.shape[axis] > _MAX_WIDTH:
        raise UserError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}, wider than any network; {_WANTED}")
    return tensor.shape[axis]
