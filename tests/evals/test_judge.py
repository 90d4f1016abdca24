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
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

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
    assert judge.open_judge(server.url + "/", "strong")("How good is 红?") == "Accuracy: 7"
    path, key, body = server.requests[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer key", "strong", 0)
    assert body["messages"] == [{"role": "user", "content": "How good is 红?"}]


def test_what_may_pass_is_tried_again(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.replies = [(429, {}), (503, {}), (200, SAID)]
    assert judge.Endpoint(server.url, "strong", wait=0.0)("?") == "Accuracy: 7"
    assert len(server.requests) == 3 and server.requests[0][1] is None


@pytest.mark.parametrize(
    "replies, message",
    [
        ([(401, {})], "401 Unauthorized"),
        ([(500, {})] * judge.ATTEMPTS, "500 Internal Server Error"),
        ([(200, {"error": "x"})], "not a chat completion: KeyError: 'choices'"),
    ],
)
def test_failures_name_the_endpoint(server, replies, message):
    server.replies = list(replies)
    with pytest.raises(OSError, match=f"judge {server.url}/chat/completions: {message}"):
        judge.Endpoint(server.url, "strong", wait=0.0)("?")
    assert server.replies == []


def test_a_function_is_a_judge():
    assert judge.open_judge("json:dumps")("a") == '"a"'
    for spec, message in (("json:nope", "nope"), ("json", "module:function"), ("https://host/v1", "--judge-model")):
        with pytest.raises(ValueError, match=message):
            judge.open_judge(spec)
