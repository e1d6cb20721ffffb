# SPDX-License-Identifier: Apache-2.0
"""Attacks on the HTTP connection itself: headers, pipelining, many connections, forged client addresses."""

import contextlib
import http.client
import socket
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_hostile import check_alive, connect, exchange, read_head, status

from internimage_deploy.cli.serve import serve
from internimage_deploy.runtime.serving.http.middleware import client_address
from internimage_deploy.runtime.serving.http.responses import accepts, negotiate
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.settings import Limits
from support.served import WAIT_S, Served, decoded, stripes, until

MIB = 1 << 20


def send_until_closed(connection, piece, times):
    """Number of bytes that could be sent, at most `times` pieces."""
    sent = 0
    for _ in range(times):
        try:
            connection.sendall(piece)
        except OSError:
            break
        sent += len(piece)
    return sent


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /healthz HTTP/1.1\r\n", b"x:y\r\n" * 2000),
        (b"GET /healthz HTTP/1.1\r\nx: ", b"y" * 10_000),
        (b"GET /healthz HTTP/1.1\r\n", b"y" * 10_000),
        (b"GET /", b"y" * 10_000),
        (b"", b"\r\n" * 5000),
        (b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x:y\r\n" * 2000),
        (b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=", b"y" * 10_000),
    ],
    ids=["many lines", "a long value", "a long name", "a long address", "empty lines", "trailers", "an extension"],
)
def test_endless_headers_end_the_connection(server, start, piece):
    before = server.resident_bytes()
    with connect(server) as connection:
        connection.sendall(start)
        assert send_until_closed(connection, piece, 6400) < 16 * MIB  # what the kernel takes before it notices
        head = read_head(connection)
        assert head == b"" or status(head) in (400, 431)
    assert server.resident_bytes() - before < 32 * MIB
    check_alive(server)


def test_too_large_headers_get_a_431_in_json(server):
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nx: " + b"y" * (70 << 10) + b"\r\n\r\n"
    response = exchange(server, head)
    assert status(response) == 431
    assert b"application/json" in response
    assert b'{"error": "the request headers are above 64 KiB' in response


def test_too_many_headers_get_a_431_and_their_request_does_not_run(server):
    before = server.metric("internimage_requests_total")
    head = b"GET /healthz HTTP/1.1\r\n" + b"x:y\r\n" * 101 + b"\r\n"
    assert status(exchange(server, head)) == 431
    assert server.metric("internimage_requests_total") == before + 1  # that of the metrics
    fewer = b"GET /healthz HTTP/1.1\r\n" + b"x:y\r\n" * 100 + b"\r\n"
    assert status(exchange(server, fewer)) == 200


def test_headers_are_counted_for_each_request_and_bodies_are_not(server):
    data, _ = stripes()
    long = b"x: " + b"y" * (20 << 10) + b"\r\n"
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + long + b"\r\n"
    body = data + bytes(MIB)
    post = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    # 6 bytes for each byte of body
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in data + bytes(12_000)) + b"0\r\n\r\n"
    chunked = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces
    assert len(pieces) > 64 << 10
    assert statuses(server, get * 4 + post + get * 4 + chunked + get, 11) == [200] * 11


def statuses(server, sent, count):
    """The statuses of `count` responses on one connection."""
    seen = []
    with connect(server) as connection, connection.makefile("rb") as received:
        connection.sendall(sent)
        for _ in range(count):
            seen.append(int(received.readline().split()[1]))
            lengths = [line for line in iter(received.readline, b"\r\n") if line.startswith(b"content-length")]
            received.read(int(lengths[0].split()[1]))
    return seen


def test_pipelined_requests_are_answered_in_order(server):
    paths = ["/healthz", "/missing", "/v2", "/v1/segment"]
    expected = {"/healthz": 200, "/missing": 404, "/v2": 200, "/v1/segment": 405}
    asked = [paths[number % 4] for number in range(500)]
    sent = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in asked)
    received = b""
    with connect(server) as connection:
        connection.sendall(sent)
        while piece := connection.recv(1 << 16):
            received += piece
            if received.count(b"HTTP/1.1 ") == len(asked) and received.endswith(b"}"):
                break
    got = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert got == [expected[path] for path in asked]


def test_pipelining_without_reading_does_not_fill_memory(server):
    """Neither requests nor responses pile up: the service stops reading."""
    before = server.resident_bytes()
    with connect(server) as connection:
        connection.settimeout(2)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 3000
        sent = send_until_closed(connection, request, 160)
        assert sent < 16 * MIB
        assert server.resident_bytes() - before < 32 * MIB
        check_alive(server)


def test_a_client_that_does_not_take_its_response_loses_the_connection(impatient_server):
    with connect(impatient_server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(1)
        send_until_closed(connection, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100, 100)
        until(lambda: connections_to(impatient_server, connection) == 0, "the end of the connection")
    check_alive(impatient_server)


def connections_to(server, connection):
    """Established connections of the service with the port of `connection`."""
    port = connection.getsockname()[1]
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    mine = (f":{server.port:04X}", f":{port:04X}")
    return sum(
        fields[1].endswith(mine[0]) and fields[2].endswith(mine[1]) and fields[3] == "01"
        for fields in map(str.split, lines)
    )


def test_a_broken_request_gets_json_and_the_log_stays_short(color_path, tmp_path):
    with Served(color_path, tmp_path) as server:
        lines = len(server.log.splitlines())
        for _ in range(50):
            response = exchange(server, b"nonsense\r\n\r\n")
            assert status(response) == 400
            assert b'{"error": "Invalid HTTP request received."}' in response
            exchange(server, b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        assert len(server.log.splitlines()) <= lines + 4


@pytest.mark.parametrize("path", ["/metrics/", "/v2/", "/v1/segment/"])
def test_no_redirect_repeats_the_host_header(server, path):
    response = exchange(server, f"GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n".encode())
    assert status(response) == 404
    assert b"evil.example" not in response


def test_of_a_long_accept_header_only_the_start_counts():
    assert accepts("x/y," * 1000 + "application/json", "application/json")
    assert not accepts("x/y," * 2000 + "application/json", "application/json")
    with pytest.raises(HttpError):
        negotiate("," * 5000 + "application/json")


def test_one_address_cannot_hold_every_connection(color_path, tmp_path):
    with Served(color_path, tmp_path, open_files=2048) as server:
        idle = [connect(server) for _ in range(1100)]
        other = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S, source_address=("127.0.0.2", 0))
        data, labels = stripes()
        with other:
            other.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            response = http.client.HTTPResponse(other)
            response.begin()
            assert response.status == 200
            assert (decoded(response.read()) == labels).all()
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("9.9.9.9", "1.1.1.1", "9.9.9.9"),  # nobody's proxy
        ("10.0.0.1", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", "6.6.6.6, 1.1.1.1", "1.1.1.1"),  # what the client wrote itself stands before
        ("10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),  # two proxies
        ("::ffff:10.0.0.1", "2001:db8::7", "2001:db8::7"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, " + "z" * 30_000, "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("", "1.1.1.1", ""),
    ],
)
def test_only_trusted_proxies_name_the_client(peer, forwarded, client):
    assert client_address(peer, forwarded, Limits(proxies=("10.0.0.0/8",))) == client


def post_as(server, address):
    return server.get("/v2", headers={"X-Forwarded-For": address} if address else {}).status_code


def test_the_rate_cannot_be_evaded_by_a_header(color_path, tmp_path):
    with Served(color_path, tmp_path, "--rate", "0.001") as server:
        seen = [post_as(server, f"10.0.{number}.1") for number in range(60)]
        assert seen == [200] * 20 + [429] * 40


def test_behind_a_proxy_each_client_has_its_own_rate(color_path, tmp_path):
    with Served(color_path, tmp_path, "--rate", "0.001", "--proxy", "127.0.0.1") as server:
        assert [post_as(server, "10.0.0.1") for _ in range(21)] == [200] * 20 + [429]
        assert post_as(server, "10.0.0.2") == 200
        assert post_as(server, "6.6.6.6, 10.0.0.1") == 429
        assert post_as(server, None) == 200


def test_a_content_type_of_many_semicolons_is_not_parsed(server):
    """Each took a third of a second, in which nobody else was served."""
    for parameters in ('boundary="' + ";" * 60_000, "a=b;" * 15_000):
        response = server.post(
            "/v1/segment", content=b"--B--", headers={"Content-Type": f"multipart/form-data; {parameters}"}
        )
        assert (response.status_code, response.json()["error"]) == (400, "the Content-Type is longer than 1000 bytes")


@pytest.mark.parametrize("path", ["/v1/segment", "/healthz", "/missing"])
def test_a_query_of_many_parameters_is_not_parsed(server, path):
    response = server.post(f"{path}?{'a&' * 30_000}", content=b"x")
    assert (response.status_code, response.json()["error"]) == (414, "the query is longer than 1000 bytes")
    assert server.get(f"/healthz?{'a' * 1000}").status_code == 200


def test_broken_forms_leave_nothing_in_the_log(server):
    lines = len(server.log.splitlines())
    for body in (b"--B\n", b"--A\r\n", b"--B\r\n\r\n:"):
        assert server.post(
            "/v1/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"}
        ).status_code == 400  # fmt: skip
    assert len(server.log.splitlines()) == lines


def test_nothing_above_left_a_traceback(server):
    assert "Traceback" not in server.log, server.log


@pytest.mark.parametrize("proxy", ["proxy.example", "10.0.0.0/40", "", "10.0.0.1:80"])
def test_a_proxy_is_an_address_or_a_network(proxy):
    result = CliRunner().invoke(serve, ["model.onnx", "--proxy", proxy])
    assert result.exit_code == 2
    assert "is no IP address or network" in result.output


def test_a_string_among_the_numbers_of_a_tensor_costs_nothing():
    """NumPy would make an array of strings as long as the longest: gigabytes from 64 KiB."""
    from internimage_deploy.runtime.serving.http import inference_protocol as protocol

    for data in (
        ["a" * 32_600, *[1] * 16_300],
        [*[""] * 16_300, "a" * 32_600],
        [[1, 2, 3], "a"],
        [1.5, 1, 1],
        [True] * 3,
    ):
        with pytest.raises(HttpError) as error:
            protocol._numbers(data, 3)
        assert error.value.status == 400
    np.testing.assert_array_equal(protocol._numbers([[[[1, 2, 3]]]], 3), [1, 2, 3])
    np.testing.assert_array_equal(protocol._numbers([1, 2, 255], 3), [1, 2, 255])
    with pytest.raises(HttpError, match="0 to 255"):
        protocol._numbers([1, 2, 10**30], 3)


def test_a_body_in_chunks_of_single_bytes_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # it closes while we send
            for _ in range(40):
                client.sendall(b"1\r\nx\r\n" * 10_000)
        received = b""
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                received += piece
    assert b"200 OK" not in received
    assert server.get("/healthz").status_code == 200


def test_a_body_in_ordinary_chunks_passes(server):
    data, labels = stripes()
    response = server.post("/v1/segment", content=iter([data[i : i + 64] for i in range(0, len(data), 64)]))
    assert response.status_code == 200
    np.testing.assert_array_equal(decoded(response.content), labels)
