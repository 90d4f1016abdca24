"""Conversations about pictures, as instruction data have them."""

import re

from evlm_jax.data import video
from evlm_jax.data.containers import files
from evlm_jax.data.formats.captions import FRAMES
from evlm_jax.data.formats.fields import facts, files_of, marked, members, turns, within
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal
from evlm_jax.data.source import key_of

INLINE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def llava(name: str, root: str, row: dict, *, images: str = "", frames: str = FRAMES) -> Sample:
    """LLaVA: {"id", "image": str or list, "conversations": [{"from": "human" or "gpt", "value":
    text with <image>}]}.

    A row may instead name a "video" (marker `<video>` or `<image>`), with "frames" (number, rate or
    seconds); one with neither is text. In a tar, a row whose json names none has the pictures
    beside it."""
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
    return Sample(
        key_of(row), name, tuple(visuals), (tuple(Turn(role, text) for role, text in said),)
    )


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
