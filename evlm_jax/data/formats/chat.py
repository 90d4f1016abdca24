"""Conversations about pictures, as instruction data have them."""

import re
from collections.abc import Callable

from evlm_jax.data import video
from evlm_jax.data.containers import files
from evlm_jax.data.formats.captions import FRAMES
from evlm_jax.data.formats.fields import facts, files_of, marked, members, turns, within
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal
from evlm_jax.data.source import key_of

PICTURES_FIRST = re.compile(rf"(\s*{MARKER}\s*)*")
INLINE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def llava(
    name: str,
    root: str,
    row: dict,
    *,
    images: str = "",
    frames: str = FRAMES,
    dialogs: str = "one",
) -> Sample:
    """LLaVA: {"id", "image": str or list, "conversations": [{"from": "human" or "gpt", "value":
    text with <image>}]}.

    A row may instead name a "video" (marker `<video>` or `<image>`), with "frames" (number, rate or
    seconds); one with neither is text. In a tar, a row whose json names none has the pictures
    beside it.

    Args:
      dialogs: `one`, the conversation as it is; `each`, every question with its answer is a dialog
        of its own about the same pictures, hidden from the others.
    """
    folder, told = files.join(root, images), facts(row)
    pictures, films = (
        files_of(row, folder, "image", "images"),
        files_of(row, folder, "video", "videos"),
    )
    if not {"image", "images", "video", "videos"} & told.keys():
        pictures = members(row)
    stills = [(ImageRef(file),) for file in pictures]
    shown = frames if told.get("frames") is None else told["frames"]
    moving = [video.sample(file, shown) for file in films]
    said = turns(told)
    if not stills and not moving and any(INLINE.search(text) for _, text in said):
        raise ValueError("its pictures stand in <img></img>, as Qwen-VL's: read it as qwen-vl:")
    visuals, said = marked(said, stills, moving)
    made = tuple(Turn(role, text) for role, text in said)
    parts = _each(made) if dialogs == "each" else (made,)
    return Sample(key_of(row), name, tuple(visuals), parts)


def _each(said: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], ...]:
    """Every question with its answer, all behind the pictures with which the first one begins.

    Raises ValueError for turns that are no such pairs, or pictures in another place.
    """
    if len(said) % 2 or [turn.role for turn in said] != ["user", "assistant"] * (len(said) // 2):
        roles = ", ".join(turn.role for turn in said)
        raise ValueError(f"dialogs=each needs questions and answers in turn, its turns are {roles}")
    pairs = tuple(zip(said[::2], said[1::2]))
    lead = PICTURES_FIRST.match(said[0].text if said else "").group()
    if sum(turn.text.count(MARKER) for turn in said) != lead.count(MARKER):
        raise ValueError(f"dialogs=each needs each {MARKER} at the beginning of the first question")
    return (
        *pairs[:1],
        *((Turn(asked.role, lead + asked.text), answer) for asked, answer in pairs[1:]),
    )


def dialog_counter(*, dialogs: str = "one", **_: str) -> Callable[[dict], int] | None:
    """Counts the dialogs of a row of `llava` with these options; None where each has one.

    Raises ValueError for another word than `one` and `each`.
    """
    if dialogs not in ("one", "each"):
        raise ValueError(f"llava: dialogs must be one or each, not {dialogs!r}")
    return _pairs if dialogs == "each" else None


def _pairs(row: dict) -> int:
    """One of a row that is no sample: what is wrong with it is said when it is read."""
    try:
        return max(1, len(turns(facts(row))) // 2)
    except Exception:  # of an odd row readers raise errors of any kind
        return 1


def qwen_vl(name: str, root: str, row: dict, *, images: str = "") -> Sample:
    """Qwen-VL: {"id", "conversations": [{"from", "value"}]} with `<img>path</img>` in the text;
    <ref> and <box> stay as they are.
    """
    folder, told = files.join(root, images), facts(row)
    if other := next((field for field in ("image", "images", "video") if told.get(field)), None):
        raise ValueError(f"its pictures stand in {other!r}, as LLaVA's: read it as llava:")
    said = [(role, literal(text)) for role, text in turns(told)]
    named = [path.strip() for _, text in said for path in INLINE.findall(text)]
    visuals = tuple((ImageRef(within(row, folder, path, alone=len(named) == 1)),) for path in named)
    return Sample(
        key_of(row),
        name,
        visuals,
        (tuple(Turn(role, INLINE.sub(MARKER, text)) for role, text in said),),
    )
