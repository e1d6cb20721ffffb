# SPDX-License-Identifier: Apache-2.0
"""From what a checkpoint holds to a segmentor with weights and the metadata for its model card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from internimage_deploy.datasets.classes import Classes, Palette, fitted, is_class_name, lookup
from internimage_deploy.errors import UserError, one_line, quoted
from internimage_deploy.exporter import mmconfig
from internimage_deploy.exporter.architecture import Hints, infer
from internimage_deploy.exporter.models.config import SegmentorConfig
from internimage_deploy.exporter.models.segmentor import Segmentor, build_without_weights
from internimage_deploy.exporter.options import SIZE_DIVISOR
from internimage_deploy.exporter.pickle_literals import Damaged
from internimage_deploy.exporter.presets import PRESETS, Preset
from internimage_deploy.exporter.rebuild import StoredTensor
from internimage_deploy.exporter.source import SourceModel, StatedLabels, find_preset
from internimage_deploy.exporter.tensor_file import Content, read_content
from internimage_deploy.exporter.unpickler import Inert
from internimage_deploy.files import sha256
from internimage_deploy.window import Window

_PLAIN_CONTAINERS = ("state_dict", "model", "model_state_dict", "module", "network")
_EMA_CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "teacher")
_MMENGINE_AVERAGE = (
    "weights taken from 'state_dict', where mmengine keeps their moving average; 'ema_state_dict' holds those of the "
    "last step"
)
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile
_TRAINING_ONLY = re.compile(r"auxiliary_head\.|ema_|.*loss|.*\.num_batches_tracked$|(steps|n_averaged)$")
_FAMILIES = {
    "UPerHead": "upernet_internimage",
    "SegformerHead": "segformer_internimage",
    "Mask2FormerHead": "mask2former_internimage",
}
_LISTED = 8  # names shown in a message before "and N more"


def read_checkpoint(
    path: Path,
    *,
    arch: str | None = None,
    offset_scale: float | None = None,
    post_norm_blocks: tuple[int, ...] | None = None,
    act_layer: str | None = None,
    attention_heads: int | None = None,
    norm_groups: int | None = None,
    ema: bool = False,
    stated: StatedLabels = StatedLabels(),  # noqa: B008 - frozen
) -> SourceModel:
    """Read an InternImage segmentation checkpoint (.pth, .safetensors).

    Args:
        path: a file that `torch.save` wrote, or safetensors; nothing in it is executed.
        arch: a preset's name: what the weights do not show is taken from there, and the weights must fit it.
        offset_scale: DCNv3's offset scale, which no weight shows.
        post_norm_blocks: the blocks of level 2 that a post-norm follows, which no weight shows.
        act_layer: the activation, which no weight shows.
        attention_heads: Mask2Former's number of attention heads, which no weight shows.
        norm_groups: the number of groups of Mask2Former's group norms, which no weight shows.
        ema: take the exponential moving average of the weights where the file holds both.
        stated: class names, palette and resize rule that the user states.

    Returns:
        The model; its weights are float32, and those stored as float32 still lie on disk, in the mapped file.

    Raises:
        UserError: the file cannot be read, is another kind of checkpoint, or does not fit together.
    """
    content = read_content(path)
    stored, meta, notes = _weights(content.value, path, ema)
    state, dropped = _usable(content, stored, path)
    notes += dropped
    config_text = meta.get("config") or meta.get("cfg")
    training = mmconfig.parse(config_text) if isinstance(config_text, str) else {}
    preset = find_preset(arch) if arch is not None else None
    settings = {
        "offset_scale": offset_scale,
        "level2_post_norm_block_ids": post_norm_blocks,
        "act_layer": act_layer,
        "attention_heads": attention_heads,
        "norm_groups": norm_groups,
    }
    hints = Hints({name: value for name, value in settings.items() if value is not None}, preset, training, notes)
    config = infer(state, hints, path.name)
    if preset:
        _compare_with_preset(config, preset, path)
    segmentor = build_without_weights(config)
    _check_names_and_shapes(segmentor, state, path)
    _load_weights(segmentor, state, path)
    known = preset or _released_as(config, path)
    dataset = _dataset(training) or (known.dataset if known else None)
    classes, palette = _labels(stated, meta, dataset, config.head.num_classes, notes)
    return SourceModel(
        segmentor=segmentor,
        architecture=known.name if known else _FAMILIES[config.head.type],
        classes=classes,
        palette=palette,
        resize=_resize(stated, mmconfig.test_scale(training), known, notes),
        window=_window(training, known, notes, path),
        source={"file": quoted(path.name), "sha256": sha256(path)},
        notes=tuple(notes),
        details=_inert_note(content.inert),
    )


def _weights(
    content: object, path: Path, ema: bool
) -> tuple[Mapping[object, object], Mapping[object, object], list[str]]:
    """The state dict inside `content`, the metadata beside it, and notes."""
    if isinstance(content, Inert):
        raise UserError(
            f"{path} holds a whole '{quoted(content.name)}' object, and rebuilding it would run its code; where that "
            "code is at hand, save its state_dict() and export that"
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a checkpoint, a dictionary of tensors")
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    averaged, last = content.get("state_dict"), content.get("ema_state_dict")
    if "mmengine_version" in meta and isinstance(averaged, Mapping) and averaged and isinstance(last, Mapping):
        # mmengine's EMAHook exchanges the two while it saves, so that deployment finds the average in 'state_dict'.
        return averaged, meta, [_MMENGINE_AVERAGE]
    containers = _EMA_CONTAINERS + _PLAIN_CONTAINERS if ema else _PLAIN_CONTAINERS + _EMA_CONTAINERS
    found = [name for name in containers if isinstance(content.get(name), Mapping) and content[name]]
    no_ema = [f"no moving average of the weights ({', '.join(_EMA_CONTAINERS)}) in the file: --ema changed nothing"]
    if found:
        name, others = found[0], found[1:]
        notes = [f"weights taken from '{name}'" + (f", not from {_listed(others)}" if others else "")]
        if name in _EMA_CONTAINERS:
            return content[name], meta, notes
        return content[name], meta, (notes if others else []) + (no_ema if ema else [])
    if any(isinstance(value, StoredTensor | np.ndarray) for value in content.values()):
        return {key: value for key, value in content.items() if key != "meta"}, meta, no_ema if ema else []
    for name in containers:
        if isinstance(content.get(name), Inert):
            raise UserError(f"{path}: '{name}' is a {_kind(content[name])}; expected a dictionary of tensors")
    raise UserError(
        f"{path} holds {f'{_listed(list(content))} and no weights' if content else 'an empty dictionary'}; "
        "expected tensors, or a 'state_dict' or 'model' of tensors"
    )


def _usable(content: Content, stored: Mapping[object, object], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that inference needs, under their plain names, and a note on those that were dropped."""
    state: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for key, value in stored.items():
        name = full = key if isinstance(key, str) else quoted(key)
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if _TRAINING_ONLY.match(name):
            kind = quoted("ema_*" if name.startswith("ema_") else name.split(".")[0] + ".*")
            if not name.endswith("num_batches_tracked") or name.startswith("auxiliary_head."):
                dropped[kind] = dropped.get(kind, 0) + 1
            continue
        if name in state:
            raise UserError(f"{path}: '{quoted(full)}' occurs twice, with and without a wrapper's prefix")
        state[name] = _tensor(content, value, f"{path}: '{quoted(full)}'")
    return state, [f"dropped {count} training-only tensors: {kind}" for kind, count in dropped.items()]


def _tensor(content: Content, value: object, where: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if not isinstance(value, StoredTensor):
        raise UserError(f"{where} is a {_kind(value)}; expected a plain tensor")
    if 0 in value.shape:
        raise UserError(f"{where} has shape {value.shape}, so it holds nothing; the file is damaged")
    try:
        return content.file.tensor(value)
    except Damaged as damaged:
        raise UserError(f"{where} {damaged}; the file is damaged") from damaged


def _kind(value: object) -> str:
    return f"'{quoted(value.name)}' object, which was not rebuilt" if isinstance(value, Inert) else type(value).__name__


def _released_as(config: SegmentorConfig, path: Path) -> Preset | None:
    """The released model that the file is named after, or the only one with this architecture."""
    same = [preset for preset in PRESETS.values() if preset.config == config]
    return next((p for p in same if p.name in path.name), same[0] if len(same) == 1 else None)


def _dataset(training: Mapping[str, object]) -> str | None:
    kind = training.get("dataset_type")
    return kind if isinstance(kind, str) and is_class_name(kind) else None


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


def _labels(
    stated: StatedLabels, meta: Mapping[object, object], dataset: str | None, count: int, notes: list[str]
) -> tuple[Classes, Palette]:
    """Names and colours for `count` outputs: the user's, else the checkpoint's own, else its data set's, else numbered.

    Where the checkpoint names no data set either, it is guessed from `count`.
    """
    stated.check(count)
    dataset_meta = meta.get("dataset_meta")  # mmsegmentation 1.x
    data = dataset_meta if isinstance(dataset_meta, Mapping) else meta
    names, colors = data.get("CLASSES", data.get("classes")), _colors(data.get("PALETTE", data.get("palette")))
    if stated.classes is not None:
        names = stated.classes[:count]
        colors = (lookup(count) or ((), ()))[1] if (lookup(count) or ((),))[0] == names else colors
    elif _are_names(names) and len(names) <= count:
        names, colors = tuple(names), colors[: len(names)]
    else:
        names, colors = lookup(dataset or count) or ((), ())
        if not names:
            how = f"numbered, for the data set {quoted(dataset)} is not known" if dataset else "numbered"
        elif dataset:
            how = f"names of {dataset}"
        else:
            how = f"names guessed from the {count} outputs ({', '.join(names[:3])}, ...)"
        notes.append(f"the checkpoint names no classes: {how}; --classes states them")
    if 0 < len(names) < count:
        notes.append(f"the head has {count} outputs for {len(names)} named classes: the rest are numbered")
    if stated.palette is not None:
        colors = stated.palette
        if len(colors) < count:
            notes.append(f"the palette has {len(colors)} colours for {count} outputs: the rest are generated")
    # Apart from each other: a checkpoint may name its classes and leave out their colours.
    return fitted(names, (), count)[0], fitted((), colors, count)[1]


def _resize(
    stated: StatedLabels, trained: tuple[int, int] | None, known: Preset | None, notes: list[str]
) -> tuple[int, int] | None:
    """(long, short) that images are resized to; None for their own size."""
    if stated.resize is not None:
        return None if stated.resize == "own" else stated.resize
    if trained is not None:
        return trained
    if known is not None:
        notes.append(
            f"images are resized to fit {known.resize[0]}x{known.resize[1]}, as for {known.name}; --resize states it"
        )
        return known.resize
    notes.append(
        "images keep their own size, for the checkpoint does not state which it was evaluated with; --resize states it"
    )
    return None


def _window(training: Mapping[str, object], known: Preset | None, notes: list[str], path: Path) -> Window | None:
    """The sliding window that the model was evaluated with; None for whole images."""
    if not training:
        return known.window if known is not None else None
    try:
        window = mmconfig.test_window(training)
    except UserError as error:
        notes.append(f"images are segmented whole, for {one_line(error)}")
        return None
    if window is not None and any(side % SIZE_DIVISOR for side in window.crop):
        notes.append(
            f"images are segmented whole, for crops of {window.crop[0]}x{window.crop[1]}, which the checkpoint was "
            f"evaluated with, are no multiples of {SIZE_DIVISOR}; --slide with --crop slides over them all the same"
        )
        return None
    return window


def _are_names(names: object) -> TypeGuard[Sequence[str]]:
    return isinstance(names, list | tuple) and len(names) > 0 and all(map(is_class_name, names))


def _colors(palette: object) -> Palette:
    """RGB triples out of what a checkpoint may hold; anything else gives ()."""
    if isinstance(palette, np.ndarray):
        palette = palette.tolist()
    triples = []
    for color in palette if isinstance(palette, list | tuple) else ():
        values = [
            int(value)
            for value in (color if isinstance(color, list | tuple | np.ndarray) else ())
            if isinstance(value, int | float | np.integer) and 0 <= value <= 255
        ]
        if len(values) != 3 or len(color) != 3:
            return ()
        triples.append((values[0], values[1], values[2]))
    return tuple(triples)


def _inert_note(inert: Counter[str]) -> tuple[str, ...]:
    if not inert:
        return ()
    listed = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in inert.most_common(_LISTED))
    more = f" and {len(inert) - _LISTED} more" if len(inert) > _LISTED else ""
    return (f"objects in the checkpoint that were neither rebuilt nor run: {listed}{more}",)


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{quoted(name)}'" for name in names[:_LISTED]) + more
