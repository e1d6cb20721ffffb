# SPDX-License-Identifier: Apache-2.0
"""How a command begins: an interrupt while it is imported, and names that are no command."""

import os
import signal
import subprocess
import sys
import time

import pytest

from internimage_deploy._version import __version__
from internimage_deploy.cli.main import COMMANDS, build_engine, export_onnx, run
from internimage_deploy.cli.main import group as command_group


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_command_is_imported(tmp_path, ignored):
    """click is imported first; this one says so and waits. A caller's choice to ignore the signal stays."""
    (tmp_path / "click.py").write_text(
        "import pathlib, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'importing').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.01)\n"
        "raise SystemExit(7)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    action = signal.SIG_IGN if ignored else signal.SIG_DFL  # a background job of a shell ignores it
    process = subprocess.Popen(
        [sys.executable, "-m", "internimage_deploy", "doctor"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, action),
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "importing").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if ignored:
            (tmp_path / "go").touch()
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == (7 if ignored else -signal.SIGINT)
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("segmnt", "did you mean segment?"),
        ("export", "did you mean export-onnx or export-triton?"),
        ("help", f"the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_a_name_that_is_no_command(name, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command_group, [name])
    assert exit_.value.code == 2
    assert f"No such command '{name}'; {hint}" in capsys.readouterr().err


@pytest.mark.parametrize(("entry_point", "name"), [(export_onnx, "export-onnx"), (build_engine, "build-engine")])
def test_a_command_of_its_own_name_has_a_version(entry_point, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with pytest.raises(SystemExit) as exit_:
        entry_point()
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"{name}, version {__version__}\n"
