# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.checkpoint import read_checkpoint
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.presets import PRESETS
from support import golden
from support.small_models import golden_config, tiny_segmentor


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_architecture_is_inferred_from_an_official_checkpoint(name, tmp_path):
    checkpoint = read_checkpoint(golden.checkpoint(name, tmp_path / "model.pth"))
    case = golden.case(name)
    backbone = checkpoint.segmentor.config.backbone
    assert list(backbone.groups) == case["backbone"]["groups"]
    assert backbone.offset_scale == case["backbone"]["offset_scale"]
    assert backbone.post_norm == case["backbone"]["post_norm"]
    assert list(backbone.level2_post_norm_block_ids) == case["backbone"].get("level2_post_norm_block_ids", [])
    assert checkpoint.segmentor.config.head.type == case["head"]["type"]
    assert checkpoint.architecture == name.split("_")[0] + "_internimage"
    assert checkpoint.classes == golden.meta(name)["CLASSES"]
    assert [list(color) for color in checkpoint.palette] == golden.meta(name)["PALETTE"]
    with torch.inference_mode():
        logits = checkpoint.segmentor(torch.from_numpy(golden.network_input(name)))
    assert (logits - torch.from_numpy(golden.arrays(name)["logits"])).abs().max() <= 1e-5


def weights(name="upernet_t_like") -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in golden.state_dict(name).items()}


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda w: {"state_dict": w}, id="state_dict"),
        pytest.param(lambda w: {"model": w, "optimizer": {"state": {}}}, id="model"),
        pytest.param(lambda w: w, id="bare"),
        pytest.param(lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}, id="DataParallel"),
        pytest.param(lambda w: {"state_dict": {f"_orig_mod.{k}": v for k, v in w.items()}}, id="compiled"),
        pytest.param(lambda w: {"model_ema": w}, id="ema-only"),
        pytest.param(lambda w: {"state_dict": {k: v.double() for k, v in w.items()}}, id="float64"),
    ],
)
def test_containers_and_prefixes(wrap, tmp_path):
    state = read_checkpoint(saved(tmp_path / "m.pth", wrap(weights())), offset_scale=1.0).segmentor.state_dict()
    assert state.keys() == weights().keys()
    for name, tensor in weights().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], tensor)


def test_files_from_before_the_zip_format_are_read(tmp_path):
    path = saved(tmp_path / "m.pth", {"state_dict": weights()}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert read_checkpoint(path, offset_scale=1.0).segmentor.config.backbone.channels == 16


def test_ema_weights_are_taken_on_request(tmp_path):
    plain = weights()
    ema = {k: v + 1 if v.is_floating_point() else v for k, v in plain.items()}
    path = saved(tmp_path / "m.pth", {"state_dict": plain, "state_dict_ema": ema})
    name = "decode_head.conv_seg.bias"
    assert torch.equal(read_checkpoint(path, offset_scale=1.0).segmentor.state_dict()[name], plain[name])
    averaged = read_checkpoint(path, offset_scale=1.0, ema=True)
    assert torch.equal(averaged.segmentor.state_dict()[name], ema[name])
    assert any("'state_dict_ema'" in line for line in averaged.notes)
    assert not any("--ema changed nothing" in line for line in averaged.notes)


@pytest.mark.parametrize("ema", [False, True])
def test_mmengine_keeps_the_average_in_the_state_dict(ema, tmp_path):
    """As mmengine 0.10.7 writes it: EMAHook._swap_ema_state_dict exchanges the two state dicts before a save."""
    averaged = weights()
    last = {f"module.{k}": v + 1 if v.is_floating_point() else v for k, v in averaged.items()}
    content = {
        "meta": {"mmengine_version": "0.10.7"},
        "state_dict": averaged,
        "ema_state_dict": {"steps": torch.tensor(2), **last},
    }
    read = read_checkpoint(saved(tmp_path / "m.pth", content), offset_scale=1.0, ema=ema)
    name = "decode_head.conv_seg.bias"
    assert torch.equal(read.segmentor.state_dict()[name], averaged[name])
    assert any("moving average" in line and "last step" in line for line in read.notes)


@pytest.mark.parametrize("content", [lambda w: {"state_dict": w}, lambda w: w], ids=["state_dict", "bare"])
def test_a_request_for_ema_weights_that_are_not_there_is_answered(content, tmp_path):
    path = saved(tmp_path / "m.pth", content(weights()))
    notes = read_checkpoint(path, offset_scale=1.0, ema=True).notes
    assert any("no moving average of the weights" in line and "--ema changed nothing" in line for line in notes)
    assert not any("moving average" in line for line in read_checkpoint(path, offset_scale=1.0).notes)


def test_training_only_tensors_are_dropped_and_reported(tmp_path):
    extra = {"auxiliary_head.conv_seg.weight": torch.zeros(3), "ema_backbone_norm": torch.zeros(2)}
    checkpoint = read_checkpoint(saved(tmp_path / "m.pth", {**weights(), **extra}), offset_scale=1.0)
    assert not extra.keys() & checkpoint.segmentor.state_dict().keys()
    assert any("auxiliary_head.*" in line for line in checkpoint.notes)
    assert any("ema_*" in line for line in checkpoint.notes)


def test_what_weights_do_not_show_must_be_set(tmp_path):
    path = golden.checkpoint("upernet_h_like", tmp_path / "m.pth", with_meta=False)
    with pytest.raises(UserError, match=r"offset_scale is not in the weights.*--offset-scale"):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"level2_post_norm_block_ids.*--post-norm-blocks"):
        read_checkpoint(path, offset_scale=1.0)
    with pytest.raises(UserError, match=r"expected 2 block numbers from 0 to 3"):
        read_checkpoint(path, offset_scale=1.0, post_norm_blocks=(1, 4))
    backbone = read_checkpoint(path, offset_scale=1.0, post_norm_blocks=(1, 3)).segmentor.config.backbone
    assert backbone.level2_post_norm_block_ids == (1, 3)


def test_numbered_classes_and_data_set_tables_fill_in_for_missing_names(tmp_path):
    ade = read_checkpoint(golden.checkpoint("upernet_s_like", tmp_path / "a.pth", with_meta=False), offset_scale=1.0)
    assert ade.classes[:2] == ("wall", "building")
    numbered = read_checkpoint(
        golden.checkpoint("upernet_h_like", tmp_path / "b.pth", with_meta=False),
        offset_scale=1.0,
        post_norm_blocks=(1, 3),
    )
    assert numbered.classes[:2] == ("class_0", "class_1")
    assert len(numbered.palette) == 21


@pytest.mark.parametrize(
    ("config", "first", "note"),
    [
        ("dataset_type = 'MyRoadDataset'", "class_0", "numbered, for the data set MyRoadDataset is not known"),
        ("dataset_type = 'CityscapesDataset'", "road", "names of CityscapesDataset"),
        ("", "road", "names guessed from the 19 outputs (road, sidewalk, building, ...)"),
    ],
    ids=["unknown data set", "known data set", "no data set"],
)
def test_names_of_another_data_set_are_not_taken_for_granted(config, first, note, tmp_path):
    path = saved(tmp_path / "m.pth", {"meta": {"config": config}, "state_dict": weights()})
    checkpoint = read_checkpoint(path, offset_scale=1.0)
    assert (checkpoint.classes[0], len(checkpoint.classes)) == (first, 19)
    assert f"the checkpoint names no classes: {note}; --classes states them" in checkpoint.notes


def test_the_checkpoints_own_data_set_comes_before_archs(tmp_path, monkeypatch):
    cityscapes = PRESETS["upernet_internimage_t_512x1024_160k_cityscapes"]
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(cityscapes, config=golden_config("upernet_t_like")))
    content = {"meta": {"config": "dataset_type = 'MyRoadDataset'"}, "state_dict": weights()}
    assert read_checkpoint(saved(tmp_path / "own.pth", content), arch="small").classes[0] == "class_0"
    assert read_checkpoint(saved(tmp_path / "bare.pth", weights()), arch="small").classes[0] == "road"


def test_heads_wider_than_their_data_set_keep_every_output(tmp_path):
    meta = {"CLASSES": ("road", "sky"), "PALETTE": [[1, 2, 3], [4, 5, 6]]}
    path = saved(tmp_path / "m.pth", {"meta": meta, "state_dict": weights()})
    checkpoint = read_checkpoint(path, offset_scale=1.0)
    assert checkpoint.classes[:3] == ("road", "sky", "class_2")
    assert checkpoint.palette[:2] == ((1, 2, 3), (4, 5, 6))
    assert len(checkpoint.classes) == len(checkpoint.palette) == 19


# A backbone with its head and auxiliary head, in millions: the published figures.
PUBLISHED = {
    "upernet_internimage_t_512_160k_ade20k": 59,
    "upernet_internimage_s_512_160k_ade20k": 80,
    "upernet_internimage_b_512_160k_ade20k": 128,
    "upernet_internimage_l_640_160k_ade20k": 256,
    "upernet_internimage_xl_640_160k_ade20k": 368,
    "upernet_internimage_h_896_160k_ade20k": 1120,
    "segformer_internimage_l_512x1024_80k_mapillary": 220,
    "segformer_internimage_xl_512x1024_80k_mapillary": 330,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        segmentor = Segmentor(preset.config)
    count = sum(parameter.numel() for parameter in segmentor.parameters())
    if preset.config.head.type == "UPerHead":  # FCNHead on the third map: 3x3 to 256, batch norm, 1x1 to the classes
        count += 4 * preset.config.backbone.channels * 256 * 9 + 2 * 256 + 257 * preset.config.head.num_classes
    assert abs(count / 1e6 - PUBLISHED[name]) <= max(0.5, 0.005 * PUBLISHED[name])


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if "_512_" in n or "_640_" in n or "_896_" in n])
def test_released_variants_need_no_training_config(name, tmp_path, monkeypatch):
    """Names and shapes alone give back the preset; the tensors take no memory (one element, expanded)."""
    config = PRESETS[name].config
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Segmentor(config).state_dict().items()}
    fake = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    from internimage_deploy.exporter.architecture import Hints, infer

    hints = Hints()
    assert infer(fake, hints, "file") == config
    assert any("offset_scale" in note for note in hints.notes)


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("raw", [True, False], ids=["plain-pickle", "torch-zip"])
def test_a_booby_trapped_checkpoint_runs_nothing(raw, tmp_path):
    target, path = tmp_path / "pwned", tmp_path / "bomb.pth"
    content = {"state_dict": weights(), "hook": Bomb(target)}
    if raw:
        path.write_bytes(pickle.dumps({"hook": Bomb(target)}))
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert not target.exists()
    assert "bomb.pth" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_refused_name_is_in_the_message(tmp_path):
    path = saved(tmp_path / "m.pth", {"state_dict": weights(), "hook": Bomb(tmp_path / "x")})
    with pytest.raises(UserError, match=r"mkdir.*can run code"):
        read_checkpoint(path)


def claims_too_much(state):
    """Shapes of terabytes over one stored element."""
    return {**state, "decode_head.conv_seg.bias": torch.zeros(1).expand(1 << 40)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: {**w, "extra.weight": torch.zeros(2)}, r"1 unknown \('extra.weight'\)", id="unknown"),
        pytest.param(
            lambda w: {k: v for k, v in w.items() if "fc2.bias" not in k}, r"5 missing \('.*fc2.bias'", id="missing"
        ),
        pytest.param(
            lambda w: {**w, "decode_head.conv_seg.bias": torch.zeros(7)},
            r"'decode_head.conv_seg.bias': got \(7,\), expected \(19,\)",
            id="shape",
        ),
        pytest.param(
            lambda w: {**w, "decode_head.conv_seg.bias": torch.full((19,), float("nan"))}, "NaN or infinity", id="nan"
        ),
        pytest.param(
            lambda w: {**w, "decode_head.conv_seg.bias": torch.zeros(19, dtype=torch.int8)}, "torch.int8", id="integers"
        ),
        pytest.param(claims_too_much, "stores less", id="storage"),
        pytest.param(lambda w: {**w, "decode_head.conv_seg.bias": [1.0]}, "is a list", id="list"),
        pytest.param(
            lambda w: {k.removeprefix("backbone."): v for k, v in w.items() if k.startswith("backbone.")},
            "without a decode head",
            id="backbone",
        ),
        pytest.param(
            lambda w: {"head.weight": torch.zeros(2), "levels.0.dcn.x": torch.zeros(2)},
            "classification",
            id="classification",
        ),
        pytest.param(lambda w: {**w, "rpn_head.conv.weight": torch.zeros(2)}, "detection", id="detection"),
        pytest.param(lambda w: {**w, "decode_head.pixel_decoder.x": torch.zeros(2)}, "1 unknown", id="unknown"),
        pytest.param(lambda w: {"backbone.layer1.0.conv1.weight": torch.zeros(2)}, "no InternImage", id="resnet"),
        pytest.param(lambda w: {"epoch": 3}, "holds .*epoch.* and no weights", id="no-weights"),
        pytest.param(lambda w: {}, "holds an empty dictionary; expected tensors", id="empty"),
        pytest.param(lambda w: [1, 2], "holds a list", id="not-a-dict"),
        pytest.param(
            lambda w: {**w, "backbone.levels.0.blocks.0.dcn.mask.weight": torch.zeros(10, 16)}, "10 rows", id="groups"
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(change, message, tmp_path):
    path = saved(tmp_path / "m.pth", change(weights()))
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path, offset_scale=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a readable PyTorch checkpoint", id="empty"),
        pytest.param(b"<html>404 Not Found</html>", "not a readable PyTorch checkpoint", id="web-page"),
        pytest.param(b"PK\x03\x04" + bytes(200), "not a readable PyTorch checkpoint", id="broken-zip"),
    ],
)
def test_files_that_are_no_checkpoints(content, message, tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_checkpoints(fraction, zipped, tmp_path):
    path = saved(tmp_path / "m.pth", {"state_dict": weights()}, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match="not a readable PyTorch checkpoint"):
        read_checkpoint(path, offset_scale=1.0)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_arch_must_agree_with_the_weights(tmp_path):
    path = golden.checkpoint("upernet_t_like", tmp_path / "m.pth", with_meta=False)
    with pytest.raises(UserError, match=r"channels 16; --arch .* has 64"):
        read_checkpoint(path, arch="upernet_internimage_t_512_160k_ade20k")
    with pytest.raises(UserError, match="no released model is called 'resnet'"):
        read_checkpoint(path, arch="resnet")


def test_a_config_is_read_and_never_run(tmp_path):
    target = tmp_path / "pwned"
    meta = golden.meta("upernet_l_like")
    meta["config"] += f"\nimport os\nos.mkdir({str(target)!r})\nx = [os.mkdir({str(target)!r})]\n"
    weights = {k: torch.from_numpy(v) for k, v in golden.state_dict("upernet_l_like").items()}
    path = saved(tmp_path / "m.pth", {"meta": meta, "state_dict": weights})
    assert read_checkpoint(path).segmentor.config.backbone.offset_scale == 2.0
    assert not target.exists()


def test_test_scale_and_activation_come_from_the_config(tmp_path):
    meta = golden.meta("upernet_t_like")
    meta["config"] = meta["config"].replace("core_op='DCNv3'", "core_op='DCNv3',\n        act_layer='SiLU'") + (
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(2048, 512))]\n"
    )
    path = saved(tmp_path / "m.pth", {"meta": meta, "state_dict": weights()})
    checkpoint = read_checkpoint(path)
    assert checkpoint.resize == (2048, 512)
    assert checkpoint.segmentor.config.backbone.act_layer == "SiLU"
    meta["config"] = meta["config"].replace("'SiLU'", "'Mish'")
    with pytest.raises(UserError, match="Mish"):
        read_checkpoint(saved(tmp_path / "n.pth", {"meta": meta, "state_dict": weights()}))


def test_random_models_use_every_part():
    """Random weights must move offsets and masks, or a wrong export could pass unseen."""
    state = tiny_segmentor().state_dict()
    assert state["backbone.levels.0.blocks.0.dcn.offset.weight"].std() > 0.01
    assert all(value.isfinite().all() for value in state.values())
