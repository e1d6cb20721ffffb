# SPDX-License-Identifier: Apache-2.0
"""Reading the golden files: what the official implementation computed (tests/data/README.md)."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "data"
NETWORKS = ("upernet_t_like", "upernet_s_like", "upernet_l_like", "upernet_h_like", "segformer_l_like")
MASK2FORMER = ("m2f_h_like", "m2f_h_narrow_like")
PIPELINES = ("pipeline_landscape", "pipeline_portrait")


def case(name: str) -> dict:
    """The description of a golden case: settings, seed, tensor names and shapes."""
    return json.loads((DATA / f"{name}.json").read_text())


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden case."""
    with np.load(DATA / f"{name}.npz") as data:
        return dict(data)


def state_dict(name: str) -> dict[str, np.ndarray]:
    """The weights of a golden network: drawn in the order of sorted names from PCG64(seed).

    Matrices and kernels have unit gain, scales lie around 1, variances above 1, all others around 0. A case may scale
    tensors further, by patterns of names.
    """
    description = case(name)
    rng = np.random.default_rng(description["seed"])
    weights = {}
    for key in sorted(description["state_dict_shapes"]):
        shape = tuple(description["state_dict_shapes"][key])
        if key.endswith("num_batches_tracked"):
            weights[key] = np.zeros((), np.int64)
            continue
        draw = rng.standard_normal(shape)
        if len(shape) >= 2:
            value = draw / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("running_var"):
            value = 1 + 0.2 * np.abs(draw)
        elif key.endswith(("weight", "gamma1", "gamma2")):
            value = 1 + 0.1 * draw
        else:
            value = 0.1 * draw
        weights[key] = value.astype(np.float32)
    for pattern, factor in description.get("gain", {}).items():
        for key in fnmatch.filter(weights, pattern):
            weights[key] = weights[key] * np.float32(factor)
    return weights


def network_input(name: str) -> np.ndarray:
    """(N, 3, H, W) float32, normalised."""
    description = case(name)
    seed = description.get("input_seed", description["seed"] + 1)
    return np.random.default_rng(seed).standard_normal(description["input"]).astype(np.float32)


def meta(name: str) -> dict:
    """What mmcv would have stored beside the weights."""
    description = case(name)
    classes = description["head"]["num_classes"]
    mask2former = description["head"]["type"] == "Mask2FormerHead"
    return {
        "mmseg_version": "0.27.0",
        "config": (_mask2former_config if mask2former else _config)(description),
        "CLASSES": tuple(f"class_{i}" for i in range(classes)),
        "PALETTE": [[(i * 37) % 256, (i * 67) % 256, (i * 97) % 256] for i in range(classes)],
        "iter": 160000,
    }


def _config(description: dict) -> str:
    backbone, head = description["backbone"], description["head"]
    settings = "".join(f"        {key}={value!r},\n" for key, value in backbone.items())
    return (
        "norm_cfg = dict(type='SyncBN', requires_grad=True)\n"
        "model = dict(\n    type='EncoderDecoder',\n    pretrained=None,\n    backbone=dict(\n"
        "        type='InternImage',\n        core_op='DCNv3',\n        mlp_ratio=4.0,\n        norm_layer='LN',\n"
        f"{settings}        out_indices=(0, 1, 2, 3)),\n    decode_head=dict(\n        type='{head['type']}',\n"
        f"        channels={head['channels']},\n        num_classes={head['num_classes']},\n"
        "        align_corners=False),\n    test_cfg=dict(mode='whole'))\n"
    )


def _mask2former_config(description: dict) -> str:
    """What a released Mask2Former config states: settings that mean something, and misleading panoptic ones."""
    head = description["head"]
    width = head["feat_channels"]
    attention = {
        "type": "MultiScaleDeformableAttention",
        "embed_dims": width,
        "num_heads": head["encoder_heads"],
        "num_levels": head["num_levels"],
        "num_points": head["num_points"],
    }
    encoder = {
        "type": "DetrTransformerEncoder",
        "num_layers": head["encoder_layers"],
        "transformerlayers": {
            "attn_cfgs": attention,
            "ffn_cfgs": {"feedforward_channels": head["encoder_feedforward"]},
        },
    }
    decoder = {
        "type": "DetrTransformerDecoder",
        "num_layers": head["decoder_layers"],
        "transformerlayers": {
            "attn_cfgs": {"type": "MultiheadAttention", "embed_dims": width, "num_heads": head["decoder_heads"]},
            "feedforward_channels": head["decoder_feedforward"],
        },
    }
    model = {
        "type": "EncoderDecoderMask2Former",
        "backbone": {"type": "InternImage", "core_op": "DCNv3", "norm_layer": "LN", **description["backbone"]},
        "decode_head": {
            "type": "Mask2FormerHead",
            "feat_channels": width,
            "num_things_classes": 100,
            "num_stuff_classes": 50,
            "num_queries": head["num_queries"],
            "num_transformer_feat_level": head["num_levels"],
            "pixel_decoder": {
                "type": "MSDeformAttnPixelDecoder",
                "num_outs": head["num_levels"],
                "norm_cfg": {"type": "GN", "num_groups": head["norm_groups"]},
                "encoder": encoder,
            },
            "transformer_decoder": decoder,
            "num_classes": head["num_classes"],
        },
        "test_cfg": {
            "panoptic_on": True,
            "semantic_on": False,
            "instance_on": True,
            **description.get("test_cfg", {"mode": "whole"}),
        },
    }
    return f"num_things_classes = 100\nnum_classes = {head['num_classes']}\nmodel = {_as_calls(model)}\n"


def _as_calls(value: object) -> str:
    """A value as config files write it: `dict(name=value, ...)`."""
    if not isinstance(value, dict):
        return repr(value)
    return f"dict({', '.join(f'{name}={_as_calls(item)}' for name, item in value.items())})"


def checkpoint(name: str, path: Path, *, with_meta: bool = True, prefix: str = "") -> Path:
    """Write an mmsegmentation-style checkpoint of a golden network; returns `path`."""
    import torch

    weights = {prefix + key: torch.from_numpy(value) for key, value in state_dict(name).items()}
    torch.save({"meta": meta(name) if with_meta else {}, "state_dict": weights}, path)
    return path
