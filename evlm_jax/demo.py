"""`evlm demo`: real weights and data, one training, one evaluation, one page. Everything that lasts is saved and taken up again."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from evlm_jax import assets, report
from evlm_jax.checkpoint import steps
from evlm_jax.config import EVLMConfig, from_config_dict
from evlm_jax.convert.engine import load_towers
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import Sample, question
from evlm_jax.data.sources import open_source
from evlm_jax.evals import caption, choice, results
from evlm_jax.generate import Generator
from evlm_jax.run import Trained, feature_store, load_trained, train_run
from evlm_jax.upcycle import upcycle_run
from experiments import demo as experiment

CAPTION_TOKENS = 16
# How much each form evaluates, of what it does not take as a whole; "greedy": questions answered by free generation as well.
SIZES = {"": {"greedy": 1000}, "fast": {"images": 40, "greedy": 40, "emoji": 24}, "full": {}, "moe": {"greedy": 1000}}
ATTENTION = 4  # pictures in the report with attention by word


class Clock:
    """Seconds by part of the demo, for the report."""

    def __init__(self):
        self.parts: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times one part and says that it begins."""
        print(f"\n== {name}", flush=True)
        since = time.monotonic()
        yield
        self.parts.append((name, time.monotonic() - since))


def run(form: str, workdir: str, dense: str | None = None) -> Path:
    """The whole demo; returns the page. `form`: as experiments/demo.py has them; "moe" makes its experts of the run `dense`.

    Raises:
      ValueError, FileNotFoundError: `dense` is no dense run of this model.
      InterruptedError: SIGTERM came while training; what was trained is saved.
    """
    cfg, clock, out = from_config_dict(experiment.get_config(form)), Clock(), Path(workdir)
    with clock.part("fetch weights and data"):
        assets.fetch()
    sizes = SIZES[form]
    test = list(open_source("easy-vqa-test"))[: sizes.get("images")]
    emoji = list(open_source("emoji-en-test"))[: sizes.get("emoji")]
    photos = list(open_source("photos"))
    with clock.part("features of the test images"):
        features = feature_store(cfg, load_towers(cfg))
        features.fill(ref for sample in [*test, *emoji, *photos] for ref in sample.refs)
    with clock.part("train"):
        done = train_run(cfg, workdir, upcycled(dense, cfg, out / "upcycled") if dense else None, tensorboard=True)
        if done < cfg.train.steps:
            raise InterruptedError(f"stopped at step {done} of {cfg.train.steps}; the same command goes on from there")
    trained = load_trained(workdir)
    with clock.part("answer every test question by lowest loss"):
        scored = choice.evaluate(trained.model, trained.tokenizer, test, choice.EASY_VQA, features)
    with clock.part("generate answers and captions"):
        generated = generate(trained, features, caption.draw_questions(test, sizes.get("greedy")), emoji, photos)
    with clock.part("report"):
        found = {"vqa": scored, **generated, "sections": sections(cfg, trained, features, workdir, test, emoji, photos, scored, generated)}
    found["sections"] |= {"time": clock.parts, **facts(cfg, trained, scored, generated, clock)}
    found |= {"provenance": provenance(trained, workdir)}
    results.save(out / "results.json", found)
    page = report.render(found["sections"] | {"provenance": found["provenance"]}, out / "report.html")
    print_table(scored, generated, clock, page)
    return page


def upcycled(dense: str, cfg: EVLMConfig, out: Path) -> str:
    """The model with experts that `dense` becomes, made in `out` where it is not there yet."""
    if not out.exists():
        upcycle_run(dense, cfg, str(out))
    return str(out)


def generate(trained: Trained, features: FeatureStore, asked: list[Sample], emoji: list[Sample], photos: list[Sample]) -> dict[str, dict]:
    """Greedy answers to questions, names of unseen emoji, names of photographs: results by name."""
    generator = Generator(trained.model, trained.tokenizer, features=features.get)
    answer = lambda prompts: [a.text.strip() for a in generator.generate(prompts, max_new_tokens=CAPTION_TOKENS)]
    score = lambda samples, types=None: caption.evaluate(answer, trained.tokenizer, trained.model.cfg, samples, types)
    like_emoji = emoji[0].dialogs[0][0].text  # the one prompt for pictures that the demo is trained on
    photos = [replace(photo, dialogs=(question(like_emoji, photo.dialogs[0][-1].text),)) for photo in photos]
    return {"greedy": score(asked, choice.EASY_VQA), "emoji": score(emoji), "photos": score(photos)}


def sections(cfg, trained, features, workdir, test, emoji, photos, scored, generated) -> dict:
    """The report's sections that are made from results and pictures."""
    predicted = {(e["image"], e["question"]): e["prediction"] for e in generated["greedy"]["examples"]}
    by_key = {sample.key: sample for sample in test}
    right = [e for e in generated["greedy"]["examples"] if e["correct"]]
    shown = {e["image"]: e for e in right[:: max(1, len(right) // (3 * ATTENTION))]} or {
        e["image"]: e for e in generated["greedy"]["examples"]
    }
    looked = []
    for key, example in list(shown.items())[:ATTENTION]:
        asked = next(dialog[0] for dialog in by_key[key].dialogs if dialog[0].text.endswith(example["question"]))
        answer = predicted[key, example["question"]] or "?"
        looked.append(replace(by_key[key], dialogs=(question(asked.text, answer),)))
    return report.training_sections(Path(workdir) / "metrics.jsonl", cfg) | {
        "accuracy": report.accuracy_section(scored, generated["greedy"]),
        "vqa": report.vqa_section(scored, test),
        "caption_scores": generated["emoji"]["scores"],
        "emoji": report.caption_section(generated["emoji"], emoji, pictures=24, size=96),
        "photos": report.caption_section(generated["photos"], photos, pictures=12, size=320),
        "attention": report.attention_section(trained.model, trained.tokenizer, looked, features),
    }


def facts(cfg: EVLMConfig, trained: Trained, scored: dict, generated: dict, clock: Clock) -> dict:
    """Headline and setup of the report."""
    overall, x, moe = scored["accuracy"][0], cfg.xattn, cfg.moe
    count = lambda *parts: sum(array.size for name, array in trained.params.items() if name.startswith(parts))
    emoji = generated["emoji"]["scores"]
    minutes = sum(seconds for _, seconds in clock.parts) / 60
    begin = "the dense run" if moe.copies else "nothing"
    percent, frozen = report.percent, f"{count('vit/', 'llm/') / 1e6:.0f} M frozen"
    majority = f"always “{overall['majority_answer']}” scores {percent(overall['majority'])}"
    return {
        "title": "A vision-language model, trained on this machine",
        "tagline": "EVLM: a frozen DINOv2 and a frozen SmolLM2, joined by gated cross-attention that was trained from zero on easy-vqa "
        "and the names of emoji.",
        "headline": [
            {"value": percent(overall["accuracy"]), "label": "of easy-vqa's test questions right", "note": majority},
            {"value": f"{minutes:.0f} min", "label": f"from {begin} to this page", "note": results.device()},
            {"value": f"{count('xattn/', 'media/') / 1e6:.1f} M", "label": "trained parameters", "note": frozen},
            {"value": percent(emoji["exact_match"]), "label": "unseen emoji named exactly", "note": f"CIDEr {emoji['cider']:.2f}"},
        ],
        "setup": [
            ("Vision tower", f"DINOv2 ViT-S/14, frozen, {cfg.vit.image_size} px, taps {', '.join(map(str, cfg.vit.taps))}"),
            ("Language model", f"SmolLM2-135M-Instruct, frozen, {cfg.llm.layers} layers"),
            ("Cross-attention", f"{len(cfg.cross_layers)} gated blocks, {x.heads} heads x {x.head_dim}, FFN {x.ffn}"),
            ("Experts", f"{moe.experts} of {x.ffn // moe.slices}, {moe.top_k} a token, and one for all" if moe.copies else "none"),
            ("Media tokens", f"{cfg.media.tokens} an image"),
            ("Training", f"{cfg.train.steps} steps of {cfg.train.batch} rows x {cfg.data.length} tokens, {cfg.train.dtype}"),
            ("Optimizer", f"AdamW, peak rate {cfg.optim.lr:g}, gates x{cfg.optim.phases[0].rules[0].lr:g}"),
        ],
    }  # fmt: skip


def provenance(trained: Trained, workdir: str) -> dict:
    """Which weights, config and versions the results come from."""
    return results.provenance(trained.model.cfg, results.weights_hash(trained.params), f"{Path(workdir).name} step {steps(workdir)[-1]}")


def print_table(scored: dict, generated: dict, clock: Clock, page: Path) -> None:
    """What the page says, on the terminal."""
    greedy = {row["type"]: row["accuracy"] for row in generated["greedy"]["accuracy"]}
    print(f"\n{'easy-vqa test':<14}{'questions':>10}{'lowest loss':>13}{'greedy':>9}{'majority':>10}")
    for row in scored["accuracy"]:
        free = f"{100 * greedy[row['type']]:.1f}%" if row["type"] in greedy else "-"
        print(f"{row['type']:<14}{row['count']:>10}{100 * row['accuracy']:>12.1f}%{free:>9}{100 * row['majority']:>9.1f}%")
    shown = {name: value for name, value in generated["emoji"]["scores"].items() if name in ("count", "exact_match", "rouge_l", "cider")}
    print("unseen emoji:", ", ".join(f"{name} {np.round(value, 3)}" for name, value in shown.items()))
    print("\n".join(f"{report.duration(seconds):>14}  {name}" for name, seconds in clock.parts))
    print(f"{report.duration(sum(s for _, s in clock.parts)):>14}  in all\n\nreport: {page}")
