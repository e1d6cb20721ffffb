# SPDX-License-Identifier: Apache-2.0
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from internimage_deploy.cli import main as cli
from internimage_deploy.cli.export_onnx import export_onnx
from internimage_deploy.exporter import export
from internimage_deploy.exporter.presets import PRESETS
from internimage_deploy.exporter.rewrites import REWRITES
from internimage_deploy.onnx_tools.model_file import read_card
from support import golden
from support.small_models import run, session

EXPORT = [sys.executable, "-m", "internimage_deploy", "export-onnx"]
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def call(*args):
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as ending:
        cli.run(cli.group, ["export-onnx", *map(str, args)])
    return ending.value.code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return golden.checkpoint("segformer_l_like", tmp_path_factory.mktemp("checkpoint") / "model.pth")


def test_checkpoint_to_file(checkpoint, tmp_path, capfd):
    target = tmp_path / "model.onnx"
    x = golden.network_input("segformer_l_like")
    size = "x".join(map(str, x.shape[2:]))
    options = ("--size", size, "--batch", len(x), "--input", "float", "--emit", "logits", "--plain")
    assert call("--ckpt", checkpoint, "-o", target, *options) == 0
    out, err = capfd.readouterr()
    assert "max error" in out
    assert "labels equal 100.000 %" in out
    assert f"wrote {target}" in out
    for step in ("loading", "tracing", "optimising", "verifying", "writing"):
        assert step in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    np.testing.assert_allclose(run(session(target), x), golden.arrays("segformer_l_like")["logits"], atol=1e-4, rtol=0)
    card = read_card(target)
    assert card.classes[:2] == ("class_0", "class_1")
    assert set(card.source) == {"file", "sha256"}
    assert card.source["file"] == "model.pth"
    assert card.rewrites == ()


def test_labels_that_a_checkpoint_lacks_are_stated(tmp_path, capsys, caplog):
    weights = {key: torch.from_numpy(value) for key, value in golden.state_dict("upernet_t_like").items()}
    content = {"state_dict": weights, "meta": {"hook_msgs": {"best_score": np.float64(0.5)}}, "run": Path("work")}
    torch.save(content, tmp_path / "m.pth")
    names = [f"Klasse {index}" for index in range(19)]
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join(names) + "\n")
    (tmp_path / "colours.txt").write_text("".join(f"{index}, 2 3\n" for index in range(19)))
    source = ("--ckpt", tmp_path / "m.pth", "-o", tmp_path / "m.onnx", "--offset-scale", "1", "--size", "32x32")
    stated = ("--classes", tmp_path / "names.txt", "--palette", tmp_path / "colours.txt", "--resize", "256x64")
    assert call(*source, "--no-verify", *stated, "--verbose") == 0
    card = read_card(tmp_path / "m.onnx")
    assert list(card.classes) == names
    assert card.palette == tuple((index, 2, 3) for index in range(19))
    assert card.resize == (256, 64)
    assert "the checkpoint names no classes" not in caplog.text
    assert "pathlib.PosixPath" in caplog.text
    assert call(*source, "--no-verify", "--classes", "cityscapes", "--resize", "own") == 0
    card = read_card(tmp_path / "m.onnx")
    assert (card.classes[0], card.palette[0], card.resize) == ("road", (128, 64, 128), None)
    capsys.readouterr()
    for wrong, message in (
        (("--classes", "ade20k"), "--classes: got 150 entries, and the model has 19 outputs"),
        (("--classes", "nowhere.txt"), "neither a data set nor a file; expected one of ade20k"),
        (("--classes", "x" * 5000), "neither a data set nor a file"),
        (("--palette", tmp_path / "names.txt"), "got 'Klasse 0', expected red, green and blue"),
        (("--palette", "nowhere.txt"), "neither a data set nor a file"),
    ):
        assert call(*source, *wrong) == 1
        assert message in capsys.readouterr().err
    assert call(*source, "--resize", "1000000x1000000") == 2
    assert "16384" in capsys.readouterr().err


def test_released_models_are_listed(capsys):
    assert call("--list") == 0
    assert capsys.readouterr().out.split() == list(PRESETS)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("internimage_deploy.exporter.find_spec", lambda name: None)
    assert call("--list") == 1
    assert "needs the package 'torch'" in (message := capsys.readouterr().err)
    assert "pip install 'internimage-deploy[export]'" in message


def test_rewrites_are_listed_with_what_they_do(capsys):
    assert call("--list-rewrites") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, r.summary] for name, r in REWRITES.items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["-o", "m.onnx"], "--ckpt FILE.pth and --random NAME", id="no-source"),
        pytest.param(["--ckpt", "a", "--random", "b", "-o", "m.onnx"], "one of --ckpt", id="two-sources"),
        pytest.param(["--ckpt", "a.pth"], "-o MODEL.onnx", id="no-output"),
        pytest.param(["--ckpt", "a.pth", "-o", "model"], "name it model.onnx", id="no-ending"),
        pytest.param(
            ["--ckpt", "a.pth", "-o", "m.onnx", "--size", "500x512"],
            "500 is no multiple of 32; the nearest are 480 and 512",
            id="no-multiple-of-32",
        ),
        pytest.param(["--ckpt", "a.pth", "-o", "m.onnx", "--size", "0x32"], "such as 512x1024", id="no-size"),
        pytest.param(["--ckpt", "a.pth", "-o", "m.onnx", "--size", "512"], "expected HxW", id="no-height"),
        pytest.param(
            ["--ckpt", "a.pth", "-o", "m.onnx", "--size", "32x32", "--dynamic"], "exclude each other", id="both"
        ),
        pytest.param(["--ckpt", "a.pth", "-o", "m.onnx", "--batch", "0"], "--batch", id="batch"),
        pytest.param(["--random", "resnet50", "-o", "m.onnx"], "'resnet50' does not exist", id="unknown-preset"),
        pytest.param(["--ckpt", "a", "-o", "m.onnx", "--arch", "x"], "'x' does not exist", id="unknown-arch"),
        pytest.param(["--ckpt", "a", "-o", "m.onnx", "--without", "x"], "'x' does not exist", id="unknown-rewrite"),
        pytest.param(["--ckpt", "a", "-o", "m.onnx", "--post-norm-blocks", "5;11"], "separated by commas", id="blocks"),
    ],
)
def test_wrong_usage(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "weights.onnx").write_bytes(b"weights")
    (tmp_path / "m.onnx").hardlink_to(tmp_path / "weights.onnx")
    assert call("--ckpt", tmp_path / "weights.onnx", "-o", tmp_path / "m.onnx") == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert (tmp_path / "m.onnx").read_bytes() == b"weights"


def test_sizes_are_read_as_everywhere():
    assert export_onnx.make_context("export-onnx", ["--size", "64X96"]).params["size"] == (64, 96)


def test_missing_checkpoint(tmp_path, capsys):
    assert call("--ckpt", tmp_path / "none.pth", "-o", tmp_path / "m.onnx") == 1
    assert "none.pth does not exist" in capsys.readouterr().err
    assert call("--ckpt", "https://host/none.pth", "-o", tmp_path / "m.onnx") == 1
    assert "download it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_checkpoint_that_runs_code_does_not_run_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Bomb()}, tmp_path / "bomb.pth")
    assert call("--ckpt", "bomb.pth", "-o", "m.onnx") == 1
    assert "is refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pth"]


def test_missing_folder_is_reported_before_the_work(checkpoint, tmp_path, capsys):
    assert call("--ckpt", checkpoint, "-o", tmp_path / "none" / "m.onnx") == 1
    out, err = capsys.readouterr()
    assert "its folder does not exist" in err
    assert "loading" not in err
    assert out == ""


def test_unwritable_folder(checkpoint, tmp_path, capsys):
    folder = Path("/sys") if ROOT else tmp_path  # permissions do not bind root; the kernel does
    tmp_path.chmod(0o500)
    assert call("--ckpt", checkpoint, "-o", folder / "m.onnx") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot write {folder}/m.onnx: ")
    assert last.endswith("choose a folder you may write to") or last.endswith("choose another folder")


def test_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    save = export.save

    def save_on_a_full_disk(*arguments):
        # No file may grow beyond 100 kB: the export gets the error that it gets on a full disk, halfway through.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(export, "save", save_on_a_full_disk)
    assert call("--ckpt", checkpoint, "-o", tmp_path / "m.onnx", "--size", "32x32", "--no-verify") == 1
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'm.onnx'}: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(checkpoint, tmp_path):
    process = subprocess.Popen(
        [*EXPORT, "--ckpt", checkpoint, "-o", tmp_path / "m.onnx", "--dynamic"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == 1  # the work is under way, in a folder of its own
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
