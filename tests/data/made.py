"""Small data for the data tests: a byte tokenizer, random samples, files on disk."""

import io
import json
import tarfile

import numpy as np
import webdataset
from hypothesis import strategies as st
from PIL import Image

from evlm_jax.data.image import load
from evlm_jax.data.samples import ImageRef, Sample, Turn
from tests.helpers.tiny import tiny_config

SPECIALS = {"<|im_start|>": 256, "<|im_end|>": 257, "<|media|>": 258}


class ByteTokenizer:
    """The tokenizer interface over UTF-8 bytes."""

    bos, eos = (), (259,)
    vocab_size = 260
    ids = range(260)

    def encode(self, text, behind="nothing"):
        return list(text.encode())

    def id(self, special):
        return SPECIALS[special]

    def decode(self, ids, skip_special=True):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TOKENIZER = ByteTokenizer()


def config(**data):
    """The tiny config, one image group, wide enough for bytes."""
    data = (
        dict(length=256, targets=128, images=8, block_pairs=64, weights=(1.0,), sources=("made",))
        | data
    )
    return tiny_config(data=data, train=dict(batch=data.get("image_group", 1)))


def refs(*frames):
    """Visuals with these numbers of frames."""
    return tuple(
        tuple(ImageRef(f"{i}.png", float(j) if n > 1 else None) for j in range(n))
        for i, n in enumerate(frames)
    )


words = st.text("ab ", max_size=6)  # a small alphabet: long common prefixes


@st.composite
def samples(draw, most_visuals=3, most_dialogs=5):
    """Samples with images, videos or neither, and one or more dialogs of one or two rounds; markers
    anywhere in the user's text.
    """
    frames = draw(st.lists(st.integers(1, 3), max_size=most_visuals))
    dialogs = []
    for _ in range(draw(st.integers(1, most_dialogs))):
        texts = [draw(words) for _ in range(2 * draw(st.integers(1, 2)))]
        spots = sorted(draw(st.sampled_from(range(0, len(texts), 2))) for _ in frames)
        for spot in spots:
            texts[spot] += "<image>" + draw(words)
        dialogs.append(
            tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
        )
    return Sample("key", "made", refs(*frames), tuple(dialogs))


def write_images(folder, count, size=8):
    """count PNG files, each of one colour that tells its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((size, size, 3), (i, 255 - i, 7), np.uint8)).save(
            folder / f"{i}.png"
        )


def write_jsonl(path, rows):
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"llava:{path}"


def row(key, image, *texts):
    """A row in LLaVA's layout."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    return {"id": key, "conversations": turns} | ({"image": image} if image else {})


def png(number: int) -> bytes:
    """A picture of one colour that tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def shows(ref: str) -> int:
    """The number of the picture behind a reference, as training would load it."""
    return int(load(ImageRef(ref), 8, "squash")[0, 0, 0])


def write_tar(path, numbers, **more):
    """Samples with a picture, text and json, in a tar of webdataset's."""
    with webdataset.TarWriter(str(path)) as writer:
        for i in numbers:
            writer.write(
                {
                    "__key__": f"{i:05d}",
                    "png": png(i),
                    "txt": f"picture {i}",
                    "json": {"similarity": i / 10},
                    **more,
                }
            )
    return str(path)


def write_json(path, value):
    """A JSON file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def said(sample):
    """[(role, text), ...] of each dialog."""
    return [[(turn.role, turn.text) for turn in dialog] for dialog in sample.dialogs]


def paths(sample):
    """Of all frames."""
    return [ref.path for ref in sample.refs]


def asked(*pairs):
    """Dialogs of one question and answer, as `said` gives them."""
    return [[("user", question), ("assistant", answer)] for question, answer in pairs]


def talk(question="<image>q", answer="a"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def pack(path, members):
    """A tar of members {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
