# SPDX-License-Identifier: Apache-2.0
"""From a model file to a graph that the compiler at hand can read: card, profiles, precision, lowering."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internimage_deploy.card import METADATA_KEY, ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.files import write_error
from internimage_deploy.onnx_tools.graph import Graph, save
from internimage_deploy.onnx_tools.logits import return_logits
from internimage_deploy.onnx_tools.model_file import read_model
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.engine_backend import Fusion, FusionForm, MsDeformAttnPlugin
from internimage_deploy.runtime.engine.gelu import OPSET, raise_gelu
from internimage_deploy.runtime.engine.layer_precision import OBEY, float32_nodes
from internimage_deploy.runtime.engine.lowering import lower
from internimage_deploy.runtime.engine.official import Classes, Palette, adapt_official, upgrade_official
from internimage_deploy.runtime.engine.operators import Parser, check, parser_of
from internimage_deploy.runtime.engine.plain_fusion import is_rewritten, make_plain
from internimage_deploy.runtime.engine.plugin_folds import allow_half, fuse_argmax, pack_offset_masks
from internimage_deploy.runtime.engine.plugin_nodes import (
    dcnv3_nodes,
    ms_deform_attn_nodes,
    plugin_operators,
    to_plugin_nodes,
)
from internimage_deploy.runtime.engine.precision import convert
from internimage_deploy.runtime.engine.profiles import InputSize, Profile, choose_profiles, tensor_shape
from internimage_deploy.runtime.engine.protocol import ExpectedTensor, Job
from internimage_deploy.runtime.engine.targets import TURING

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class BuildOptions:
    """Options of an engine build.

    Attributes:
        precision: fp32 keeps the graph; fp16 and bf16 convert it.
        keep_fp32: nodes that a conversion leaves in float32; see `precision.convert`.
        min, opt, max: profiles of a dynamic model: smallest, typical and largest input, one of each per profile.
        workspace_mib: the compiler's scratch memory in MiB; None for its default.
        optimization_level: 0 (quick build) to 5 (longest search); None for the compiler's default.
        compute_capabilities: GPUs that TensorRT-RTX compiles for; empty for its default set.
        timing_cache: file in which TensorRT keeps measured kernels; None for none.
        version_compatible: the engine also loads in newer versions; see `sidecar.check_runtime`.
        embed_plugin: put the plugin's code into the engine.
        tf32: let what runs in float32 multiply with TF32's 10 bits of mantissa.
        fusion: form of the decode head's fusion convolutions; see `plain_fusion`. `prepare` leaves them as they are for
            "auto".
        whole: compile for whole images what was evaluated with a sliding window.
        pack_offsets: let the DCNv3 plugin read offsets and mask from one tensor; see `plugin_folds`.
        fuse_argmax: let a plugin upsample the logits and take the argmax; see `plugin_folds`.
        half_interpolation: let the DCNv3 plugin interpolate float16 values in float16; see `plugin_folds`.
        ms_deform_attn: the plugin that TensorRT runs multi-scale deformable attention with; see `plugin_nodes`.
        classes, palette, size: the card's entries for a file without a card; see `official.adapt_official`.
    """

    precision: Precision = "fp32"
    keep_fp32: tuple[str, ...] = ()
    min: tuple[InputSize, ...] = ()
    opt: tuple[InputSize, ...] = ()
    max: tuple[InputSize, ...] = ()
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    embed_plugin: bool = False
    tf32: bool = False
    fusion: Fusion = "auto"
    whole: bool = False
    pack_offsets: bool = True
    fuse_argmax: bool = True
    half_interpolation: bool = False
    ms_deform_attn: MsDeformAttnPlugin = "own"
    classes: Classes | None = None
    palette: Palette | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class PreparedModel:
    """A graph that the compiler's parser can read, with its card and profiles."""

    graph: Graph
    card: ModelCard
    parser: Parser
    profiles: tuple[Profile, ...]
    lowered: tuple[str, ...]  # operators that were decomposed because the parser lacks them
    weights_beside: Path  # the file in whose folder external weights lie, as long as the graph is not saved
    plugins: tuple[str, ...]  # operators that a plugin runs
    fusion: FusionForm | Literal[""]  # form of the fusion convolutions; empty where none had been rewritten
    returns_logits: bool  # in place of the file's labels, for the sliding window

    @property
    def uses_plugin(self) -> bool:
        """True when the engine needs the plugin library."""
        return bool(self.plugins)

    def embeds_plugin(self, options: BuildOptions) -> bool:
        """True when the engine will carry the plugin's code."""
        return self.uses_plugin and options.embed_plugin


def prepare(model: Path, compiler: Compiler, options: BuildOptions) -> PreparedModel:
    """Read `model` and convert its graph for `compiler`, in memory.

    Raises:
        UserError: the file is broken, or the options do not fit it or the compiler.
    """
    _check_options(compiler, options)
    parser = parser_of(compiler.backend, compiler.version)
    graph = Graph(read_model(model), model.parent)
    stored = _card(graph, model, options)
    card = _for_window(graph, stored, model, whole=options.whole)
    profiles = choose_profiles(card, options.min, options.opt, options.max)
    fusion: FusionForm | Literal[""] = "rewritten" if is_rewritten(graph) else ""
    if fusion and options.fusion == "plain":
        make_plain(graph)
        fusion = "plain"
    if parser.reads("Gelu") and parser.newest_opset >= OPSET:
        raise_gelu(graph)
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
    attention = ms_deform_attn_nodes(graph)
    if options.ms_deform_attn == "tensorrt" and not attention:
        raise UserError(f"{model}: has no multi-scale deformable attention; leave --ms-deform-attn out")
    plugins: tuple[str, ...] = ()
    if compiler.backend == "tensorrt" and (dcnv3_nodes(graph) or attention):
        if options.pack_offsets:
            pack_offset_masks(graph)
        if options.fuse_argmax:
            fuse_argmax(graph)
        if options.half_interpolation:
            allow_half(graph)
        to_plugin_nodes(graph, options.ms_deform_attn)
        plugins = plugin_operators(graph)
    check(graph.model, parser)
    if options.embed_plugin and plugins and parser.version < (8, 6):
        raise UserError(f"--embed-plugin needs TensorRT 8.6 or later, this is {compiler.version}; leave it out")
    returns_logits = stored.emits_labels != card.emits_labels
    return PreparedModel(graph, card, parser, profiles, lowered, model, plugins, fusion, returns_logits)


def write_graph(prepared: PreparedModel, folder: Path) -> tuple[Path, Path]:
    """Write the graph to parse into `folder`; returns its path and the path beside which its weights lie."""
    path = folder / "model.onnx"
    for entry in prepared.graph.model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = prepared.card.to_json()
    try:
        if prepared.graph.new_weights:
            save(prepared.graph, path)
            return path, path
        path.write_bytes(prepared.graph.model.SerializeToString())
    except OSError as error:
        raise write_error(path, error) from error
    return path, prepared.weights_beside


def make_job(
    prepared: PreparedModel,
    compiler: Compiler,
    options: BuildOptions,
    *,
    model: Path,
    weights_beside: Path,
    output: Path,
    plugin: Path | None,
) -> Job:
    """The compilation of `prepared`, whose graph `write_graph` has written to `model`."""
    embed = prepared.embeds_plugin(options)
    flags: list[str] = []
    kept: tuple[str, ...] = ()
    lean = {"--embed-plugin": embed, "--version-compatible": options.version_compatible}
    if options.precision != "fp32" and not prepared.parser.strongly_typed:
        # 8.x: the graph's types alone neither make it choose float16 kernels nor keep it from doing so.
        flags += ["FP16", OBEY]
        kept = float32_nodes(prepared.graph)
    if embed or options.version_compatible:
        flags.append("VERSION_COMPATIBLE")
    card = prepared.card
    return Job(
        backend=compiler.backend,
        model=str(model.absolute()),
        weights_beside=str(weights_beside.absolute()),
        output=str(output.absolute()),
        input=_expected(card.input),
        outputs=(_expected(card.output),),
        profiles=tuple(
            {bound: tensor_shape(card.input, size) for bound, size in (("min", p.min), ("opt", p.opt), ("max", p.max))}
            for p in prepared.profiles
        ),
        flags=tuple(flags),
        strongly_typed=prepared.parser.strongly_typed,
        workspace_mib=options.workspace_mib,
        optimization_level=options.optimization_level,
        compute_capabilities=options.compute_capabilities,
        timing_cache=str(options.timing_cache or ""),
        plugin=str(plugin.absolute()) if plugin else "",
        embed_plugin=embed,
        lean_options=tuple(name for name, given in lean.items() if given),
        tf32=options.tf32,
        # Before 8.6 there is no such thing, and from 10.0 on profiles are shared without asking.
        share_profiles=compiler.backend == "tensorrt" and (8, 6) <= prepared.parser.version < (10, 0),
        float32_nodes=kept,
        tensorrt_plugins=options.ms_deform_attn == "tensorrt",
    )


def _expected(spec: TensorSpec) -> ExpectedTensor:
    return ExpectedTensor(spec.name, spec.dtype, tuple(side if isinstance(side, int) else -1 for side in spec.shape))


def _check_options(compiler: Compiler, options: BuildOptions) -> None:
    if options.half_interpolation and options.precision != "fp16":
        raise UserError("--half-interpolation interpolates float16 values, so it needs --fp16")
    if compiler.backend == "tensorrt":
        if options.compute_capabilities:
            raise UserError(
                "TensorRT compiles for the GPU it runs on, so --compute-capability has no effect; "
                "leave it out, or use --backend tensorrt-rtx"
            )
        if options.ms_deform_attn == "tensorrt" and (options.embed_plugin or options.version_compatible):
            raise UserError(
                "TensorRT's own plugins cannot be part of a version-compatible engine: with --ms-deform-attn tensorrt "
                "leave --embed-plugin and --version-compatible out"
            )
        return
    for option, given in (
        ("--ms-deform-attn", options.ms_deform_attn == "tensorrt"),
        ("--embed-plugin", options.embed_plugin),
        ("--no-pack-offsets", not options.pack_offsets),
        ("--no-fuse-argmax", not options.fuse_argmax),
        ("--half-interpolation", options.half_interpolation),
    ):
        if given:
            raise UserError(f"TensorRT-RTX takes no plugins, so {option} has no effect; leave it out")
    if options.timing_cache is not None:
        raise UserError(
            "TensorRT-RTX times no kernels while it compiles, so --timing-cache has no effect; leave it out"
        )
    if options.version_compatible:
        raise UserError("TensorRT-RTX comes without the lean runtime that --version-compatible needs; leave it out")
    if TURING in options.compute_capabilities and options.precision != "fp16":
        raise UserError(
            "TensorRT-RTX has no matrix products in float32 or bfloat16 for compute capability 7.5 (Turing); "
            "use --fp16 for it"
        )


def _for_window(graph: Graph, card: ModelCard, model: Path, *, whole: bool) -> ModelCard:
    """The engine's card. Changes `graph` to return logits where images are to be cut into crops. Raises `UserError`."""
    if whole:
        return dataclasses.replace(card, window=None)
    if card.window is None or not card.emits_labels:
        return card
    changed = return_logits(graph, card)
    if changed is None:
        raise UserError(
            f"{model}: was evaluated with a sliding window, which averages logits, and the file has none; "
            "export the checkpoint again, or compile it for whole images with --whole"
        )
    return changed


def _card(graph: Graph, model: Path, options: BuildOptions) -> ModelCard:
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
    upgrade_official(graph)
    return adapt_official(graph, options.classes, options.palette, options.size)
