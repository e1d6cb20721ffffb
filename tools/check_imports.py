# SPDX-License-Identifier: Apache-2.0
"""Check which part of the project imports which: `python tools/check_imports.py [--count]`, run by `make lint`.

The rules are `ROOMS` and `RUNTIME_LAYERS`; docs/architecture.md explains them. Every import counts, wherever in a file
it stands. The public API and the command group reach into the rooms from inside functions only, on first use.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = "internimage_deploy"


@dataclass(frozen=True)
class Room:
    """What a part of the project may import: other rooms, and no package of `never`."""

    rooms: tuple[str, ...]
    never: tuple[str, ...]
    lazily: tuple[str, ...] = ()  # rooms that may be imported inside functions only


_GPU_PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "pycuda", "cuda")
_ROOMS = ("exporter", "trt_plugins", "runtime")
ROOMS = {
    "ground": Room((), ("torch", "onnxscript", *_GPU_PACKAGES)),
    "exporter": Room(("ground",), _GPU_PACKAGES),
    "trt_plugins": Room(("ground",), ("torch", "onnxscript")),
    "runtime": Room(("ground", "trt_plugins"), ("torch", "onnxscript")),
    "cli": Room(("ground", *_ROOMS), ()),
    "api": Room(("ground", "cli"), (), lazily=_ROOMS),
}
# Folders of runtime/ from the lowest to the highest; "" is its own modules. One imports those before it.
RUNTIME_LAYERS = ("imaging", "gpu", "engine", "backends", "", "pipelines", "evaluation", "serving", "cluster")
_API = ("__init__", "__main__", "cli.main")


@dataclass(frozen=True)
class Import:
    """One import of one of our modules or of a third-party package."""

    source: str
    target: str
    line: int
    in_function: bool


def room_of(module: str) -> str:
    """The room of a module, given without the root: "runtime.card" is of "runtime", "errors" of the ground."""
    if module in _API:
        return "api"
    first = module.partition(".")[0]
    return first if first in ROOMS else "ground"


def modules(root: Path) -> dict[str, Path]:
    """Every module below `root`, the folder of the package, by its name without the root's."""
    found = {}
    for path in _python_files(root):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import in the package that `root` is the folder of; other packages by their first name."""
    known = modules(root)
    return [found for name, path in known.items() for found in _imports_of(name, path, known)]


def problems(root: Path) -> list[str]:
    """Every breach of a rule, as "module:line: what is wrong"."""
    found = imports(root)
    known = modules(root)
    return [
        *(f"{one.source}:{one.line}: {wrong}" for one in found if (wrong := _breach(one, known))),
        *(f"import circle: {' -> '.join((*circle, circle[0]))}" for circle in circles(found, known)),
    ]


def circles(found: list[Import], known: dict[str, Path]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""
    graph: dict[str, set[str]] = {name: set() for name in known}
    for one in found:
        if one.target in known and one.target != one.source and room_of(one.source) != "api":
            graph[one.source].add(one.target)
    reach = {name: _reachable(name, graph) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return sorted(group for group in groups if len(group) > 1)


def arrows(found: list[Import], known: dict[str, Path]) -> dict[tuple[str, str], int]:
    """How many imports lead from one room to another."""
    counts: dict[tuple[str, str], int] = {}
    for one in found:
        if one.target in known and (pair := (room_of(one.source), room_of(one.target)))[0] != pair[1]:
            counts[pair] = counts.get(pair, 0) + 1
    return counts


def _breach(one: Import, known: dict[str, Path]) -> str:
    source = room_of(one.source)
    rules = ROOMS[source]
    if one.target == ".":
        return f"write {ROOT}....; relative imports are not checked"
    if one.target not in known:
        if one.target in rules.never:
            return f"{source} must not import {one.target}"
        if one.target in _ROOMS:
            return f"write {ROOT}.{one.target}; a second copy of the room would be imported"
        return ""
    target = room_of(one.target)
    if target == source:
        return _layer_breach(one) if source == "runtime" else ""
    if target in rules.rooms or (target in rules.lazily and one.in_function):
        return ""
    if target in rules.lazily:
        return f"{source} imports {target} inside functions only, so that importing it stays quick"
    return f"{source} must not import {target} ({one.target})"


def _layer_breach(one: Import) -> str:
    layers = []
    for module in (one.source, one.target):
        parts = module.split(".")
        layers.append(parts[1] if len(parts) > 1 and parts[1] in RUNTIME_LAYERS else "")
    source, target = (RUNTIME_LAYERS.index(layer) for layer in layers)
    return f"runtime/{layers[0]} lies below runtime/{layers[1]} ({one.target})" if target > source else ""


def _imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    inside |= {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            yield Import(name, _target(full, known), node.lineno, id(node) in inside)


def _target(full: str, known: dict[str, Path]) -> str:
    """The module of ours that `full` lies in, the first name of another package, or "." for a relative import."""
    if full.startswith("."):
        return "."
    if full.partition(".")[0] != ROOT:
        return full.partition(".")[0]
    name = full.partition(".")[2]
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or "__init__"


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def _python_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():  # the rooms are links, which `rglob` does not follow
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def main() -> None:
    """Print every breach and exit with 1 if there is one; with --count also how many arrows there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1] / ROOT)
    parser.add_argument("--count", action="store_true", help="print the number of modules, arrows and circles")
    options = parser.parse_args()
    found, known = imports(options.root), modules(options.root)
    if options.count:
        for room in ROOMS:
            print(f"{room}: {sum(room_of(name) == room for name in known)} modules")
        for (source, target), count in sorted(arrows(found, known).items()):
            print(f"{source} -> {target}: {count} imports")
        print(f"import circles: {len(circles(found, known))}")
    wrong = problems(options.root)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
