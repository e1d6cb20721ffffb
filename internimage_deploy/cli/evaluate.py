# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: a model's mIoU, accuracy and IoU by class on images with label maps."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click

from internimage_deploy.cli.cluster_options import check_local, cluster_options
from internimage_deploy.cli.load_options import load_options
from internimage_deploy.cli.options import FilePath, Number, model_argument
from internimage_deploy.cli.progress import ProgressBar
from internimage_deploy.datasets.layouts import LAYOUTS
from internimage_deploy.errors import UserError, escaped
from internimage_deploy.runtime.options import LoadOptions

_CHANGED = 10  # classes that are listed

_EXAMPLES = """\b
Examples:
  internimage-deploy evaluate model.onnx --images val/images --labels val/labels --json result.json
  internimage-deploy evaluate model.onnx --images val/images --labels val/labels --against model.engine
  internimage-deploy evaluate model.onnx --images val/images --labels val/labels --scales 0.5,1.0,1.5 --flip
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@click.option("--images", required=True, help="Folder of the images, or an object store's prefix; with its subfolders.")
@click.option(
    "--labels",
    required=True,
    help="Folder of the label maps, likewise: grey or palette images of ids, of the same size as the images. A label "
    "map has the path and name of its image, but for the ending and the data set's suffixes.",
)
@click.option(
    "--dataset",
    type=click.Choice(list(LAYOUTS)),
    help="Data set whose file names and label encoding are meant; 'folder' pairs files of one stem, and the values are "
    "class ids.  [default: recognised by folders and file names]",
)
@click.option(
    "--split",
    type=FilePath,
    help="Text file with the stem of an image in each line; the others are left out.  [default: the list of the data "
    "set where it has one, else all images]",
)
@click.option("--against", type=FilePath, help="Second model file, run on the same images and compared with MODEL.")
@click.option("--json", type=FilePath, help="File for the result as JSON, with the confusion matrix.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a run that ended early. With --json RESULT.json, the counts of every image are written to "
    "RESULT.images.jsonl as it is done; this takes them and runs the images that are left.",
)
@click.option(
    "--at-least",
    type=Number(0, 1),
    metavar="MIOU",
    help="Exit with 1 if the mIoU is below this fraction.",
)
@click.option("--ignore-unknown", is_flag=True, help="Count label values that mean no class as ignored.")
@click.option("--skip-unlabeled", is_flag=True, help="Leave out images that have no label map.")
@load_options
@cluster_options
def evaluate(
    model: Path,
    images: str,
    labels: str,
    dataset: str | None,
    split: Path | None,
    against: Path | None,
    json: Path | None,
    resume: bool,
    at_least: float | None,
    ignore_unknown: bool,
    skip_unlabeled: bool,
    options: LoadOptions,
    executor: str,
    ray_address: str | None,
    replicas: tuple[int, int],
    gpus: float,
    cpus: float,
) -> None:
    """Score MODEL against label maps: mIoU, mAcc, aAcc and IoU by class, as mmsegmentation defines them.

    The layouts and label encodings of ADE20K, Cityscapes, COCO-Stuff, Mapillary, NYU and Pascal Context are recognised;
    the value 255 is ignored. Images that cannot be evaluated are named at the end, the others count, and the exit code
    is 1.

    With --executor ray, the images are spread over a Ray cluster, whose machines must all be able to read the model,
    the images and the label maps.
    """
    from internimage_deploy.runtime.cluster.batch import segment_on_cluster
    from internimage_deploy.runtime.cluster.connect import Cluster
    from internimage_deploy.runtime.evaluation.run import run
    from internimage_deploy.runtime.evaluation.task import plan

    if executor == "local":
        check_local()
    elif against is not None:
        raise click.UsageError("--against runs on one machine; leave --executor out, or evaluate the models one by one")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks about odd metadata: the pixels decide
    task = plan(
        model,
        images,
        labels,
        options,
        dataset=dataset,
        split=split,
        against=against,
        ignore_unknown=ignore_unknown,
        skip_unlabeled=skip_unlabeled,
        json=json,
        resume=resume,
    )
    click.echo(f"label maps: {task.pairs.layout.name}, {task.pairs.truth.meaning}, 255 is ignored")
    for note in task.pairs.notes:
        click.echo(escaped(f"note: {note}"), err=True)
    elsewhere = None
    if executor == "ray":
        cluster = Cluster(ray_address, replicas, gpus, cpus)
        elsewhere = partial(segment_on_cluster, model.absolute(), options, cluster=cluster, again="--resume")
    with ProgressBar("evaluating", len(task.pairs.images)) as advance:
        result = run(task, advance, elsewhere)
    _show(result)
    for source, reason in result.failed:
        click.echo(f"failed: {escaped(reason if source in reason else f'{source}: {reason}')}", err=True)
    problems = []
    if result.failed:
        count = len(result.failed) + result.images
        problems.append(f"{len(result.failed)} of {count} images could not be evaluated; they are named above")
    if at_least is not None and not result.miou >= at_least:
        problems.append(f"mIoU {result.miou:.4f}, expected at least {at_least:g}")
    if problems:
        raise UserError("; ".join(problems))


def _show(result: Any) -> None:
    """Print tables and means."""
    for one in (result, *([] if result.against is None else [result.against])):
        if result.against is not None:
            click.echo(f"\n{escaped(one.model)}")
        for line in one.table():
            click.echo(escaped(line))
        speed = "" if one.images_per_second is None else f", {one.images_per_second:.1f} images per second"
        click.echo(f"{one.images} images: mIoU {one.miou:.4f}, mAcc {one.macc:.4f}, aAcc {one.aacc:.4f}{speed}")
    if result.against is None:
        return
    other = result.against
    click.echo(f"\n{result.agreement:.4%} of the labels agree; mIoU {result.miou:.4f} against {other.miou:.4f}")
    changes = [row for row in result.changes() if row[1] != row[2]][:_CHANGED]
    if changes:
        width = max(len(name) for name, _, _ in changes)
        click.echo("IoU of the classes that differ most:")
        for name, first, second in changes:
            click.echo(escaped(f"  {name:{width}}  {first:7.2%} against {second:7.2%}"))
