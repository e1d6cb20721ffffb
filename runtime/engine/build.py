# SPDX-License-Identifier: Apache-2.0
"""Building an engine from start to end: read, convert, lower, compile, describe."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internimage_deploy.card import METADATA_KEY, EngineInfo, ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.files import sha256, staging_folder, write_error
from internimage_deploy.onnx_tools.graph import Graph, save
from internimage_deploy.onnx_tools.model_file import read_model
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.compilers import Compiler, gpu_problem
from internimage_deploy.runtime.engine.job import Job
from internimage_deploy.runtime.engine.lowering import lower
from internimage_deploy.runtime.engine.operators import Parser, check, parser_of
from internimage_deploy.runtime.engine.plugin_nodes import dcnv3_nodes, for_plugin
from internimage_deploy.runtime.engine.precision import convert
from internimage_deploy.runtime.engine.process import run
from internimage_deploy.runtime.engine.profiles import Profile, Size, plan, tensor_shape
from internimage_deploy.runtime.engine.targets import TURING

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Options:
    """What one can choose about an engine.

    Attributes:
        precision: fp32 keeps the graph; fp16 and bf16 convert it.
        keep_fp32: nodes that a conversion leaves alone; see `precision.convert`.
        least, usual, most: profiles of a dynamic model, each a list of (batch, height, width).
        workspace_mib: the compiler's scratch memory in MiB; None for its default.
        optimization_level: 0 (quick build) to 5 (quick engine); None for the compiler's default.
        compute_capabilities: targets of TensorRT-RTX; empty for its default set.
        timing_cache: file that TensorRT keeps measured kernels in; None for none.
        version_compatible: the engine also loads in newer versions of the same major number.
        strip_weights: the engine leaves out weights that can be refitted.
        embed_plugin: the engine carries the plugin's code.
        classes, palette, size: what the card of a file without one is to say; see `official.adopt`.
    """

    precision: Precision = "fp32"
    keep_fp32: tuple[str, ...] = ()
    least: tuple[Size, ...] = ()
    usual: tuple[Size, ...] = ()
    most: tuple[Size, ...] = ()
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    strip_weights: bool = False
    embed_plugin: bool = True
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Prepared:
    """A graph that the parser at hand can read, with its card and profiles."""

    graph: Graph
    card: ModelCard
    parser: Parser
    profiles: tuple[Profile, ...]
    lowered: tuple[str, ...]
    weights_beside: Path  # the file in whose folder external weights lie, as long as the graph is not saved
    uses_plugin: bool


@dataclass(frozen=True)
class Built:
    """A finished engine."""

    path: Path
    card: ModelCard
    size_bytes: int
    seconds: float
    inputs: tuple[dict[str, Any], ...]  # {"name", "dtype", "shape"} as the network has them; free sizes are -1
    outputs: tuple[dict[str, Any], ...]
    lowered: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(model: Path, compiler: Compiler, options: Options) -> Prepared:
    """Read the model and make its graph fit for `compiler`; nothing is written.

    Raises:
        UserError: the file is broken, or the options do not fit it or the compiler.
    """
    _check_options(compiler, options)
    parser = parser_of(compiler.flavour, compiler.version)
    graph = Graph(read_model(model), model.parent)
    card = _card(graph, model, options)
    profiles = plan(card, options.least, options.usual, options.most)
    kept: tuple[str, ...] = ()
    if options.precision != "fp32":
        if card.precision != "fp32":
            raise UserError(f"{model}: already {card.precision}; export the checkpoint again for another precision")
        if options.precision == "bf16" and not parser.bfloat16:
            raise UserError(f"{parser} does not know bfloat16; use --fp16")
        turing = TURING in options.compute_capabilities
        kept = convert(graph, options.precision, keep=options.keep_fp32, all_products_low=turing)
        card = dataclasses.replace(card, precision=options.precision, kept_fp32=kept)
    elif options.keep_fp32:
        raise UserError("--keep-fp32 needs --fp16 or --bf16")
    lowered = lower(graph, parser)
    plugin = compiler.flavour == "tensorrt" and bool(dcnv3_nodes(graph))
    if plugin:
        for_plugin(graph)
    check(graph.model, parser)
    return Prepared(graph, card, parser, profiles, lowered, model, plugin)


def build(
    model: Path,
    target: Path,
    compiler: Compiler,
    options: Options,
    *,
    follow: Callable[[dict[str, Any]], None] = lambda event: None,
    save_onnx: Path | None = None,
    plugin: Callable[[], tuple[Path, str]] | None = None,
) -> Built:
    """Build the engine `target` and its card beside it; both appear, or neither.

    Args:
        model: what `export-onnx` wrote, or an ONNX file of the official repository.
        target: the engine file.
        compiler: what `compilers.choose` found.
        options: precision, profiles, limits.
        follow: gets progress events (see `job`).
        save_onnx: also write the converted graph here.
        plugin: finds, or builds, the plugin library; returns its path and version. Called only where it is needed.

    Raises:
        UserError: anything a user can change; see `prepare`, `compile.compile_engine`.
        KeyboardInterrupt: stopped; nothing was left behind.
    """
    start = time.monotonic()
    ready = prepare(model, compiler, options)
    library, plugin_version = Path(), ""
    if ready.uses_plugin:
        assert plugin is not None
        library, plugin_version = plugin()
    embed = ready.uses_plugin and options.embed_plugin and ready.parser.version >= (8, 6)
    with staging_folder(target) as stage:
        parsed, beside = _store(ready, stage)
        job = _job(ready, compiler, options, parsed, beside, stage / target.name, library, embed)
        facts = run(job, follow)
        if save_onnx is not None:
            _keep(parsed, beside, save_onnx)
        shutil.rmtree(parsed.parent)
        engine = stage / target.name
        card = dataclasses.replace(
            ready.card,
            engine=EngineInfo(
                flavour=compiler.flavour,
                version=facts["version"],
                sha256=sha256(engine),
                compute_capabilities=options.compute_capabilities,
                profiles=tuple(profile.as_dict() for profile in ready.profiles),
                plugin_version=plugin_version,
                plugin_embedded=embed,
                version_compatible=embed or options.version_compatible,
                device=facts["device"],
            ),
        )
        sidecar.path_of(engine).write_text(card.to_json() + "\n")
    return Built(
        target,
        card,
        facts["bytes"],
        time.monotonic() - start,
        tuple(facts["inputs"]),
        tuple(facts["outputs"]),
        ready.lowered,
        _notes(ready, options, embed),
    )


def _check_options(compiler: Compiler, options: Options) -> None:
    if compiler.flavour == "tensorrt":
        if options.compute_capabilities:
            raise UserError(
                "TensorRT compiles for the GPU it runs on, so --compute-capability has no effect; "
                "leave it out, or use --backend tensorrt-rtx"
            )
        return
    if options.timing_cache is not None:
        raise UserError(
            "TensorRT-RTX times no kernels while it compiles, so --timing-cache has no effect; leave it out"
        )
    if options.version_compatible:
        raise UserError("TensorRT-RTX comes without the lean runtime that --version-compatible needs; leave it out")
    if options.strip_weights and (problem := gpu_problem()):
        raise UserError(
            f"TensorRT-RTX strips weights only where it finds a GPU, and {problem}; leave --strip-weights out"
        )
    if TURING in options.compute_capabilities and options.precision != "fp16":
        raise UserError(
            "TensorRT-RTX has no matrix products in float32 or bfloat16 for compute capability 7.5 (Turing); "
            "use --fp16 for it"
        )


def _card(graph: Graph, model: Path, options: Options) -> ModelCard:
    from internimage_deploy.runtime.engine.official import adopt, modernise

    for entry in graph.model.metadata_props:
        if entry.key == METADATA_KEY:
            if options.classes is not None or options.size is not None:
                raise UserError(f"{model}: has a model card, so --classes and --size have no effect; leave them out")
            return ModelCard.from_json(entry.value, str(model))
    if options.classes is None or options.palette is None:
        raise UserError(
            f"{model}: an ONNX file without a model card; export the checkpoint with export-onnx, or, for a file that "
            "the official repository exported, name its classes: --classes ade20k (or a file with a name a line)"
        )
    modernise(graph)
    return adopt(graph, options.classes, options.palette, options.size)


def _store(ready: Prepared, stage: Path) -> tuple[Path, Path]:
    """Write the graph to parse; returns its path and the path beside which its weights lie."""
    folder = stage / "graph"
    folder.mkdir()
    path = folder / "model.onnx"
    for entry in ready.graph.model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = ready.card.to_json()
    try:
        if ready.graph.made:
            save(ready.graph, path)
            return path, path
        path.write_bytes(ready.graph.model.SerializeToString())
    except OSError as error:
        raise write_error(path, error) from error
    return path, ready.weights_beside


def _job(
    ready: Prepared,
    compiler: Compiler,
    options: Options,
    model: Path,
    beside: Path,
    output: Path,
    plugin: Path,
    embed: bool,
) -> Job:
    spec = ready.card.input
    flags = []
    if options.precision != "fp32" and not ready.parser.strongly_typed:
        flags.append("FP16")  # 8.x: the graph's types alone do not make it choose float16 kernels
    if embed or options.version_compatible:
        flags.append("VERSION_COMPATIBLE")
    if options.strip_weights:
        flags.append("STRIP_PLAN")
    return Job(
        flavour=compiler.flavour,
        model=str(model.absolute()),
        weights_beside=str(beside.absolute()),
        output=str(output.absolute()),
        input_name=spec.name,
        profiles=tuple(
            {kind: tensor_shape(spec, size) for kind, size in (("min", p.min), ("opt", p.opt), ("max", p.max))}
            for p in ready.profiles
        ),
        flags=tuple(flags),
        strongly_typed=ready.parser.strongly_typed,
        workspace_mib=options.workspace_mib,
        optimization_level=options.optimization_level,
        compute_capabilities=options.compute_capabilities,
        timing_cache=str(options.timing_cache or ""),
        plugin=str(plugin.absolute()) if ready.uses_plugin else "",
        embed_plugin=embed,
        expected_input=(spec.name, spec.dtype),
        expected_output=(ready.card.output.name, ready.card.output.dtype),
    )


def _keep(parsed: Path, beside: Path, target: Path) -> None:
    """Copy the graph that was parsed, in one file or with its weights beside it."""
    import onnx

    model = onnx.load(str(parsed), load_external_data=False)
    graph = Graph(model, beside.parent)
    with staging_folder(target) as stage:
        save(graph, stage / target.name)


def _notes(ready: Prepared, options: Options, embed: bool) -> tuple[str, ...]:
    notes = []
    if embed:
        notes.append(
            "the engine carries the plugin's code, so it is version-compatible, which may cost speed, and loading it "
            "needs --trust-engine; --no-embed-plugin keeps the plugin apart"
        )
    elif ready.uses_plugin:
        notes.append("the engine needs the DCNv3 plugin where it runs:  internimage-deploy build-plugin")
    if options.strip_weights:
        notes.append("the engine lacks its weights: refit it from the ONNX file before use")
    return tuple(notes)
