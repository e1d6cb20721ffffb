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
from internimage_deploy.exporter.head_architecture import infer_head
from internimage_deploy.exporter.models.config import BackboneConfig, SegmentorConfig
from internimage_deploy.exporter.options import ACTIVATIONS, Activation
from internimage_deploy.exporter.presets import BACKBONES, Preset, known_variant
from internimage_deploy.exporter.state_shapes import WANTED, count, size

_POINTS = 9  # every InternImage samples 3x3 points

_OTHER_MODELS = (
    (
        r"(panoptic_head|panoptic_fusion_head|sem_seg_head)\.",
        "a Mask2Former checkpoint for panoptic or instance segmentation",
    ),
    (r"(bbox_head|rpn_head|roi_head|mask_head|query_head|transformer)\.", "a detection checkpoint"),
    (r".*\.dcn\.offset_mask\.", "a DCNv4 checkpoint (FlashInternImage)"),
    (r"(head|conv_head|fc|clip_projector)\.", "a classification checkpoint"),
)

_OTHER_BACKBONES = (
    (r"backbone\.layer\d\.", "ResNet"),
    (r"backbone\.stages\.\d+\.blocks\.\d+\.(attn|ffn)\.", "Swin Transformer"),
    (r"backbone\.(blocks|layers)\.\d+\.(attn|ffn|mlp)\.", "ViT"),
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
    return SegmentorConfig(
        _backbone(state, hints, where),
        infer_head(state, hints.section("decode_head"), hints.user, hints.notes, where),
    )


def _refuse_other_models(state: Mapping[str, Tensor], where: str) -> None:
    for pattern, kind in _OTHER_MODELS:
        if any(re.match(pattern, key) for key in state):
            raise UserError(f"{where} is {kind}; {WANTED}")
    if not any(".dcn." in key for key in state):
        if any(key.startswith("decode_head.transformer_decoder.") for key in state):
            raise UserError(f"{where} is a Mask2Former checkpoint on {_other_backbone(state)}; {WANTED}")
        raise UserError(f"{where} is no InternImage checkpoint, it has no '...dcn...' tensors; {WANTED}")
    if not any(key.startswith("decode_head.") for key in state):
        raise UserError(f"{where} holds a backbone without a decode head; {WANTED}")


def _other_backbone(state: Mapping[str, Tensor]) -> str:
    for pattern, name in _OTHER_BACKBONES:
        if any(re.match(pattern, key) for key in state):
            return f"a {name} backbone"
    return "another backbone"


def _backbone(state: Mapping[str, Tensor], hints: Hints, where: str) -> BackboneConfig:
    levels = count(state, r"backbone\.levels")
    depths = tuple(count(state, rf"backbone\.levels\.{level}\.blocks") for level in range(levels))
    if len(depths) != 4 or not all(depths):
        raise UserError(f"{where} has blocks {depths} on its levels; expected four levels with blocks; {WANTED}")
    first = "backbone.levels.0.blocks.0"
    channels = size(state, f"{first}.dcn.input_proj.weight", 0, where)
    masks = [size(state, f"backbone.levels.{level}.blocks.0.dcn.mask.weight", 0, where) for level in range(4)]
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
        mlp_ratio=size(state, f"{first}.mlp.fc1.weight", 0, where) / channels,
        layer_scale=f"{first}.gamma1" in state,
        post_norm="backbone.levels.0.norm.0.weight" not in state,
        res_post_norm=f"{first}.res_post_norm1.0.weight" in state,
        dw_kernel_size=size(state, f"{first}.dcn.dw_conv.0.weight", 2, where),
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
    norms = count(state, r"backbone\.levels\.2\.post_norms")
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
