# SPDX-License-Identifier: Apache-2.0
"""Segmenting a folder, or a prefix of an object store, on a Ray cluster.

Each picture's label map is written last, so its presence says that the picture is done: a run that was interrupted
goes on where it stopped. A picture that fails is reported and leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.files import atomic_write, write_error
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.imaging.image_io import EXTENSIONS, MAX_PIXELS, decode_image
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.serving.execution import model_runner
from internimage_deploy.runtime.serving.settings import ModelSettings

if TYPE_CHECKING:
    from pyarrow import fs

_LABELS = ".labels.png"
_FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class Place:
    """A folder on a shared disk, or a prefix such as `s3://bucket/pictures`."""

    uri: str

    def __str__(self) -> str:
        # Object stores' addresses may hold credentials (s3://KEY:SECRET@bucket), which belong into no message.
        return re.sub(r"//[^/@]*@", "//", self.uri)

    def open(self) -> tuple[fs.FileSystem, str]:
        """The file system and the path within it. Raises `UserError`."""
        from pyarrow import ArrowInvalid, fs

        if "://" not in self.uri:
            return fs.LocalFileSystem(), str(Path(self.uri).absolute())
        try:
            system, path = fs.FileSystem.from_uri(self.uri)
        except (ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"{self}: not a place that can be opened ({_line(error)})") from error
        return system, path


@dataclass(frozen=True)
class Outputs:
    """Where results go, and which there are beside the label maps."""

    place: Place
    overlay: bool = False
    as_json: bool = False


@dataclass
class Report:
    """How a job went: pictures done in this run, found done already, and (source, reason) of those that failed."""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Cluster:
    """What to use of a cluster; `address` None starts one on this machine."""

    address: str | None = None
    replicas: tuple[int, int] = (1, 1)
    gpus: float = 0.0
    cpus: float = 1.0


def segment(
    model: ModelSettings,
    source: Place,
    outputs: Outputs,
    cluster: Cluster,
    *,
    recursive: bool = False,
    batch: int = 1,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Segment every picture under `source` that has no label map in `outputs` yet.

    Args:
        model: a file every machine of the cluster can read, and how it is loaded.
        source: where the pictures are.
        outputs: where results go.
        cluster: which, and how much of it.
        recursive: search below `source` too; results keep the subfolders.
        batch: most pictures in one run of the network.
        max_pixels: refuse larger pictures.
        progress: told how many pictures of how many are through.

    Raises:
        UserError: no picture, no cluster, a model that cannot be loaded, or outputs that cannot be written.
    """
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependency("ray[data]", "ray", "segmenting on a cluster") from error
    if model.path.suffix == ".onnx":
        read_card(model.path)  # a broken file is better found here than on every machine
    found = list(_pictures(source, recursive))
    report = Report()
    finished = _finished(outputs.place)
    todo = [item for item in found if item["stem"] not in finished]
    report.skipped = len(found) - len(todo)
    if not todo:
        return report
    _connect(cluster.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    arguments = {"model": model, "source": source, "outputs": outputs, "batch": batch, "max_pixels": max_pixels}
    pieces = min(len(todo), max(4 * cluster.replicas[1], len(todo) // 64))
    rows = ray.data.from_items(todo, override_num_blocks=pieces).map_batches(
        _Worker,
        fn_constructor_kwargs=arguments,
        batch_size=max(batch, 1),
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=cluster.replicas[0], max_size=cluster.replicas[1]),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    try:
        for row in rows.iter_rows():
            if row["error"]:
                report.failed.append((str(row["source"]), str(row["error"])))
            else:
                report.done += 1
            progress(report.done + len(report.failed), len(todo))
    except ray.exceptions.RayError as error:
        raise UserError(f"the job stopped: {_line(error)}; run it again to go on where it stopped") from error
    finally:
        if cluster.address is None:
            ray.shutdown()
    _write_failures(outputs.place, report)
    return report


class _Worker:
    """On a machine of the cluster: the loaded model, and where to read and write."""

    def __init__(self, *, model: ModelSettings, source: Place, outputs: Outputs, batch: int, max_pixels: int) -> None:
        self._segmenter = model_runner.load(ModelSettings(model.path, dataclasses.replace(model.options, batch=batch)))
        self._model = model.path.name
        self._outputs = outputs
        self._read, _ = source.open()
        self._write, self._folder = outputs.place.open()
        self._max_pixels = max_pixels

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        sources, stems = list(map(str, batch["source"])), list(map(str, batch["stem"]))
        errors = [""] * len(sources)
        groups: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        for index, source in enumerate(sources):
            try:
                with self._read.open_input_stream(source) as stream:
                    data = stream.read()
                image = decode_image(data, what=posixpath.basename(source), max_pixels=self._max_pixels)
                prepared = self._segmenter.prepare(image)
                groups.setdefault(prepared.size, []).append((index, prepared))
            except (UserError, OSError) as error:
                errors[index] = _line(error)
        for group in groups.values():
            answers = model_runner.run_each(self._segmenter, [image for _, image in group])
            for (index, prepared), answer in zip(group, answers, strict=True):
                if isinstance(answer, Exception):
                    errors[index] = _line(answer)
                else:
                    result = self._segmenter.pipeline.result(prepared.image, answer)
                    self._store(stems[index], sources[index], result)
        return {"source": np.array(sources, object), "error": np.array(errors, object)}

    def _store(self, stem: str, source: str, result: Segmentation) -> None:
        from internimage_deploy.runtime.serving.http.image_codec import png

        if self._outputs.overlay:
            self._put(f"{stem}.overlay.png", png(result.overlay()))
        if self._outputs.as_json:
            facts = {"image": posixpath.basename(source), "model": self._model, **result.summary()}
            self._put(f"{stem}.json", (json.dumps(facts, indent=1) + "\n").encode())
        self._put(f"{stem}{_LABELS}", png(result.labels))

    def _put(self, name: str, data: bytes) -> None:
        put(self._write, posixpath.join(self._folder, name), data)


def put(system: fs.FileSystem, path: str, data: bytes) -> None:
    """Write a file so that it is seen whole or not at all. Raises `UserError` or OSError."""
    if system.type_name == "local":
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(Path(path).parent, error) from error
        atomic_write(Path(path), data)
        return
    with system.open_output_stream(path) as stream:  # object stores show an object when it is complete
        stream.write(data)


def _pictures(source: Place, recursive: bool) -> Iterator[dict[str, str]]:
    """{"source": path, "stem": path of the results without suffix, relative to the output} of every picture."""
    owners: dict[str, str] = {}
    for path in sorted(_files(source, recursive, must_exist=True)):
        _, root = source.open()
        stem, suffix = posixpath.splitext(posixpath.relpath(path, root))
        name = posixpath.basename(path).lower()
        if suffix.lower() not in EXTENSIONS or name.startswith(".") or name.endswith((_LABELS, ".overlay.png")):
            continue
        if stem in owners:
            raise UserError(f"{owners[stem]} and {path} would both write {stem}{_LABELS}; rename one")
        owners[stem] = path
        yield {"source": path, "stem": stem}
    if not owners:
        deeper = "" if recursive else "; add --recursive to look deeper"
        raise UserError(f"{source}: no picture here ({', '.join(sorted(EXTENSIONS))}){deeper}")


def _finished(place: Place) -> set[str]:
    _, root = place.open()
    paths = _files(place, True, must_exist=False)
    return {posixpath.relpath(path, root).removesuffix(_LABELS) for path in paths if path.endswith(_LABELS)}


def _files(place: Place, recursive: bool, *, must_exist: bool) -> list[str]:
    from pyarrow import fs

    system, root = place.open()
    try:
        infos = system.get_file_info(fs.FileSelector(root, recursive=recursive, allow_not_found=not must_exist))
    except OSError as error:
        raise UserError(f"cannot list {place}: {_line(error)}") from error
    return [info.path for info in infos if info.type == fs.FileType.File]


def _write_failures(place: Place, report: Report) -> None:
    """The failures of this run beside the results; an older list goes away when there are none."""
    system, root = place.open()
    path = posixpath.join(root, _FAILURES)
    if report.failed:
        lines = [json.dumps({"source": source, "error": error}) + "\n" for source, error in report.failed]
        put(system, path, "".join(lines).encode())
    elif path in _files(place, False, must_exist=False):
        system.delete_file(path)


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    for name in ("ray", "ray.data"):  # their remarks about every step are for people who debug Ray
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
