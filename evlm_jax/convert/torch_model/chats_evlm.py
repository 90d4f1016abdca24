"""Chats and prompts -> pieces: text, ids of special tokens, and places of images and videos.

What text spells is never a special token.
"""

import re
from typing import Any, NamedTuple

from .pictures_evlm import from_base64
from .templates_evlm import lay_out_own

IMAGE, VIDEO = "<image>", "<video>"
VISUAL = "\U0010fffd"  # in its place in what a template is given: private, no text has it
SOURCES = {IMAGE: ("image", "url", "path", "base64"), VIDEO: ("video",)}  # keys of a message's part


class Visual(NamedTuple):
    """Position of an image or a video, and its content if the message has it."""

    mark: str
    source: Any = None


class Piece(NamedTuple):
    """A text, an id or a Visual; whether it is the assistant's, which training learns."""

    what: Any
    told: bool = False


class Rendered(str):
    """A chat as a string with its pieces, for `processor(text=processor.apply_chat_template(..))`;
    text may be appended to it.
    """

    pieces = ()

    def __add__(self, text):
        return rendered(str(self) + text, [*self.pieces, *split_marks(text)])


def rendered(text, pieces):
    """Rendered of a text and its pieces."""
    made = Rendered(text)
    made.pieces = tuple(piece if isinstance(piece, Piece) else Piece(piece) for piece in pieces)
    return made


def split_marks(text):
    """The text, with a Visual in place of each mark."""
    return [
        Visual(part) if part in SOURCES else part
        for part in re.split(f"({IMAGE}|{VIDEO})", text)
        if part
    ]


def parts_of(content):
    """Texts and Visuals of a message's content: a string with marks, or a list of parts, whose
    texts are text alone.

    Raises:
      ValueError: an unknown kind of part, or key of one.
    """
    if isinstance(content, str):
        return split_marks(content)
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"a message's content is a string or a list of parts, not {type(content).__name__}"
        )
    found = []
    for part in content:
        part = (
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {k: v for k, v in part.items() if v is not None}
        )
        kind = part.pop("type", None)
        if kind == "image_url":  # as OpenAI's clients write it
            url = part.pop("image_url", None)
            kind, part = "image", part | {"url": url["url"] if isinstance(url, dict) else url}
        if kind == "text" and part.keys() == {"text"} and isinstance(part["text"], str):
            found.append(part["text"])
        elif (
            kind in ("image", "video")
            and len(part) <= 1
            and part.keys() <= set(SOURCES[f"<{kind}>"])
        ):
            source = (
                from_base64(part["base64"]) if "base64" in part else next(iter(part.values()), None)
            )
            found.append(Visual(f"<{kind}>", source))
        else:
            raise ValueError(
                f"a part of type {kind!r} with {sorted(part)}: known are text with text, image with"
                " one of image, url, path, base64, video with its frames in video"
            )
    return found


def joined(*parts):
    """The parts, neighbouring texts as one, without empty ones."""
    found = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


def lay_out(messages, how, add_generation_prompt=True, continue_final_message=False):
    """Pieces of a chat, as training lays it out.

    chatml: `<|im_start|>user\\n{text}<|im_end|>`, a newline between turns. plain: `{text} Answer:`
      ` {answer}` end. own: as the tokenizer's template says. An assistant alone (a caption) is its
      text and the end, in all.

    Args:
      how: the processor, which knows the template, its tokens and the tokenizer.
      add_generation_prompt: end where an answer begins.
      continue_final_message: end within the last turn, an assistant's, which goes on.
    Raises:
      ValueError: an unknown role, key of a message or part of a content; nothing to continue.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('a chat is a list of messages, as {"role": "user", "content": "What?"}')
    pieces, alone = [], [message.get("role") for message in messages] == ["assistant"]
    if not messages or (
        continue_final_message
        and (add_generation_prompt or messages[-1].get("role") != "assistant")
    ):
        raise ValueError(
            "continue_final_message needs an assistant's turn at the end, and no"
            " add_generation_prompt; a chat some turn"
        )
    turns = [checked(message) for message in messages]
    if how.template == "own" and not alone:
        return by_own_template(turns, how, add_generation_prompt, continue_final_message)
    chatml = how.template == "chatml"
    for i, (role, parts) in enumerate(turns):
        told, last = role == "assistant", i == len(turns) - 1
        stop = [] if continue_final_message and last else [Piece(how.turn_end, told)]
        if chatml and not alone:
            pieces += [Piece("\n")] * (i > 0) + [Piece(how.turn_start)]
            pieces += [Piece("assistant\n")] if told else []
            pieces += [
                Piece(part, told) for part in joined(*(() if told else ("user\n",)), *parts)
            ] + stop
        elif told:
            stop = stop and [Piece(how.tokenizer.eos_token_id, True)]
            pieces += [Piece(part, True) for part in joined(" " * (i > 0), *parts)] + stop
        else:
            pieces += [Piece(part) for part in joined(*parts, " Answer:")]
    if add_generation_prompt and chatml:
        pieces += [Piece("\n"), Piece(how.turn_start), Piece("assistant\n")]
    return pieces


def checked(message):
    """(role, parts) of a message.

    Raises ValueError as lay_out.
    """
    message = {key: value for key, value in message.items() if value is not None}
    if message.keys() != {"role", "content"} or message["role"] not in ("user", "assistant"):
        raise ValueError(
            f"a message has role, user or assistant, and content: not {message.get('role')!r}"
            f" with {sorted(message)}"
        )
    return message["role"], parts_of(message["content"])


def by_own_template(turns, how, add_generation_prompt, continue_final_message):
    """Pieces of a chat by the tokenizer's own template, behind what every text begins with."""
    tokenizer, visuals = how.tokenizer, []

    def text(part):
        if isinstance(part, str):
            return part
        visuals.append(part)
        return VISUAL

    def render(messages, answer_begins):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_begins
        )

    def takes(token):
        added = tokenizer.added_tokens_decoder[token]
        return added.lstrip, added.rstrip

    messages = [{"role": role, "content": "".join(map(text, parts))} for role, parts in turns]
    added = tokenizer.added_tokens_decoder.items()
    specials = {token.content: i for i, token in added if token.special}
    parts = lay_out_own(render, messages, specials, takes, add_generation_prompt)
    if continue_final_message:
        parts = parts[: 1 + max(i for i, part in enumerate(parts) if part.said)]
    pieces, visuals = [], iter(visuals)
    for part in parts[len(how.text_start) :]:
        told = part.message is not None and turns[part.message][0] == "assistant"
        split = re.split(f"({VISUAL})", part.what) if part.said else [part.what]
        for what in split:
            if what == VISUAL:
                what = next(visuals)
            last = pieces[-1] if pieces else Piece(0)
            if isinstance(what, str) and isinstance(last.what, str) and last.told == told:
                pieces[-1] = Piece(last.what + what, told)
            elif what != "":
                pieces.append(Piece(what, told))
    return pieces
