# SPDX-License-Identifier: Apache-2.0
"""`file_fuzz.py FOLDER COUNT SEED` loads COUNT damaged models and engine cards and prints what happened as JSON.

It runs in a process of its own, with bounded memory: ONNX Runtime is not ours, and a crash is a result, too.
"""

import collections
import contextlib
import io
import json
import random
import resource
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, helper
from PIL import Image

from internimage_deploy.card import METADATA_KEY, EngineInfo
from internimage_deploy.cli import info
from internimage_deploy.cli.main import group, run
from internimage_deploy.errors import UserError
from internimage_deploy.files import sha256
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.backends.load import load_backend, model_card
from internimage_deploy.runtime.segmenter import Segmenter
from support.tiny_models import color_model, picture

MEMORY = 8 << 30  # bytes of address space
VALUES = (
    None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e999, float("nan"), 2**31, 2**70, 10**4000, "", "x", "height",
    "\x1b[2J", "two\nlines", "²", "\ud800", "a" * 100_000, [], [[]], [0] * 5000, {}, {"a": 1}, [1, 2], [-1, 5],
    [10**9, 10**9], [1, 2, 3], ["batch", 64, "width", 3], ["n", 3, 64, 64], "float32", "uint8", [["x"] * 3] * 3,
    [[0, 0, 0]], "../x", "1.5", {"min": [1, 1, 1], "opt": [0, 0, 0], "max": [-1, -1, -1]},
)  # fmt: skip
TEXTS = ("[" * 100_000, "{" * 50, '{"a":' * 20_000, "", "null", "[]", '"x"', "1e999", "{}", '{"version": 1}',
         '{"version": NaN}', '{"version": [1]}', '{"version": "' + "9" * 100_000 + '"}')  # fmt: skip
LOCATIONS = ("", "/etc/passwd", "../m.onnx.data", "a/../../b", "C:\\windows", "\\\\host\\share", "x" * 5000, "\0",
             "\x1b[2J", ".", "a//b", "é" * 200, "~/x", "m.onnx", "none.data")  # fmt: skip
NUMBERS = ("x", "-1", "1.5", "²", "9" * 5000, "99999999999", "", " 1", "0x10")
_SIZES = ((8, 12), (24, 32), (64, 96))


def changed_json(card, chance):
    """The card's JSON with one or two values anywhere in it replaced, left out or doubled."""
    if chance.random() < 0.1:
        return chance.choice(TEXTS)
    tree = json.loads(card)
    for _ in range(chance.choice((1, 1, 2))):
        place, key = tree, chance.choice(list(tree))
        while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.6:
            place = place[key]
            key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        kind = chance.randrange(8)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[chance.choice(("surprise", "\x1b[31m", "x" * 5000))] = 1
        elif kind == 2 and isinstance(place, list):
            place.insert(key, place[key])
        else:
            place[key] = chance.choice(VALUES)
        if not tree:
            break
    return json.dumps(tree)


def change_model(model, chance):
    """Damage one or two fields of the graph."""
    graph = model.graph
    for _ in range(chance.choice((1, 1, 2))):
        node, tensor = chance.choice(graph.node), chance.choice(graph.initializer)
        value = chance.choice((graph.input[0], graph.output[0])) if graph.input and graph.output else None
        match chance.randrange(15):
            case 0:
                del node.attribute[:]
            case 1:
                del node.input[chance.randrange(len(node.input) + 1) :]
            case 2:
                del node.output[:]
            case 3:
                node.op_type = chance.choice(
                    ("", "Conv", "ArgMax", "Resize", "Loop", "Nothing", "\x1b[2J", "ConstantOfShape")
                )
            case 4:
                node.domain = chance.choice(("internimage", "mmdeploy", "\x1b", "x" * 5000))
            case 5:
                name = chance.choice(("axis", "pads", "strides", "group", "kernel_shape", "to", "perm", "equation"))
                node.attribute.append(
                    helper.make_attribute(name, chance.choice((-1, 1.5, "x", [0], [1.5], 1 << 40, ["y"])))
                )
            case 6:
                node.attribute.append(AttributeProto(name="axis", type=chance.choice((0, 2, 7, 14))))
            case 7:
                del tensor.dims[:]
                tensor.dims.extend(chance.choice(((), (-1,), (1 << 40,), (0,), (3, 3, 3, 3), (1 << 31, 1 << 31))))
            case 8:
                tensor.data_type = chance.choice((0, 2, 8, 10, 99, 1000))
            case 9:
                tensor.raw_data = tensor.raw_data[: chance.randrange(len(tensor.raw_data) + 1)]
            case 10:
                tensor.data_location = 1
                for key, values in (("location", LOCATIONS), ("offset", NUMBERS), ("length", NUMBERS)):
                    if chance.random() < 0.7:
                        tensor.external_data.add(key=key, value=chance.choice(values))
            case 11 if value is not None:
                dims = value.type.tensor_type.shape.dim
                if dims:
                    chance.choice(dims).dim_value = chance.choice((0, -1, 1, 3, 64, 1 << 40))
            case 12 if value is not None:
                value.type.tensor_type.elem_type = chance.choice((0, 2, 6, 8, 99))
            case 13 if value is not None:
                value.name = chance.choice(("", "x", "\x1b[2J", "y" * 5000))
            case _:
                which = chance.choice((graph.input, graph.output, model.opset_import, graph.node))
                del which[chance.randrange(len(which) + 1) :]
        if not graph.node or not graph.initializer:
            return


def change_bytes(data, chance):
    """Flip, overwrite, double, drop and cut bytes."""
    data = bytearray(data or b" ")
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.randrange(256)
            case 2:
                data[at:at] = data[at : at + 32]
            case 3:
                del data[at + 1 : at + 8]
            case _ if chance.random() < 0.3:
                del data[at + 1 :]
    return bytes(data)


class Fuzz:
    """Writes damaged files into a folder, one at a time, and loads them."""

    def __init__(self, folder, seed):
        self.folder, self.chance = Path(folder), random.Random(seed)
        self.verdicts = collections.Counter()
        self.failures, self.slowest = [], 0.0
        self.image, _ = picture(24, 32)
        Image.fromarray(self.image).save(self.folder / "image.png")
        forms = ({}, {"labels": True}, {"uint8": False}, {"size": (64, 96), "resize": (96, 64)}, {"external": True})
        self.models = [color_model(self.folder / f"seed{i}.onnx", **form) for i, form in enumerate(forms)]
        profile = {"min": (1, 32, 32), "opt": (1, 64, 64), "max": (4, 96, 96)}
        self.engine = self.folder / "m.engine"
        self.engine.write_bytes(b"an engine")
        info = EngineInfo("tensorrt", "10.14.1", sha256(self.engine), ("8.6",), (profile,), "1")
        self.engine_card = replace(read_card(self.models[0]), resize=(96, 64), kept_fp32=("x",), engine=info).to_json()

    def write(self):
        """A damaged file of a random kind; its path."""
        chance = self.chance
        path, source = self.folder / "m.onnx", chance.choice(self.models)
        match chance.randrange(5):
            case 0 | 1:
                model = onnx.load(source, load_external_data=False)
                (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
                entry.value = changed_json(entry.value, chance).encode(errors="replace").decode()
                path.write_bytes(model.SerializeToString())
            case 2:
                text = changed_json(self.engine_card, chance).encode(errors="replace")
                self.engine.with_name("m.engine.json").write_bytes(
                    change_bytes(text, chance) if chance.random() < 0.2 else text
                )
                return self.engine
            case 3:
                model = onnx.load(source, load_external_data=False)
                change_model(model, chance)
                path.write_bytes(model.SerializeToString())
            case _:
                path.write_bytes(change_bytes(source.read_bytes(), chance))
        return path

    def attempt(self, what, call):
        """Count what `call` does; anything but success and a `UserError` of one line is kept as a failure."""
        start = time.monotonic()
        try:
            call()
            verdict = "done"
        except UserError as error:
            text = str(error)
            verdict = "refused" if text.isprintable() and len(text) < 1500 else "unreadable"
            if verdict == "unreadable":
                self.failures.append(f"{what}: {text[:1000]!r}")
        except BaseException as error:
            verdict = type(error).__name__
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.failures.append(f"{what}: {verdict} {str(error)[:300]} ({where.filename}:{where.lineno})")
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.verdicts[verdict] += 1
        return verdict

    def run_command(self, *words):
        """Run a command in this process; raises what it raises but the exit itself."""
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run(group, list(map(str, words)))
        except SystemExit as ending:
            if ending.code not in (0, 1, None):
                raise RuntimeError(f"exit code {ending.code}: {err.getvalue()}") from ending
        if "\x1b" in out.getvalue() + err.getvalue():
            raise RuntimeError(f"control characters: {out.getvalue()!r} {err.getvalue()!r}")

    def once(self):
        """Damage a file and load it in every way."""
        path = self.write()
        self.attempt("card", lambda: model_card(path))
        self.attempt("info", lambda: info.collect(path))
        backend = "openvino" if self.chance.random() < 0.1 and path.suffix == ".onnx" else "auto"
        if path.suffix == ".onnx" and backend == "auto":
            backend = "onnxruntime"
        if self.attempt("load", lambda: load_backend(path, backend).close()) == "done":
            self.attempt("segment", lambda: Segmenter.load(path, backend=backend)(self.image))
        if self.chance.random() < 0.05:
            self.attempt("command info", lambda: self.run_command("info", path))
            words = ("segment", path, self.folder / "image.png", "-o", self.folder / "out", "--backend", backend)
            self.attempt("command segment", lambda: self.run_command(*words))


def main(folder, count, seed):
    """Load `count` damaged files; print the verdicts."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    np.seterr(all="ignore")  # a card's own mean and deviation may overflow
    fuzz = Fuzz(folder, seed)
    for _ in range(count):
        fuzz.once()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {"verdicts": fuzz.verdicts, "failures": fuzz.failures, "slowest_s": fuzz.slowest, "peak_mb": peak / 1024}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
