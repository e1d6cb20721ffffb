# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/all.py without a GPU: what it lists, what it keeps, and from where it runs."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_tests
import pytest
import stages
from rows import FAILED, NOT_RUN, OK, WRONG, Rows, exit_code
from task import Options, Task, Unavailable, run_tasks

from internimage_deploy.trt_plugins.build import KERNELS

REPOSITORY = Path(__file__).parents[2]
ALL = REPOSITORY / "benchmarks" / "gpu" / "all.py"


def run(*arguments, script=ALL, **options):
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, **options)


@functools.cache
def listed(stage, script=ALL):
    done = run("--stage", stage, "--dry-run", script=script, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_stage_a_lists_every_kernel_type_and_comparison():
    lines = listed("A")
    for name in KERNELS:
        assert f"correct: {name}: every compiled variant was reached" in lines
        for dtype in ("float16", "float32", "bfloat16"):
            assert any(line.startswith(f"correct: {name} {dtype} ") for line in lines)
    for kernel in ("ours", "official", "dcnv4"):
        for dtype in ("float16", "float32"):  # InternImage-T has four stages; one image and eight
            cases = {f"times: {kernel} {dtype} t 512x512 stage{s} b{b}" for s in (1, 2, 3, 4) for b in (1, 8)}
            assert cases <= set(lines)
    # Ours first: a comparison that fails to compile costs nothing of it.
    assert lines.index("times: ours float16 t 512x512 stage4 b1") < lines.index(
        "times: official float16 t 512x512 stage1 b8"
    )
    assert {"sanitizer: compute-sanitizer memcheck", "sanitizer: compute-sanitizer initcheck"} <= set(lines)


def test_stage_b_lists_every_kernel_and_the_ways_to_call_dcnv3():
    lines = listed("B")
    for name in KERNELS:
        assert any(line.startswith(f"variants: {name} float16 ") for line in lines)
    assert "variants: dcnv3 float16 t 512x512 stage1 b8, softmax, packed" in lines
    assert "variants: dcnv3 bfloat16 h 512x512 stage3 b1" in lines


def test_stage_c_lists_both_forms_of_the_head():
    heads = {f"networks: head, {form}, b{b}" for form in ("plain", "fusion rewritten") for b in (1, 8)}
    assert heads <= set(listed("C"))


def test_the_parts_of_a_stage_fit_into_nine_minutes():
    for parts in stages.STAGES.values():
        assert sum(part.seconds for part in parts if not part.beside) <= 9 * 60


def test_the_document_has_every_stage():
    text = (REPOSITORY / "docs" / "measuring.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python benchmarks/gpu/all.py")]
    assert [line.split()[3] for line in commands] == list(stages.STAGES)
    assert all(f"\n| {stage} |" in text for stage in stages.STAGES)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="asks what happens without a GPU")
def test_nothing_is_claimed_without_a_gpu(tmp_path):
    done = run("--stage", "A", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "nothing was measured" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path):
    done = run("--stage", "A", "--dcnv4", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no folder" in done.stderr
    assert "Traceback" not in done.stderr


# What is kept

WRITER = """
import sys
sys.path[:0] = [{gpu!r}]
import clone
from pathlib import Path
from rows import Rows
rows = Rows(Path({path!r}))
number = 0
while True:
    rows.add({{"part": "p", "case": str(number), "status": "ok"}})
    print(number, flush=True)
    number += 1
"""


def test_rows_outlive_a_writer_that_is_killed(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    program = WRITER.format(gpu=str(ALL.parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        said = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
    kept = [int(row["case"]) for row in Rows(path)]
    assert kept[:20] == said
    assert kept == list(range(len(kept)))
    with path.open("a") as file:
        file.write('{"part": "p", "ca')  # as a full disk would leave it
    assert len(list(Rows(path))) == len(kept)


def test_a_failure_costs_its_own_row(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")

    def fail():
        raise ValueError("of this one")

    def lack():
        raise Unavailable("no such tool")

    tasks = [
        Task("good", lambda: {"us": 1.5}), Task("bad", fail), Task("lacking", lack),
        Task("wrong", lambda: {"status": WRONG}), Task("good again", dict),
    ]  # fmt: skip
    run_tasks("part", tasks, rows, time.time() + 1000)
    found = {row["case"]: row for row in rows}
    states = {"good": OK, "bad": FAILED, "lacking": NOT_RUN, "wrong": WRONG, "good again": OK}
    assert {name: row["status"] for name, row in found.items()} == states
    assert found["good"]["us"] == 1.5
    assert "ValueError: of this one" in found["bad"]["traceback"]
    assert found["lacking"]["reason"] == "no such tool"


def test_tasks_beyond_the_deadline_are_named(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    run_tasks("part", [Task("late", dict)], rows, time.time() - 1)
    assert [(row["case"], row["status"]) for row in rows] == [("late", NOT_RUN)]


@pytest.mark.parametrize(
    ("states", "code"), [([OK], 0), ([OK, NOT_RUN], 0), ([NOT_RUN], 1), ([], 1), ([OK, WRONG], 1), ([OK, FAILED], 1)]
)
def test_exit_code(states, code, tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    for state in states:
        rows.add({"part": "p", "case": "c", "status": state})
    assert exit_code(rows) == code


# The tests


def test_the_verdict_of_pytest():
    assert gpu_tests.judge(0, "....\n12 passed, 3 deselected in 4.20s\n") == {"status": OK, "passed": 12, "reason": ""}
    skipped = "ss\nSKIPPED [2] tests/gpu/conftest.py:29: needs TensorRT\n2 skipped in 0.10s\n"
    row = gpu_tests.judge(0, skipped)
    assert (row["status"], row["skipped"]) == (NOT_RUN, 2)
    assert "needs TensorRT" in row["reason"]
    assert gpu_tests.judge(5, "3 deselected in 0.1s\n")["status"] == NOT_RUN
    failed = gpu_tests.judge(1, "assert 1 == 2\n1 failed, 2 passed in 0.10s\n")
    assert (failed["status"], failed["failed"]) == (WRONG, 1)
    assert "assert 1 == 2" in failed["log"]
    with pytest.raises(RuntimeError, match="unknown option"):
        gpu_tests.judge(4, "ERROR: unknown option timeout\n")


# A stage of processes, each of which ends in another way

PART = """
import os, sys, time
sys.path[:0] = [{gpu!r}]
import clone
import stages, task
from pathlib import Path
from rows import Rows
from task import Options, Task, run_tasks
import argparse
parser = argparse.ArgumentParser()
for name in ("stage", "part", "out", "official"):
    parser.add_argument("--" + name)
parser.add_argument("--deadline", type=float)
chosen = parser.parse_args()
def lose():
    task.gpu_answers = lambda: False
    raise RuntimeError("an illegal memory access")

second = dict(
    crash=os.abort, hang=lambda: time.sleep(600), good=dict, lose=lose, beside=lambda: dict(official=chosen.official),
    late=dict,
)
tasks = [Task("first", dict), Task("second", second[chosen.part]), Task("third", dict)]
path = stages.rows_path(Options(Path(chosen.out)), chosen.stage)
answers = run_tasks(chosen.part, tasks, Rows(path), chosen.deadline)
if chosen.part == "late":
    os.abort()
sys.exit(0 if answers else stages.GPU_LOST)
"""


def test_a_stage_keeps_what_each_part_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "all.py").write_text(PART.format(gpu=str(ALL.parent)))
    monkeypatch.setattr(stages, "HERE", tmp_path)
    monkeypatch.setattr(stages, "GRACE_S", 0)
    parts = [stages.Part(name, "", seconds, name == "beside") for name, seconds in
             (("beside", 60), ("crash", 40), ("lose", 40), ("hang", 5), ("good", 25))]  # fmt: skip
    monkeypatch.setitem(stages.STAGES, "X", tuple(parts))
    out = tmp_path / "out"
    monkeypatch.setattr(stages, "LAST_S", 0)
    code = stages.run("X", Options(out, official=tmp_path), time.time() + 120, ["a note"])
    assert code == 1
    report = json.loads((out / "stage_X.json").read_text())
    states = {(row["part"], row["case"]): row for row in report["rows"]}
    assert {key: row["status"] for key, row in states.items()} == {
        **{(part, "first"): OK for part in ("beside", "crash", "lose", "hang", "good")},
        **{(part, "second"): OK if part in ("beside", "good") else FAILED for part in
           ("beside", "crash", "lose", "hang", "good")},
        # After a crash, or when the GPU is lost to a process, another one goes on.
        **{(part, "third"): OK for part in ("beside", "crash", "lose", "good")},
    }  # fmt: skip
    assert states["beside", "second"]["official"] == str(tmp_path)
    assert "exit code -6" in states["crash", "second"]["reason"]
    assert "crash: second" in states["crash", "second"]["log"]
    assert "illegal memory access" in states["lose", "second"]["traceback"]
    assert "outlasted" in states["hang", "second"]["reason"]
    assert {"machine", "versions", "command"} <= report.keys()
    assert report["notes"] == ["a note"]
    assert "3 failed" in capsys.readouterr().out


def test_a_process_that_dies_after_its_tasks_is_not_started_for_ever(tmp_path, monkeypatch):
    (tmp_path / "all.py").write_text(PART.format(gpu=str(ALL.parent)))
    monkeypatch.setattr(stages, "HERE", tmp_path)
    monkeypatch.setitem(stages.STAGES, "X", (stages.Part("late", "", 300),))
    assert stages.run("X", Options(tmp_path / "out"), time.time() + 600, []) == 1
    rows = [(row["case"], row["status"]) for row in json.loads((tmp_path / "out" / "stage_X.json").read_text())["rows"]]
    # One process did the tasks and died, a second had none left and died too.
    assert rows == [("first", OK), ("second", OK), ("third", OK), ("third", FAILED), ("", FAILED)]


# Where it runs from


def copy_without_links(target, lost):
    """A copy of the clone in which the links to the rooms are missing, or small text files."""
    rooms = ("exporter", "runtime", "trt_plugins")
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in (*rooms, "benchmarks"):
        shutil.copytree(REPOSITORY / name, target / name, ignore=ignore)
    shutil.copytree(
        REPOSITORY / "internimage_deploy", target / "internimage_deploy",
        ignore=lambda folder, names: [n for n in names if n in rooms and Path(folder).name == "internimage_deploy"],
    )  # fmt: skip
    if lost == "text":
        for name in rooms:
            (target / "internimage_deploy" / name).write_text(f"../{name}")


@pytest.mark.parametrize("lost", ["missing", "text"])
def test_a_copy_that_lost_its_links(lost, tmp_path):
    copy_without_links(tmp_path, lost)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'benchmarks/gpu')!r}); import clone; print(clone.NOTES);"
        "import internimage_deploy.trt_plugins.build as b; print(b.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    notes, place = done.stdout.splitlines()
    assert notes.count("is lost") == 3
    assert place == str(tmp_path / "trt_plugins" / "build.py")
    assert listed("A", script=tmp_path / "benchmarks/gpu/all.py") == listed("A")


def test_nothing_beyond_pytorch_and_its_packages_is_needed(tmp_path):
    """Where the project is not installed, its other dependencies need not be: compiling and checking a kernel."""
    program = f"""
import sys
for name in ("platformdirs", "ml_dtypes", "onnx", "onnxruntime", "onnxscript", "cv2", "PIL", "rich", "click", "pycuda"):
    sys.modules[name] = None
real = __import__("importlib.util").util.find_spec
__import__("importlib.util").util.find_spec = lambda name, *more: None if name == "platformdirs" else real(name, *more)
sys.path.insert(0, {str(ALL.parent)!r})
import clone
print(clone.NOTES)
import correctness, kernel_library, kernel_times, networks, nvidia_tools, plugin_operators, stages
operator = plugin_operators.operators()["upsample_argmax"]
case = operator.odd_cases()[0]
print(correctness.check_case(operator, case, "float32", "cpu", correctness.launch_on_host, set())["status"])
for part in stages.STAGES["A"] + stages.STAGES["B"] + stages.STAGES["C"]:
    assert list(part.tasks()(__import__("task").Options(__import__("pathlib").Path("out"))))
"""
    environment = {**os.environ, "PYTHONPATH": "", "INTERNIMAGE_DEPLOY_CACHE": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    notes, status = done.stdout.splitlines()
    assert "compiled libraries go to" in notes
    assert status == OK


def test_a_copy_without_a_room_says_so(tmp_path):
    copy_without_links(tmp_path, "missing")
    shutil.rmtree(tmp_path / "exporter")
    done = run("--stage", "A", "--dry-run", script=tmp_path / "benchmarks/gpu/all.py")
    assert done.returncode == 1
    assert "lacks the folder exporter/" in done.stderr
    assert "Traceback" not in done.stderr
