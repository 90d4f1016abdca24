"""The page of `evlm chat` in Chromium, against the conversation without a page: what is shown, and
which hosts page and server ask.
"""

import importlib.util
import os
import queue
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evlm_jax import cli
from evlm_jax.chat.conversation import Chat, Message
from evlm_jax.library import Model

PICTURES = Path(__file__).parents[1] / "golden" / "format1_dense" / "pictures"
MOST = 8  # tokens of an answer
# Pictures in Markdown and HTML, which a page would fetch.
ABROAD = "![a](http://example.com/a.png) <img src=http://example.com/b.png> <image >"
pytestmark = pytest.mark.slow
# Every text that the bubbles of answers show, in turn.
WATCH = """() => {
  window.shown = [];
  new MutationObserver(() => {
    const said = [...document.querySelectorAll('[data-testid=bot]')].at(-1)?.innerText.trim();
    if (said && window.shown.at(-1) !== said) window.shown.push(said);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Recorder(socketserver.BaseRequestHandler):
    """A proxy that notes what it is asked for, and goes nowhere."""

    asked = queue.SimpleQueue()

    def handle(self):
        self.asked.put(self.request.recv(200).decode(errors="replace").partition("\r\n")[0])


@pytest.fixture(scope="module")
def abroad():
    """(address of the proxy, what was asked of it)"""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}", Recorder.asked
        proxy.shutdown()


@pytest.fixture(scope="module")
def page_of(tmp_path_factory, trained, abroad):
    """The server's address, and what it leaves behind is looked at."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip('needs an environment of its own: python -m pip install "evlm_jax[chat]"')
    folder = tmp_path_factory.mktemp("page")
    Model(trained.model, trained.tokenizer).save(folder / "run")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), abroad[0])
    environment = os.environ | proxies | {"NO_PROXY": "127.0.0.1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "evlm_jax", "chat", "--checkpoint", str(folder / "run")]
    command += ["--port", str(port), "--max-new-tokens", str(MOST), "--frames", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = iter(server.stdout.readline, "")
            address = next((line.split()[2] for line in lines if "http://" in line), None)
            assert address == f"http://127.0.0.1:{port}/"
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
    assert not list(folder.glob("evlm-chat-*"))  # uploaded files


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs apt install chromium")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def tab(browser, page_of):
    """Opens tabs; in the end none has asked another host."""
    opened, asked = [], []

    def make(width=1280):
        page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_of)
        page.wait_for_selector("textarea")
        page.evaluate(WATCH)
        opened.append(page)
        return page

    yield make
    for page in opened:
        page.context.close()
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((page_of, "data:", "blob:"))]


@pytest.fixture(scope="module")
def chat(trained):
    return Chat(trained, "4", MOST)


def send(page, text, *files):
    if files:
        page.set_input_files("input[type=file]", list(files))
        page.wait_for_function(
            "([shown, count]) => document.querySelectorAll(shown).length == count",
            arg=[".multimodal-textbox .thumbnail-item", len(files)],
        )
    page.fill("textarea", text)
    page.click("button.submit-button")


def answer(page, number=1):
    """Text of the answer with this number, once it is whole."""
    page.wait_for_function(
        "number => document.querySelectorAll('[data-testid=bot]').length == number"
        " && document.querySelector('button.submit-button')"
        " && !document.querySelector('textarea').disabled",
        arg=number,
    )
    return page.locator("[data-testid=bot]").last.inner_text().strip()


def whole(chat, *messages):
    """The answer without a page; the page ends lines where white space is."""
    *_, said = chat.answer(messages)
    return said


def same(shown, said):
    return shown.split() == said.split()


def picture(number):
    return str(PICTURES / f"{number}.png")


def test_an_answer_grows_and_its_words_show_where_the_model_looked(tab, chat):
    page = tab()
    asked = (Message("user", f"What is {n}? {ABROAD}", (picture(1), picture(2))) for n in range(99))
    first = next(one for one in asked if len(list(chat.answer([one]))) > 3)
    send(page, first.text, *first.files)
    said = whole(chat, first)
    assert same(answer(page), said)
    assert first.text in page.locator("[data-testid=user]").last.inner_text()
    grown = page.evaluate("window.shown")
    assert len(grown) > 2 and all(
        after.startswith(before) for before, after in zip(grown, grown[1:])
    )
    words = page.locator(".words .token")
    assert [word.strip() for word in words.all_inner_texts()] == said.split()
    words.first.click()
    page.wait_for_selector(".looked img")
    assert "of its attention" in page.locator(".looked").inner_text()
    assert page.locator(".gates svg").count() == 1
    second = Message("user", "And now?")
    send(page, second.text)
    assert same(answer(page, 2), whole(chat, first, Message("assistant", said), second))
    assert page.locator("button[aria-label=Share]:visible").count() == 0


def test_two_tabs_get_the_answers_of_one(tab, chat):
    pages, asked = [tab(), tab(390)], []
    for number, page in enumerate(pages, 3):
        asked.append(Message("user", f"What is number {number}?", (picture(number),)))
        send(page, asked[-1].text, *asked[-1].files)
    for page, message in zip(pages, asked):
        assert same(answer(page), whole(chat, message))
    assert pages[1].evaluate("document.documentElement.scrollWidth") <= 390


def test_what_cannot_be_answered_is_told_in_one_line(tab, chat, tmp_path):
    (tmp_path / "odd.png").write_bytes(b"no picture")
    page, odd = tab(), str(tmp_path / "odd.png")
    for number, (text, files, why) in enumerate(
        (
            ("What?", [odd], "odd.png: cannot decode the image"),
            ("<image> and <image>?", [picture(1)], "2 <image> markers for 1 images"),
            ("a " * 2000, [], "1024 are the most"),
        ),
        1,
    ):
        send(page, text, *files)
        shown = answer(page, number)
        assert why in shown and str(tmp_path) not in shown and len(shown.splitlines()) <= 2
    message = Message("user", "What is it?", (picture(5),))
    send(page, message.text, *message.files)
    assert same(answer(page, 4), whole(chat, message))


def test_a_taken_port_is_told(page_of, capsys):
    port = page_of.rstrip("/").rpartition(":")[2]
    assert cli.main(["chat", "--checkpoint", "nowhere", "--port", port]) == 1
    told = f"evlm: cannot listen at 127.0.0.1, port {port}: Address already in use; give another"
    assert capsys.readouterr().err.startswith(told)


def test_the_server_asked_nobody(page_of, abroad):
    assert abroad[1].empty()
