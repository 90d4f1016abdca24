"""One HTML page about a run, with everything inside it: no script, no network, light and dark.

`render` needs nothing but the results, a plain dict as JSON holds it, so a saved run can be shown
again without the model:

    title, tagline   text
    headline         [{value, label, note}]             the three or four numbers to remember
    setup            [[name, value]]                    towers, parameters, steps
    time             [[part, seconds]]
    losses           {source: {step: [...], loss: [...]}}
    monitors         {task and metric: {step: [...], score: [...]}}; empty where none was followed
    scenes           [{kind, count, held out, known, style, guessed, majority, chance}], shares; the
                     last row is the mean of the families
    examples         {title: as vqa}
    accuracy         [{type, count, accuracy, error, majority, majority_answer, greedy}]; greedy may
                     be None
    vqa              [{image, questions: [{question, answer, prediction, correct}]}]
    caption_scores   {title: {count, exact_match, rouge_l, cider}}
    emoji, photos    [{image, answer, prediction, correct}]
    sources          [{source, image, question, answer, prediction, correct}]
    attention        [{image, words: [{word, grid, predicted}]}]; grid: [g][g] weights over the
                     patches; empty where it has none
    gates            {layers, attn, ffn}: how far they are open, without `ffn` where blocks have no
                     FFN; None where there is no cross-attention
    experts          {layers, load: {kind of token: shares [X, E]}, entropy: [X], dropped}; None
                     where the run is dense
    provenance       as evals/results.py makes it

Images are `data:` addresses (viz.data_uri).
"""

import json
import random
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from etils import epath
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from evlm_jax.config import EVLMConfig
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.image import decode_all, load
from evlm_jax.data.samples import ImageRef, Sample
from evlm_jax.journal import read_lines
from evlm_jax.metrics import SECONDS, training_lines
from evlm_jax.models.evlm import EVLM
from evlm_jax.paths import write
from evlm_jax.report import attention_maps, figures

SECTIONS = (
    "title tagline headline setup time losses monitors scenes examples accuracy vqa"
    " caption_scores emoji photos sources attention gates experts provenance"
).split()
PICTURE = 320  # pixels a side of the pictures that attention is drawn over
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
TEMPLATE = Path(__file__).with_name("page.html")


def render(results: dict, out: PathLike | str) -> epath.Path:
    """Writes the page and returns its path.

    Raises ValueError naming the sections that `results` lacks.
    """
    if missing := [name for name in SECTIONS if name not in results]:
        raise ValueError(
            f"report: results lack {', '.join(missing)}; see evlm_jax/report/page.py for what each"
            " holds"
        )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "duration": duration, "thousands": "{:,}".format}
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        results,
        attention=[strip(row) for row in results["attention"]],
        loss_svg=Markup(figures.loss_curves(results["losses"])),
        monitor_svg=results["monitors"] and Markup(figures.score_curves(results["monitors"])),
        gate_svg=results["gates"] and Markup(figures.gate_bars(**results["gates"])),
        load_svg=results["experts"]
        and Markup(figures.load_maps(results["experts"]["layers"], results["experts"]["load"])),
        largest_load=results["experts"] and np.max([*results["experts"]["load"].values()]),
        provenance_json=json.dumps(results["provenance"], ensure_ascii=False, indent=1),
        total_seconds=sum(seconds for _, seconds in results["time"]),
    )
    return write(out, page)


def style() -> str:
    """The page's style sheet, for other pages."""
    return TEMPLATE.read_text("utf-8").partition("<style>")[2].partition("</style>")[0]


def training_sections(metrics: PathLike | str, cfg: EVLMConfig) -> dict:
    """`losses`, `monitors`, `gates` and `experts` from a run's metrics.jsonl (metrics.py).

    Raises ValueError if it has no line.
    """
    lines = [json.loads(line) for line in read_lines(metrics)]
    if not lines:
        raise ValueError(
            f"report: {metrics} is empty or not there; train.log_every = {cfg.train.log_every} may"
            " be more than the steps of the run"
        )

    def curve(key, name):
        return {
            "step": [line["step"] for line in lines if key in line],
            name: [line[key] for line in lines if key in line],
        }

    losses = {source: curve(f"loss/{source}", "loss") for source in cfg.data.sources}
    losses = {
        source: points for source, points in losses.items() if points["step"]
    }  # a short run may not meet a rare source
    followed = dict.fromkeys(
        key for line in lines for key in line if key.startswith("monitor/") and key != SECONDS
    )
    monitors = {key.removeprefix("monitor/"): curve(key, "score") for key in followed}
    last = training_lines(metrics)[-1]

    gates = {}
    for kind in ("attn", "ffn"):
        names = [f"xattn/{layer}/{kind}_gate" for layer in cfg.cross_layers]
        if names and names[0] in last:
            gates[kind] = [last[name] for name in names]
    return {
        "losses": losses,
        "monitors": monitors,
        "gates": {"layers": list(cfg.cross_layers)} | gates if gates else None,
        "experts": experts_section(last, cfg),
    }


def experts_section(line: dict, cfg: EVLMConfig) -> dict | None:
    """`experts` from one line of metrics.jsonl; None where the FFNs are dense."""
    if not cfg.moe.copies:
        return None

    def of(name):
        return [line[f"xattn/{layer}/ffn/{name}"] for layer in cfg.cross_layers]

    load = {"all": of("load"), "text": of("load_text"), "media": of("load_media")}
    return {
        "layers": list(cfg.cross_layers),
        "load": load,
        "entropy": of("entropy"),
        "dropped": sum(of("dropped")),
    }


def accuracy_section(choice: dict, greedy: dict) -> list[dict]:
    """The `accuracy` rows of the lowest-loss result, with the greedy result's accuracy of the same
    type, None where it has none.
    """
    generated = {row["type"]: row["accuracy"] for row in greedy["accuracy"]}
    return [row | {"greedy": generated.get(row["type"])} for row in choice["accuracy"]]


def vqa_section(
    examples: Sequence[dict],
    refs: dict[str, ImageRef],
    pictures: int = 8,
    questions: int = 4,
    seed: int = 0,
) -> list[dict]:
    """`pictures` of the examples and `questions` about each, drawn by a seed.

    `refs`: image -> its file.
    """
    rng, by_image = random.Random(seed), {}
    for example in examples:
        by_image.setdefault(example["image"], []).append(example)
    chosen = rng.sample(sorted(by_image), min(pictures, len(by_image)))

    def pick(asked):
        return rng.sample(asked, min(questions, len(asked)))

    return [{"image": _picture(refs[key], 192), "questions": pick(by_image[key])} for key in chosen]


def caption_section(
    examples: Sequence[dict], refs: dict[str, ImageRef], pictures: int, size: int, seed: int = 0
) -> list[dict]:
    """`pictures` of the examples with what was said about them, drawn by a seed."""
    chosen = random.Random(seed).sample(examples, min(pictures, len(examples)))
    return [example | {"image": _picture(refs[example["image"]], size)} for example in chosen]


def sources_section(examples: Sequence[dict], refs: Sequence[ImageRef]) -> list[dict]:
    """The examples, each with its picture."""
    return [
        example | {"image": _picture(ref, 128)} for example, ref in zip(examples, refs, strict=True)
    ]


def attention_section(
    model: EVLM, tokenizer, samples: Sequence[Sample], features: FeatureStore | None = None
) -> list[dict]:
    """The picture as the model sees it and the attention of every word; each sample has one dialog
    of a question and an answer.

    Empty, which the page explains, where no cross-attention reads patches.
    """
    if not attention_maps.looks_at_patches(model.cfg):
        return []
    rows = []
    for sample in samples:
        seen = Image.fromarray(load(sample.refs[0], PICTURE, model.cfg.data.resize))
        words = [
            word | {"grid": word["grid"].tolist()}
            for word in attention_maps.word_maps(model, tokenizer, sample, features)
        ]
        rows.append({"image": figures.data_uri(seen, kind="JPEG"), "words": words})
    return rows


def banner(row: dict, size: int = 224) -> Image.Image:
    """An entry of `attention` as one picture to share: the image, then the glow for each word, with
    the words below.
    """
    image, font = (
        figures.from_data_uri(row["image"]).convert("RGB"),
        ImageFont.truetype(FONT, size // 10),
    )
    cells = [(image.resize((size, size)), "")]
    for word in row["words"]:
        cells.append(
            (
                figures.overlay(image, np.asarray(word["grid"]), size),
                "\u2192 " * word["predicted"] + word["word"],
            )
        )
    sheet = Image.new("RGB", (len(cells) * (size + 2) - 2, size + size // 5), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (cell, text) in enumerate(cells):
        sheet.paste(cell, (i * (size + 2), 0))
        ink = "#c2410c" if text.startswith("\u2192") else "#23252b"
        draw.text((i * (size + 2) + size / 2, size + size / 10), text, ink, font, anchor="mm")
    return sheet


def _picture(ref: ImageRef, size: int) -> str:
    """JPEG for photographs, PNG for drawings, which it keeps sharp and makes no larger."""
    (image,) = decode_all([ref])
    drawn = image.getcolors(4096) is not None
    return figures.data_uri(image, size, "PNG" if drawn else "JPEG")


def strip(row: dict) -> dict:
    """An entry of `attention` with the drawn picture of each word instead of its grid."""
    image = figures.from_data_uri(row["image"])

    def draw(word):
        return figures.data_uri(figures.overlay(image, np.asarray(word["grid"])), kind="JPEG")

    return row | {"words": [word | {"picture": draw(word)} for word in row["words"]]}


def percent(value: float) -> str:
    """0.9134 -> "91.3%"."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """Seconds for people: 8.4 s, 12 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )
