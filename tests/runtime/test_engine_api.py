# SPDX-License-Identifier: Apache-2.0
"""`build_engine` of the Python API, up to the compiler, whose place `compiled` takes."""

import pytest

from internimage_deploy.card import ModelCard
from internimage_deploy.datasets import classes as tables
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine import build as module
from internimage_deploy.runtime.engine.build import build_engine
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.protocol import Compiled, CompilerChosen, CompilerWarning
from support.tiny_models import color_model


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The jobs that were compiled, by a stand-in that writes six bytes."""
    jobs = []

    def compile_in_process(job, on_event):
        jobs.append(job)
        for _ in range(2):
            on_event(CompilerWarning("slow kernel"))
        with open(job.output, "wb") as file:
            file.write(b"engine")
        return Compiled("1.7.1", "", 6)

    monkeypatch.setattr(module, "compile_in_process", compile_in_process)
    monkeypatch.setattr(module, "choose", lambda backend: Compiler(backend or "tensorrt-rtx", "1.7.1"))
    return jobs


def test_a_build_with_defaults(compiled, tmp_path):
    model = color_model(tmp_path / "m.onnx", labels=True)
    events = []
    built = build_engine(str(model), str(tmp_path / "m.engine"), on_event=events.append)
    assert (built.path, built.size_bytes, built.lowered) == (tmp_path / "m.engine", 6, ("Cast",))
    assert built.card == ModelCard.from_json((tmp_path / "m.engine.json").read_text())
    assert built.card.engine.profiles == ({"min": (1, 64, 64), "opt": (1, 512, 512), "max": (1, 1024, 1024)},)
    assert (built.notes, built.warnings) == ((), ("slow kernel",))
    assert events[0] == CompilerChosen("TensorRT-RTX 1.7.1")
    (job,) = compiled
    assert (job.backend, job.timing_cache, job.compute_capabilities) == ("tensorrt-rtx", "", ())


def test_every_option_reaches_the_job(compiled, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    built = build_engine(
        model,
        tmp_path / "m.engine",
        precision="fp16",
        backend="tensorrt-rtx",
        min=(1, 64, 64),
        max=[(2, 128, 64)],
        compute_capabilities=["8.6", "8.9", "8.6"],
        keep_fp32=("Conv",),
        workspace_mib=256,
        optimization_level=2,
        save_onnx=tmp_path / "kept.onnx",
    )
    (job,) = compiled
    assert (job.workspace_mib, job.optimization_level, job.compute_capabilities) == (256, 2, ("8.6", "8.9"))
    assert [profile["max"] for profile in job.profiles] == [(2, 128, 64, 3)]
    assert (built.card.precision, (tmp_path / "kept.onnx").is_file()) == ("fp16", True)


def test_tensorrt_keeps_its_timings_in_the_users_cache(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    model = color_model(tmp_path / "m.onnx")
    monkeypatch.setattr(module, "choose", lambda backend: Compiler("tensorrt", "10.13.0"))
    build_engine(model, tmp_path / "m.engine")
    build_engine(model, tmp_path / "m.engine", use_timing_cache=False)
    build_engine(model, tmp_path / "m.engine", timing_cache=tmp_path / "own.cache")
    caches = [str(tmp_path / "cache" / "timing" / "tensorrt-10.13.0.cache"), "", str(tmp_path / "own.cache")]
    assert [job.timing_cache for job in compiled] == caches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output": "m.onnx"},
            "m.onnx is named like an ONNX file; expected a name that ends in .engine, .plan, .trt, as m.engine",
        ),
        ({"opt": (64, 64)}, r"got the input size \(64, 64\), expected \(batch, height, width\)"),
        ({"opt": (1, 0, 64)}, r"got the input size \(1, 0, 64\), expected"),
        ({"compute_capabilities": ("9.0",)}, "9.0 is Hopper"),
        ({"timing_cache": "x", "use_timing_cache": False}, "a timing cache is named and switched off"),
        ({"classes": "nobody"}, "neither a data set nor a file; expected one of ade20k"),
    ],
)
def test_wrong_options(options, message, compiled, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    options = {"output": tmp_path / "m.engine", **options}
    with pytest.raises(UserError, match=message):
        build_engine(model, **options)
    assert compiled == []


def test_classes_by_name_number_file_or_one_by_one(tmp_path):
    cityscapes = tables.lookup("cityscapes")
    (tmp_path / "names.txt").write_text("\n".join(cityscapes[0]) + "\n")
    for classes in ("cityscapes", "19", str(tmp_path / "names.txt"), cityscapes[0]):
        assert tables.read_classes(classes) == cityscapes
    names, palette = tables.read_classes(["road", "sky"])
    assert (names, palette) == (("road", "sky"), tables.generic(2)[1])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="there are no names, expected one per line"):
        tables.read_classes(str(tmp_path / "empty.txt"))
