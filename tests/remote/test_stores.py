"""A store that does not answer is said so, in a bounded time, by the real client; on loopback."""

import http.server
import json
import socket
import threading

import pytest

from evlm_jax import cli, paths, stores

gcsfs = pytest.importorskip("gcsfs", reason="needs the extra cloud")


class Refuses(http.server.BaseHTTPRequestHandler):
    """Every request for want of credentials, as Google does."""

    def do_GET(self):
        said = json.dumps({"error": {"code": 401, "message": "Anonymous caller does not have it"}})
        self.send_response(401)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def at(monkeypatch):
    """Points the client, which is made anew, to a port of this machine."""

    def point(port):
        gcsfs.GCSFileSystem.clear_instance_cache()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")

    monkeypatch.setattr(stores, "PATIENCE", 1.0)
    monkeypatch.setattr(stores, "_answered", set())
    yield point
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def port():
    """Of a socket that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


def test_a_store_that_is_silent(at, port, capsys, monkeypatch):
    monkeypatch.setattr(stores, "GLANCE", 0.5)
    at(port)
    assert cli.main(["generate", "--checkpoint", "gs://b/run", "--prompt", "a"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evlm: gs://b/run: no answer in 1 s: http://127.0.0.1")
    assert "cannot be reached" in line and line.endswith("see to the network")


def test_a_store_that_is_not_there(at):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    at(free)
    with pytest.raises(OSError, match="gs://b/run: .*refused.*see to the network"):
        paths.place("gs://b/run")


def test_a_store_that_wants_credentials(at, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at(server.server_port)
        with pytest.raises(OSError, match="gs://b/run: Anonymous caller .*; give credentials"):
            paths.place("gs://b/run")
        server.shutdown()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "none.json")
    with pytest.raises(OSError, match="GOOGLE_APPLICATION_CREDENTIALS=none.json: no such file"):
        paths.place("gs://c/run")
