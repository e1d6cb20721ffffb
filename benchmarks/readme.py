# SPDX-License-Identifier: Apache-2.0
"""Write the README's figures from results/*.json, between the markers that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLAIN, EAGER = "plain export, ONNX Runtime", "PyTorch eager"


def main() -> None:
    """Replace what lies between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    path = ROOT / "benchmarks" / "results" / "cpu.json"
    if path.exists():
        block = f"<!-- speed:begin -->\n{speed(json.loads(path.read_text()))}\n<!-- speed:end -->"
        text, found = re.subn(r"<!-- speed:begin -->.*?<!-- speed:end -->", lambda _: block, text, flags=re.DOTALL)
        if not found:
            raise SystemExit("README.md has no <!-- speed:begin --> and <!-- speed:end --> markers")
        readme.write_text(text)


def speed(report: dict[str, Any]) -> str:
    """Ratios to the plain export first, then milliseconds, then the sizes that go with them."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["times"]))
    heads = (f"{row['model'].upper()} {'x'.join(map(str, row['size']))}" for row in report["rows"])
    lines = [
        f"{report['machine']['cpu']}, {report['threads']} threads, batch 1, uint8 picture to labels; median time as a "
        "share of the plain export's, and in ms. One interleaved run.",
        "",
        "| | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(report["rows"]),
    ]
    for name in names:
        cells = []
        for row in report["rows"]:
            timing = row["times"].get(name)
            share = timing and timing["median_ms"] / row["times"][PLAIN]["median_ms"]
            cells.append(f"{share:.2f} ({timing['median_ms']:.0f} ms)" if timing else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for label, key, unit in (
        ("file", "file_mb", "MiB"),
        ("export", "export_s", "s"),
        ("peak memory", "peak_mb", "MiB"),
    ):
        ours = "onnxruntime" if key == "peak_mb" else "ours"
        cells = [f"{row[key][ours]:.0f} ({row[key]['plain']:.0f}) {unit}" for row in report["rows"]]
        lines.append(f"| {label}, ours (plain) | " + " | ".join(cells) + " |")
    unstable = [name for row in report["rows"] for name, timing in row["times"].items() if timing["unstable"]]
    if unstable:
        lines += ["", "The machine was busy: some runs differ by more than 10 %, so take the ratios as rough."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
