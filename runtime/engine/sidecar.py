# SPDX-License-Identifier: Apache-2.0
"""The card beside an engine, `MODEL.engine.json`, and checks that name a problem before TensorRT would."""

from __future__ import annotations

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
    try:
        digest = sha256(engine)
    except OSError as error:
        raise UserError(f"cannot read {engine}: {error.strerror or error}") from error
    if digest != info.sha256:
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
    if info.version_compatible and built[:1] == here[:1] and built <= here:
        return
    if backend == "tensorrt-rtx" and built[:1] == here[:1]:
        return  # TensorRT-RTX judges the engine's header itself (`get_engine_validity`)
    compatible = "; it was built version-compatible, which reaches newer versions of the same major number only"
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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isascii() and part.isdigit())
