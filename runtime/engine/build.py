# SPDX-License-Identifier: Apache-2.0
"""Building an engine: read and convert the model, compile it, and write the engine with its card beside it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from internimage_deploy.cache import cache_folder
from internimage_deploy.card import EngineInfo, ModelCard
from internimage_deploy.datasets.classes import read_classes
from internimage_deploy.errors import UserError
from internimage_deploy.files import sha256, staging_folder
from internimage_deploy.onnx_tools.graph import Graph, save
from internimage_deploy.operators import contract
from internimage_deploy.runtime.engine import sidecar, targets
from internimage_deploy.runtime.engine.compilers import Compiler, choose
from internimage_deploy.runtime.engine.engine_backend import (
    ENGINE_BACKENDS,
    ENGINE_SUFFIXES,
    FUSIONS,
    MS_DEFORM_ATTN_PLUGINS,
    EngineBackend,
    Fusion,
    MsDeformAttnPlugin,
)
from internimage_deploy.runtime.engine.engine_files import Engine
from internimage_deploy.runtime.engine.fusion_choice import choose_form, median_ms_on_gpu
from internimage_deploy.runtime.engine.prepare import (
    BuildOptions,
    Precision,
    PreparedModel,
    make_job,
    prepare,
    write_graph,
)
from internimage_deploy.runtime.engine.process import compile_in_process
from internimage_deploy.runtime.engine.profiles import InputSize, profile_note
from internimage_deploy.runtime.engine.protocol import BuildEvent, CompilerChosen, CompilerWarning
from internimage_deploy.trt_plugins import library

OnEvent = Callable[[BuildEvent], None]
InputSizes = InputSize | Sequence[InputSize]
"""One (batch, height, width), or one per profile."""


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine.

    Attributes:
        path: the engine file; its card is beside it, with ".json" after the name.
        card: the card, whose `engine` says what the engine was built with.
        size_bytes: size of the engine file.
        seconds: duration of the build.
        lowered: operators that were decomposed because the compiler's parser lacks them.
        notes: sentences about what the engine needs where it runs.
        warnings: the compiler's warnings.
    """

    path: Path
    card: ModelCard
    size_bytes: int
    seconds: float
    lowered: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def build_engine(
    model: str | Path,
    output: str | Path,
    *,
    precision: Precision = "fp32",
    backend: EngineBackend | None = None,
    min: InputSizes | None = None,
    opt: InputSizes | None = None,
    max: InputSizes | None = None,
    compute_capabilities: Sequence[str] = (),
    keep_fp32: Sequence[str] = (),
    workspace_mib: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | Path | None = None,
    use_timing_cache: bool = True,
    version_compatible: bool = False,
    plugin: str | Path | None = None,
    pack_offsets: bool = True,
    fuse_argmax: bool = True,
    half_interpolation: bool = False,
    embed_plugin: bool = False,
    tf32: bool = False,
    fusion: Fusion = "auto",
    ms_deform_attn: MsDeformAttnPlugin = "own",
    save_onnx: str | Path | None = None,
    whole: bool = False,
    classes: str | Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    on_event: OnEvent | None = None,
) -> BuiltEngine:
    """Compile an ONNX file into an engine, as the command `build-engine` does.

    `output` and its card (`output` with ".json" after the name) are both written, or neither. The compiler runs in a
    process of its own.

    Args:
        model: a file that `export-onnx` wrote, or an ONNX file of the official InternImage repository.
        output: the engine file to write.
        precision: "fp32" keeps the graph; "fp16" and "bf16" convert it, with statistics and sums in float32.
        backend: "tensorrt" or "tensorrt-rtx"; None for TensorRT where it and a GPU are available, else TensorRT-RTX.
        min: smallest input of a dynamic model as (batch, height, width) in pixels, or one per profile.
        opt: input that the engine is tuned for, like `min`.
        max: largest input, like `min`. Of the three, those left out follow from the others, or from the model card
            where all are left out. A model of fixed size takes none.
        compute_capabilities: GPUs that TensorRT-RTX compiles for, such as ("8.6", "8.9"); empty for 8.0, 8.6, 8.9,
            12.0 and later. TensorRT compiles for the GPU at hand.
        keep_fp32: operator types, node names or name patterns with `*` to keep in float32.
        workspace_mib: limit of the compiler's scratch memory in MiB; None for the compiler's default.
        optimization_level: 0 (quick build) to 5 (longest search); None for the compiler's default.
        timing_cache: file in which TensorRT keeps measured kernels; None for one in the user's cache folder.
        use_timing_cache: False to measure every kernel anew.
        version_compatible: make the engine load in newer TensorRT versions too: of the same major number, and of 11 for
            an engine of 10, of 10 for one of 8. It carries code, which loading it has to allow.
        plugin: the plugin library for TensorRT; None for the one in the user's cache, compiled if there is none.
        pack_offsets: let the DCNv3 plugin read offsets and mask from the one tensor that a product computes, where it
            can. False keeps them apart, with two more kernels per layer.
        fuse_argmax: let a plugin upsample the logits and take the argmax in one step, where TensorRT makes labels.
        half_interpolation: let the DCNv3 plugin choose kernels that interpolate float16 values in float16, with
            precision "fp16"; compare labels before use.
        embed_plugin: put the plugin's code into the engine, which makes it version-compatible and needs the lean
            runtime. By default the library is copied beside the engine.
        tf32: let what runs in float32 multiply with TF32's 10 bits of mantissa, on GPUs that can.
        fusion: form of UPerNet's fusion convolutions: "rewritten" as exported, "plain" for upsampling, concatenation
            and one convolution; "auto" for the faster of both on the GPU at hand, without a GPU the rewritten form.
        ms_deform_attn: the plugin that TensorRT runs the multi-scale deformable attention of Mask2Former models with:
            "own" for this project's; "tensorrt" for the one that TensorRT brings, which takes float32 (with
            `keep_fp32=["MSDeformAttn"]` also within a float16 model).
        save_onnx: also write the converted graph to this file.
        whole: compile for whole images. By default a model that was evaluated with a sliding window is compiled to
            return logits for its crops.
        classes: for a file without a model card: a data set's name, a number of classes, a text file with one name
            per line, or the names themselves.
        size: for a file without a model card: (height, width) in pixels that its input is fixed to.
        on_event: called with the events of `protocol` while the build goes on.

    Raises:
        UserError: the model, an option or this machine does not allow the build; the message says what to change.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    output = Path(output)
    check_output_name(output)
    if precision not in get_args(Precision):
        raise UserError(f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}")
    if backend is not None and backend not in ENGINE_BACKENDS:
        raise UserError(f"backend is {backend!r}, expected one of {', '.join(ENGINE_BACKENDS)}")
    if ms_deform_attn not in MS_DEFORM_ATTN_PLUGINS:
        raise UserError(f"ms_deform_attn is {ms_deform_attn!r}, expected one of {', '.join(MS_DEFORM_ATTN_PLUGINS)}")
    if fusion not in FUSIONS:
        raise UserError(f"fusion is {fusion!r}, expected one of {', '.join(FUSIONS)}")
    if timing_cache is not None and not use_timing_cache:
        raise UserError("a timing cache is named and switched off; leave one of the two options out")
    capabilities = targets.parse(compute_capabilities) if compute_capabilities else ()
    compiler = choose(backend)
    names, palette = (None, None) if classes is None else read_classes(classes)
    if timing_cache is None and use_timing_cache and compiler.backend == "tensorrt":
        timing_cache = default_timing_cache(compiler.version)
    options = BuildOptions(
        precision=precision,
        keep_fp32=tuple(keep_fp32),
        min=_sizes(min),
        opt=_sizes(opt),
        max=_sizes(max),
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        compute_capabilities=capabilities,
        timing_cache=None if timing_cache is None else Path(timing_cache),
        version_compatible=version_compatible,
        embed_plugin=embed_plugin,
        tf32=tf32,
        fusion=fusion,
        whole=whole,
        pack_offsets=pack_offsets,
        fuse_argmax=fuse_argmax,
        half_interpolation=half_interpolation,
        ms_deform_attn=ms_deform_attn,
        classes=names,
        palette=palette,
        size=size,
    )
    return build(
        Path(model),
        output,
        compiler,
        options,
        on_event=on_event or (lambda event: None),
        save_onnx=None if save_onnx is None else Path(save_onnx),
        find_plugin=lambda: library.find_library(
            None if plugin is None else Path(plugin), tensorrt=compiler.version, build=True
        ),
        measure=lambda engine: median_ms_on_gpu(engine, compiler.backend),
    )


def build(
    model: Path,
    output: Path,
    compiler: Compiler,
    options: BuildOptions,
    *,
    on_event: OnEvent = lambda event: None,
    save_onnx: Path | None = None,
    find_plugin: Callable[[], Path] | None = None,
    measure: Callable[[Path], float] | None = None,
) -> BuiltEngine:
    """Build the engine `output` and its card with a given compiler; see `build_engine`.

    Args:
        model: the ONNX file.
        output: the engine file.
        compiler: what `compilers.choose` returned.
        options: precision, profiles, limits.
        on_event: called with every event.
        save_onnx: also write the converted graph here.
        find_plugin: returns the path of the plugin library; called only where the engine needs the plugin.
        measure: returns the milliseconds that an engine takes, to choose between forms of the network; None where no
            engine can be run.
    """
    start = time.monotonic()
    warnings: dict[str, None] = {}  # in order, each once

    def collect_warnings(event: BuildEvent) -> None:
        if isinstance(event, CompilerWarning):
            warnings[event.text] = None
        on_event(event)

    on_event(CompilerChosen(str(compiler)))
    prepared = prepare(model, compiler, options)
    plugin = None
    if prepared.uses_plugin:
        assert find_plugin is not None
        plugin = find_plugin()
    notes: list[str] = []
    with staging_folder(output) as stage:

        def compile_form(prepared: PreparedModel) -> Engine:
            return _compile_form(stage, output.name, prepared, compiler, options, plugin, collect_warnings)

        engine = compile_form(prepared)
        if options.fusion == "auto" and prepared.fusion:
            engine, note = choose_form(
                engine,
                lambda: compile_form(prepare(model, compiler, dataclasses.replace(options, fusion="plain"))),
                measure,
            )
            notes.append(note)
        if save_onnx is not None:
            _save_graph(*engine.graph, save_onnx)
        engine.move_to(stage)
    return BuiltEngine(
        path=output,
        card=engine.card,
        size_bytes=engine.size_bytes,
        seconds=time.monotonic() - start,
        lowered=prepared.lowered,
        notes=(*_notes(prepared, options), *notes),
        warnings=tuple(warnings),
    )


def _compile_form(
    stage: Path,
    name: str,
    prepared: PreparedModel,
    compiler: Compiler,
    options: BuildOptions,
    plugin: Path | None,
    on_event: OnEvent,
) -> Engine:
    """Compile `prepared` into the engine `name` in a new folder of `stage`, which is named after the form of the model.

    `plugin` is the path of the plugin library, None where the engine needs none.
    """
    folder = stage / (prepared.fusion or "engine")
    graph = folder / "graph"
    graph.mkdir(parents=True)
    engine = folder / name
    parsed, weights_beside = write_graph(prepared, graph)
    job = make_job(
        prepared, compiler, options, model=parsed, weights_beside=weights_beside, output=engine, plugin=plugin
    )
    compiled = compile_in_process(job, on_event)
    beside = None if plugin is None or job.embed_plugin else sidecar.copy_plugin(plugin, folder)
    info = EngineInfo(
        backend=compiler.backend,
        version=compiled.version,
        sha256=sha256(engine),
        compute_capabilities=options.compute_capabilities,
        profiles=tuple(profile.as_dict() for profile in prepared.profiles),
        plugin_version=contract.PLUGIN_VERSION if prepared.uses_plugin else "",
        plugin_embedded=job.embed_plugin,
        plugin_file=beside.name if beside else "",
        plugin_sha256=sha256(beside) if beside else "",
        version_compatible=job.embed_plugin or options.version_compatible,
        device=compiled.device,
        profile_sharing=prepared.parser.can_share_profiles,
        tf32=options.tf32,
        fusion=prepared.fusion,
        plugins=prepared.plugins,
    )
    card = dataclasses.replace(prepared.card, engine=info)
    return Engine(engine, card, (parsed, weights_beside), compiled.size_bytes)


def check_output_name(output: Path) -> None:
    """Check that commands will recognise the file `output` as an engine by its name. Raises `UserError`."""
    ending = output.suffix.lower()
    if ending not in ENGINE_SUFFIXES:
        known = "is named like an ONNX file" if ending == ".onnx" else "is not named like an engine"
        example = output.with_suffix(".engine").name
        raise UserError(f"{output} {known}; expected a name that ends in {', '.join(ENGINE_SUFFIXES)}, as {example}")


def default_timing_cache(version: str) -> Path:
    """The file in the user's cache folder that keeps measured kernels for this version of TensorRT."""
    return cache_folder() / "timing" / f"tensorrt-{version}.cache"


def _sizes(sizes: InputSizes | None) -> tuple[InputSize, ...]:
    """One size per profile, from one size or several."""
    if sizes is None:
        return ()
    single = len(sizes) > 0 and isinstance(sizes[0], int)
    result = []
    for size in cast(Sequence[Sequence[int]], (sizes,) if single else sizes):
        if len(size) != 3 or not all(side > 0 for side in size):
            raise UserError(f"got the input size {tuple(size)}, expected (batch, height, width) such as (1, 512, 512)")
        result.append((size[0], size[1], size[2]))
    return tuple(result)


def _save_graph(parsed: Path, weights_beside: Path, target: Path) -> None:
    """Copy the graph that was parsed, with its weights in one file or beside it."""
    import onnx

    graph = Graph(onnx.load(str(parsed), load_external_data=False), weights_beside.parent)
    with staging_folder(target) as stage:
        save(graph, stage / target.name)


def _notes(prepared: PreparedModel, options: BuildOptions) -> tuple[str, ...]:
    notes = []
    if prepared.returns_logits:
        notes.append(
            "the engine returns logits in place of labels, for the sliding window that the model was evaluated with; "
            "--whole compiles it for labels of whole images"
        )
    if derived := profile_note(prepared.profiles, options.min, options.opt, options.max):
        notes.append(derived)
    if options.fusion != "auto" and not prepared.fusion:
        notes.append("the model has no rewritten fusion convolutions, so --fusion has no effect")
    if prepared.embeds_plugin(options):
        notes.append(
            "the engine carries the plugin's code, so it is version-compatible, which may cost speed, and loading it "
            "needs --trust-engine"
        )
    elif prepared.uses_plugin:
        notes.append("the plugin library lies beside the engine: copy the engine, its card and the library together")
    return tuple(notes)
