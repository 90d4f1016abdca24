"""The judge's endpoint, against a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from evlm_jax.evals import judge


@pytest.fixture
def server():
    """Answers with what `server.replies` says in turn; keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
            status, reply = self.server.replies.pop(0)
            if status is None:
                return  # the connection is dropped
            content = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in reply.pop("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: reply.get("cut")])

        def do_GET(self):
            self.server.requests.append((self.path, self.headers.get("Authorization"), None))
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SAID = {"choices": [{"message": {"content": "Accuracy: 7"}}]}


def test_asks_a_chat_completion(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server.replies = [(200, SAID)]
    assert judge.open_judge(server.url + "/", "strong")("How good is 红?") == {
        "judgement": "Accuracy: 7",
        "judge": f"strong at {server.url}/chat/completions",
    }
    path, key, body = server.requests[0]
    assert (path, key, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer key",
        "strong",
        0,
    )
    assert body["messages"] == [{"role": "user", "content": "How good is 红?"}]


def test_what_may_pass_is_tried_again(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    empty = {"choices": [{"message": {"content": None}}]}
    for passing in (
        [(429, {}), (503, {})],
        [(None, {})],
        [(200, SAID | {"cut": 20})],
        [(200, empty)] * 4,
    ):
        server.replies, server.requests[:] = [*passing, (200, dict(SAID))], []
        assert judge.Endpoint(server.url, "strong", wait=0.0)("?") == "Accuracy: 7"
        assert len(server.requests) == len(passing) + 1 and server.requests[0][1] is None


def test_the_key_stays_at_the_address_that_was_given(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    for status in (301, 302, 303, 307, 308):
        server.replies, server.requests[:] = (
            [(status, {"headers": {"Location": f"{server.url}/elsewhere"}})],
            [],
        )
        with pytest.raises(
            OSError, match=f"redirects to {server.url}/elsewhere; give that as --judge"
        ):
            judge.Endpoint(server.url, "strong", wait=0.0)("?")
        assert [path for path, *_ in server.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "replies, message",
    [
        ([(401, {})], "401 Unauthorized"),
        ([(500, {})] * judge.ATTEMPTS, "500 Internal Server Error"),
        ([(200, {"error": "x"})], "not a chat completion: KeyError: 'choices'"),
        ([(None, {})] * judge.ATTEMPTS, "Remote end closed connection without response, 5 times"),
        (
            [(200, SAID | {"cut": 20})] * judge.ATTEMPTS,
            r"IncompleteRead\(20 bytes read, .* more expected\), 5 times",
        ),
        (
            [(200, {"choices": [{"message": {"content": None}}]})] * judge.ATTEMPTS,
            "the reply has no text but null, 5 times",
        ),
    ],
)
def test_failures_name_the_endpoint(server, replies, message):
    server.replies = list(replies)
    with pytest.raises(OSError, match=f"judge {server.url}/chat/completions: {message}"):
        judge.Endpoint(server.url, "strong", wait=0.0)("?")
    assert server.replies == []


def test_a_function_is_a_judge(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert judge.open_judge("json:dumps")("a") == {"judgement": '"a"', "judge": "json:dumps"}
    with pytest.raises(ValueError, match="judge json:loads: replied 3, which is no text"):
        judge.open_judge("json:loads")("3")
    for spec, message in (
        ("json:nope", "nope"),
        ("json", "module:function"),
        ("https://host/v1", "--judge-model"),
        ("json:__doc__", "is a str, not a function"),
        ("mine:broken", "'mine:broken': ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=message):
            judge.open_judge(spec)
    with pytest.raises(ValueError, match="judge math:sqrt: TypeError: must be real number"):
        judge.open_judge("math:sqrt")("a")
