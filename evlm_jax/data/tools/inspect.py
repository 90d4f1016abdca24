"""`evlm data inspect`: rows as the model will see them,
as one HTML page with everything inside it.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.data.mixture import tasks
from evlm_jax.data.pack import Budget, first_slots, used
from evlm_jax.data.pipeline import Lane, collate, load_pictures
from evlm_jax.data.samples import ImageRef
from evlm_jax.data.sources import open_source, scene_of
from evlm_jax.data.text import Document
from evlm_jax.data.tools.picture import draw
from evlm_jax.paths import probe_file, write, writing

TEMPLATE = Path(__file__).with_name("inspect.html")
MASK = 420  # most pixels a side of a mask
COLOURS = (
    "#c2410c",
    "#1d6fb8",
    "#15803d",
    "#7c3aed",
    "#b45309",
    "#0e7490",
    "#be185d",
    "#4d7c0f",
)  # of images, in turn
HALF = "\ufffd"  # a token that ends within a character


def inspect(
    cfg: EVLMConfig, tokenizer, out: str, rows: int, picture: str | None = None
) -> epath.Path:
    """Writes the page of the first step's first `rows` rows, and of those that share images with
    them; its path.

    `picture`: a file for a picture of them as well (picture.py).
    """
    probe_file(out)
    cfg = replace(cfg, data=replace(cfg.data, cache_features=False))  # pictures are to be seen
    made = tasks([open_source(name) for name in cfg.data.sources], tokenizer, cfg)
    lanes = [
        Lane(made, cfg, number)
        for number in range(min(-(-rows // cfg.data.image_group), cfg.image_groups))
    ]
    chosen = [row for lane in lanes for row in lane.rows()]
    batch, damaged = collate(chosen, cfg, load_pictures(chosen, cfg, None))
    drops = [drop.message for lane in lanes for drop in lane.drops()] + [
        drop.message for drop in damaged
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [
        row(batch, b, *packed, tokenizer, cfg)
        for b, packed in enumerate(zip(chosen, first_slots(chosen, cfg.data)))
    ]
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=cfg.name,
        colours=COLOURS,
        sources=list(zip(cfg.data.sources, cfg.data.weights)),
        rows=shown,
        drops=drops,
    )
    path = write(out, page)
    if picture:
        with writing(picture) as file:
            draw(shown, COLOURS).quantize(256).save(file, "png", optimize=True)
    return path


def row(
    batch: Batch, b: int, documents: Sequence[Document], slot: int, tokenizer, cfg: EVLMConfig
) -> dict:
    """What the page shows of a row, whose first image slot is `slot`: fill, documents, masks."""
    needed = used([documents]).tolist()
    tokens = needed[0]
    return {
        "fill": [
            (name, n, room, f"{100 * n / max(room, 1):.0f}%")
            for name, n, room in zip(Budget._fields, needed, Budget.of(cfg.data))
        ],
        "documents": list(_documents(batch, b, documents, slot, tokenizer)),
        "text_mask": _png(sees_text(batch, b)[:tokens, :tokens]),
        "image_mask": _png(sees_images(batch, b, cfg.data.slots)[:tokens]),
    }


def _documents(
    batch: Batch, b: int, documents: Sequence[Document], slot: int, tokenizer
) -> Iterator[dict]:
    """Key, pictures and tokens of each document, as they stand in the batch."""
    token, pixels = 0, batch.pixels[b * len(batch.pixels) // len(batch.tokens)]
    for document in documents:
        here = range(token, token + len(document.tokens))
        pictures = [
            {
                "number": slot + i,
                "colour": (slot + i) % len(COLOURS),
                "data": _png(pixels[slot + i][..., :3]),
                "truth": _truth(ref),
            }
            for i, ref in enumerate(document.refs)
        ]
        yield {
            "name": f"{document.source}/{document.key}",
            "pictures": pictures,
            "tokens": spelled(batch, b, here, tokenizer),
        }
        token, slot = here.stop, slot + len(document.refs)


def _truth(ref: ImageRef) -> list[tuple[str, list[float]]]:
    """What is in a scene: in words, and left, top, width and height in percent of the picture."""
    scene = scene_of(ref)
    shown = []
    for thing in scene.things if scene else ():
        left, top, right, bottom = (100 * side / scene.size for side in thing.box)
        text = f"{thing.kind} {thing.what}"
        if thing is scene.disc:
            text += f" ({scene.side}, {scene.reference.kind} {scene.reference.what})"
        shown.append((text, [left, top, right - left, bottom - top]))
    return shown


def spelled(batch: Batch, b: int, here: range, tokenizer) -> list[dict]:
    """Tokens of a document: text, kind ("media", "given" or "learned"), what they see, what they
    predict.

    A token is learned if the one that it follows predicts it; predicted tokens that are not part of
    the row are in `ends`. Tokens that end within a character, and the media tokens of an image, are
    shown together.
    """
    targets: dict[int, list[int]] = {}
    for at, target in zip(batch.target_positions[b].tolist(), batch.targets[b].tolist()):
        if target >= 0 and at in here:
            targets.setdefault(at, []).append(target)
    shown, last = [], None
    path: list[int] = []
    for q in here:
        path = [k for k in path if q < batch.visible_until[b, k]]
        ids, see = (
            [int(batch.tokens[b, q])],
            (
                int(batch.visible_start[b, q]),
                int(batch.visible_stop[b, q]),
            ),
        )
        media = batch.media_slot[b, q] >= 0
        kind = (
            "media"
            if media
            else "learned"
            if path and ids[0] in targets.get(path[-1], ())
            else "given"
        )
        follows = last is not None and (last["kind"], last["see"]) == (kind, see) and q - 1 in path
        joins = follows and (media or HALF in last["text"])
        if joins:
            ids, shown = last["ids"] + ids, shown[:-1]
        text = f"image {see[0]}" if media else tokenizer.decode(ids, skip_special=False)
        predicts = [
            tokenizer.decode([target], skip_special=False)
            for target in dict.fromkeys(targets.get(q, ()))
        ]
        branch = last["branch"] if joins else bool(shown) and q - 1 not in path
        last = {
            "text": text,
            "kind": kind,
            "see": see,
            "ids": ids,
            "predicts": predicts,
            "branch": branch,
        }
        last |= {
            "index": q,
            "position": int(batch.positions[b, q]),
            "until": int(batch.visible_until[b, q]),
            "colour": see[0] % len(COLOURS),
        }
        shown.append(last)
        path.append(q)
    for token in shown:
        token["ends"] = _ends(batch, b, token, targets.get(token["index"], ()))
    return shown


def _ends(batch: Batch, b: int, token: dict, wanted: Sequence[int]) -> list[str]:
    """What a token predicts that is not laid out behind it."""
    below = slice(token["index"] + 1, token["until"])
    children = batch.tokens[b, below][batch.positions[b, below] == token["position"] + 1]
    pairs = zip(token["predicts"], dict.fromkeys(wanted))
    return [name for name, target in pairs if target not in children]


def sees_text(batch: Batch, b: int) -> np.ndarray:
    """bool [T, T]: query (down) sees key (right)."""
    at = np.arange(batch.tokens.shape[1])
    return (at[None] <= at[:, None]) & (at[:, None] < batch.visible_until[b][None])


def sees_images(batch: Batch, b: int, images: int) -> np.ndarray:
    """bool [T, I]: token (down) of row b sees image of its group (right), by the block pairs that
    cross-attention computes; False without it.
    """
    length = batch.tokens.shape[1]
    if batch.pair_block is None:
        return np.zeros((length, images), bool)
    c, place = divmod(b, len(batch.tokens) // len(batch.pair_block))
    sees = np.zeros((batch.token_place.shape[1] + 1, images), bool)
    real = batch.pair_block[c] < batch.block_tokens.shape[1]
    for block, slot in zip(batch.pair_block[c][real], batch.pair_image[c][real]):
        sees[batch.block_tokens[c, block], slot] = True
    return sees[place * length : (place + 1) * length]


def _png(array: np.ndarray) -> str:
    """A `data:` address. A mask is drawn at a size that can be seen."""
    if array.dtype == bool:
        shape = [max(1, MASK // max(1, side)) for side in array.shape]
        picture = Image.fromarray(
            np.where(np.kron(array, np.ones(shape, bool)), 40, 235).astype(np.uint8)
        )
        picture = picture.resize([min(MASK, side) for side in picture.size], Image.Resampling.BOX)
    else:
        picture = Image.fromarray(array)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
