# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/gpu are imported as they import each other: by the names of their files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import clone  # noqa: F401  # first: it finds the others
