# SPDX-License-Identifier: Apache-2.0
"""Importing the project from a clone that nobody installed, also where a copy lost the clone's symbolic links.

Importing this module first makes the others importable. `NOTES` says what had to be worked around.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("exporter", "runtime", "trt_plugins")


def make_importable(repository: Path = REPOSITORY) -> list[str]:
    """Put the project, benchmarks/ and benchmarks/gpu/ on the import path; returns what had to be worked around.

    `internimage_deploy/exporter` and its like are links to the folders at the top. Archives and copies can drop them,
    or make small text files of them; the folders are then found beside the package.

    Raises:
        SystemExit: a folder is in neither place.
    """
    missing = [room for room in ROOMS if not (repository / "internimage_deploy" / room / "__init__.py").is_file()]
    lost = [room for room in missing if not (repository / room / "__init__.py").is_file()]
    if lost:
        raise SystemExit(
            f"error: this copy of the project lacks the folder {lost[0]}/: {repository} should hold "
            f"{', '.join(ROOMS)} and internimage_deploy. Copy the whole clone"
        )
    places = [str(repository), str(repository / "benchmarks"), str(repository / "benchmarks" / "gpu")]
    sys.path[:0] = [place for place in places if place not in sys.path]
    if not missing:
        return []
    import internimage_deploy

    internimage_deploy.__path__.append(str(repository))
    return [f"the link internimage_deploy/{room} is lost; using {repository / room}" for room in missing]


def choose_cache(repository: Path = REPOSITORY) -> list[str]:
    """Keep compiled libraries in out/cache where the package that knows the user's cache folder is missing."""
    if importlib.util.find_spec("platformdirs") or os.environ.get("INTERNIMAGE_DEPLOY_CACHE"):
        return []
    folder = repository / "out" / "cache"
    os.environ["INTERNIMAGE_DEPLOY_CACHE"] = str(folder)
    return [f"the package platformdirs is not installed: compiled libraries go to {folder}"]


NOTES = make_importable() + choose_cache()
