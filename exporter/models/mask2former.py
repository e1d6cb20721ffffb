# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's head for semantic segmentation, inference only, with the parameter names of the official checkpoints.

Source: Mask2Former, https://arxiv.org/abs/2112.01527.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import Mask2FormerConfig
from internimage_deploy.exporter.models.pixel_decoder import FeedForward, PixelDecoder
from internimage_deploy.exporter.models.positions import LevelPositions, level_positions

# The score of a masked position: its softmax is exactly 0, and unlike minus infinity it survives every runtime.
_MASKED = -1e9


class Mask2FormerHead(nn.Module):
    """Queries attend to the image where their own masks lie, and end as a class and a mask each.

    Four maps (N, in_channels[i], H / 2**i, W / 2**i) to semantic scores (N, classes, H, W), each from 0 to the number
    of queries: the sum over the queries of class probability times mask probability.
    """

    def __init__(self, in_channels: Sequence[int], config: Mask2FormerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.pixel_decoder = PixelDecoder(in_channels, config)
        self.transformer_decoder = TransformerDecoder(config)
        self.query_feat = nn.Embedding(config.queries, channels)
        self.query_embed = nn.Embedding(config.queries, channels)
        self.level_embed = nn.Embedding(config.levels, channels)
        self.cls_embed = nn.Linear(channels, config.num_classes + 1)
        self.mask_embed = nn.Sequential(
            *(nn.Linear(channels, channels), nn.ReLU()),
            *(nn.Linear(channels, channels), nn.ReLU()),
            nn.Linear(channels, config.mask_channels),
        )
        self.attention_masks = AttentionMasks()
        self.first_embedding: nn.Parameter | None = None  # (1, Q, mask channels), when a rewrite has computed it

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        classes, masks = self.predict(features)
        return semantic_scores(classes, masks)

    def predict(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (N, queries, classes + 1), the last for "no object", and mask logits (N, queries, H, W)."""
        memories, levels, mask_features = self.pixel_decoder(features)
        *_, query = self._decode(memories, levels, mask_features)
        return self._prediction(query, mask_features)

    def predict_each(self, features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What `predict` returns, of the queries before and after each decoder layer: training compares all of them."""
        memories, levels, mask_features = self.pixel_decoder(features)
        for query in self._decode(memories, levels, mask_features):
            yield self._prediction(query, mask_features)

    def _decode(
        self, memories: Sequence[Tensor], levels: Sequence[LevelPositions], mask_features: Tensor
    ) -> Iterator[Tensor]:
        """The queries (N, queries, C) before the first decoder layer and after each of them."""
        masks = self.attention_masks.prepare(mask_features, levels)
        embeddings = self.level_embed.weight
        positions = [level_positions(x.height, x.width, embeddings[i]) for i, x in enumerate(levels)]
        keys = [memory + position.encoding() for memory, position in zip(memories, positions, strict=True)]
        values = [memory + position.embedding for memory, position in zip(memories, positions, strict=True)]
        query = self.query_feat.weight.expand(memories[0].shape[0], -1, -1)
        yield query
        for index, layer in enumerate(self.transformer_decoder.layers):
            level = index % len(levels)
            embedding = self.mask_embedding(query) if index or self.first_embedding is None else self.first_embedding
            masked = self.attention_masks(embedding, masks[level], levels[level])
            query = layer(query, self.query_embed.weight, keys[level], values[level], masked)
            yield query

    def _prediction(self, query: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        classes = self.cls_embed(self.transformer_decoder.post_norm(query))
        return classes, mask_logits(self.mask_embedding(query), mask_features)

    def mask_embedding(self, query: Tensor) -> Tensor:
        """Queries (N, Q, C) to what the mask features are multiplied with, (N, Q, mask channels)."""
        return self.mask_embed(self.transformer_decoder.post_norm(query))


class AttentionMasks(nn.Module):
    """Where a query does not attend: outside its own latest mask."""

    def __init__(self) -> None:
        super().__init__()
        self.decision = Decision()

    def prepare(self, mask_features: Tensor, levels: Sequence[LevelPositions]) -> list[Tensor]:
        """What `forward` reads of the mask features (N, C, H, W) for each level."""
        return [mask_features] * len(levels)

    def forward(self, embedding: Tensor, mask_features: Tensor, level: LevelPositions) -> Tensor:
        """Mask embeddings (N, Q, C) and mask features (N, C, H, W) to booleans (N, Q, h*w), True where masked."""
        logits = mask_logits(embedding, mask_features)
        return self.decision(resize_to(logits, level.height, level.width).flatten(2))


class Decision(nn.Module):
    """Mask logits (N, Q, T) to booleans, True where masked: where the logit is negative.

    A probability below 0.5 is a logit below 0. A query that is masked everywhere attends everywhere.
    """

    def forward(self, logits: Tensor) -> Tensor:
        return (logits < 0) & (logits.amax(-1, keepdim=True) >= 0)


def mask_logits(embedding: Tensor, mask_features: Tensor) -> Tensor:
    """Products of (N, Q, C) and (N, C, H, W): (N, Q, H, W).

    An embedding of C + 1 channels, which a rewrite makes, has a constant at the end.
    """
    if embedding.shape[2] == mask_features.shape[1] + 1:
        return mask_logits(embedding[..., :-1], mask_features) + embedding[..., -1:, None]
    return (embedding @ mask_features.flatten(2)).unflatten(2, mask_features.shape[2:])


def resize_to(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, half-pixel centres: (N, C, H, W) to (N, C, height, width)."""
    return nn.functional.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def semantic_scores(classes: Tensor, masks: Tensor) -> Tensor:
    """Class logits (N, Q, K + 1) and mask logits (N, Q, H, W) to scores (N, K, H, W)."""
    probabilities = classes.softmax(-1)[..., :-1]
    return (probabilities.transpose(1, 2) @ masks.sigmoid().flatten(2)).unflatten(2, masks.shape[2:])


class TransformerDecoder(nn.Module):
    """The decoder layers, and the norm before every prediction."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.post_norm = nn.LayerNorm(config.channels)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and a feed-forward network, each with a norm after it."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        channels, heads = config.channels, config.decoder_heads
        self.attentions = nn.ModuleList([Attention(channels, heads), Attention(channels, heads)])
        self.ffns = nn.ModuleList([FeedForward(channels, config.decoder_feedforward)])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, query: Tensor, embedding: Tensor, key: Tensor, value: Tensor, masked: Tensor) -> Tensor:
        """Queries (N, Q, C), their positions (Q, C), a level's keys and values (N, T, C), what is masked (N, Q, T)."""
        query = self.norms[0](query + self.attentions[0](query + embedding, key, value, masked))
        place = query + embedding
        query = self.norms[1](query + self.attentions[1](place, place, query))
        return self.norms[2](self.ffns[0](query))


class Attention(nn.Module):
    """Multi-head attention: queries (N, Q, C), keys and values (N, T, C) to (N, Q, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = AttentionWeights(channels)
        self.fixed_query: nn.Parameter | None = None  # (1, Q, C), projected, when a rewrite has computed it

    def forward(self, query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None = None) -> Tensor:
        """`masked` (N, Q, T) is True where a query does not attend, for every head alike."""
        projected = self.attn.query(query) if self.fixed_query is None else self.fixed_query
        parts = (projected, self.attn.key(key), self.attn.value(value))
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in parts)
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k
        if masked is not None:
            scores = torch.where(masked[:, None], _MASKED, scores)
        return self.attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AttentionWeights(nn.Module):
    """The projections of an `Attention`; checkpoints store those of queries, keys and values as one matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight: nn.Parameter | None = nn.Parameter(torch.zeros(3 * channels, channels))
        self.in_proj_bias: nn.Parameter | None = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        self.q_proj: nn.Linear | None = None
        self.k_proj: nn.Linear | None = None
        self.v_proj: nn.Linear | None = None

    def query(self, x: Tensor) -> Tensor:
        return self._project(x, 0, self.q_proj)

    def key(self, x: Tensor) -> Tensor:
        return self._project(x, 1, self.k_proj)

    def value(self, x: Tensor) -> Tensor:
        return self._project(x, 2, self.v_proj)

    def part(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C) of the projection of queries (0), keys (1) or values (2)."""
        if self.in_proj_weight is None or self.in_proj_bias is None:
            linear = (self.q_proj, self.k_proj, self.v_proj)[index]
            assert linear is not None
            return linear.weight, linear.bias
        channels = self.in_proj_weight.shape[1]
        rows = slice(index * channels, (index + 1) * channels)
        return self.in_proj_weight[rows], self.in_proj_bias[rows]

    def split(self) -> None:
        """Keep three matrices instead of one, so that a graph has three weights and no slices of one."""
        parts = [self.part(index) for index in range(3)]
        self.q_proj, self.k_proj, self.v_proj = (linear(weight, bias) for weight, bias in parts)
        self.in_proj_weight = self.in_proj_bias = None

    def _project(self, x: Tensor, index: int, split: nn.Linear | None) -> Tensor:
        return split(x) if split is not None else nn.functional.linear(x, *self.part(index))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of these tensors, without a copy: `weight` (out, in), `bias` (out)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def split_projections(module: nn.Module) -> None:
    """Split the projections of every attention inside `module`, see `AttentionWeights.split`."""
    for layer in module.modules():
        if isinstance(layer, AttentionWeights):
            layer.split()
