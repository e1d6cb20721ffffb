# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and docs/ from results/*.json, between the markers that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from report import Json

ROOT = Path(__file__).parents[1]
PLAIN = "plain export, ONNX Runtime"
VISIBLE = 1e-4  # share of changed labels that gets a row
OPERATORS = 9  # lines of a profile; the rest is summed


def main() -> None:
    """Replace what lies between the markers of every result file that exists."""
    for document, name, block in (
        ("README.md", "cpu", speed),
        ("docs/speed-notes.md", "cpu-cost", cost),
        ("docs/speed-notes.md", "profile", profile),
        ("docs/speed-notes.md", "operators", operators),
        ("docs/serving.md", "serving", serving),
        ("docs/demo.md", "accuracy", accuracy),
    ):
        path = ROOT / "benchmarks" / "results" / f"{name.partition('-')[0]}.json"
        if path.exists():
            replace(ROOT / document, name, block(json.loads(path.read_text())))


def replace(document: Path, name: str, content: str) -> None:
    """Put `content` between <!-- NAME:begin --> and <!-- NAME:end -->."""
    block = f"<!-- {name}:begin -->\n{content}\n<!-- {name}:end -->"
    pattern = f"<!-- {name}:begin -->.*?<!-- {name}:end -->"
    text, found = re.subn(pattern, lambda _: block, document.read_text(), flags=re.DOTALL)
    if not found:
        raise SystemExit(f"{document.name} has no <!-- {name}:begin --> and <!-- {name}:end --> markers")
    document.write_text(text)


def table(*lines: list[str]) -> str:
    """A Markdown table: the first line is the head, all but the first column are numbers."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def of(row: dict[str, Json]) -> str:
    """The model and size of a row."""
    return f"{row['model'].upper()} {'x'.join(map(str, row['size']))}"


def machine(report: dict[str, Json]) -> str:
    """Where it was measured, and with what."""
    versions = report["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino") if name in versions)
    return f"{report['machine']['cpu']}, {report['threads']} threads, float32, batch 1; {used}"


def columns(report: dict[str, Json]) -> list[str]:
    """The head of a table with one column for each model and size."""
    return ["", *map(of, report["rows"])]


def speed(report: dict[str, Json]) -> str:
    """Median times, as ratios to the plain export and in milliseconds."""
    rows = report["rows"]
    names = dict.fromkeys(name for row in rows for name in row["times"])
    lines = [columns(report)]
    for name in names:
        cells = []
        for row in rows:
            timing = row["times"].get(name)
            ratio = timing and timing["median_ms"] / row["times"][PLAIN]["median_ms"]
            cells.append(f"**{ratio:.2f}** ({timing['median_ms']:,.0f} ms)" if timing else "-")
        lines.append([name, *cells])
    unstable = any(timing["unstable"] for row in rows for timing in row["times"].values())
    busy = " Some runs differ by more than 10 %: take their ratios as rough." if unstable else ""
    return (
        "Time from a uint8 image to labels: median, as a ratio to the plain `torch.onnx` export in ONNX Runtime. "
        f"{machine(report)}; `openvino-bf16` computes in bfloat16. All variants of a column were measured in one "
        f"interleaved run.{busy}\n\n{table(*lines)}"
    )


def cost(report: dict[str, Json]) -> str:
    """File size, export time and memory of ours and of the plain export; labels that a backend changes."""
    rows = report["rows"]
    lines = [columns(report)]
    for label, key, unit in (
        ("file", "file_mb", "MiB"),
        ("export", "export_s", "s"),
        ("peak memory", "peak_mb", "MiB"),
    ):
        ours = "onnxruntime" if key == "peak_mb" else "ours"
        cells = [f"{row[key][ours]:,.0f} ({row[key]['plain']:,.0f}) {unit}" for row in rows]
        lines.append([f"{label}, ours (plain)", *cells])
    changed = {
        name: [row["times"].get(name, {}).get("labels_differ", 0) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row["times"])
    }
    exact = [max(shares) for shares in changed.values() if max(shares) < VISIBLE]
    for name, shares in changed.items():
        if max(shares) >= VISIBLE:
            lines.append([f"labels changed, {name}", *(f"{100 * share:.1f} %" for share in shares)])
    return (
        f"{machine(report)}. Labels are compared with PyTorch's, with random weights and a random image, where many "
        f"pixels lie close between two classes; all other variants change at most {100 * max(exact):.4f} %."
        f"\n\n{table(*lines)}"
    )


def profile(report: dict[str, Json]) -> str:
    """Where the time goes before and after, beside the arithmetic floor."""
    parts = []
    for row in sorted(report["rows"], key=lambda row: ("tsl".index(row["model"]), row["size"])):
        rate = row["gemm_gmacs"]
        before = {line["operator"]: line for line in row["plain"]["operators"]}
        after = {line["operator"]: line for line in row["ours"]["operators"]}
        both = sorted(
            before | after, key=lambda name: -max(side.get(name, {"ms": 0})["ms"] for side in (before, after))
        )
        lines = [[of(row), "plain, ms", "ours, ms", "G multiply-adds", "floor, ms", "times the floor"]]
        for name in both[:OPERATORS]:
            ms = [f"{side[name]['ms']:,.0f}" if name in side else "-" for side in (before, after)]
            work = after.get(name, {"gmacs": 0})["gmacs"]
            floor = 1e3 * work / rate
            lines.append([name, *ms, *(_floor(work, floor, after[name]["ms"]) if work else ["", "", ""])])
        others = [
            sum(line["ms"] for name, line in side.items() if name not in both[:OPERATORS]) for side in (before, after)
        ]
        work = sum(line["gmacs"] for line in after.values())
        lines.append(["others", *(f"{ms:,.0f}" for ms in others), "", "", ""])
        totals = [row[kind]["total_ms"] for kind in ("plain", "ours")]
        lines.append(["all", *(f"{ms:,.0f}" for ms in totals), *_floor(work, 1e3 * work / rate, totals[1])])
        parts.append(table(*lines))
    rates = [row["gemm_gmacs"] for row in report["rows"]]
    return (
        f"{machine(report)}. The floor is the rate of a product of two 2048x2048 matrices, the second constant, "
        f"measured before each run: {min(rates):.0f} to {max(rates):.0f} G multiply-adds a second. Minimum time of "
        "every node over the runs.\n\n" + "\n\n".join(parts)
    )


def _floor(work: float, floor: float, ms: float) -> list[str]:
    return [f"{work:,.1f}", f"{floor:,.0f}", f"{ms / floor:.1f}" if floor else ""]


def operators(report: dict[str, Json]) -> str:
    """One line for each operator: parameters, then multiply-adds, memory and time at every size."""
    rows = report["rows"]
    sizes = sorted({row["size"] for row in rows})
    lines = [["", "parameters", *(f"{size}x{size}" for size in sizes)]]
    for name in dict.fromkeys(row["operator"] for row in rows):
        own = {row["size"]: row for row in rows if row["operator"] == name}
        cells = [
            f"{r['mmacs']:,.0f} M, {r['memory_mb']:,.1f} MiB, {r['median_ms']:.2f} ms" for r in map(own.get, sizes) if r
        ]
        lines.append([name, f"{own[sizes[0]]['parameters']:,}", *cells])
    return (
        f"{report['channels']} channels, PyTorch; {machine(report)}. Multiply-adds, memory allocated by one call "
        f"(freed parts included), median time.\n\n{table(*lines)}"
    )


def accuracy(report: dict[str, Json]) -> str:
    """The mIoU of every variant, one column for each model, and how many labels differ from the plain export's."""
    rows = report["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [["", *(f"`{model}.pth`" for model in models)]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = {row["model"]: row for row in rows if row["variant"] == name}
        cells = [f"{own[m]['miou']:.4f} ({100 * own[m]['labels_differ']:.4f} %)" if m in own else "-" for m in models]
        lines.append([name, *cells])
    return (
        f"mIoU on {report['scenes']} held-out scenes, and in brackets the fraction of pixels whose label differs "
        "from the plain export's; ONNX Runtime on the CPU. The float16 graph is the one that `build-engine --fp16` "
        "compiles."
        f"\n\n{table(*lines)}"
    )


def serving(report: dict[str, Json]) -> str:
    """Load, overload, batching, faults and damaged requests, as one table."""
    load, batching, faults, fuzz = (report[stage] for stage in ("load", "batching", "faults", "fuzz"))
    network = batching["the network alone, pictures per second"]
    service = batching["answered per second"]
    alone = load["refused_ms, seen by a single client in a process of its own"]
    latency, rejection = load["answered_ms"], load["refused_ms"]
    memory = load["memory_mb"]
    rows = [
        (
            f"{load['clients']} clients, {load['seconds']:.0f} s",
            f"{load['answered']:,} images segmented ({load['answered per second']:.0f}/s), latency "
            f"p50 {latency['p50'] / 1e3:.2f} s, p95 {latency['p95'] / 1e3:.2f} s; "
            f"{load['lost or wrong']} responses lost or wrong",
        ),
        (
            "overload",
            f"{load['refused with 503']:,} requests rejected with 503 and Retry-After: p50 {rejection['p50']:.0f} ms, "
            f"p95 {rejection['p95']:.0f} ms, max {rejection['max']:.0f} ms (a client in a process of its own: "
            f"p95 {alone['p95']:.0f} ms)",
        ),
        ("memory", f"{memory['second quarter']} MiB in the second quarter, {memory['last quarter']} MiB in the last"),
        (
            "batch size 8 and 1",
            f"{service['batch 8']:.0f}/s and {service['batch 1']:.0f}/s, median ratio {service['ratio']:.2f}; "
            f"the network alone on one thread: {network['batch 8']:.0f}/s and {network['batch 1']:.0f}/s, "
            f"median ratio {network['ratio']:.2f}",
        ),
        (
            f"{faults['workers killed']} workers killed under load",
            f"{faults['answered']:,} images segmented, {faults['refused with 503']} requests rejected, "
            f"{faults['lost or wrong']} responses lost or wrong",
        ),
        (
            f"{fuzz['mutations']:,} damaged requests, Schemathesis",
            f"{fuzz['number of problems']} with a 5xx status or without a response; {fuzz['schemathesis'][0]}",
        ),
    ]
    if attacks := report.get("attacks"):
        number = sum(isinstance(value, dict) and "healthy_ms" in value for value in attacks.values())
        rows.append(
            (
                f"{number} attacks, {attacks['seconds each']:.0f} s each",
                f"other clients meanwhile: p99 at most {attacks['worst p99 of healthy clients, ms']:,.0f} ms; "
                f"memory at most {attacks['highest memory above the start, mb']:,} MiB above the start, with "
                f"--max-memory {attacks['max_memory_mb']:,}",
            )
        )
    where = (
        f"The model of the demo, {report['pictures'].replace('PNG', 'PNG images')}; {report['service']}; "
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads."
    )
    lines = [f"| {label} | {figures} |" for label, figures in (("", ""), ("---", "---"), *rows)]
    return "\n".join((where, "", *lines))


if __name__ == "__main__":
    main()
