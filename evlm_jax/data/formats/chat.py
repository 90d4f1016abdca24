"""Conversations about pictures, as instruction data have them."""

import re

from evlm_jax.data import video
from evlm_jax.data.containers import files
from evlm_jax.data.formats.captions import FRAMES
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal
from evlm_jax.data.source import key_of

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
INLINE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def llava(name: str, root: str, row: dict, *, images: str = "", frames: str = FRAMES) -> Sample:
    """LLaVA: {"id", "image": str or list, "conversations": [{"from": "human" or "gpt", "value": text with <image>}]}.

    A row may instead name a "video" (marker `<video>` or `<image>`), with "frames" (number, rate or seconds); one with neither is text.
    """
    folder = files.join(root, images)
    pictures = row.get("image") or []
    file = lambda image: image["bytes"] if isinstance(image, dict) else files.join(folder, image)  # in parquet they may be inside
    visuals = [(ImageRef(file(image)),) for image in (pictures if isinstance(pictures, list) else [pictures])]
    if "video" in row:
        visuals.append(video.sample(files.join(folder, row["video"]), row.get("frames", frames)))
    turns = tuple(Turn(ROLES[turn["from"]], turn["value"].replace("<video>", MARKER)) for turn in row["conversations"])
    return Sample(key_of(row), name, tuple(visuals), (turns,))


def qwen_vl(name: str, root: str, row: dict, *, images: str = "") -> Sample:
    """Qwen-VL: {"id", "conversations": [{"from", "value"}]} with `<img>path</img>` in the text; <ref> and <box> stay as they are."""
    folder = files.join(root, images)
    texts = [literal(turn["value"]) for turn in row["conversations"]]
    visuals = tuple((ImageRef(files.join(folder, path.strip())),) for text in texts for path in INLINE.findall(text))
    turns = tuple(Turn(ROLES[turn["from"]], INLINE.sub(MARKER, text)) for turn, text in zip(row["conversations"], texts))
    return Sample(key_of(row), name, visuals, (turns,))
