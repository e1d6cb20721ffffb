# SPDX-License-Identifier: Apache-2.0
"""`checkpoint_fuzz.py FOLDER COUNT SEED` reads COUNT damaged checkpoints and prints what happened as JSON.

It runs in a process of its own: with bounded memory, and with an audit hook that no code can take out again.
"""

import codecs
import collections
import contextlib
import io
import json
import pickle
import random
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.checkpoint import read_checkpoint
from support import golden

MEMORY = 4 << 30  # bytes of address space beyond what the imports took
WATCHED = (
    "import", "open", "exec", "compile", "os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pickle.", "marshal.",
    "code.", "builtins.", "sys.", "tempfile.", "urllib.", "glob.",
)  # fmt: skip
HARMLESS = ("sys._getframe", "builtins.id")
# Whole opcodes with operands: what a random byte would rarely form.
SNIPPETS = (
    b"cposix\nsystem\nX\x05\0\0\0touch\x85R", b"cos\nmkdir\n(X\1\0\0\0xtR", b"cbuiltins\neval\nX\1\0\0\0001\x85R",
    b"\x8c\x08builtins\x8c\x04exec\x93\x8c\x01x\x85R", b"(cbuiltins\nexec\no", b"(ibuiltins\nopen\n",
    b"ccollections\nOrderedDict\n)R", b"cnumpy\ndtype\nX\2\0\0\0f8\x89\x88\x87R", b"cmine\nThing\n)\x81}b",
    b"r\xff\xff\xff\x7f", b"q\0", b"h\0", b"j\0\0\1\0", b"\x95" + b"\xff" * 8, b"B\xff\xff\xff\xff",
    b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"\x85" * 3000, b"]" * 3000,
    b"(" * 500, b"}}s", b"I99999999999999999999\n", b"F1e999\n", b"S'\\x41'\n", b"V\\ud800\n", b"g0\n",
    b"p99999999999999999999\n", b"L" + b"9" * 5000 + b"L\n", b"J\xff\xff\xff\xff", b"G\x7f\xf0" + bytes(6), b"\x82\x01",
    *(bytes([code]) for code in b"Q201aesubR.Ntld\x81\x8f\x90\x91\x92\x93\x94\x97\x98"),
)  # fmt: skip


def contents():
    """Checkpoints as training leaves them, with few and tiny tensors."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = collections.OrderedDict(a=weight, b=weight.T, c=torch.nn.Parameter(torch.zeros(2)), half=weight.half())
    history = {"best_score": np.float64(0.5), "array": np.arange(4.0), "ids": np.array([1, 2])}
    meta = {"config": "model = dict(backbone=dict(depths=[1, 2]))", "CLASSES": ("road",), "PALETTE": [[1, 2, 3]]}
    yield {"state_dict": state, "meta": meta | {"hook_msgs": history}, "optimizer": {"state": {0: {"step": weight}}}}
    yield {"model": dict(state), "epoch": 3, "lr": 0.1, "args": Path("work"), "seen": {1, 2}}
    yield dict(state)


def seeds():
    """(kind of file, bytes) of valid checkpoints; of zip files the pickle, with the other records."""
    for content in contents():
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            yield "zip" if zipped else "legacy", file.getvalue()
    for protocol in range(2, 6):
        yield (
            "legacy",
            pickle.dumps({"state_dict": {"a": np.arange(4.0), "b": np.float32(1)}, "x": [1, 2.5, None]}, protocol),
        )
    weights = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"a": "b"}}
    header = json.dumps(weights).encode()
    yield "legacy", struct.pack("<Q", len(header)) + header + bytes(24)


def damaged(data, chance):
    """`data` with bytes flipped, opcodes put in, pieces repeated or left out, or cut short."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 2:
            data[at:at] = chance.choice(SNIPPETS)
        elif kind == 3:
            data[at:at] = data[at : at + chance.choice((4, 32, 256))]
        elif kind == 4:
            del data[at : at + chance.choice((1, 2, 8, 64))]
        elif chance.random() < 0.2:
            del data[at:]
    return bytes(data)


def mutations(count, seed):
    """`count` damaged files; of three zip files, two have a damaged pickle in an intact archive."""
    chance, valid = random.Random(seed), list(seeds())
    for _ in range(count):
        kind, data = chance.choice(valid)
        if kind == "zip" and chance.random() < 0.67:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, record in records.items():
                    archive.writestr(name, damaged(record, chance) if name.endswith("data.pkl") else record)
            yield file.getvalue()
        else:
            yield damaged(data, chance)


def networks(count, seed):
    """`count` files of a whole network, damaged a little, so that many get to their weights; not without `seed`."""
    chance = random.Random(seed)
    file = io.BytesIO()
    weights = {name: torch.from_numpy(value) for name, value in golden.state_dict("upernet_t_like").items()}
    torch.save({"meta": golden.meta("upernet_t_like"), "state_dict": weights}, file)
    for _ in range(count):
        data = bytearray(file.getvalue())
        pickled = data.index(b"data.pkl") + 8
        for _ in range(0 if seed is None else chance.choice((1, 2, 4))):
            data[pickled + chance.randrange(30_000)] = chance.randrange(256)
        yield bytes(data)


def main(folder, count, seed):
    """Read `count` small files and a fiftieth as many networks; print the verdicts."""
    path = Path(folder) / "model.pth"
    offences, verdicts, slowest = [], collections.Counter(), 0.0
    armed = False

    def hook(event, arguments):
        if not armed or not event.startswith(WATCHED) or event in HARMLESS:
            return
        if event == "open" and str(arguments[0]) == str(path):
            return
        # The training config is parsed, never compiled; Python looks for its "file" to show a syntax error's line.
        if (event, arguments[1]) == ("compile", "<unknown>") or (event, arguments[0]) == ("open", "<unknown>"):
            return
        offences.append(f"{event} {arguments!r}"[:300])

    def read(data):
        nonlocal slowest
        path.write_bytes(data)
        nonlocal armed
        armed, start = True, time.monotonic()
        try:
            read_checkpoint(path)
            verdict = "read"
        except UserError as error:
            verdict = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"long message: {error}"[:500]
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error}"[:300]
        armed, slowest = False, max(slowest, time.monotonic() - start)
        verdicts[verdict] += 1

    sys.addaudithook(hook)
    codecs.lookup("cp437"), codecs.lookup("raw-unicode-escape")  # of zip archives and old pickles
    for data in (*networks(1, None), *(data for _, data in seeds())):  # imports what reading imports
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            read_checkpoint(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for data in mutations(count, seed):
        read(data)
    for data in networks(count // 50, seed):
        read(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"verdicts": verdicts, "offences": offences[:20], "slowest_s": slowest, "peak_mb": peak / 1024}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
