# SPDX-License-Identifier: Apache-2.0
"""Damaged requests must end in a reason, never in a crash. `make soak` sends 10,000 mutations; here a sample."""

import asyncio
import re

import numpy as np
import pytest

from support import fuzz
from support.served import Served, decoded, stripes

MUTATIONS = 600


def check_unharmed(server, workers):
    data, labels = stripes()
    np.testing.assert_array_equal(decoded(server.post("/v1/segment", content=data).content), labels)
    assert server.workers() == workers
    assert "Traceback" not in server.log
    assert server.metric("internimage_request_memory_bytes") == 0
    assert server.metric("internimage_queue_pictures") == 0


def test_the_seeds_are_valid_requests(server):
    for head, body in fuzz.seeds():
        response = asyncio.run(fuzz._send(server.port, fuzz.assemble(head, body)))
        assert fuzz.verdict(response) == 200, head


def test_mutated_requests_get_a_status_below_500(color_path, tmp_path):
    with Served(color_path, tmp_path, "--body-timeout", "1", "--deadline", "600") as server:
        workers = server.workers()
        problems = []
        verdicts = asyncio.run(fuzz.run(server.port, MUTATIONS, seed=1, problems=problems))
        assert problems == []
        assert sum(verdicts.values()) == MUTATIONS
        assert verdicts[200] > 20
        assert verdicts[400] > 100
        check_unharmed(server, workers)


def test_requests_made_from_the_openapi_page(server, tmp_path):
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    workers = server.workers()
    settings = tmp_path / "schemathesis.toml"
    settings.write_text('[parameters]\n"path.model" = "color"\n"path.version" = "1"\n')
    result = fuzz.schemathesis(server.url, settings, examples=10)
    assert result.returncode == 0, result.stdout
    assert re.search(r"Tested: 17\b", result.stdout)
    assert int(re.search(r"(\d+) generated, (\d+) passed", result.stdout)[2]) > 300
    check_unharmed(server, workers)
