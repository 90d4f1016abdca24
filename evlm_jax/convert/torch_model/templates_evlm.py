"""A tokenizer's own chat template, rendered, and cut into what the template says and what was said.

What was said is found by rendering twice: once with a mark in place of each text, once as it is;
the two must differ in the marks alone. So a text never becomes a special token, and a template that
changes texts, but for white space around them, is refused."""

import itertools
import re
from typing import NamedTuple

MARKS = 0xF0000  # private characters, which no text has
KINDS = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to texts


class Part(NamedTuple):
    """A text, or the id of a special token."""

    what: str | int
    message: int | None = None  # number of the message that it belongs to; None: to none
    said: bool = False  # by the message; else by the template
    end: bool = False  # of an answer, or what stands between it and its end


def lay_out_own(render, messages, specials, takes, answer_begins=False):
    """The parts of a chat. What the template says between the prompt for an answer and the answer,
    as an empty thought, belongs to the answer, and so does the special token that ends it.

    Args:
      render: (messages, whether to end where an answer begins) -> text, as the template has it.
      messages: [{"role": .., "content": text}].
      specials: ids of special tokens by name.
      takes: id -> whether the token takes away white space in front of it, and behind it.
      answer_begins: end where an assistant's answer begins.
    Raises:
      ValueError: the template changes what is said, or no special token ends an answer.
    """
    between, within = _around(render, [message["role"] for message in messages], answer_begins)
    texts, parts, answer = _said(render, messages, between, answer_begins), [], None
    for i, text in enumerate([*texts, None]):
        before = between[i][: len(between[i]) - within[i]]
        for what in _split(before, specials):
            parts.append(Part(what, answer, end=answer is not None))
            if isinstance(what, int):
                answer = None
        if text is None:
            break
        parts += [Part(what, i) for what in _split(between[i][len(before) :], specials)]
        parts.append(Part(text, i, said=True))
        answer = i if messages[i]["role"] == "assistant" else None
    if answer is not None:
        raise ValueError(
            "chat template: no special token ends an answer: use another data.template"
        )
    return _without_space(parts, takes)


def _around(render, roles, answer_begins):
    """Texts of the template in front of each message and behind the last; and how many letters of
    each belong to an answer.
    """
    marks = [chr(MARKS + i) for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
    rest, between, within, past = render(messages, answer_begins), [], [], ""
    for i, mark in enumerate(marks):
        before, found, rest = rest.partition(mark)
        if not found or mark in rest or any(later in before for later in marks[i:]):
            raise ValueError(
                f"chat template: it says message {i + 1} of {', '.join(roles)} not once, or not in"
                " its turn: use another data.template"
            )
        past += before
        prompt = render(messages[:i], True) if i and roles[i] == "assistant" else ""
        within.append(len(past) - len(prompt) if prompt and past.startswith(prompt) else 0)
        between.append(before)
        past += mark
    return [*between, rest], [*within, 0]


def _said(render, messages, between, answer_begins):
    """The texts as the template says them."""
    roles, rendered = [message["role"] for message in messages], render(messages, answer_begins)
    for kinds in itertools.product(KINDS, repeat=len(set(roles))):
        kind = dict(zip(dict.fromkeys(roles), kinds))
        texts = [kind[message["role"]](message["content"]) for message in messages]
        if "".join(map("".join, zip(between, [*texts, ""]))) == rendered:
            return texts
    raise ValueError(
        "chat template: it changes what is said, or says more by what is said: use another"
        " data.template"
    )


def _split(text, specials):
    """Text of a template, in which special tokens are spelled."""
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    pieces = re.split(f"({names})", text) if names else [text]
    return [specials.get(piece, piece) for piece in pieces if piece]


def _without_space(parts, takes):
    """Without the white space that special tokens take away, and without empty texts."""
    found = []
    for part in parts:
        last = found[-1].what if found else None
        if isinstance(part.what, str):
            if isinstance(last, int) and takes(last)[1]:
                part = part._replace(what=part.what.lstrip())
        elif isinstance(last, str) and takes(part.what)[0]:
            found[-1] = found[-1]._replace(what=last.rstrip())
        if part.what != "":
            found.append(part)
    return found
