# SPDX-License-Identifier: Apache-2.0
"""Exports that several tests read, each made and verified once per test run, whichever worker needs it first.

Tracing takes seconds, and half a minute with free sizes. A test that changes a file changes a copy.
"""

import hashlib
import os
import pickle

import pytest
from filelock import FileLock

from internimage_deploy.exporter.export import export_model
from internimage_deploy.exporter.options import ExportOptions
from support import golden
from support.small_models import golden_segmentor, small, source_model, tiny_segmentor

MODELS = {
    "tiny": tiny_segmentor,
    "tiny_segformer": lambda: tiny_segmentor("SegformerHead"),
    "tiny_centre_feature_scale": lambda: tiny_segmentor(center_feature_scale=True),
    "small_l": lambda: small("l"),
    **{name: lambda name=name: golden_segmentor(name) for name in (*golden.NETWORKS, *golden.MASK2FORMER)},
}

# What more than one test file reads.
STATIC = ("tiny", ExportOptions(size=(64, 96), batch=2))
DYNAMIC_LOGITS = ("upernet_t_like", ExportOptions(input="float", emit="logits"))
DYNAMIC_LABELS = ("tiny_segformer", ExportOptions())
OPSET_16 = (
    "tiny_centre_feature_scale",
    ExportOptions(size=(64, 32), batch=1, input="float", emit="logits", opset=16),
)


class Exports:
    """Call it with a name of MODELS and options; it returns the `ExportedModel`."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, name, options):
        key = f"{name}-{hashlib.sha256(repr(options).encode()).hexdigest()[:12]}"
        record = self.folder / f"{key}.pickle"
        with FileLock(f"{record}.lock"):
            if not record.exists():
                exported = export_model(source_model(MODELS[name](), name), options, self.folder / f"{key}.onnx")
                record.write_bytes(pickle.dumps(exported))
        return pickle.loads(record.read_bytes())


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Exports(shared / "exports")
