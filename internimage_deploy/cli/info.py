# SPDX-License-Identifier: Apache-2.0
"""`info`: a model file's card, graph statistics and multiply-adds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from internimage_deploy.cli.options import Size, model_argument
from internimage_deploy.errors import UserError, escaped
from internimage_deploy.runtime.engine.profiles import described

_DEFAULT_SIZE = (512, 512)
Json = dict[str, Any]
"""An object of the JSON report."""


_EXAMPLES = """\b
Examples:
  internimage-deploy info model.onnx --size 512x1024
  internimage-deploy info model.engine --json
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--size",
    type=Size("HxW"),
    help="Input size to count multiply-adds for, in an ONNX file.  [default: the model's own, 512x512 where it takes "
    "any]",
)
def info(model: Path, as_json: bool, size: tuple[int, int] | None) -> None:
    """Print the card of MODEL and, for an ONNX file, its parameters, operators and multiply-adds."""
    report = collect(model, size)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, escaped(value, keep="\n"))
    Console(width=None if Console().is_terminal else 120, highlight=False, markup=False).print(table)


def collect(path: Path, size: tuple[int, int] | None = None) -> Json:
    """The report of `info` about the model file `path`, as plain data for JSON. Raises `UserError`."""
    from internimage_deploy.runtime.engine.engine_backend import ENGINE_SUFFIXES

    if path.suffix.lower() in ENGINE_SUFFIXES:
        if size is not None:
            raise UserError(f"{path}: multiply-adds are counted in ONNX files only; leave --size out")
        return _engine_report(path)
    from internimage_deploy.onnx_tools.cost import UnknownShape, graph_statistics, multiply_adds
    from internimage_deploy.onnx_tools.model_file import card_of, read_model

    model = read_model(path)
    card = card_of(model, path)
    height, width = card.network_size
    fixed = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    if fixed and size and size != fixed:
        raise UserError(f"{path} takes one size, {fixed[0]}x{fixed[1]}, got --size {size[0]}x{size[1]}; leave it out")
    counted = size or fixed or _DEFAULT_SIZE
    if any(side % card.size_divisor for side in counted):
        raise UserError(f"--size {counted[0]}x{counted[1]}: expected multiples of {card.size_divisor}")
    statistics = graph_statistics(model, path)
    macs: Json = {"size": list(counted)}
    try:
        by_operator = multiply_adds(model, card, counted, path.parent)
        macs |= {"total": sum(by_operator.values()), "by_operator": by_operator}
    except UnknownShape as error:
        macs |= {"total": None, "reason": str(error)}
    graph = {"nodes": statistics.nodes, **asdict(statistics)}
    return {"file": path.name, "card": json.loads(card.to_json()), "graph": graph, "multiply_adds": macs}


def _engine_report(path: Path) -> Json:
    from internimage_deploy.runtime.engine import sidecar

    card = sidecar.read(path)
    return {"file": path.name, "card": json.loads(card.to_json()), "file_bytes": path.stat().st_size}


def _rows(report: Json) -> list[tuple[str, str]]:
    card = report["card"]
    names = card["classes"]
    listed = ", ".join(names[:8]) + (", ... (--json lists all)" if len(names) > 8 else "")
    resize = f"keep-ratio into {card['resize'][0]}x{card['resize'][1]}" if card["resize"] else "the image's own size"
    size = report["graph"]["file_bytes"] if "graph" in report else report["file_bytes"]
    rows = [
        ("file", f"{report['file']}, {size / 1e6:,.1f} MB"),
        ("architecture", card["architecture"]),
        ("classes", f"{len(names)}: {listed}"),
        ("input", _tensor(card["input"])),
        ("output", _tensor(card["output"])),
        ("resize", resize),
        ("window", _window(card["window"])),
        ("precision", card["precision"]),
        ("rewrites", ", ".join(card["rewrites"]) or "none"),
        ("source", ", ".join(f"{name} {value}" for name, value in card["source"].items()) or "not recorded"),
        ("made with", ", ".join(f"{name} {value}" for name, value in card["tools"].items()) or "not recorded"),
    ]
    if "graph" in report:
        return rows + _graph_rows(report["graph"], report["multiply_adds"])
    return rows + _engine_rows(card["engine"])


def _graph_rows(graph: Json, macs: Json) -> list[tuple[str, str]]:
    rows = [("parameters", f"{graph['parameters'] / 1e6:,.2f} M")]
    height, width = macs["size"]
    if macs["total"] is None:
        rows.append(("multiply-adds", f"unknown at {height}x{width}: {macs['reason']}"))
    else:
        by_operator = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in macs["by_operator"].items())
        rows.append(("multiply-adds", f"{macs['total'] / 1e9:,.2f} G at {height}x{width} ({by_operator})"))
    rows.append(("graph", f"{graph['nodes']} nodes, opset {graph['opset']}"))
    rows.append(("operators", ", ".join(f"{name} {count}" for name, count in graph["operators"].items())))
    return rows


def _engine_rows(engine: Json) -> list[tuple[str, str]]:
    gpus = ", ".join(engine["compute_capabilities"])
    rows = [
        ("engine", f"{engine['flavour']} {engine['version']}{', version-compatible' * engine['version_compatible']}"),
        ("GPU", f"compute capability {gpus}" if gpus else engine["device"] or "the library's own choice"),
    ]
    if engine["plugin_version"]:
        beside = engine["plugin_file"]
        where = "inside" if engine["plugin_embedded"] else f"beside it: {beside}" if beside else "in a file of its own"
        rows.append(("plugin library", f"version {engine['plugin_version']}, {where}"))
    rows.append(("float32 products", "may be in TF32" if engine["tf32"] else "in float32"))
    if engine["fusion"]:
        times = ", ".join(f"{form} {found:.3f} ms" for form, found in engine["fusion_ms"].items())
        rows.append(("fusion convolutions", f"{engine['fusion']}{f' (timed: {times})' if times else ''}"))
    return rows + [("profile", described(profile)) for profile in engine["profiles"]]


def _window(window: Json | None) -> str:
    if window is None:
        return "none, the network sees whole images"
    crop, stride = ("x".join(map(str, window[name])) for name in ("crop", "stride"))
    return f"crops of {crop}, every {stride} pixels"


def _tensor(spec: Json) -> str:
    return f"{spec['name']} {spec['dtype']} ({', '.join(map(str, spec['shape']))})"
