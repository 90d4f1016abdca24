"""What a row says, of the type that it must have: any other value raises, so that the row is left
out and counted.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from evlm_jax.data.containers import files, rows, tar, text
from evlm_jax.data.containers.files import Ref
from evlm_jax.data.samples import MARKER, literal

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
LEARNED = ("train", "loss", "weight")  # of an answer, by which others leave it out: true or 1 here
UNREAD = {  # fields that say what a model would have to see or learn, and nothing here reads
    "the row": ("system", "tools", "audio", "rejected"),
    "a turn": ("tool_calls", "function_call", "reasoning_content", "image", "video", "audio"),
}
FILM = "<video>"


def words(value: Any, field: str) -> str:
    """The value of a text field; bytes are decoded."""
    if isinstance(value, Ref):
        with rows.open_ref(value, text.MOST_BYTES) as file:
            return text.decode(file.read())
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be a text, it is {_kind(value)}")
    return value


def listed(value: Any, field: str) -> list:
    """The value of a list field."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{field!r} must be a list, it is {_kind(value)}")
    return list(value)


def number(value: Any, field: str) -> float:
    """The value of a finite numeric field."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{field!r} must be a finite number, it is {str(value)[:40]!r}")
    return found


def pixels(row: dict) -> tuple[int, int]:
    """ "width" and "height" of a picture."""
    found = tuple(int(number(row[field], field)) for field in ("width", "height"))
    if min(found) < 1:
        raise ValueError(f"'width' and 'height' must be above 0, they are {found[0]}, {found[1]}")
    return found


def facts(row: dict) -> dict:
    """The fields of a row; where it is a member of a tar, with those of its json."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with fields, it is {_kind(row)}")
    inner = row.get("json")
    if inner is None:
        return row
    if not isinstance(inner, dict):
        raise ValueError(f"'json' must be an object, it is {_kind(inner)}")
    return row | inner


def files_of(row: dict, folder: str, *fields: str) -> list[str]:
    """Pictures (or videos) of a row in one of these fields, as paths and references.

    A field is empty (null, ""), bytes, a name, {"bytes", "path"} of which one may be null, or a
    list of such.
    """
    told = facts(row)
    named = [value for field in fields for value in _flat(told.get(field), field)]
    filled = [field for field in fields if told.get(field)]
    if len(filled) > 1:
        raise ValueError(f"the row has both {' and '.join(map(repr, filled))}")
    return [within(row, folder, name, alone=len(named) == 1) for name in named]


def _flat(value: Any, field: str) -> Iterator[str]:
    if isinstance(value, dict):
        if not {"bytes", "path"} & value.keys():
            raise ValueError(f"{field!r} has neither bytes nor path, but {', '.join(value)}")
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner, field)
    elif isinstance(value, str):
        yield from [value] * bool(value)
    elif value is not None:
        raise ValueError(f"{field!r} must name a file or hold its bytes, it is {_kind(value)}")


def within(row: dict, folder: str, name: str, alone: bool = False) -> str:
    """The file of a name: the member of the row's tar that is called so, or a file below `folder`.

    Args:
      alone: the row names no other: the one picture beside it in a tar must be it, whatever it is
        called there.
    """
    if isinstance(name, Ref):
        return name
    beside = members(row)
    called = [ref for ref in beside if os.path.basename(tar.name_of(ref)) == os.path.basename(name)]
    found = called if len(called) == 1 else beside if alone and len(beside) == 1 else ()
    return found[0] if found else files.inside(folder, name)


def members(row: dict) -> list[Ref]:
    """The pictures and videos that are members of a tar beside the row's json, in its order."""
    held = (value for field, value in row.items() if field.rpartition(".")[2] in (*IMAGES, *VIDEOS))
    return [value for value in held if isinstance(value, Ref) and value.startswith(tar.KIND)]


def member(row: dict, folder: str, kinds: Sequence[str] = IMAGES) -> str:
    """The row's picture, in a field named as its kind. Raises ValueError."""
    found = next((name for kind in kinds for name in _flat(row.get(kind), kind)), None)
    if found is None:
        raise ValueError(f"no picture; {has(row)}")
    return files.inside(folder, found)


def has(row: dict) -> str:
    """The fields of a row, for errors about one that is missing."""
    together = " (what belongs to one key must stand together in a tar)" * ("__key__" in row)
    return f"the row has {', '.join(map(str, row))}{together}"


def turns(row: dict) -> list[tuple[str, str]]:
    """(role, text) of a conversation: "conversations" of "from" and "value", or "messages" of
    "role" and "content".
    """
    field = _one(row, "conversations", "messages")
    given = row[field]
    _read_whole(row, "the row")
    found = []
    for turn in listed(
        text.parse(words(given, field).encode()) if isinstance(given, str) else given, field
    ):
        if not isinstance(turn, dict):
            raise ValueError(f"a turn must be an object, it is {_kind(turn)}")
        _read_whole(turn, "a turn")
        role = words(turn[_one(turn, "from", "role")], "from")
        if role.lower() not in ROLES:
            raise ValueError(f"unknown role {role!r}; there are {', '.join(ROLES)}")
        role = ROLES[role.lower()]
        if left := [n for n in LEARNED if role == "assistant" and turn.get(n) not in (None, True)]:
            raise ValueError(f"an answer of {left[0]!r} {turn[left[0]]!r}: all are learned alike")
        found.append((role, words(turn[_one(turn, "value", "content")], "value")))
    return found


def _read_whole(said: dict, what: str) -> None:
    """Raises ValueError where one of the fields of UNREAD says something: the rest alone would be
    another conversation.
    """
    if more := [n for n in UNREAD[what] if said.get(n) not in (None, "", "[]", [], {}, ())]:
        raise ValueError(
            f"{what} has {more[0]!r}, which is not read: leave out the one or the other"
        )


def _one(said: dict, *names: str) -> str:
    """Which of its names a field has. Raises ValueError where several say something."""
    given = [name for name in names if said.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"there are both {' and '.join(map(repr, given))}")
    return given[0] if given else names[0]


def marked(
    said: list[tuple[str, str]], images: list, videos: list
) -> tuple[list, list[tuple[str, str]]]:
    """What is seen, in the order of its markers, and the turns with one marker for each: <image>,
    or <video> for a video.

    A text about no picture has no markers: what spells one stays text.
    """
    if not images and not videos:
        return [], [(role, literal(text)) for role, text in said]
    marks = re.findall(f"{MARKER}|{FILM}", "".join(text for _, text in said)) if videos else []
    if FILM not in marks:
        return [*images, *videos], said
    queues = {MARKER: iter(images), FILM: iter(videos)}
    seen = [found for mark in marks if (found := next(queues[mark], None)) is not None]
    return [*seen, *queues[MARKER], *queues[FILM]], [
        (role, text.replace(FILM, MARKER)) for role, text in said
    ]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
