"""Sources of synthetic pages for tests."""

import json

import pytest

from evlm_jax.data.ocr import fonts
from evlm_jax.data.ocr.book import plain
from evlm_jax.data.ocr.layout import LAYOUTS
from evlm_jax.data.ocr.page import Page, compose
from evlm_jax.data.sources import open_source
from tests.data.made import write_images
from tests.helpers.parity import needs_asset

ENGLISH = [
    "The quick brown fox jumps over the lazy dog",
    "Pack my box",
    "Is it 12.5% of <image> jugs?",
    "Sphinx",
    "Vow, quartz & “judge” me",
]
CHINESE = ["红苹果", "天地玄黄，宇宙洪荒。", "他用 GPU 训练模型，花了 3 天", "日月盈昃"]
LANGUAGES = ["en", pytest.param("zh", marks=needs_asset("noto-cjk"))]


def write_sources(folder):
    """Texts of both languages, one that no font can write, and a few pictures."""
    for name, texts in (("en", ENGLISH), ("zh", CHINESE), ("none", ["\ue000 x"])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    write_images(folder / "pictures", 3, 32)
    for i in range(3):
        (folder / "pictures" / f"{i}.txt").write_text("a picture")


def opened(folder, language, options="", texts=None, pictures=True):
    backgrounds = f"folder:{folder}/pictures" if pictures else ""
    return open_source(
        f"ocr-{language}:text:{folder}/{texts or language}.jsonl?pictures={backgrounds}&{options}"
    )


def pages(language, count, lying=False, size=320, layouts=tuple(LAYOUTS)):
    """Pages by their parts."""
    texts = {"en": ENGLISH, "zh": CHINESE}[language]

    def supply(rng):
        while True:
            yield plain(texts[rng.integers(len(texts))])

    faces = fonts.faces(language)
    return [
        compose((7, i), size, language, faces, supply, 1500, lying, layouts) for i in range(count)
    ]


def words_of(page: Page):
    return [word for line in page.sheet.lines for word in line.words]
