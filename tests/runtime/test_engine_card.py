# SPDX-License-Identifier: Apache-2.0
"""Profiles from the card, and the checks of the card beside an engine."""

import dataclasses
import json
import re

import pytest

from internimage_deploy.card import EngineInfo, ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.files import sha256
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.profiles import (
    Profile,
    best_profile,
    choose_profiles,
    parse_size,
    profile_note,
    tensor_shape,
)
from internimage_deploy.window import Window

FREE = TensorSpec("image", "uint8", ("batch", "height", "width", 3))
LABELS = TensorSpec("labels", "uint8", ("batch", "height", "width"))
CARD = ModelCard("net", ("a", "b"), ((0, 0, 0), (1, 1, 1)), FREE, LABELS)


def test_default_profiles_include_what_the_resize_rule_makes():
    """ADE20K's (2048, 512): the short side is at most 512, the long one 2048, upright or wide."""
    wide, upright = choose_profiles(dataclasses.replace(CARD, resize=(2048, 512)), (), (), ())
    assert wide == Profile((1, 64, 64), (1, 512, 704), (1, 512, 2048))
    assert upright == Profile((1, 64, 64), (1, 704, 512), (1, 2048, 512))
    for size in ((1, 512, 704), (1, 256, 2048), (1, 64, 512)):
        assert best_profile((wide, upright), size) == 0
    assert best_profile((wide, upright), (1, 1024, 512)) == 1
    assert best_profile((wide, upright), (2, 512, 512)) is None
    (cityscapes, _) = choose_profiles(dataclasses.replace(CARD, resize=(2048, 1024)), (), (), ())
    assert cityscapes.opt == (1, 1024, 2048)
    assert choose_profiles(CARD, (), (), ()) == (Profile((1, 64, 64), (1, 512, 512), (1, 1024, 1024)),)


def test_default_profiles_of_a_window_are_its_crops():
    """Whatever the resize rule makes of an image, the network sees crops, or a smaller image."""
    card = dataclasses.replace(CARD, resize=(2048, 1024), window=Window((1024, 896), (512, 512)))
    assert choose_profiles(card, (), (), ()) == (Profile((1, 64, 64), (1, 1024, 896), (1, 1024, 896)),)
    assert choose_profiles(card, ((1, 32, 32),), (), ()) == (Profile((1, 32, 32), (1, 1024, 896), (1, 1024, 896)),)
    small = dataclasses.replace(card, window=Window((32, 32), (16, 16)))
    assert choose_profiles(small, (), (), ()) == (Profile((1, 32, 32), (1, 32, 32), (1, 32, 32)),)
    sized = dataclasses.replace(card, input=TensorSpec("image", "uint8", ("batch", 512, 512, 3)))
    assert choose_profiles(sized, (), (), ()) == (Profile((1, 512, 512), (1, 512, 512), (1, 512, 512)),)


def test_missing_bounds_follow_from_the_others():
    assert choose_profiles(CARD, (), (), ((4, 512, 1024),)) == (Profile((1, 64, 64), (4, 512, 1024), (4, 512, 1024)),)
    assert choose_profiles(CARD, ((2, 32, 32),), ((2, 64, 64),), ()) == (
        Profile((2, 32, 32), (2, 64, 64), (2, 64, 64)),
    )
    low, high = (1, 64, 64), (4, 512, 1024)
    assert choose_profiles(CARD, (low,), (), (high,)) == (Profile(low, high, high),)
    fixed = dataclasses.replace(CARD, input=TensorSpec("image", "uint8", ("batch", 512, 512, 3)))
    assert choose_profiles(fixed, (), (), ((8, 512, 512),)) == (Profile((1, 512, 512), (8, 512, 512), (8, 512, 512)),)


def test_one_bound_alone_changes_the_default_profiles():
    """It says nothing about the largest images; an engine for its size alone would take hardly any."""
    card = dataclasses.replace(CARD, resize=(2048, 512))
    wide, upright = choose_profiles(card, (), (), ())
    assert choose_profiles(card, ((1, 128, 96),), (), ()) == (
        dataclasses.replace(wide, min=(1, 128, 96)),
        dataclasses.replace(upright, min=(1, 128, 96)),
    )
    assert choose_profiles(card, (), ((1, 1024, 512),), ()) == (
        wide,  # which does not include that size
        dataclasses.replace(upright, opt=(1, 1024, 512)),
    )
    text = profile_note((wide, upright), ((1, 64, 64),), (), ())
    assert text.startswith(
        "--opt and --max left out and taken from the model card; profiles: min 1x64x64 opt 1x512x704"
    )
    assert profile_note((wide,), ((1, 64, 64),), (), ((1, 512, 2048),)).startswith(
        "--opt left out and taken from the o"
    )
    for sizes in (((), (), ()), (((1, 64, 64),),) * 3):
        assert profile_note((wide,), *sizes) == ""


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((), ((4, 512, 512),), ()), "--opt 4x512x512 does not fit into this model's default profiles (min 1x64x64 "),
        ((((1, 2048, 64),), (), ()), "opt 1x512x512 max 1x1024x1024); name --max too"),
        ((((1, 64, 64),) * 2, (), ()), "got 2 times --min alone; name --max as often"),
        ((((1, 60, 64),), (), ()), "--min has height 60, expected a multiple of 32"),
        ((((1, 64, 64),) * 2, (), ((1, 64, 64),)), "got 2 --min, 0 --opt and 1 --max"),
        ((((1, 64, 64),), (), ((1, 32, 64),)), "height: --min 64, --opt 32, --max 32 are out of order"),
        (((), (), ((1, 100, 64),)), "--opt has height 100, expected a multiple of 32; the next one is 128"),
    ],
    ids=["opt alone", "min alone", "twice", "min's divisor", "counts", "order", "divisor"],
)
def test_profiles_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_profiles(CARD, *sizes)


def test_a_fixed_batch_is_kept():
    card = dataclasses.replace(CARD, input=TensorSpec("input", "float32", (4, 3, "height", "width")))
    (profile,) = choose_profiles(card, (), (), ())
    assert profile.max == (4, 1024, 1024)
    assert tensor_shape(card.input, profile.max) == (4, 3, 1024, 1024)
    with pytest.raises(UserError, match=r"has batch \d, but this model's is fixed to 4"):
        choose_profiles(card, (), (), ((2, 64, 64),))


@pytest.mark.parametrize("text", ["512x512", "1x0x512", "1x2x3x4", "axbxc"])
def test_texts_that_are_not_sizes(text):
    with pytest.raises(ValueError, match="expected NxHxW, such as 1x512x512"):
        parse_size(text)


INFO = EngineInfo("tensorrt", "10.3.0", "", (), plugin_version="1")


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    info = dataclasses.replace(INFO, sha256=sha256(path))
    sidecar.path_of(path).write_text(dataclasses.replace(CARD, engine=info).to_json())
    return path


def test_a_card_and_its_engine(engine):
    assert sidecar.path_of(engine).name == "model.engine.json"
    assert sidecar.read(engine).engine.plugin_version == "1"
    # sha256sum of the four letters "plan"
    assert sidecar.read(engine).engine.sha256.startswith("64879f7d6b960a01")


def test_the_json_of_a_card_keeps_its_keys(engine):
    data = json.loads(sidecar.path_of(engine).read_text())
    assert set(data["engine"]) == {
        *("flavour", "version", "sha256", "compute_capabilities", "profiles"),
        *("plugin_version", "plugin_embedded", "plugin_file", "plugin_sha256", "version_compatible", "device"),
        *("profile_sharing", "tf32", "fusion", "fusion_ms", "plugins"),
    }
    assert data["engine"]["flavour"] == sidecar.read(engine).engine.backend == "tensorrt"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [({}, True), ({"version": "8.6.1"}, False), ({"flavour": "tensorrt-rtx", "version": "1.7.1"}, True)],
    ids=["10", "8.6", "rtx"],
)
def test_a_card_of_before_a_key_says_what_the_compiler_did_then(engine, changes, shared):
    data = json.loads(sidecar.path_of(engine).read_text())
    for key in ("plugin_file", "plugin_sha256", "profile_sharing", "tf32", "fusion", "fusion_ms", "plugins"):
        del data["engine"][key]
    data["engine"] |= changes
    sidecar.path_of(engine).write_text(json.dumps(data))
    info = sidecar.read(engine).engine
    assert (info.plugin_file, info.fusion, info.fusion_ms) == ("", "", {})
    assert (info.tf32, info.profile_sharing) == (True, shared)


@pytest.mark.parametrize("name", ["../plugin.so", "/tmp/plugin.so", "..", "a\\b.so"])
def test_a_card_leads_to_no_library_elsewhere(engine, name):
    data = json.loads(sidecar.path_of(engine).read_text())
    data["engine"]["plugin_file"] = name
    sidecar.path_of(engine).write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"plugin_file: got .*, expected a file name without folders"):
        sidecar.read(engine)


def test_files_that_do_not_belong_together(engine):
    engine.write_bytes(b"plan2")
    with pytest.raises(UserError, match="the file is not the one its card describes"):
        sidecar.read(engine)
    sidecar.path_of(engine).write_text(CARD.to_json())
    with pytest.raises(UserError, match="the card of a model, not of an engine"):
        sidecar.read(engine)
    sidecar.path_of(engine).write_text("{")
    with pytest.raises(UserError, match="not a model card"):
        sidecar.read(engine)
    sidecar.path_of(engine).unlink()
    with pytest.raises(UserError, match=r"its card model.engine.json is not beside it; copy both files together"):
        sidecar.read(engine)
    with pytest.raises(UserError, match="no such file"):
        sidecar.read(engine.with_name("none.engine"))


@pytest.mark.parametrize(
    ("changes", "backend", "version", "message"),
    [
        ({}, "tensorrt", "10.3.0", ""),
        ({}, "tensorrt-rtx", "1.7.1", "an engine for TensorRT, and this is TensorRT-RTX 1.7.1; use --backend tensorrt"),
        ({}, "tensorrt", "10.16.0", "built with TensorRT 10.3.0, and this is 10.16.0; build it again here, or install"),
        ({"version_compatible": True}, "tensorrt", "10.16.0", ""),
        ({"version_compatible": True}, "tensorrt", "11.1.0", ""),
        ({"version_compatible": True}, "tensorrt", "12.0.0", "11 from 10, and 10 from 8; build it again here"),
        ({"version_compatible": True}, "tensorrt", "10.1.0", "which reaches newer versions of the same major number"),
        ({"version_compatible": True, "version": "8.6.1"}, "tensorrt", "10.3.0", ""),
        ({"version_compatible": True, "version": "8.6.1"}, "tensorrt", "11.1.0", "built with TensorRT 8.6.1, and this"),
        (
            {"version_compatible": True, "version": "11.1.0"},
            "tensorrt",
            "10.3.0",
            "built with TensorRT 11.1.0, and",
        ),
        ({"backend": "tensorrt-rtx", "version": "1.7.1"}, "tensorrt-rtx", "1.8.0", ""),
    ],
    ids=[
        *("same", "backend", "newer", "compatible", "next major", "too new", "older"),
        *("8 to 10", "8 to 11", "11 to 10", "rtx asks the header"),
    ],
)
def test_libraries(changes, backend, version, message, tmp_path):
    info = dataclasses.replace(INFO, **changes)
    if not message:
        sidecar.check_runtime(tmp_path, info, backend, version)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        sidecar.check_runtime(tmp_path, info, backend, version)


def test_another_gpu(tmp_path):
    info = dataclasses.replace(INFO, compute_capabilities=("8.6", "8.9"))
    sidecar.check_gpu(tmp_path, info, "8.9", "L4")
    with pytest.raises(UserError, match=r"built for compute capability 8.6, 8.9, and this GPU \(T4\) has 7.5"):
        sidecar.check_gpu(tmp_path, info, "7.5", "T4")
    sidecar.check_gpu(tmp_path, INFO, "7.5", "T4")


def test_plugins(tmp_path):
    sidecar.check_plugin(tmp_path, INFO, available="1", trusted=False)
    with pytest.raises(UserError, match=r"needs the plugin library, which is not here; build it with"):
        sidecar.check_plugin(tmp_path, INFO, available="", trusted=False)
    with pytest.raises(UserError, match="built with version 1 of the plugin library, and version 2 is here"):
        sidecar.check_plugin(tmp_path, INFO, available="2", trusted=False)
    embedded = dataclasses.replace(INFO, plugin_embedded=True)
    with pytest.raises(UserError, match=r"carries code that loading it would run; .* --trust-engine"):
        sidecar.check_plugin(tmp_path, embedded, available="", trusted=False)
    sidecar.check_plugin(tmp_path, embedded, available="", trusted=True)
