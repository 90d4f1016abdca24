"""`evlm demo`: real weights and data, one training, one evaluation, one page.

Everything that lasts is saved and taken up again.
"""

import contextlib
import time
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import jax
import numpy as np

from evlm_jax import assets
from evlm_jax.checkpoint.store import steps
from evlm_jax.checkpoint.store import trained as trained_names
from evlm_jax.config import EVLMConfig, from_config_dict
from evlm_jax.convert.engine import load_towers
from evlm_jax.convert.upcycle import upcycle_run
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import MARKER, Sample, question
from evlm_jax.data.sources import open_source
from evlm_jax.evals import results, score, tasks
from evlm_jax.evals.answer import Generated, LowestLoss
from evlm_jax.evals.runner import Answerer, evaluate
from evlm_jax.evals.statistics import accuracy_table
from evlm_jax.evals.task import Question, draw, first
from evlm_jax.evals.tasks.demo import ANSWERS, EASY_VQA, from_samples
from evlm_jax.evals.text_metrics import words
from evlm_jax.generate import Generator
from evlm_jax.launch import train_run
from evlm_jax.paths import place, probe
from evlm_jax.report import page as report
from evlm_jax.runs import Trained, feature_store, load_trained
from experiments import demo as experiment

# How much each form evaluates, of what it does not take as a whole; "greedy": questions answered by
# free generation as well.
SIZES = {
    "": {"greedy": 1000},
    "fast": {"vqa": 120, "greedy": 24, "emoji": 8},
    "full": {},
    "moe": {"greedy": 1000},
}
TASKS = {"vqa": "easy-vqa-choice", "greedy": "easy-vqa", "emoji": "emoji", "photos": "photos"}
ATTENTION = 4  # pictures in the report with attention by word
TAUGHT = 3  # samples in the report of each source that was trained on


class Clock:
    """Seconds spent in each part of the demo, for the report."""

    def __init__(self):
        self.parts: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Prints that a part begins and times it."""
        print(f"\n== {name}", flush=True)
        since = time.monotonic()
        yield
        self.parts.append((name, time.monotonic() - since))


def fast_products(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The dtype of products' operands with which a step is fastest on this CPU: on 2 cores with
    bfloat16 products (AMX, AVX-512 BF16) 2.4 s instead of 4.5, on 2 without them 12.0 instead of
    8.6. Where Linux does not say what the CPU has, bfloat16.
    """
    file = Path(cpuinfo)
    flags = file.read_text("utf-8").split() if file.is_file() else ["amx_bf16"]
    return "bfloat16" if {"amx_bf16", "avx512_bf16", "bf16"} & set(flags) else "float32"


def run(form: str, workdir: str, dense: str | None = None) -> PathLike:
    """The whole demo; returns the page. `form`: as experiments/demo.py has them; "moe" makes its
    experts of the run `dense`.

    Raises:
      ValueError, FileNotFoundError: `dense` is no dense run of this model.
      Stopped: a signal came while training; what was trained is saved.
    """
    config, clock, out = experiment.get_config(form), Clock(), place(workdir)
    if jax.default_backend() == "cpu":
        config.train.matmul_precision = fast_products()
    cfg = from_config_dict(config)
    if dense:
        trained_names(dense)  # is there, before anything is fetched
    probe(workdir)
    with clock.part("fetch weights and data"):
        assets.fetch()
    asked = questions(SIZES[form])
    with clock.part("features of the test images"):
        features = feature_store(cfg, load_towers(cfg))
        features.fill(
            ref for part in asked.values() for question in part for (ref,) in question.visuals
        )
    with clock.part("train"):
        train_run(
            cfg,
            workdir,
            upcycled(dense, cfg, out / "upcycled") if dense else None,
            tensorboard=True,
        )
    trained = load_trained(workdir)
    with clock.part("answer every test question by lowest loss"):
        chooses = LowestLoss(trained.model, trained.tokenizer, ANSWERS, features)
        found = {"vqa": answered("vqa", asked, chooses)}
    with clock.part("generate answers and captions"):
        generates = Generated(
            Generator(trained.model, trained.tokenizer, features=features.get),
            tasks.find("emoji").tokens,
        )
        found |= {name: answered(name, asked, generates) for name in ("greedy", "emoji", "photos")}
        learned = taught(cfg, generates)
    with clock.part("report"):
        page = sections(cfg, trained, features, workdir, asked, found) | {"sources": learned}
    page |= {
        "time": clock.parts,
        **facts(cfg, trained, found, clock),
        "provenance": provenance(trained, workdir),
    }
    results.save(out / "results.json", found | {"sections": page, "provenance": page["provenance"]})
    print_table(found, clock, written := report.render(page, out / "report.html"))
    return written


def upcycled(dense: str, cfg: EVLMConfig, out: PathLike) -> str:
    """The model with experts that `dense` becomes, made in `out` where it is not there yet."""
    if not steps(out):
        upcycle_run(dense, cfg, str(out))
    return str(out)


def questions(sizes: dict[str, int]) -> dict[str, list[Question]]:
    """The questions of the demo by the name of their result."""
    every = {name: tasks.find(task).questions(None, None) for name, task in TASKS.items()}
    vqa = first(every["vqa"], sizes.get("vqa"))
    return every | {
        "vqa": vqa,
        "greedy": draw(vqa, sizes.get("greedy")),
        "emoji": every["emoji"][: sizes.get("emoji")],
    }


def answered(name: str, asked: dict[str, list[Question]], answer: Answerer) -> dict:
    """One result with scores, and with what the report shows of it: "shown" and, of easy-vqa,
    "accuracy".
    """
    result = score.scored(evaluate(tasks.find(TASKS[name]), asked[name], answer, {}))
    shown = []
    for row in result["examples"]:
        right = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        line = {
            "image": row["cluster"],
            "question": row["prompt"],
            "answer": right,
            "prediction": row["prediction"],
        }
        shown.append(line | {"correct": words(row["prediction"]) == words(right)})
    return (
        result
        | {"shown": shown}
        | ({"accuracy": accuracy_table(shown, EASY_VQA)} if "vqa" in TASKS[name] else {})
    )


def taught(cfg: EVLMConfig, answer: Answerer) -> list[dict]:
    """The report's section of training data: answers to the first question of some samples of each
    source; documents have none.
    """
    pairs = []
    for source in map(open_source, cfg.data.sources):
        samples = [source[i] for i in range(min(TAUGHT, len(source)))]
        pairs += [
            (sample, from_samples([sample])[0]) for sample in samples if len(sample.dialogs[0]) > 1
        ]
    examples = []
    for (sample, asked), said in zip(pairs, answer([asked for _, asked in pairs])):
        line = {"source": sample.source, "question": asked.text, "answer": asked.answer, **said}
        examples.append(line | {"correct": words(said["prediction"]) == words(asked.answer)})
    return report.sources_section(examples, [sample.refs[0] for sample, _ in pairs])


def sections(
    cfg: EVLMConfig,
    trained: Trained,
    features: FeatureStore,
    workdir: str,
    asked: dict,
    found: dict,
) -> dict:
    """The report's sections that are made from results and pictures."""
    refs = {name: {q.cluster: q.visuals[0][0] for q in asked[name]} for name in asked}
    right = [e for e in found["greedy"]["shown"] if e["correct"]] or found["greedy"]["shown"]
    shown = {e["image"]: e for e in right[:: max(1, len(right) // (3 * ATTENTION))]}
    looked = []
    for key, example in list(shown.items())[:ATTENTION]:
        dialog = question(MARKER + example["question"], example["prediction"] or "?")
        looked.append(Sample(key, "easy-vqa", ((refs["greedy"][key],),), (dialog,)))
    return report.training_sections(place(workdir) / "metrics.jsonl", cfg) | {
        "accuracy": report.accuracy_section(found["vqa"], found["greedy"]),
        "vqa": report.vqa_section(found["vqa"]["shown"], refs["vqa"]),
        "caption_scores": caption_scores(found["emoji"]),
        "emoji": report.caption_section(
            found["emoji"]["shown"], refs["emoji"], pictures=24, size=96
        ),
        "photos": report.caption_section(
            found["photos"]["shown"], refs["photos"], pictures=6, size=320
        ),
        "attention": report.attention_section(trained.model, trained.tokenizer, looked, features),
    }


def caption_scores(result: dict) -> dict[str, float]:
    """The report's scores of a caption result, as shares."""
    value = {row["metric"]: row["value"] / 100 for row in result["scores"]}
    names = {
        "exact_match": "exact match (words)",
        "rouge_l": "ROUGE-L (words)",
        "cider": "CIDEr (words)",
    }
    return {"count": len(result["examples"])} | {
        name: value[metric] for name, metric in names.items()
    }


def facts(cfg: EVLMConfig, trained: Trained, found: dict, clock: Clock) -> dict:
    """Headline and setup of the report."""
    overall = found["vqa"]["accuracy"][0]

    def count(*parts):
        return sum(array.size for name, array in trained.params.items() if name.startswith(parts))

    emoji = caption_scores(found["emoji"])
    minutes = sum(seconds for _, seconds in clock.parts) / 60
    begin = "the dense run" if cfg.moe.copies else "nothing"
    percent, frozen = report.percent, f"{count('vit/', 'llm/') / 1e6:.0f} M frozen"
    majority = f"always “{overall['majority_answer']}” scores {percent(overall['majority'])}"
    return {
        "title": "A vision-language model, trained on this machine",
        "tagline": "EVLM: a frozen DINOv2 and a frozen SmolLM2, joined by gated cross-attention "
        "that was trained from zero on questions about shapes, names of emoji in two languages, "
        "written words, albums of photographs, and videos.",
        "headline": [
            {
                "value": percent(overall["accuracy"]),
                "label": "of easy-vqa's test questions right",
                "note": majority,
            },
            {
                "value": f"{minutes:.0f} min",
                "label": f"from {begin} to this page",
                "note": results.device(),
            },
            {
                "value": f"{count('xattn/', 'media/') / 1e6:.1f} M",
                "label": "trained parameters",
                "note": frozen,
            },
            {
                "value": percent(emoji["exact_match"]),
                "label": "unseen emoji named exactly",
                "note": f"CIDEr {emoji['cider']:.2f}",
            },
        ],
        "setup": _setup(cfg),
    }


def _setup(cfg: EVLMConfig) -> list[tuple[str, str]]:
    x, moe = cfg.xattn, cfg.moe
    return [
        (
            "Vision tower",
            f"DINOv2 ViT-S/14, frozen, {cfg.vit.image_size} px, "
            f"taps {', '.join(map(str, cfg.vit.taps))}",
        ),
        ("Language model", f"SmolLM2-135M-Instruct, frozen, {cfg.llm.layers} layers"),
        (
            "Cross-attention",
            f"{len(cfg.cross_layers)} gated blocks, {x.heads} heads x {x.head_dim}, FFN {x.ffn}",
        ),
        (
            "Experts",
            f"{moe.experts} of {x.ffn // moe.slices}, {moe.top_k} a token, and one for all"
            if moe.copies
            else "none",
        ),
        ("Media tokens", f"{cfg.media.tokens} an image"),
        (
            "Training",
            f"{cfg.train.steps} steps of {cfg.train.batch} rows x {cfg.data.length} tokens, "
            f"{cfg.train.dtype}",
        ),
        (
            "Documents",
            ", ".join(
                f"{name} {100 * weight:g}%"
                for name, weight in zip(cfg.data.sources, cfg.data.weights)
            ),
        ),
        (
            "Optimizer",
            f"AdamW, peak rate {cfg.optim.lr:g}, gates x{cfg.optim.phases[0].rules[0].lr:g}",
        ),
    ]


def provenance(trained: Trained, workdir: str) -> dict:
    """Which weights, config and versions the results come from."""
    return results.provenance(
        trained.model.cfg,
        results.weights_hash(trained.params),
        f"{place(workdir).name} step {steps(workdir)[-1]}",
    )


def print_table(found: dict, clock: Clock, page: PathLike) -> None:
    """Prints the figures of the page."""
    greedy = {row["type"]: row["accuracy"] for row in found["greedy"]["accuracy"]}
    print(
        f"\n{'easy-vqa test':<14}{'questions':>10}{'lowest loss':>13}{'greedy':>9}{'majority':>10}"
    )
    for row in found["vqa"]["accuracy"]:
        free = f"{100 * greedy[row['type']]:.1f}%" if row["type"] in greedy else "-"
        print(
            f"{row['type']:<14}{row['count']:>10}{100 * row['accuracy']:>12.1f}%{free:>9}"
            f"{100 * row['majority']:>9.1f}%"
        )
    print(
        "unseen emoji:",
        ", ".join(
            f"{name} {np.round(value, 3)}" for name, value in caption_scores(found["emoji"]).items()
        ),
    )
    print("\n".join(f"{report.duration(seconds):>14}  {name}" for name, seconds in clock.parts))
    print(f"{report.duration(sum(s for _, s in clock.parts)):>14}  in all\n\nreport: {page}")
