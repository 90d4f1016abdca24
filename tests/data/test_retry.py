"""Reads that fail by accident are tried again, others at once told of."""

import errno
import http.server
import io
import threading

import numpy as np
import pytest
from PIL import Image

from evlm_jax.data import image, retry
from evlm_jax.data.samples import RowError
from evlm_jax.data.source import Source


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retry, "WAITS", (0.0,) * 4)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def failing(monkeypatch, error, times):
    """`image.open_ref` fails so often; returns the list of its calls."""
    calls, opened = [], image.open_ref

    def open_ref(*args):
        calls.append(args)
        if len(calls) <= times:
            raise error
        return opened(*args)

    monkeypatch.setattr(image, "open_ref", open_ref)
    return calls


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "disk"),
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.ESTALE, "stale"),
    ],
)
def test_a_picture_is_read_behind_accidents(picture, monkeypatch, error):
    calls = failing(monkeypatch, error, times=4)
    assert (
        np.asarray(image.decode(str(picture))).tolist() == np.arange(48).reshape(4, 4, 3).tolist()
        and len(calls) == 5
    )


def test_an_accident_that_stays_is_told(picture, monkeypatch):
    calls = failing(monkeypatch, OSError(errno.EIO, "disk"), times=99)
    with pytest.raises(image.ImageError, match=f"{picture}.*disk"):
        image.decode(str(picture))
    assert len(calls) == 5


def test_what_is_not_there_is_asked_for_once(tmp_path, monkeypatch):
    calls = failing(monkeypatch, None, times=0)
    for name in ("gone.png", "text.png"):
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(image.ImageError):
            image.decode(str(tmp_path / name))
    assert len(calls) == 2


def test_rows_are_read_again_too():
    class Rows(list):
        tries = 0

        def __getitem__(self, index):
            self.tries += 1
            if self.tries < 4:
                raise OSError(errno.EIO, "disk")
            return super().__getitem__(index)

    assert Source("made", Rows(["a"]), lambda row: row)[0] == "a"
    rows = Rows(["a"])
    rows.tries = -99
    with pytest.raises(RowError, match="disk"):
        Source("made", rows, lambda row: row)[0]
    assert rows.tries == -94


def test_a_busy_store_is_asked_again(picture):
    """Through fsspec's own client, from a server that is busy twice."""
    pytest.importorskip("aiohttp", reason="needs fsspec's client for HTTP")
    content, asked = picture.read_bytes(), []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.command)
            self.send_response(503 if len(asked) < 3 else 200)
            self.send_header("Content-Length", str(0 if len(asked) < 3 else len(content)))
            self.end_headers()
            if len(asked) >= 3 and self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        @retry.retried
        def read():
            import fsspec

            with fsspec.open(f"http://127.0.0.1:{server.server_port}/a.png", block_size=0) as file:
                return file.read()

        found = np.asarray(Image.open(io.BytesIO(read())))
        server.shutdown()
    assert found.shape == (4, 4, 3) and len(asked) >= 3
