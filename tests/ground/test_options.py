# SPDX-License-Identifier: Apache-2.0
import re

import click
import pytest
from click.testing import CliRunner

from internimage_deploy.cli.main import run
from internimage_deploy.cli.options import Number, Option, Size


@click.command()
@click.option("--executor", cls=Option, aliases=("--engine",), default="local", help="Where it runs.")
@click.option("--batch", "count", cls=Option, aliases=("--max-batch",), type=int, default=8)
def command(executor, count):
    click.echo(f"{executor} {count}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "local 8"),
        (["--executor", "ray", "--batch", "2"], "ray 2"),
        (["--engine", "ray", "--max-batch", "2"], "ray 2"),
    ],
)
def test_old_names_mean_the_new_ones(arguments, expected):
    assert CliRunner().invoke(command, arguments).output.strip() == expected


def test_help_lists_the_new_names_only():
    text = CliRunner().invoke(command, ["--help"]).output
    assert "--executor TEXT  Where it runs." in text
    assert "--batch INTEGER" in text
    assert "engine" not in text
    assert "max-batch" not in text


@pytest.mark.parametrize(
    ("misspelt", "names"),
    [("--engin", ["--executor"]), ("--max-batc", ["--batch"]), ("--executo", ["--executor"])],
)
def test_a_misspelt_option_is_told_the_new_names_only(misspelt, names, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, [misspelt, "1"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert re.findall(r"--[a-z-]+", message.partition("No such option")[2]) == [misspelt, *names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000000x64", "at most 16384 pixels on a side"),
        ("64", "expected HxW such as 512x1024"),
        ("0x64", "expected HxW"),
    ],
)
def test_sizes_that_no_image_has(text, message):
    with pytest.raises(click.BadParameter, match=message):
        Size("HxW").convert(text, None, None)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_numbers_are_finite(text):
    with pytest.raises(click.BadParameter, match=r"finite|not in the range"):
        Number(0).convert(text, None, None)
