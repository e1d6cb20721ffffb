# SPDX-License-Identifier: Apache-2.0
"""Inferring the decode head from the names and shapes of its tensors, and from the training config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from internimage_deploy.errors import UserError, quoted
from internimage_deploy.exporter.models.config import HeadConfig, Mask2FormerConfig
from internimage_deploy.exporter.state_shapes import WANTED, count, size

_CLASSIFIER = "decode_head.conv_seg.weight"
_PIXEL_DECODER = "decode_head.pixel_decoder"
_ENCODER_LAYER = f"{_PIXEL_DECODER}.encoder.layers.0"
_DECODER_LAYER = "decode_head.transformer_decoder.layers.0"
_RELEASED_HEAD_CHANNELS = 32  # of one attention head, in every released model
_RELEASED_NORM_GROUPS = 32

Settings = Mapping[str, object]


def infer_head(
    state: Mapping[str, Tensor], settings: Settings, user: Settings, notes: list[str], where: str
) -> HeadConfig | Mask2FormerConfig:
    """The settings of the decode head that `state` has.

    Args:
        state: tensors under mmsegmentation's names.
        settings: the head's part of the training config; empty where the checkpoint has none.
        user: what the user states, `attention_heads` and `norm_groups` among it.
        notes: gets a sentence for every setting that was assumed.
        where: the file's name.

    Raises:
        UserError: it is another head, or a setting cannot be inferred.
    """
    if settings.get("align_corners"):
        raise UserError(f"{where}: the head was trained with align_corners=True; only False is supported")
    if any(key.startswith("decode_head.transformer_decoder.") for key in state):
        return _mask2former(state, settings, user, notes, where)
    classes, channels = (size(state, _CLASSIFIER, axis, where) for axis in (0, 1))
    if "decode_head.fusion_conv.conv.weight" in state:
        return HeadConfig("SegformerHead", channels, classes)
    if "decode_head.fpn_bottleneck.conv.weight" not in state:
        kind = quoted(settings.get("type", "an unknown decode head"))
        raise UserError(f"{where} has {kind}; {WANTED}")
    scales = settings.get("pool_scales", HeadConfig.pool_scales)
    modules = count(state, r"decode_head\.psp_modules")
    if not isinstance(scales, list | tuple) or len(scales) != modules or not all(isinstance(s, int) for s in scales):
        raise UserError(
            f"{where}: {modules} pyramid pooling modules but pool_scales {quoted(scales)}; expected one scale for each"
        )
    return HeadConfig("UPerHead", channels, classes, tuple(map(int, scales)))


def _mask2former(
    state: Mapping[str, Tensor], settings: Settings, user: Settings, notes: list[str], where: str
) -> Mask2FormerConfig:
    levels, channels = (size(state, f"{_PIXEL_DECODER}.level_encoding.weight", axis, where) for axis in (0, 1))
    if levels not in (3, 4):
        raise UserError(f"{where}: the pixel decoder has {levels} levels; expected 3, as the released models, or 4")
    encoder_layers = count(state, r"decode_head\.pixel_decoder\.encoder\.layers")
    decoder_layers = count(state, r"decode_head\.transformer_decoder\.layers")
    if not encoder_layers or not decoder_layers:
        raise UserError(
            f"{where}: the pixel decoder has {encoder_layers} encoder layers, the transformer decoder {decoder_layers} "
            f"layers, numbered from 0 without gaps; expected at least one of each; {WANTED}"
        )
    encoder = _section(settings, "pixel_decoder", "encoder", "transformerlayers", "attn_cfgs")
    decoder = _section(settings, "transformer_decoder", "transformerlayers", "attn_cfgs")
    rows = size(state, f"{_ENCODER_LAYER}.attentions.0.attention_weights.weight", 0, where)
    encoder_heads, decoder_heads = _heads((encoder, decoder), user, channels, notes, where)
    if rows % (levels * encoder_heads):
        raise UserError(
            f"{where}: {rows} attention weights for {levels} levels and {encoder_heads} heads; expected a multiple of "
            f"{levels * encoder_heads}; set the number of heads with --attention-heads"
        )
    return Mask2FormerConfig(
        channels=channels,
        num_classes=_classes(state, where),
        queries=size(state, "decode_head.query_feat.weight", 0, where),
        encoder_heads=encoder_heads,
        decoder_heads=decoder_heads,
        encoder_feedforward=size(state, f"{_ENCODER_LAYER}.ffns.0.layers.0.0.weight", 0, where),
        decoder_feedforward=size(state, f"{_DECODER_LAYER}.ffns.0.layers.0.0.weight", 0, where),
        mask_channels=size(state, f"{_PIXEL_DECODER}.mask_feature.weight", 0, where),
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        levels=levels,
        points=rows // (levels * encoder_heads),
        norm_groups=_norm_groups(settings, user, channels, notes, where),
    )


def _classes(state: Mapping[str, Tensor], where: str) -> int:
    outputs = size(state, "decode_head.cls_embed.weight", 0, where)
    if outputs < 2:
        raise UserError(f"{where}: the classifier has {outputs} output; expected the classes and one for 'no object'")
    return outputs - 1


def _heads(attentions: Sequence[Settings], user: Settings, channels: int, notes: list[str], where: str) -> list[int]:
    """The numbers of attention heads, which no tensor shows: the user's, the config's, or the released models'."""
    numbers = [user.get("attention_heads", attention.get("num_heads")) for attention in attentions]
    if None in numbers:
        if channels % _RELEASED_HEAD_CHANNELS:
            raise UserError(
                f"{where}: the number of attention heads is not in the weights, the checkpoint has no training config, "
                f"and {channels} channels are no multiple of {_RELEASED_HEAD_CHANNELS}, the channels of a head in the "
                "released models; set it with --attention-heads"
            )
        heads = channels // _RELEASED_HEAD_CHANNELS
        numbers = [heads if number is None else number for number in numbers]
        notes.append(
            f"{heads} attention heads, for {_RELEASED_HEAD_CHANNELS} channels each as in the released models; "
            "--attention-heads states another number"
        )
    return [_divisor(number, channels, "attention heads", "--attention-heads", where) for number in numbers]


def _divisor(number: object, channels: int, what: str, option: str, where: str) -> int:
    if type(number) is not int or number < 1 or channels % number:
        raise UserError(
            f"{where}: {quoted(number)} {what} for {channels} channels; expected a divisor of them ({option})"
        )
    return number


def _norm_groups(settings: Settings, user: Settings, channels: int, notes: list[str], where: str) -> int:
    """The number of groups of the pixel decoder's group norms, which no tensor shows."""
    groups = user.get("norm_groups", _section(settings, "pixel_decoder", "norm_cfg").get("num_groups"))
    if groups is None:
        groups = _RELEASED_NORM_GROUPS
        notes.append(
            f"{groups} groups in the group norms, as in the released models; --norm-groups states another number"
        )
    return _divisor(groups, channels, "groups in the group norms", "--norm-groups", where)


def _section(settings: Settings, *path: str) -> Settings:
    """The part of the training config under `path`, or {}; of a list of parts the first one."""
    section: object = settings
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, list | tuple) and section:
            section = section[0]
    return section if isinstance(section, dict) else {}
