"""Every answer has a request id, and web pages that nobody allowed cannot drive a server without a key."""

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gcompute.config.serve import ServeConfig
from gcompute.serve.front import REQUEST_ID, guarded, is_loopback

PAGE = "https://page.example"


async def served(request):
    return JSONResponse({"served": True})


def client(*, host: str | None = "127.0.0.1", has_key: bool = False, origins: tuple[str, ...] = ()) -> TestClient:
    app = Starlette(routes=[Route("/call", served, methods=["GET", "POST"])])
    return TestClient(guarded(app, host=host, has_key=has_key, origins=origins), base_url="http://127.0.0.1:8000")


def test_the_clients_id_comes_back_and_another_is_made_where_there_is_none():
    http = client()
    assert http.post("/call", headers={REQUEST_ID: "abc-1"}).headers[REQUEST_ID] == "abc-1"
    made = [http.post(path).headers[REQUEST_ID] for path in ("/call", "/call", "/nowhere")]
    assert len(set(made)) == 3
    for bad in ("", "a b", "x" * 129, "caf\xe9".encode("latin-1")):
        assert http.post("/call", headers={REQUEST_ID: bad}).headers[REQUEST_ID] != bad
    refused = http.post("/call", headers={"Origin": PAGE, REQUEST_ID: "abc-2"})
    assert (refused.status_code, refused.headers[REQUEST_ID]) == (403, "abc-2")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),  # the server's own page
        ({"Origin": PAGE}, 403),
        ({"Origin": "null"}, 403),  # a sandboxed frame or a file
        ({"Origin": "http://127.0.0.1:9999"}, 403),  # another server's page on this machine
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "rebound.example:8000"}, 403),
        ({"Host": "rebound.example:8000", "Origin": "http://rebound.example:8000"}, 403),
        ({"Host": "127.0.0.1.rebound.example"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_may_call_a_local_server_without_a_key(headers, status, method):
    answer = client().request(method, "/call", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "forbidden"
        assert "access-control-allow-origin" not in answer.headers


def test_a_key_or_another_address_judges_no_host():
    other = {"Host": "rebound.example"}
    assert client(has_key=True).post("/call", headers={**other, "Origin": PAGE}).status_code == 200
    assert client(host="0.0.0.0").post("/call", headers=other).status_code == 200
    assert client(host="0.0.0.0").post("/call", headers={**other, "Origin": PAGE}).status_code == 403


@pytest.mark.parametrize("origins", [(PAGE,), ("*",)])
def test_an_allowed_page_calls_and_reads(origins):
    http = client(origins=origins)
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = http.options("/call", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in (PAGE, "*")
    answer = http.post("/call", json={}, headers={"Origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"] in (PAGE, "*")) == (200, True)
    # Its own name, as behind a tunnel.
    assert http.post("/call", headers={"Host": "page.example"}).status_code == 200
    if origins != ("*",):
        assert http.post("/call", headers={"Origin": "https://other.example"}).status_code == 403


def test_origins_are_read_from_the_setting():
    config = ServeConfig(allow_origin=" https://a.example/, http://localhost:3000")
    assert config.origins == ("https://a.example", "http://localhost:3000")
    for wrong in ("a.example", "https://a.example/path", "ftp://a.example"):
        with pytest.raises(ValueError, match="is no origin"):
            ServeConfig(allow_origin=wrong)


@pytest.mark.parametrize("name", ["localhost", "a.localhost", "127.8.0.1", "::1", "[::1]"])
def test_names_of_this_machine(name):
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["0.0.0.0", "10.0.0.1", "localhost.example", ""])
def test_names_of_others(name):
    assert not is_loopback(name)
