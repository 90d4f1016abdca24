"""The page of `evlm chat`, in Gradio: conversation, words to click, gates by layer. Nothing is
fetched from elsewhere, by page or server.
"""

import html
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import gradio
from starlette.middleware import Middleware

from evlm_jax.chat.conversation import Chat, Message
from evlm_jax.data.image import MOST_BYTES
from evlm_jax.report import figures

TITLE = "Ask about pictures"
REFUSED = "Not answered"  # title of what the page says in place of an answer
FILES = ["image", "video"]
MOST_TEXT = 1 << 20  # characters that may be pasted; Gradio would make a file of more
# The browser asks no other host, whatever a message or a part of Gradio says.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self'"
    " data:; worker-src 'self' blob:; form-action 'self'; base-uri 'self'"
)
CSS = """
:root { --ink: #1f2937; --line: #d1d5db; --series-0: #2563eb; --series-1: #d97706; }
.dark { --ink: #e5e7eb; --line: #4b5563; --series-0: #60a5fa; --series-1: #fbbf24; }
.gates svg { display: block; width: 100%; height: auto; }
.gates svg text { font-family: inherit !important; fill: var(--ink); }
button[aria-label="Share"] { display: none !important; } /* it uploads to another host */
"""


class OwnHost:
    """ASGI middleware that sends POLICY with every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Passes the request on."""

        async def sent(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await self.app(scope, receive, sent)


def make(chat: Chat, about: str) -> gradio.Blocks:
    """The page. `about` says which model answers."""

    def reply(said: dict, history: list[dict]) -> Iterator[tuple]:
        yield from _replies(chat, _messages(history), said)

    def look(history: list[dict], event: gradio.SelectData) -> list[tuple]:
        looks = chat.looks(_messages(history), event.index)
        return [
            (figures.overlay(one.picture, one.grid), f"{one.share:.0%} of its attention")
            for one in looks
        ]

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f"# {TITLE}\n`{about}`")
        words = gradio.HighlightedText(
            label="Click a word of the answer to see where the model looked",
            show_inline_category=False,
            elem_classes="words",
            visible=chat.shows_looks,
            render=False,
        )
        looked = gradio.Gallery(
            show_label=False,
            columns=2,
            elem_classes="looked",
            visible=chat.shows_looks,
            render=False,
        )
        with gradio.Row():
            with gradio.Column(scale=3):
                chatbot = _interface(reply, [words, looked])
            with gradio.Column(scale=2):
                words.render()
                looked.render()
                if openings := chat.gates():
                    gradio.HTML(
                        f"<h3>Gates by layer</h3>{figures.gate_bars(**openings)}",
                        elem_classes="gates",
                    )
        words.select(look, chatbot, looked, api_visibility="private")
        gradio.on([chatbot.clear, chatbot.undo], lambda: ([], []), None, [words, looked])
    return page


def _interface(reply: Callable, outputs: list) -> gradio.Chatbot:
    """Conversation and question. `reply` fills the `outputs` as well."""
    chatbot = gradio.Chatbot(label="Conversation", render_markdown=False, height=480, buttons=[])
    _show_literally(chatbot)
    gradio.ChatInterface(
        reply,
        multimodal=True,
        chatbot=chatbot,
        textbox=gradio.MultimodalTextbox(
            placeholder="Ask; the clip adds pictures or a video",
            file_count="multiple",
            file_types=FILES,
            max_plain_text_length=MOST_TEXT,
            stop_btn=True,
        ),
        additional_outputs=outputs,
        analytics_enabled=False,
        api_visibility="private",
        flagging_mode="never",
        fill_height=False,
    )
    return chatbot


def serve(page: gradio.Blocks, host: str, port: int) -> str:
    """Starts the server in threads of its own; returns the page's address. Raises OSError where the
    port is taken.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MOST_BYTES,
        app_kwargs={"middleware": [Middleware(OwnHost)]},
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
    )
    return address


def _show_literally(chatbot: gradio.Chatbot) -> None:
    """Texts appear as they are: without Markdown, Gradio still renders HTML. (A subclass would make
    Gradio write a file beside this one.)
    """
    to_browser, from_browser = chatbot.postprocess, chatbot.preprocess

    def postprocess(value):
        shown = to_browser(value)
        for part in (part for message in shown.root for part in message.content):
            if part.type == "text":
                part.text = html.escape(part.text, quote=False)
        return shown

    def preprocess(payload):
        messages = from_browser(payload)
        for part in (part for message in messages for part in message["content"]):
            if part["type"] == "text":
                part["text"] = html.unescape(part["text"])
        return messages

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess


def _replies(chat: Chat, before: list[Message], said: dict) -> Iterator[tuple]:
    """(answer so far, its words, pictures) as the page shows them; what cannot be answered gets one
    line that says why.
    """
    files, answer, why = tuple(said["files"]), "", "the model ended its answer at once"
    try:
        for answer in chat.answer([*before, Message("user", said["text"], files)]):
            yield answer, [], []
    except (ValueError, OSError) as error:
        answer, why = "", str(error)
    if answer:
        yield answer, [(f"{word} ", None) for word in chat.words(answer)], []
        return
    for file in (*files, *(file for message in before for file in message.files)):
        why = why.replace(file, Path(file).name)
    yield gradio.ChatMessage(" ".join(why.split()), metadata={"title": REFUSED}), [], []


def _messages(history: list[dict]) -> list[Message]:
    """A conversation as Gradio has it, without questions that were not answered."""
    return [
        _message(one)
        for asked, answered in pairwise(history)
        if (asked["role"], answered["role"]) == ("user", "assistant")
        and not (answered["metadata"] or {}).get("title")
        for one in (asked, answered)
    ]


def _message(message: dict) -> Message:
    parts = message["content"]
    return Message(
        message["role"],
        "\n".join(part["text"] for part in parts if part["type"] == "text"),
        tuple(part["file"]["path"] for part in parts if part["type"] == "file"),
    )
