# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom, and what its results show is what a notebook displays."""

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"

pytestmark = pytest.mark.slow


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'internimage-deploy[rtx]'")
    notebook = json.loads(NOTEBOOK.read_text())
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    values = []
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "outputs hold paths of the machine they were made on"
        *statements, last = _statements("".join(cell["source"]))
        exec("\n".join(statements), names)
        values.append(_value(last, names))
    result = names["result"]
    assert result._repr_png_().startswith(b"\x89PNG")
    assert "road" in result.class_fractions()
    assert (tmp_path / "out" / "quickstart" / "street.labels.png").is_file()
    assert names["built"].card.precision == "fp16"
    assert values[1][1] == result.classes


def _statements(source):
    import ast

    return [ast.unparse(node) for node in ast.parse(source).body]


def _value(statement, names):
    """What a notebook shows for a cell's last statement: its value if it is an expression."""
    try:
        code = compile(statement, "<cell>", "eval")
    except SyntaxError:
        exec(statement, names)
        return None
    return eval(code, names)
