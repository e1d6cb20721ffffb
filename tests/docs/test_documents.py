# SPDX-License-Identifier: Apache-2.0
"""Links lead somewhere, figures come from results, and what the documents list is what the code has."""

import importlib.util
import re
from pathlib import Path

import pytest

from internimage_deploy.cli.main import COMMANDS
from support.documents import DOCUMENTS, ROOT, anchors, links, section

WALKS = ("From an image to labels", "From a weight to an engine", "From a request to a response",
         "From a DCNv3 node to the kernel")  # fmt: skip
MODULE = re.compile(r"`([\w/.]+\.(?:py|cpp|cuh|h))`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    broken = []
    for link in links(DOCUMENTS[document]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        name = target.relative_to(ROOT).as_posix()
        if not target.exists() or (anchor and anchor not in anchors(DOCUMENTS[name])):
            broken.append(link)
    assert broken == []


def test_every_document_is_linked_from_the_readme():
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= set(links(DOCUMENTS["README.md"]))


def test_the_readme_is_short():
    assert len(DOCUMENTS["README.md"].splitlines()) <= 160


def test_every_command_is_documented():
    text = "".join(DOCUMENTS.values())
    assert [name for name in COMMANDS if name not in text] == []


@pytest.mark.parametrize("title", WALKS)
def test_modules_of_the_walks_exist(title):
    walk = section(DOCUMENTS["docs/architecture.md"], title)
    steps = re.findall(r"^(\d+)\. ", walk, re.M)
    assert [int(number) for number in steps] == list(range(1, len(steps) + 1))
    assert len(steps) >= 5
    missing = [name for name in MODULE.findall(walk) if not _exists(name)]
    assert missing == []


def _exists(name):
    """C++ files are named without their folder."""
    return (ROOT / name).is_file() if "/" in name else any((ROOT / "trt_plugins" / "csrc").rglob(name))


def test_tables_are_those_of_the_results(tmp_path, monkeypatch):
    """`benchmarks/readme.py` would change nothing."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec.loader.exec_module(readme)
    (tmp_path / "docs").mkdir()
    for name, text in DOCUMENTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    readme.main()
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in DOCUMENTS} == DOCUMENTS


def test_the_released_models_are_listed():
    torch = pytest.importorskip("torch")
    from internimage_deploy.exporter.models.segmentor import Segmentor
    from internimage_deploy.exporter.presets import PRESETS

    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) M \|", DOCUMENTS["docs/models.md"], re.M))
    assert set(rows) == set(PRESETS)
    for config in {preset.config for preset in PRESETS.values()}:
        with torch.device("meta"):
            parameters = sum(tensor.numel() for tensor in Segmentor(config).parameters())
        for name, preset in PRESETS.items():
            if preset.config == config:
                assert int(rows[name].replace(",", "")) == round(parameters / 1e6), name


def test_slow_tests_exist():
    """Every entry of the list in tests/conftest.py names a file, and a test in it."""
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for entry in conftest.SLOW:
        file, _, test = entry.partition("::")
        path: Path = ROOT / "tests" / file
        assert path.is_file(), entry
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), entry
