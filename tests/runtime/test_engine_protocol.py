# SPDX-License-Identifier: Apache-2.0
"""Jobs and events survive the way to the other process and back."""

import pytest

from internimage_deploy.runtime.engine import protocol
from internimage_deploy.runtime.engine.progress import BuildTree
from internimage_deploy.runtime.engine.protocol import (
    Compiled,
    CompilerChosen,
    CompilerWarning,
    ExpectedTensor,
    Failed,
    Job,
    PhaseFinished,
    PhaseStarted,
    StepCompleted,
)

EVENTS = [
    PhaseStarted("Parsing", None, 1),
    PhaseStarted("Timing", "Building", 12),
    StepCompleted("Timing", 3),
    PhaseFinished("Timing"),
    CompilerWarning("slow\nkernel"),
    Compiled("10.13.0", "Stand-in GPU", 5),
    Failed("bug", "Traceback ..."),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event(event):
    line = protocol.encode_event(event)
    assert "\n" not in line
    assert protocol.decode_event(line) == event


def test_a_job():
    profile = {"min": (1, 64, 64, 3), "opt": (1, 64, 64, 3), "max": (4, 64, 64, 3)}
    job = Job(
        "tensorrt",
        "m.onnx",
        "m.onnx",
        "m.engine",
        ExpectedTensor("image", "uint8", (-1, 64, 64, 3)),
        (ExpectedTensor("labels", "uint8", (-1, 64, 64)),),
        profiles=(profile, profile),
        flags=("FP16",),
        compute_capabilities=("8.6",),
        embed_plugin=True,
        lean_options=("--embed-plugin",),
        float32_nodes=("decode_head.conv_seg/Conv",),
    )
    assert protocol.decode_job(protocol.encode_job(job)) == job


def test_the_tree_shows_running_phases_and_drops_finished_ones():
    tree = BuildTree("model.onnx")
    tree.show(CompilerChosen("TensorRT 10.13.0"))
    for event in (PhaseStarted("Building", None, 1), *EVENTS[1:3]):
        tree.show(event)
    assert tree.root.name == "TensorRT 10.13.0: model.onnx"
    (building,) = tree.root.children
    (timing,) = building.children
    assert (timing.name, timing.steps, timing.done) == ("Timing", 12, 4)
    tree.show(PhaseFinished("Building"))  # compilers do not always report the end of inner phases
    assert tree.root.children == []
