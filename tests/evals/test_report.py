"""The report renders from a results file alone, with every section, and asks the network for
nothing.
"""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evlm_jax.chat.conversation import Chat
from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.evals import results
from evlm_jax.report import figures
from evlm_jax.report import page as report
from tests.data.made import TOKENIZER
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, tiny_config

SCENES = ("kind", "count", "chance", "majority", "guessed", "held out", "known", "style")
CAPTIONS = {"count": 3, "exact_match": 1 / 3, "rouge_l": 0.5, "cider": 1.25}
FAMILIES = (
    ("name", 166, 0.025, 0.0617, None, 0.4417, 0.9051, 0.5118),
    ("mean", 800, 0.1, 0.2, 0.15, 0.6, 0.7, 0.65),
)
LOAD = [0.172, 0.062, 0.016] + 12 * [0.0577] + [0.0576]
SECTIONS = (
    "scenes",
    "examples",
    "accuracy",
    "attention",
    "emoji",
    "photos",
    "sources",
    "training",
    "setup",
)


def write_metrics(file, cfg, copies):
    """What a run of three updates notes: losses, gates, experts' loads, monitors."""
    lines = [
        {"step": s, "loss": 2.5 / s, "loss/vqa": 2 / s, "loss/caption": 3 / s} for s in (1, 2, 3)
    ]
    lines[-1] |= {
        f"xattn/{layer}/{kind}_gate": 0.1 * layer
        for layer in cfg.cross_layers
        for kind in ("attn", "ffn")
    }
    if copies:
        lines[-1] |= {
            f"xattn/{layer}/ffn/{name}": LOAD
            for layer in cfg.cross_layers
            for name in ("load", "load_text", "load_media")
        }
        lines[-1] |= {f"xattn/{layer}/ffn/entropy": 2.0 + 0.1 * layer for layer in cfg.cross_layers}
        lines[-1] |= {f"xattn/{layer}/ffn/dropped": 300.0 for layer in cfg.cross_layers}
    notes = [{"step": s, "monitor/pope/accuracy": 50.0 + s, "monitor/seconds": 2.0} for s in (2, 4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines + copies // 4 * notes))


@pytest.fixture(params=["dense", "experts"])
def saved(tmp_path, request):
    """Results as the demo saves them, made from small results of the evaluators; of a dense run,
    and of one with experts.
    """
    copies = 4 if request.param == "experts" else 0
    cfg, rng = tiny_config(moe={"copies": copies}), np.random.default_rng(0)
    refs = {str(i): ImageRef(str(tmp_path / f"{i}.png")) for i in range(3)}
    for ref in refs.values():
        Image.fromarray(rng.integers(0, 255, (80, 80, 3), np.uint8)).save(ref.path)

    def example(i, guess):
        return {
            "image": str(i),
            "question": "is it <b>?",
            "answer": "yes",
            "prediction": guess,
            "correct": guess == "yes",
        }

    examples = [example(0, "yes"), example(1, "no"), example(2, "")]
    row = {
        "type": "all",
        "count": 9673,
        "accuracy": 0.9134,
        "error": None,
        "majority": 0.37,
        "majority_answer": "yes",
    }
    write_metrics(tmp_path / "metrics.jsonl", cfg, copies)
    captions = report.caption_section(examples, refs, 3, 64)
    image = figures.data_uri(Image.open(tmp_path / "0.png"))
    words = [
        {"word": word, "grid": rng.random((4, 4)), "predicted": word == "yes"}
        for word in ("red", "yes")
    ]
    made = dict(
        title="It <sees>",
        tagline="two towers",
        headline=[{"value": "91.3%", "label": "right", "note": "majority 37%"}],
        setup=[["vision", "tiny"]],
        time=[["training", 754.0], ["evaluation", 61.0]],
        accuracy=report.accuracy_section(
            {"accuracy": [row, row | {"type": "colour"}]}, {"accuracy": [row | {"accuracy": 0.5}]}
        ),
        vqa=report.vqa_section(examples, refs, pictures=2),
        emoji=captions,
        photos=captions,
        sources=report.sources_section(
            [e | {"source": "rare <words>"} for e in examples], list(refs.values())
        ),
        caption_scores={"unseen": CAPTIONS},
        scenes=[dict(zip(SCENES, row)) for row in FAMILIES],
        examples={"drawings <held> out": report.vqa_section(examples, refs, pictures=1)},
        attention=[{"image": image, "words": words}],
        provenance=results.provenance(cfg, "0" * 64),
    )
    return results.save(
        tmp_path / "results.json", made | report.training_sections(tmp_path / "metrics.jsonl", cfg)
    )


class Page(HTMLParser):
    """Ids, addresses and text of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.text, self.open = set(), [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.ids |= {value for name, value in attrs if name == "id"}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_renders_every_section_from_the_saved_results(saved, tmp_path):
    text = report.render(results.load(saved), tmp_path / "out" / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.ids >= set(SECTIONS)
    numbers = ("91.3%", "50.0%", "33.3%", "1.250", "9,673", "12 min 34 s", "13 min 35 s")
    for shown in (
        *numbers,
        "It <sees>",
        "is it <b>?",
        "rare <words>: is it <b>?",
        "drawings <held> out",
        *("44.2%", "90.5%", "51.2%", "6.2%"),  # of names
        "(nothing)",
        "0" * 64,
    ):
        assert shown in page.text
    assert (
        text.partition('<section id="photos">')[2]
        .partition("</section>")[0]
        .count("is it &lt;b&gt;?")
        == 3
    )  # the question is printed
    experts = results.load(saved)["experts"]
    assert ("experts" in page.ids) == (experts is not None) and text.count("<svg") == 2 + 2 * (
        "experts" in page.ids
    )
    assert (
        ("Followed in training" in page.text)
        == ("pope/accuracy" in page.text)
        == (experts is not None)
    )
    if experts:
        assert results.load(saved)["monitors"] == {
            "pope/accuracy": {"step": [2, 4], "score": [52.0, 54.0]}
        }
    for shown in (
        "An even share is 6.2%",
        "the full colour 17.2%",
        "between 2.00 and 2.30 nats",
        "1,200 choices were dropped",
    ):
        assert (shown in page.text) == (experts is not None)
    pictures = [a for a in page.addresses if a.startswith("data:image/")]
    assert (
        len(pictures) == 1 + 2 + 3 + 3 + 3 + 2 * 3
    )  # examples, vqa, emoji, photos, sources, the only attention strip above and in its section
    assert all(figures.from_data_uri(a).size >= (64, 64) for a in pictures)
    assert not [a for a in page.addresses if not a.startswith(("data:", "#"))] and not re.search(
        r"url\((?!#)|@import|<script", text
    )


def test_without_cross_attention_the_page_says_so(saved, tmp_path):
    cfg = tiny_config(**BASELINES["llava"])
    made = results.load(saved) | report.training_sections(saved.with_name("metrics.jsonl"), cfg)
    made |= {"attention": report.attention_section(random_model(cfg, 0), TOKENIZER, [None])}
    page = Page(text := report.render(made, tmp_path / "report.html").read_text("utf-8"))
    assert (
        "Not drawn: no cross-attention of this model" in page.text
        and "no cross-attention, and so no gates" in page.text
    )
    assert text.count("<svg") == 1 + bool(made["monitors"]) and page.ids >= set(SECTIONS)


def test_a_missing_section_is_named(saved, tmp_path):
    made = results.load(saved)
    del made["gates"], made["emoji"]
    with pytest.raises(ValueError, match="results lack emoji, gates"):
        report.render(made, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_greedy_column_is_empty_where_the_type_was_not_drawn(saved):
    rows = results.load(saved)["accuracy"]
    assert [(row["type"], row["greedy"]) for row in rows] == [("all", 0.5), ("colour", None)]


def test_a_source_that_a_short_run_did_not_meet_has_no_curve(tmp_path):
    cfg = tiny_config()
    gates = {
        f"xattn/{layer}/{kind}_gate": 0.1 for layer in cfg.cross_layers for kind in ("attn", "ffn")
    }
    line = {"step": 1, "loss": 2.0, "loss/vqa": 2.0} | gates
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert cfg.data.sources == ("vqa", "caption")
    assert report.training_sections(tmp_path / "metrics.jsonl", cfg)["losses"] == {
        "vqa": {"step": [1], "loss": [2.0]}
    }


def test_a_model_without_gates_has_no_picture_of_them(tmp_path):
    """mPLUG-Owl3's later form, whose scores of images share the softmax of the text."""
    own = BASELINES["mplug_owl3"]
    cfg = tiny_config(**own | {"xattn": own["xattn"] | {"gate": "softmax"}})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert report.training_sections(tmp_path / "metrics.jsonl", cfg)["gates"] is None
    model = SimpleNamespace(xattn=SimpleNamespace(gates=dict))
    assert Chat.gates(SimpleNamespace(cfg=cfg, _model=model)) is None


def test_empty_metrics_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl is empty"):
        report.training_sections(tmp_path / "metrics.jsonl", tiny_config())


def test_attention_section_and_banner(tmp_path):
    cfg = tiny_config(
        llm=dict(vocab=TOKENIZER.vocab_size),
        data=dict(template="plain", length=96, targets=32, block_pairs=24),
    )
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    sample = Sample(
        "a",
        "test",
        ((ImageRef(str(tmp_path / "a.png")),),),
        (question(MARKER + "is it red?", "yes"),),
    )
    (row,) = json.loads(
        json.dumps(report.attention_section(random_model(cfg, 0), TOKENIZER, [sample]))
    )
    assert [word["word"] for word in row["words"]] == ["is", "it", "red?", "yes"]
    assert figures.from_data_uri(row["image"]).size == (report.PICTURE, report.PICTURE)
    picture = report.banner(row, 90)
    assert picture.size == (5 * 92 - 2, 108)
    below = np.asarray(picture.crop((0, 90, *picture.size))).min(-1)
    assert below[:, :90].min() == 255 and all(
        below[:, i * 92 : i * 92 + 90].min() < 128 for i in range(1, 5)
    )  # a word under each glow


def test_durations():
    assert [report.duration(s) for s in (8.44, 59.2, 60, 754, 7830)] == [
        "8.4 s",
        "59 s",
        "1 min 00 s",
        "12 min 34 s",
        "2 h 10 min",
    ]
