# SPDX-License-Identifier: Apache-2.0
"""The card beside an engine, `MODEL.engine.json`, and checks that name a problem before TensorRT would."""

from __future__ import annotations

import shutil
from pathlib import Path

from internimage_deploy.card import EngineInfo, ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.files import require_file, sha256
from internimage_deploy.runtime.engine.engine_backend import DISPLAY_NAMES, EngineBackend

_MAX_BYTES = 64_000_000  # of a card


def path_of(engine: Path) -> Path:
    """The path of the card of `engine`."""
    return engine.with_name(engine.name + ".json")


def read(engine: Path) -> ModelCard:
    """The card of an engine file.

    Raises:
        UserError: the engine or its card is missing, they do not belong together, or the engine has changed.
    """
    card, info = _card_and_info(engine)
    if _digest(engine) != info.sha256:
        raise UserError(
            f"{engine}: the file is not the one its card describes (changed, truncated or replaced); "
            "copy both files again, or build the engine again"
        )
    return card


def info_of(engine: Path) -> EngineInfo:
    """What an engine was built with, from its card alone, without reading the engine. Raises `UserError`."""
    return _card_and_info(engine)[1]


def _card_and_info(engine: Path) -> tuple[ModelCard, EngineInfo]:
    require_file(engine, "an engine")
    beside = path_of(engine)
    if not beside.is_file():
        raise UserError(
            f"{engine}: its card {beside.name} is not beside it; copy both files together, or build the engine again"
        )
    try:
        if beside.stat().st_size > _MAX_BYTES:
            raise UserError(f"{beside}: not a model card, larger than {_MAX_BYTES:,} bytes; build the engine again")
        card = ModelCard.from_json(beside.read_text(encoding="utf-8"), str(beside))
    except UnicodeDecodeError as error:
        raise UserError(f"{beside}: not a model card; build the engine again") from error
    except OSError as error:
        raise UserError(f"cannot read {beside}: {error.strerror or error}") from error
    if card.engine is None:
        raise UserError(f"{beside}: the card of a model, not of an engine; build the engine again")
    return card, card.engine


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def copy_plugin(library: Path, folder: Path) -> Path:
    """Copy a plugin library into the folder of an engine; returns the copy.

    Its name holds a part of its digest, so that engines with different libraries can share a folder.
    """
    copy = folder / f"{library.name.partition('.')[0]}-{sha256(library)[:12]}.so"
    shutil.copyfile(library, copy)
    return copy


def plugin_beside(engine: Path, info: EngineInfo) -> Path | None:
    """The plugin library that was built with `engine` and lies beside it; None where there is none.

    Raises:
        UserError: the library there is another one.
    """
    library = engine.parent / info.plugin_file
    if not info.plugin_file or not library.is_file():
        return None
    digest = _digest(library)
    if digest != info.plugin_sha256:
        raise UserError(
            f"{library}: not the plugin library that {engine.name} was built with (its SHA-256 is {digest[:12]}..., "
            f"the card has {info.plugin_sha256[:12]}...); copy it again, or build the engine again"
        )
    return library


def check_runtime(engine: Path, info: EngineInfo, backend: EngineBackend, version: str) -> None:
    """Check that the library at hand can load an engine.

    Args:
        engine: the file, for the message.
        info: what the engine was built with.
        backend: the library at hand.
        version: of the library at hand.

    Raises:
        UserError: the engine is for the other backend, or for a version that this one cannot read.
    """
    if info.backend != backend:
        raise UserError(
            f"{engine}: an engine for {DISPLAY_NAMES[info.backend]}, and this is {DISPLAY_NAMES[backend]} {version}; "
            f"use --backend {info.backend}, or build it again with --backend {backend}"
        )
    if info.version == version:
        return
    built, here = _numbers(info.version), _numbers(version)
    if info.version_compatible and _reaches(built, here):
        return
    if backend == "tensorrt-rtx" and built[:1] == here[:1]:
        return  # TensorRT-RTX judges the engine's header itself (`get_engine_validity`)
    compatible = (
        "; it was built version-compatible, which reaches newer versions of the same major number, 11 from 10, and 10 "
        "from 8"
    )
    raise UserError(
        f"{engine}: built with {DISPLAY_NAMES[backend]} {info.version}, and this is {version}"
        f"{compatible if info.version_compatible else ''}; build it again here, or install version {info.version}"
    )


def check_gpu(engine: Path, info: EngineInfo, capability: str, device: str) -> None:
    """Check that an engine was built for the GPU at hand.

    Args:
        engine: the file, for the message.
        info: what the engine was built with; without capabilities the library chose them itself.
        capability: of the GPU at hand, such as "8.6".
        device: its name.

    Raises:
        UserError: the engine has no code for it.
    """
    if info.compute_capabilities and capability not in info.compute_capabilities:
        raise UserError(
            f"{engine}: built for compute capability {', '.join(info.compute_capabilities)}, and this GPU ({device}) "
            f"has {capability}; build it again for this GPU"
        )


def allows_several_contexts(info: EngineInfo) -> bool:
    """True when an engine may have several execution contexts at a time.

    A profile could be in use by one execution context alone until TensorRT 8.6 brought profile sharing, which engines
    before 10.0 have only where they were built with it. Engines of a fixed size have no profiles to share.
    """
    if info.backend == "tensorrt-rtx" or not info.profiles:
        return True
    version = _numbers(info.version)
    return version >= (10,) or (version >= (8, 6) and info.profile_sharing)


def check_plugin(engine: Path, info: EngineInfo, *, available: str, trusted: bool) -> None:
    """Check that the plugin an engine needs can be loaded.

    Args:
        engine: the file, for the message.
        info: what the engine was built with.
        available: version of the plugin that this machine can load, empty where there is none.
        trusted: the user allows engines to run the code they carry.

    Raises:
        UserError: the plugin is missing or of another version, or the engine carries code and is not trusted.
    """
    if info.plugin_embedded or info.version_compatible:
        if not trusted:
            raise UserError(
                f"{engine}: the engine carries code that loading it would run; if you built it or trust its "
                "source, load it with --trust-engine (trust_engine=True)"
            )
        return
    if not info.plugin_version:
        return
    if not available:
        raise UserError(
            f"{engine}: the engine needs the plugin library, which is not here; build it with  "
            "internimage-deploy build-plugin"
        )
    if available != info.plugin_version:
        raise UserError(
            f"{engine}: built with version {info.plugin_version} of the plugin library, and version {available} is "
            "here; build the engine again"
        )


def _reaches(built: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """True when a version-compatible engine loads in another version.

    Source: NVIDIA's support matrix for TensorRT 11.4 ("No other combination across major versions is supported").
    """
    return built <= here if built[:1] == here[:1] else (built[0], here[0]) in ((8, 10), (10, 11))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isascii() and part.isdigit())
