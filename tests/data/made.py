"""Small data for the data tests: a byte tokenizer, random samples, files on disk."""

import json

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from evlm_jax.data.samples import ImageRef, Sample, Turn
from tests.tiny import tiny_config

SPECIALS = {"<|im_start|>": 256, "<|im_end|>": 257, "<|media|>": 258}


class ByteTokenizer:
    """The tokenizer interface over UTF-8 bytes."""

    eos = (259,)
    vocab_size = 260

    def encode(self, text):
        return list(text.encode())

    def id(self, special):
        return SPECIALS[special]

    def decode(self, ids, skip_special=True):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TOKENIZER = ByteTokenizer()


def config(**data):
    """The tiny config, one lane, wide enough for bytes."""
    return tiny_config(data=dict(length=256, targets=128, images=8, pairs=64, weights=(1.0,), sources=("made",)) | data)


def refs(*frames):
    """Visuals with these numbers of frames."""
    return tuple(tuple(ImageRef(f"{i}.png", float(j) if n > 1 else None) for j in range(n)) for i, n in enumerate(frames))


words = st.text("ab ", max_size=6)  # a small alphabet: long common prefixes


@st.composite
def samples(draw, most_visuals=3, most_dialogs=5):
    """Samples with images, videos or neither, and one or more dialogs of one or two rounds; markers anywhere in the user's text."""
    frames = draw(st.lists(st.integers(1, 3), max_size=most_visuals))
    dialogs = []
    for _ in range(draw(st.integers(1, most_dialogs))):
        texts = [draw(words) for _ in range(2 * draw(st.integers(1, 2)))]
        spots = sorted(draw(st.sampled_from(range(0, len(texts), 2))) for _ in frames)
        for spot in spots:
            texts[spot] += "<image>" + draw(words)
        dialogs.append(tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)))
    return Sample("key", "made", refs(*frames), tuple(dialogs))


def write_images(folder, count, size=8):
    """count PNG files, each of one colour that tells its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((size, size, 3), (i, 255 - i, 7), np.uint8)).save(folder / f"{i}.png")


def write_jsonl(path, rows):
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"llava:{path}"


def row(key, image, *texts):
    """A row in LLaVA's layout."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    return {"id": key, "conversations": turns} | ({"image": image} if image else {})
