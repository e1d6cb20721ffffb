# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people have them, and as nobody should: what is in them is read, and nothing of it is run."""

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.checkpoint import read_checkpoint
from internimage_deploy.exporter.rebuild import StoredTensor
from internimage_deploy.exporter.tensor_file import read_content
from internimage_deploy.exporter.unpickler import Inert
from support import golden

FUZZ = Path(__file__).parents[1] / "support" / "checkpoint_fuzz.py"
COUNT = int(os.environ.get("INTERNIMAGE_FUZZ_CHECKPOINTS", "10000"))


def weights(name="upernet_t_like"):
    return {key: torch.from_numpy(value) for key, value in golden.state_dict(name).items()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def same_weights(checkpoint):
    state = checkpoint.segmentor.state_dict()
    return all(torch.equal(state[key], value) for key, value in weights().items() if not key.endswith("tracked"))


@pytest.fixture
def foreign(monkeypatch):
    """A class as mmengine's, of a module that is there while the file is written and gone when it is read."""
    module = types.ModuleType("mmengine_like.history_buffer")

    class HistoryBuffer:
        def __init__(self, values=()):
            self.values = np.array(values)
            self.statistics = {"mean": np.float64(0.5)}
            # mmengine's keeps functions of the class; protocol 2 writes them as getattr(HistoryBuffer, "mean").
            self.statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            return self.values.mean()

        def __setstate__(self, state):
            raise AssertionError("the object was rebuilt")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setitem(sys.modules, "mmengine_like", types.ModuleType("mmengine_like"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_of_the_official_config_keeps_its_card(zipped, foreign, tmp_path, monkeypatch):
    """`save_best='mIoU'` leaves NumPy's scalars in meta.hook_msgs, and mmengine objects of its own."""
    meta = golden.meta("upernet_t_like") | {
        "hook_msgs": {"best_score": np.float64(0.4782), "best_ckpt": "best_mIoU.pth", "rounds": np.int64(3)},
        "PALETTE": np.array(golden.meta("upernet_t_like")["PALETTE"]),
        "time": datetime.datetime(2026, 1, 1),
        "args": argparse.Namespace(seed=0, folder=Path("work")),
    }
    parameters = {
        key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in weights().items()
    }
    content = {
        "meta": meta,
        "state_dict": collections.OrderedDict(parameters),
        "optimizer": {"state": {0: {"step": np.float32(2), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "message_hub": {"log_scalars": collections.OrderedDict(loss=foreign([1.0, 2.0]), lr=foreign())},
    }
    path = saved(tmp_path / "m.pth", content, _use_new_zipfile_serialization=zipped)
    assert b"getattr" in path.read_bytes()
    monkeypatch.undo()
    checkpoint = read_checkpoint(path)
    assert same_weights(checkpoint)
    assert checkpoint.classes == golden.meta("upernet_t_like")["CLASSES"]
    assert [list(color) for color in checkpoint.palette] == golden.meta("upernet_t_like")["PALETTE"]
    (note,) = checkpoint.details
    assert "mmengine_like.history_buffer.HistoryBuffer" in note
    assert "argparse.Namespace" in note


def test_values_are_rebuilt(tmp_path):
    content = {
        "float": np.float64(0.5), "half": np.float16(2), "flag": np.bool_(True), "complex": np.complex64(1j),
        "array": np.arange(6).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"), "empty": np.zeros((0, 4), np.float32), "dtype": np.dtype("<i2"),
        "set": {1, "a"}, "frozen": frozenset([2]), "nested": {"tuple": (1, (2.5, None)), "list": [[], {}]},
        "size": torch.Size([1, 2]), "default": collections.defaultdict(list, a=[1]), "text": "ü\ud800",
        "bytes": b"\0\xff", "long": 1 << 200, "negative": -(1 << 70), "objects": np.array([{}, None]),
    }  # fmt: skip
    for protocol in range(2, 6):
        file = tmp_path / f"{protocol}.pth"
        file.write_bytes(pickle.dumps(content, protocol))
        read = read_content(file).value
        torch_file = read_content(saved(tmp_path / "torch.pth", content, pickle_protocol=protocol)).value
        for value in (read, torch_file):
            for key in content.keys() - {"array", "fortran", "big", "empty", "dtype", "objects", "default"}:
                assert value[key] == content[key]
                assert type(value[key]) is type(content[key]) or key == "size"
            for key in ("array", "fortran", "big", "empty"):
                assert value[key].dtype == content[key].dtype
                assert np.array_equal(value[key], content[key])
            assert value["default"] == {"a": [1]}
            assert isinstance(value["objects"], Inert)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_those_of_torch_load(zipped, tmp_path):
    base = torch.arange(24.0)
    content = {
        "whole": base, "view": base[3:9].reshape(2, 3), "turned": base.reshape(4, 6).T, "step": base[::5],
        "shared": base, "scalar": torch.tensor(3), "empty": torch.zeros(0, 3), "half": base.half(), "bool": base > 3,
        "bf16": base.bfloat16(), "long": base.long(), "grad": torch.nn.Parameter(base.clone()),
        "byte": torch.ones(3).byte(),
        "after": torch.arange(5, dtype=torch.int16), "double": base.double(), "last": torch.arange(3.0),
    }  # fmt: skip
    path = saved(tmp_path / "m.pth", content, _use_new_zipfile_serialization=zipped)
    read = read_content(path)
    for key, expected in torch.load(path, weights_only=True).items():
        stored = read.value[key]
        assert isinstance(stored, StoredTensor)
        tensor = read.file.tensor(stored)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor, expected.data)


def safetensors(path, tensors, **entries):
    """Write a `.safetensors` file; `entries` replace those of the header."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header | entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    return path


def test_safetensors(tmp_path):
    checkpoint = read_checkpoint(safetensors(tmp_path / "m.safetensors", weights()), offset_scale=1.0)
    assert same_weights(checkpoint)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 50]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": [], "shape": "x", "data_offsets": None},
        "nonsense",
    ],
)
def test_broken_safetensors(entry, tmp_path):
    with pytest.raises(UserError, match=r"not a readable PyTorch checkpoint \(its entry for 'w\\x1b' "):
        read_checkpoint(safetensors(tmp_path / "m.safetensors", {"a": torch.zeros(4)}, **{"w\x1b": entry}))


def test_broken_headers_of_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    for header in (b"{" + b'"a":[' * 50_000, b'{"a": ', b"{\xff}"):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UserError, match="no JSON"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "container", ["state_dict", "model", "model_state_dict", "module", "ema", "teacher", "state_dict_ema"]
)
def test_containers(container, tmp_path):
    path = saved(tmp_path / "m.pth", {container: weights(), "epoch": 3})
    assert same_weights(read_checkpoint(path, offset_scale=1.0))


def test_weights_may_be_numpy_arrays(tmp_path):
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"model": golden.state_dict("upernet_t_like")}))
    assert same_weights(read_checkpoint(path, offset_scale=1.0))


def test_a_weight_that_is_an_object_is_an_error(foreign, tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pth", {"state_dict": {**weights(), "decode_head.conv_seg.bias": foreign()}})
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"'decode_head.conv_seg.bias' is a 'mmengine_like.*HistoryBuffer' object"):
        read_checkpoint(path, offset_scale=1.0)


def test_a_whole_model_is_refused_with_the_cure(foreign, tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pth", foreign())
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"a whole 'mmengine_like.*HistoryBuffer' object.*state_dict"):
        read_checkpoint(path)


class Calls:
    """A pickle that would call `function` when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.system, "touch pwned"), "system"),
        (Calls(os.mkdir, "pwned"), "mkdir"),
        (Calls(eval, "open('pwned', 'w')"), "eval"),
        (Calls(exec, "open('pwned', 'w')"), "exec"),
        (Calls(getattr, os, "system"), "getattr"),
        (Calls(__import__, "os"), "__import__"),
        (Calls(open, "pwned", "w"), "open"),
        (Calls(subprocess.Popen, ["touch", "pwned"]), "Popen"),
        (Calls(pickle.loads, pickle.dumps(1)), "loads"),
        (Calls(torch.load, "pwned"), "load"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_by_name(call, name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": weights(), "hook": call}
    if call.function is getattr:  # a module cannot be pickled
        call.arguments = ("", "format")
    path = saved(tmp_path / "m.pth", content, pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"is refused: it asks for '[\w.]*\b{name}', which can run code") as e:
        read_checkpoint(path)
    assert "\n" not in str(e.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize(
    "pickled",
    [
        b"c__builtin__\ngetattr\n(ctorch\nos\nVsystem\ntR",
        b"c__builtin__\ngetattr\n(cpathlib\nPath\nV__init__\ntR",
        b"c__builtin__\ngetattr\n(cpathlib\nPath\nVcwd.x\ntR",
        b"c__builtin__\ngetattr\n(cpathlib\nPath\nVcwd\nNtR",
        b"c__builtin__\ngetattr\n(c__builtin__\ngetattr\n(cpathlib\nPath\nVcwd\ntRV__func__\ntR",
        b"c__builtin__\ngetattr\n)R",
    ],
)
def test_only_methods_of_classes_are_named_by_getattr(pickled, tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(b"\x80\x02" + pickled + b".")
    with pytest.raises(UserError, match=r"is refused: it asks for 'builtins.getattr'"):
        read_content(path)


def test_other_functions_are_not_called(tmp_path):
    touch = Calls(Path.touch, tmp_path / "pwned")
    path = saved(tmp_path / "m.pth", {"state_dict": weights(), "hook": touch, "more": Calls(print, "pwned")})
    read_checkpoint(path, offset_scale=1.0)  # Path.touch is pickled by way of getattr
    assert [file.name for file in tmp_path.iterdir()] == ["m.pth"]


BOMBS = {
    "nested tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\1s.",
    "doubling tuple as a key": b"\x80\x02})" + b"2\x86" * 200 + b"K\1s.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "huge bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\x0f\0\0.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "huge number in text": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "huge number": b"\x80\x02\x8b\x40\x42\x0f\0" + b"\x7f" * 1_000_000 + b".",
    "text repeated as bytes": b"\x80\x02]X\0\0\x01\0" + b"a" * 65536 + b"q\1"
    + b"c_codecs\nencode\nh\1\x85Ra" * 20_000 + b".",
    "list repeated as sets": b"\x80\x02]](" + b"K\1" * 50_000 + b"eq\1"
    + b"c__builtin__\nset\nh\1\x85R0" * 20_000 + b".",
    "list repeated as dictionaries": b"\x80\x02](X\2\0\0\0abq\2" + b"h\2" * 100_000 + b"eq\1"
    + b"ccollections\nOrderedDict\nh\1\x85R0" * 100_000 + b".",
    "long arguments": b"\x80\x02]](" + b"N" * 500_000 + b"tq\1ccollections\ndefaultdict\nq\2" + b"h\2h\1R0" * 200_000
    + b".",
    "long persistent id": b"\x80\x02](X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aNK\1" + b"N" * 500_000
    + b"tQ.",
    "names without end": b"\x80\x02c__builtin__\ngetattr\nq\1X\x64\0\0\0" + b"A" * 100 + b"q\2cx\nA\nq\3"
    + b"h\1h\3h\2\x86Rq\3" * 200_000 + b".",
    "a long tuple as a key again and again": b"\x80\x02}(" + b"N" * 500_000 + b"tq\0010" + b"h\1Ns" * 200_000 + b".",
    "a long text as a key again and again": b"\x80\x02}(" + 2 * (b"X\x80\x96\x98\0" + b"a" * 10_000_000 + b"N")
    + b"uX\x80\x96\x98\0" + b"a" * 10_000_000 + b"q\1" + b"0" + b"h\1Ns" * 200_000 + b".",
    "an array alone": pickle.dumps(np.arange(4), 2),
    "an array in the place of the version": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(np.arange(4), 2)
    + b"".join(pickle.dumps(value, 2) for value in ({"little_endian": True}, {}, [])),
    "calls a number": b"\x80\x02K\1)R.",
    "calls a call": b"\x80\x02ca\nb\n)R)R)R.",
    "state for a number": b"\x80\x02K\1}b.",
    "no stop": b"\x80\x02" + b"]" * 1000,
    "extension code": b"\x80\x02\x82\1.",
    "out of band": b"\x80\x05\x97\x98.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "zip"])
def test_bombs(name, zipped, tmp_path):
    path = tmp_path / "m.pth"
    if zipped:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("m/data.pkl", BOMBS[name])
        path.write_bytes(file.getvalue())
    else:
        path.write_bytes(BOMBS[name])
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_keys_that_take_long_to_find_are_no_keys(tmp_path):
    """Numbers and tuples could be chosen to collide; the time must not depend on which the file has."""
    path = tmp_path / "m.pth"
    content = {
        "tuples": {(1, 2): 3, ((),): 4}, "numbers": dict.fromkeys(range(30_000)), "long": {"a" * 2000: 1},
        "set": {*range(30_000), (1, 2), "a"}, "texts": {str(i): i for i in range(30_000)},
        "plain": {1: 2, 0.5: 3, None: 4},
    }  # fmt: skip
    path.write_bytes(pickle.dumps(content, 4))
    read = read_content(path).value
    for name in ("tuples", "long"):
        assert {type(key) for key in read[name]} == {Inert}
        assert [*read[name].values()] == [*content[name].values()]
    for name in ("numbers", "set"):
        assert 1000 < sum(isinstance(key, int) for key in read[name]) <= 10_000
        assert len(read[name]) == len(content[name])
    assert read["texts"] == content["texts"]
    assert read["plain"] == content["plain"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
        (b"\x08\x09\x12\x04test" + bytes(50), "an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(50), "a gzip file"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"model = dict(type='InternImage')\n", "a text"),
        (b"", "empty"),
        (bytes(range(1, 255)) * 4, "of an unknown kind"),
    ],
)
def test_other_files_are_called_what_they_are(content, kind, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"not a readable PyTorch checkpoint: it is {kind}"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_other_zip_archives(tmp_path):
    path = tmp_path / "m.pth"
    np.savez(path.open("wb"), a=np.zeros(3))
    with pytest.raises(UserError, match=r"holds no 'data.pkl'"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}." + bytes(1000))
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "config",
    [
        "x = {[1]: 2}", "a = (1,)\n" + "a = (a, a)\n" * 60 + "x = {a: 1}", "x = " + "(" * 100_000,
        "x = " + "-" * 50_000 + "1", "model = dict(backbone=dict(offset_scale=1e999, act_layer='GELU'))", "x = '\\d'",
        "model = dict(backbone=dict(offset_scale=" + "9" * 4000 + "))", "\0", "dataset_type = '\\x1b[31m'",
    ],
    ids=range(9),
)  # fmt: skip
def test_hostile_configs(config, tmp_path, recwarn):
    path = saved(tmp_path / "m.pth", {"meta": {"config": config}, "state_dict": weights()})
    checkpoint = read_checkpoint(path, offset_scale=1.0)
    assert checkpoint.classes[0] == "road"
    assert not recwarn.list


def test_long_settings_are_cut_in_messages(tmp_path):
    lists = "a = ['x']\n" + "a = [a, a]\n" * 60
    meta = {"config": f"{lists}model = dict(backbone=dict(act_layer=a))"}
    with pytest.raises(UserError, match=r"the activation is .{0,120}; expected one of GELU"):
        read_checkpoint(saved(tmp_path / "m.pth", {"meta": meta, "state_dict": weights()}), offset_scale=1.0)


def test_class_names_that_no_terminal_should_see(tmp_path):
    meta = {"CLASSES": ["road", "sk\x1b[2Jy"], "PALETTE": "nonsense"}
    checkpoint = read_checkpoint(saved(tmp_path / "m.pth", {"meta": meta, "state_dict": weights()}), offset_scale=1.0)
    assert checkpoint.classes[:2] == ("road", "sidewalk")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1 << 20, 0), torch.zeros(0), torch.zeros(70_000, 1)],
    ids=["no numbers", "no rows", "too wide"],
)
def test_shapes_that_no_network_has(tensor, tmp_path):
    name = "backbone.levels.0.blocks.0.dcn.input_proj.weight"
    with pytest.raises(UserError, match=f"'{name}' has shape"):
        read_checkpoint(saved(tmp_path / "m.pth", {**weights(), name: tensor}), offset_scale=1.0)


def test_damaged_checkpoints_run_nothing_and_are_told_in_one_line(tmp_path):
    """INTERNIMAGE_FUZZ_CHECKPOINTS sets how many."""
    done = subprocess.run(
        [sys.executable, FUZZ, tmp_path, str(COUNT), os.environ.get("INTERNIMAGE_FUZZ_SEED", "0")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(FUZZ.parents[2]), str(FUZZ.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["offences"] == []
    assert set(report["verdicts"]) == {"read", "refused"}, report
    assert report["verdicts"]["refused"] > COUNT // 2
    assert report["peak_mb"] < 1500
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
