# SPDX-License-Identifier: Apache-2.0
"""A model repository for Triton Inference Server.

    REPO/NAME/config.pbtxt
    REPO/NAME/1/model.onnx or model.plan
    REPO/NAME/libinternimage_trt_plugins.so, libinternimage_trt_register.so    (engines that need the plugin)

Triton treats every folder of a repository as a model, so the libraries lie in the model's own folder. It only opens the
libraries that it is told of, so that is the registering one, which registers the other.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internimage_deploy.card import METADATA_KEY, ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_path, atomic_write, require_file, write_error
from internimage_deploy.onnx_tools.model_file import external_files, read_card, read_model
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.trt_plugins.build import LIBRARY, REGISTER_LIBRARY, find_register_library

log = logging.getLogger(__name__)

_TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32"}
_WARM_UP_SIDE = 512
_MOUNT = "/models"


@dataclass(frozen=True)
class TritonOptions:
    """How Triton runs the model.

    Attributes:
        name: of the model and its folder.
        max_batch: maximum number of images in one run; a model of fixed batch size ignores it.
        delay_us: maximum time in microseconds that an image waits for others to form a batch.
        queue: maximum number of waiting images; further ones are rejected.
        instances: number of copies of the model.
        device: where they run; an engine always runs on the GPU.
        plugin: the compiled plugin library, for an engine that does not carry the plugin; None for the one beside the
            engine. The registering library is taken from the same folder, else from the cache.
    """

    name: str
    max_batch: int = 8
    delay_us: int = 5000
    queue: int = 64
    instances: int = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"
    plugin: Path | None = None


def export(model: Path, repository: Path, options: TritonOptions) -> list[str]:
    """Write `model` into `repository` and return the commands that start Triton with it.

    Raises:
        UserError: Triton cannot run the model in one step, its plugin is missing, or a file cannot be written.
    """
    is_engine = model.suffix.lower() != ".onnx"
    card = sidecar.read(model) if is_engine else read_card(model)
    _check(model, card, is_engine)
    library = _plugin_library(model, card, options)
    if card.window is not None:
        log.warning("Triton runs the network on whole images, and %s was evaluated with a sliding window", model)
    folder = repository / options.name
    try:
        (folder / "1").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    _copy(model, folder / "1" / ("model.plan" if is_engine else "model.onnx"))
    if not is_engine:
        for name in external_files(read_model(model)):
            _copy(model.parent / name, folder / "1" / name)
    plugin = None
    if library is not None:
        register = find_register_library(library)
        _copy(library, folder / LIBRARY)
        _copy(register, folder / REGISTER_LIBRARY)
        plugin = f"{_MOUNT}/{options.name}/{REGISTER_LIBRARY}"
    # Last: a server that polls the repository must not see a model without its files.
    atomic_write(folder / "config.pbtxt", config(card, options, is_engine=is_engine))
    compatible = card.engine is not None and card.engine.version_compatible
    gpu = is_engine or options.device == "gpu"
    return commands(repository, plugin, gpu=gpu, version_compatible=compatible)


def config(card: ModelCard, options: TritonOptions, *, is_engine: bool) -> str:
    """The text of `config.pbtxt` for the model of `card`."""
    batch = _batch_size(card, options)
    device = "gpu" if is_engine else options.device
    lines = [
        f"name: {_text(options.name)}",
        f"platform: {_text('tensorrt_plan' if is_engine else 'onnxruntime_onnx')}",
        f"max_batch_size: {batch}",
        f"input [ {_tensor(card.input, batch)} ]",
        f"output [ {_tensor(card.output, batch)} ]",
        f"instance_group [ {{ count: {options.instances} kind: KIND_{device.upper()} }} ]",
    ]
    if batch > 1:
        preferred = sorted({max(batch // 2, 1), batch})
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]",
            f"  max_queue_delay_microseconds: {options.delay_us}",
            f"  default_queue_policy {{ timeout_action: REJECT max_queue_size: {options.queue} }}",
            "}",
        ]
    warm_up = " ".join(f"dims: {side}" for side in _warm_up_shape(card, batch))
    lines += [
        "model_warmup [ {",
        '  name: "black image" batch_size: 1',
        f"  inputs {{ key: {_text(card.input.name)} "
        f"value {{ data_type: {_TYPES[card.input.dtype]} {warm_up} zero_data: true }} }}",
        "} ]",
        f"parameters {{ key: {_text(METADATA_KEY)} value {{ string_value: {_text(_metadata(card))} }} }}",
    ]
    return "\n".join(lines) + "\n"


def commands(repository: Path, plugin: str | None, *, gpu: bool, version_compatible: bool = False) -> list[str]:
    """Shell commands that start Triton on `repository` and check that it is ready.

    `plugin` is the path of the registering library inside the container, None for none.
    """
    gpus = "--gpus all " if gpu else ""
    # Triton's TensorRT backend opens these before it reads an engine. LD_PRELOAD would open them in every program of
    # the container, each of which would load TensorRT for them.
    backend = f" --backend-config=tensorrt,plugins={plugin}" if plugin else ""
    # A version-compatible engine carries code, which Triton runs only with this setting.
    backend += " --backend-config=tensorrt,version-compatible=true" if version_compatible else ""
    return [
        f"docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -p 8002:8002 "
        f"-v {shlex.quote(f'{repository.resolve()}:{_MOUNT}:ro')} nvcr.io/nvidia/tritonserver:YY.MM-py3 "
        f"tritonserver --model-repository={_MOUNT}{backend}",
        "curl -f localhost:8000/v2/health/ready",
    ]


def _check(model: Path, card: ModelCard, is_engine: bool) -> None:
    if not (card.takes_uint8 and card.emits_labels):
        windowed = card.engine is not None and card.window is not None
        raise UserError(
            f"{model}: the model takes {card.input.name} ({card.input.dtype}) and returns {card.output.name}; Triton "
            "runs the network only, so it must take uint8 images and return labels: "
            + ("build the engine with  --whole" if windowed else "export it with  --input uint8 --emit labels")
        )
    if not is_engine:
        return
    assert card.engine is not None
    if card.engine.backend != "tensorrt":
        raise UserError(
            f"{model}: an engine for {card.engine.backend}, which Triton does not run; "
            "build one with  build-engine --backend tensorrt"
        )


def _plugin_library(model: Path, card: ModelCard, options: TritonOptions) -> Path | None:
    """The plugin library that Triton has to register for this model; None for none."""
    if options.plugin is not None:
        require_file(options.plugin, "a plugin library")
    if card.engine is None or not card.engine.plugin_version:
        return None
    library = options.plugin or sidecar.plugin_beside(model, card.engine)
    if library is None and not card.engine.plugin_embedded:
        raise UserError(
            f"{model}: the engine needs the plugin library, which is not beside it, and Triton must load it first; "
            "compile it with  build-plugin  against the TensorRT of your Triton image and name it with --plugin"
        )
    return library


def _batch_size(card: ModelCard, options: TritonOptions) -> int:
    """Triton's max_batch_size: 0 where the batch is fixed and so an ordinary dimension."""
    if card.batch is not None:
        return 0
    if card.engine is not None:
        return min([options.max_batch, *(profile["max"][0] for profile in card.engine.profiles)])
    return options.max_batch


def _tensor(spec: TensorSpec, batch: int) -> str:
    dims = [side if isinstance(side, int) else -1 for side in spec.shape]
    return (
        f"{{ name: {_text(spec.name)} data_type: {_TYPES[spec.dtype]} "
        f"dims: [ {', '.join(map(str, dims[1:] if batch else dims))} ] }}"
    )


def _warm_up_shape(card: ModelCard, batch: int) -> list[int]:
    height, width = (_WARM_UP_SIDE if isinstance(side, str) else side for side in card.network_size)
    if card.engine is not None and card.engine.profiles and card.is_dynamic:
        _, height, width = card.engine.profiles[0]["opt"]
    return [*([] if batch else [card.batch or 1]), height, width, 3]


def _metadata(card: ModelCard) -> str:
    metadata = {
        "architecture": card.architecture,
        "classes": card.classes,
        "palette": card.palette,
        "resize": card.resize,
        "size_divisor": card.size_divisor,
        "precision": card.precision,
    }
    return json.dumps(metadata, separators=(",", ":"))


def _text(value: str) -> str:
    """A quoted string of protobuf's text format; JSON's escapes of ASCII text are among its own."""
    escaped = []
    for byte in value.encode():
        char = chr(byte)
        escaped.append(f"\\{char}" if char in '"\\' else char if 32 <= byte < 127 else f"\\{byte:03o}")
    return f'"{"".join(escaped)}"'


def _copy(source: Path, target: Path) -> None:
    try:
        with atomic_path(target) as path:
            shutil.copyfile(source, path)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {target}: {error.strerror or error}") from error
