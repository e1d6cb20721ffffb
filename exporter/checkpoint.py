# SPDX-License-Identifier: Apache-2.0
"""Reading official checkpoints without running anything that is in them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from internimage_deploy.datasets import classes as class_tables
from internimage_deploy.errors import UserError
from internimage_deploy.exporter import mmconfig
from internimage_deploy.exporter.architecture import Hints, infer
from internimage_deploy.exporter.models.config import SegmentorConfig
from internimage_deploy.exporter.models.segmentor import Segmentor, build_without_weights
from internimage_deploy.exporter.presets import PRESETS, Preset
from internimage_deploy.exporter.source import SourceModel, find_preset
from internimage_deploy.files import sha256

Color = tuple[int, int, int]

_PLAIN_CONTAINERS = ("state_dict", "model", "module", "network")
_EMA_CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile
_TRAINING_ONLY = re.compile(r"auxiliary_head\.|ema_|.*loss|.*\.num_batches_tracked$")
_FAMILIES = {"UPerHead": "upernet_internimage", "SegformerHead": "segformer_internimage"}
_LISTED = 8  # names shown in a message before "and N more"


def read_checkpoint(
    path: Path,
    *,
    arch: str | None = None,
    offset_scale: float | None = None,
    post_norm_blocks: tuple[int, ...] | None = None,
    act_layer: str | None = None,
    ema: bool = False,
) -> SourceModel:
    """Read an official InternImage segmentation checkpoint (.pth).

    Args:
        path: a file that `torch.save` wrote; it is read with `weights_only`, so nothing in it is executed.
        arch: a preset's name: what the weights do not show is taken from there, and the weights must fit it.
        offset_scale: DCNv3's offset scale, which no weight shows.
        post_norm_blocks: the blocks of level 2 that a post-norm follows, which no weight shows.
        act_layer: the activation, which no weight shows.
        ema: take the exponential moving average of the weights where the file holds both.

    Returns:
        The model; its weights are float32, and where the file could be mapped they still lie on disk.

    Raises:
        UserError: the file cannot be read, is another kind of checkpoint, or does not fit together.
    """
    stored, meta, notes = _weights(_load(path), path, ema)
    state, dropped = _usable(stored, path)
    notes += dropped
    config_text = meta.get("config") or meta.get("cfg")
    training = mmconfig.parse(config_text) if isinstance(config_text, str) else {}
    preset = find_preset(arch) if arch is not None else None
    settings = {"offset_scale": offset_scale, "level2_post_norm_block_ids": post_norm_blocks, "act_layer": act_layer}
    hints = Hints({name: value for name, value in settings.items() if value is not None}, preset, training, notes)
    config = infer(state, hints, path.name)
    if preset:
        _compare_with_preset(config, preset, path)
    segmentor = build_without_weights(config)
    _check_names_and_shapes(segmentor, state, path)
    _load_weights(segmentor, state, path)
    known = preset or _released_as(config, path)
    dataset = _dataset(training) or (known.dataset if known else None)
    classes, palette = _classes(meta, dataset, config.head.num_classes, notes)
    return SourceModel(
        segmentor=segmentor,
        architecture=known.name if known else _FAMILIES[config.head.type],
        classes=classes,
        palette=palette,
        resize=mmconfig.test_scale(training) or (known.resize if known else None),
        source={"file": path.name, "sha256": sha256(path)},
        notes=tuple(notes),
    )


def _load(path: Path) -> object:
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path of a checkpoint (.pth)")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a checkpoint (.pth)")
    try:
        # Mapped, not read: optimiser states stay on disk. Files from before PyTorch 1.6 are no zip: not mappable.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except Exception as error:  # a damaged or hostile file can make the reader fail in any way
        forbidden = re.search(r"(?:GLOBAL|global:?) (\S+)", str(error))
        if forbidden and "weights_only" in str(error):
            raise UserError(
                f"{path} is refused: it asks to load '{forbidden[1].rstrip('.,')}', and a checkpoint that loads more "
                "than tensors can run code; save its state_dict alone and export that"
            ) from error
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise UserError(
            f"{path} is not a readable PyTorch checkpoint ({reason}); it may be truncated: download or save it again"
        ) from error


def _weights(
    content: object, path: Path, ema: bool
) -> tuple[Mapping[object, object], Mapping[object, object], list[str]]:
    """The state dict inside `content`, the metadata beside it, and notes."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a checkpoint, a dictionary of tensors")
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    containers = _EMA_CONTAINERS + _PLAIN_CONTAINERS if ema else _PLAIN_CONTAINERS + _EMA_CONTAINERS
    for name in containers:
        if isinstance(content.get(name), Mapping):
            others = [n for n in containers if n != name and isinstance(content.get(n), Mapping)]
            notes = [f"weights taken from '{name}'" + (f", not from {_listed(others)}" if others else "")]
            return content[name], meta, notes if others or name in _EMA_CONTAINERS else []
    if any(isinstance(value, Tensor) for value in content.values()):
        return {key: value for key, value in content.items() if key != "meta"}, meta, []
    raise UserError(
        f"{path} holds {_listed(list(map(str, content)))} and no weights; "
        "expected tensors, or a 'state_dict' or 'model' of tensors"
    )


def _usable(stored: Mapping[object, object], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that inference needs, under their plain names, and a note on those that were dropped."""
    state: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for key, value in stored.items():
        name = str(key)
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if _TRAINING_ONLY.match(name):
            kind = "ema_*" if name.startswith("ema_") else name.split(".")[0] + ".*"
            if not name.endswith("num_batches_tracked") or name.startswith("auxiliary_head."):
                dropped[kind] = dropped.get(kind, 0) + 1
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            kind = type(value).__name__ if not isinstance(value, Tensor) else "sparse or quantised tensor"
            raise UserError(f"{path}: '{name}' is a {kind}; expected a plain tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: '{name}' claims shape {tuple(value.shape)} but stores less; the file is damaged")
        if name in state:
            raise UserError(f"{path}: '{name}' occurs twice, with and without a wrapper's prefix")
        state[name] = value
    return state, [f"dropped {count} training-only tensors: {kind}" for kind, count in dropped.items()]


def _released_as(config: SegmentorConfig, path: Path) -> Preset | None:
    """The released model that the file is named after, or the only one with this architecture."""
    same = [preset for preset in PRESETS.values() if preset.config == config]
    return next((p for p in same if p.name in path.name), same[0] if len(same) == 1 else None)


def _dataset(training: Mapping[str, object]) -> str | None:
    kind = training.get("dataset_type")
    return kind if isinstance(kind, str) else None


def _compare_with_preset(config: SegmentorConfig, preset: Preset, path: Path) -> None:
    """Raise a `UserError` if --arch contradicts the weights; the class count may differ."""
    expected = preset.config.backbone
    for name in ("channels", "depths", "groups"):
        got, want = getattr(config.backbone, name), getattr(expected, name)
        if got != want:
            raise UserError(f"{path.name} has {name} {got}; --arch {preset.name} has {want}; leave --arch out")
    if config.head.type != preset.config.head.type:
        raise UserError(f"{path.name} has a {config.head.type}; --arch {preset.name} has a {preset.config.head.type}")


def _check_names_and_shapes(segmentor: Segmentor, state: dict[str, Tensor], path: Path) -> None:
    expected = {name: tensor.shape for name, tensor in segmentor.state_dict().items() if not _is_counter(name)}
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{len(missing)} missing ({_listed(missing)})"] if missing else []
        parts += [f"{len(unknown)} unknown ({_listed(unknown)})"] if unknown else []
        raise UserError(f"{path.name} does not fit an InternImage segmentation model: tensors {' and '.join(parts)}")
    wrong = sorted(name for name in expected if state[name].shape != expected[name])
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path.name}: {len(wrong)} tensors have the wrong shape, first '{name}': "
            f"got {tuple(state[name].shape)}, expected {tuple(expected[name])}"
        )


def _load_weights(segmentor: Segmentor, state: dict[str, Tensor], path: Path) -> None:
    """Give `segmentor` the tensors of `state` as float32, without a copy where they are."""
    weights = {name: _float32(tensor, name, path) for name, tensor in state.items()}
    # BatchNorm's state dict has batch counters, which inference never reads.
    counters = {name: torch.zeros((), dtype=torch.int64) for name in segmentor.state_dict() if _is_counter(name)}
    segmentor.load_state_dict(weights | counters, assign=True)
    segmentor.requires_grad_(False)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _float32(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise UserError(f"{path.name}: '{name}' has type {tensor.dtype}; expected floating-point weights")
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise UserError(f"{path.name}: '{name}' holds NaN or infinity; the training diverged or the file is damaged")
    return tensor


def _classes(
    meta: Mapping[object, object], dataset: str | None, count: int, notes: list[str]
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Names and colours for `count` outputs: the checkpoint's own, else its data set's, else numbered ones.

    Where the checkpoint names no data set either, it is guessed from `count`.
    """
    dataset_meta = meta.get("dataset_meta")  # mmsegmentation 1.x
    data = dataset_meta if isinstance(dataset_meta, Mapping) else meta
    names, palette = data.get("CLASSES", data.get("classes")), data.get("PALETTE", data.get("palette"))
    if isinstance(names, list | tuple) and 0 < len(names) <= count:
        names, colors = tuple(map(str, names)), _colors(palette)[: len(names)]
    else:
        names, colors = class_tables.lookup(dataset or count) or ((), ())
        if not names:
            how = f"numbered, for the data set {dataset} is not known" if dataset else "numbered"
        elif dataset:
            how = f"names of {dataset}"
        else:
            how = f"names guessed from the {count} outputs ({', '.join(names[:3])}, ...)"
        notes.append(f"the checkpoint names no classes: {how}")
    if 0 < len(names) < count:
        notes.append(f"the head has {count} outputs for {len(names)} named classes: the rest are numbered")
    # Apart from each other: a checkpoint may name its classes and leave out their colours.
    return class_tables.fitted(names, (), count)[0], class_tables.fitted((), colors, count)[1]


def _colors(palette: object) -> tuple[Color, ...]:
    """RGB triples out of what a checkpoint may hold; anything else gives ()."""
    try:
        triples = tuple((int(r), int(g), int(b)) for r, g, b in palette)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()
    return triples if all(0 <= value <= 255 for triple in triples for value in triple) else ()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more
