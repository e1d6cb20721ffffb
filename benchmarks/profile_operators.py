# SPDX-License-Identifier: Apache-2.0
"""Where the time goes, per operator, in the plain export and in ours.  Writes results/profile.json and a table.

    python benchmarks/profile_operators.py [--models t,s,l] [--sizes 512x512,512x1024,1024x2048] [--threads 2]

Beside it stands the arithmetic floor: multiply-adds of convolutions and matrix products, at the rate of a large matrix
product on the same machine.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from cpu import exported

import report
from report import Json


def main() -> None:
    """Profile and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="t,s,l")
    parser.add_argument("--sizes", default="512x512,512x1024,1024x2048")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep the other models and sizes of the results")
    parser.add_argument("--quick", action="store_true", help="T at 512x512 only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.sizes = "t", "512x512"
    rate = gemm_rate(arguments.threads)
    print(f"large matrix product: {rate:.0f} G multiply-adds/s")
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    chosen = [(model, size) for model in arguments.models.split(",") for size in sizes]
    rows = report.kept("profile", [(model, list(size)) for model, size in chosen]) if arguments.add else []
    for model, size in chosen:
        rows.append({**profile(model, size, arguments), "gemm_gmacs": round(rate, 1)})
        show(rows[-1], rate)
        report.write("profile", rows, threads=arguments.threads)


def gemm_rate(threads: int) -> float:
    """The best of ten products of 2048 x 2048 float32 in ONNX Runtime, in G multiply-adds per second.

    The second factor is constant, as weights are, so that ONNX Runtime may lay it out beforehand.
    """
    from onnx import TensorProto, helper, numpy_helper

    shape = [2048, 2048]
    a, b = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    read, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "ac")
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "gemm", [read], [made], [numpy_helper.from_array(b, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    run = session(model.SerializeToString(), threads)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        run.run(None, {"a": a})
        best = min(best, time.perf_counter() - start)
    return 2048**3 / best / 1e9


def session(model: bytes | str, threads: int, prefix: str | None = None) -> ort.InferenceSession:
    """An ONNX Runtime session, profiled if `prefix`, of the log's name, is not None."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = prefix
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def profile(model: str, size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Json]:
    """Milliseconds and G multiply-adds per operator type, before and after."""
    import onnx

    from internimage_deploy.exporter.presets import PRESETS
    from internimage_deploy.runtime.backends import cpu_graph

    name = next(key for key in PRESETS if key.startswith(f"upernet_internimage_{model}_") and key.endswith("ade20k"))
    image = np.zeros((1, *size, 3), np.uint8)
    kinds: dict[str, Json] = {}
    for kind in ("plain", "ours"):
        with tempfile.TemporaryDirectory() as folder:
            path, _ = exported(name, size, kind == "plain", Path(folder))
            network = onnx.load(str(path))
            if kind == "ours":
                cpu_graph.adapt(network)
            run = session(network.SerializeToString(), arguments.threads, f"{folder}/profile")
            for _ in range(arguments.runs):
                run.run(None, {"image": image})
            kinds[kind] = summarise(Path(run.end_profiling()))
    return {"model": model, "size": list(size), **kinds}


def summarise(log: Path) -> dict[str, Json]:
    """The smallest time of every node over the runs, summed by operator type, and the slowest nodes."""
    nodes: dict[tuple[str, str], list[Json]] = collections.defaultdict(list)
    for event in json.loads(log.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event)
    times: collections.Counter[str] = collections.Counter()
    macs: collections.Counter[str] = collections.Counter()
    slowest = []
    for (name, operator), events in nodes.items():
        best = min(events, key=lambda event: event["dur"])
        times[operator] += best["dur"] / 1e3
        work = multiply_adds(operator, best["args"])
        macs[operator] += work
        slowest.append((round(best["dur"] / 1e3, 2), operator, name, round(work / 1e9, 2)))
    return {
        "total_ms": round(sum(times.values()), 1),
        "operators": [
            {"operator": operator, "ms": round(ms, 2), "gmacs": round(macs[operator] / 1e9, 2)}
            for operator, ms in times.most_common()
        ],
        "slowest": sorted(slowest, reverse=True)[:15],
    }


def multiply_adds(operator: str, arguments: dict[str, Json]) -> int:
    """Of a convolution or matrix product, from the shapes in the profile; 0 for anything else."""
    read = [next(iter(shape.values())) for shape in arguments.get("input_type_shape", [])]
    made = [next(iter(shape.values())) for shape in arguments.get("output_type_shape", [])]
    if not made or len(read) < 1:
        return 0
    outputs = int(np.prod(made[0]))
    if operator == "Conv" and len(read) > 1 and len(read[1]) == 4:
        return outputs * int(np.prod(read[1][1:]))
    if operator in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
        return outputs * int(read[0][-1])
    return 0


def show(row: dict[str, Json], rate: float) -> None:
    """Print the operators of one network, before and after, each with its floor."""
    print(f"== {row['model'].upper()} {row['size'][0]}x{row['size'][1]}")
    for kind in ("plain", "ours"):
        print(f"  {kind}: {row[kind]['total_ms']:.0f} ms")
        for line in row[kind]["operators"][:10]:
            floor = 1e3 * line["gmacs"] / rate
            above = f"  floor {floor:7.1f} ms, x {line['ms'] / floor:.1f}" if floor > 0.1 else ""
            print(f"    {line['operator']:20} {line['ms']:9.1f} ms{above}")


if __name__ == "__main__":
    main()
