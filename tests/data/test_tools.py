"""`evlm data`: what the tools show is what the pipeline gives."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evlm_jax import cli
from evlm_jax.batch import Batch
from evlm_jax.config import to_dict
from evlm_jax.data import tokenizer
from evlm_jax.data.pack import assemble
from evlm_jax.data.samples import Sample, question
from evlm_jax.data.sources import open_source
from evlm_jax.data.text import encode
from evlm_jax.data.tools import picture as picture_tool
from evlm_jax.data.tools.inspect import sees_images, sees_text, spelled
from evlm_jax.data.tools.stats import stats
from tests.data.made import TOKENIZER, config, refs, row, write_images, write_jsonl
from tests.helpers.tiny import tiny_config

pytestmark = pytest.mark.ci


class Spelling:
    """The byte tokenizer, with an end token that can be seen."""

    encode, id, bos, eos = TOKENIZER.encode, TOKENIZER.id, TOKENIZER.bos, TOKENIZER.eos

    def decode(self, ids, skip_special=True):
        return "".join(f"<{i}>" for i in ids if i > 255) or bytes(ids).decode(errors="replace")


@pytest.fixture(params=[1, 2])
def cfg(request, tmp_path):
    write_images(tmp_path / "pictures", 9)
    (tmp_path / "pictures" / "5.png").write_bytes(b"no picture")
    rows = [
        row(
            f"r{i}",
            f"pictures/{i % 9}.png" if i % 3 else None,
            "<image>" * bool(i % 3) + "q" * i,
            f"a{i}",
        )
        for i in range(30)
    ]
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        [*rows, row("mute", None, "q"), {"id": "bad"}, row("long", None, "q" * 999, "a")],
    )
    data = dict(
        sources=(source,),
        weights=(1.0,),
        length=200,
        targets=150,
        images=6,
        image_group=request.param,
        slots=6,
        block_pairs=60,
    )
    return tiny_config(data=data, train=dict(batch=2))


def test_tokens_are_shown_with_what_is_learned_and_seen():
    """(media), given, [learned], and what is predicted but not laid out.

    A character of two tokens is shown as one.
    """
    cfg = config(template="plain")
    dialogs = [
        question("<image>is it é?", "yes"),
        question("<image>is it?", "no"),
        question("<image>is it é?", "ye"),
    ]
    dialogs.append(question("<image>éa", "no"))
    first = encode(Sample("first", "made", (), (question("a", "b"),)), Spelling(), cfg)
    document = encode(Sample("k", "made", refs(1), tuple(dialogs)), Spelling(), cfg)
    batch = Batch(**assemble([[first, document]], cfg), pixels=None, taps=None)
    tokens = spelled(
        batch, 0, range(len(first.tokens), len(first.tokens) + len(document.tokens)), Spelling()
    )
    write = {"learned": "[{}]", "given": "{}", "media": "({})"}
    text = "".join(
        write[token["kind"]].format(token["text"]) + "".join(token["ends"]) for token in tokens
    )
    assert (
        text == "(image 0)is it é? Answer:[ ][y][e]<259>[s]<259>? Answer:[ ][n][o]<259>éa Answer:["
        " ][n][o]<259>"
    )
    assert [token["text"] for token in tokens if token["branch"]] == ["?", "é"]
    assert all(token["see"] == (0, 1) for token in tokens)


def test_masks_are_those_of_the_documents():
    cfg = config()
    made = [
        Sample("a", "made", refs(1, 1), (question("<image>x<image>", "y"),)),
        Sample("b", "made", refs(2), (question("<image>z", "w"),)),
    ]
    documents = [encode(sample, TOKENIZER, cfg) for sample in made]
    batch = Batch(**assemble([documents], cfg), pixels=None, taps=None)
    first, second = (len(document.tokens) for document in documents)
    text, images = sees_text(batch, 0), sees_images(batch, 0, cfg.data.slots)
    assert (text[:first, :first] == np.tri(first, dtype=bool)).all() and not text[
        first : first + second, :first
    ].any()
    assert images[first - 1].nonzero()[0].tolist() == [1] and images[first + second - 1].nonzero()[
        0
    ].tolist() == [2, 3]
    assert not images[first + second :].any()
    shared = config(image_group=2, slots=8)
    batch = Batch(**assemble([documents[:1], documents[1:]], shared), pixels=None, taps=None)
    rows = [sees_images(batch, b, 8) for b in range(2)]
    assert rows[0][first - 1].nonzero()[0].tolist() == [1] and rows[1][second - 1].nonzero()[
        0
    ].tolist() == [2, 3]
    assert not rows[0][first:].any() and not rows[1][second:].any()


class Page(HTMLParser):
    """Pictures and tokens of a page; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.tokens, self.links = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.pictures.append(
                Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
            )
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_experiment(path, cfg):
    """The config as an experiment file."""
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return"
        f" ConfigDict({to_dict(cfg)!r})\n"
    )
    return str(path)


def test_inspect_shows_pictures_as_they_are_seen_and_everything_is_inside(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda _: Spelling())
    out = tmp_path / "page.html"
    written = ["--out", str(out), "--picture", str(tmp_path / "page.png")]
    assert (
        cli.main(
            ["data", "inspect", write_experiment(tmp_path / "e.py", cfg), "--rows", "2", *written]
        )
        == 0
    )
    text = out.read_text("utf-8")
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links)
    seen = {np.asarray(picture)[0, 0, 0] for picture in page.pictures if picture.size == (8, 8)}
    assert seen <= set(range(9)) and len(seen) > 3
    assert (
        len([picture for picture in page.pictures if picture.mode == "L"]) == 4
    )  # two masks a row
    with Image.open(tmp_path / "page.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"), int)
    colours = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    bright = [
        picture
        for picture in page.pictures
        if picture.size == (8, 8) and np.asarray(picture)[0, 0, 1] > 240
    ]  # others are damaged
    green = (np.abs(pixels - (4, 251, 7)).max(-1) <= 8).sum()
    assert (
        pixels.shape[1] == picture_tool.WIDE and green == len(bright) * picture_tool.THUMB**2
    )  # each stands there too
    assert {
        tuple(bytes.fromhex(colour[1:])) for colour in ("#c8efd4", "#f0eee8", "#c2410c")
    } <= colours  # learned, given, image 0


def test_stats_count_what_is_there_and_what_is_lost(cfg):
    text = stats(cfg, TOKENIZER, 0)
    assert (
        "33 samples, 33 dialogs; looked at: 33" in text and "30 documents of them fit a row" in text
    )
    for cause, count in (
        ("bad row", 1),
        ("nothing supervised", 1),
        ("too long", 1),
        ("unreadable image", 1),
    ):
        assert re.search(rf"dropped, {cause}: {count}, the first: .*(bad|mute|long|5.png)", text)
    lengths = [
        len(encode(open_source(cfg.data.sources[0])[i], TOKENIZER, cfg).tokens) for i in range(30)
    ]
    assert f"tokens          {np.mean(lengths):8.1f}" in text


def test_bench_names_rates_fill_and_padding(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda _: TOKENIZER)
    assert (
        cli.main(["data", "bench", write_experiment(tmp_path / "e.py", cfg), "--documents", "60"])
        == 0
    )
    text = capsys.readouterr().out
    assert re.search(r"documents/s read and tokenised; left out: bad row [12]\n", text)
    assert re.search(
        r"images/s decoded and resized to 8 x 8; left out: unreadable image \d+\n", text
    )
    (padding,) = re.findall(
        rf"data.slots = 6, of {cfg.data.image_group} rows: ([\d.]+)% of the ViT's images are"
        " padding",
        text,
    )
    (row,) = re.findall(r"^8 +[\d.]+ +([\d.]+)", text, re.MULTILINE)
    assert float(padding) + float(row) == pytest.approx(100, abs=0.11)


def test_build_from_the_command_line_is_read_again(cfg, tmp_path, capsys):
    arguments = [
        "data",
        "build",
        write_experiment(tmp_path / "e.py", cfg),
        "--out",
        str(tmp_path / "built"),
        "--workers",
        "1",
    ]
    assert cli.main(arguments) == 0
    assert "sample: 33 seen, 29 written" in capsys.readouterr().out
    assert len(open_source(f"built:{tmp_path / 'built'}")) == 29
    assert cli.main([*arguments, "--config.data.sources=()", "--config.data.weights=()"]) == 1
    assert "data.sources is empty" in capsys.readouterr().err
