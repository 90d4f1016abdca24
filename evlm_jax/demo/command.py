"""`evlm demo`: real weights and data, one training, one evaluation, one page.

Everything that lasts is saved and taken up again.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
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
from evlm_jax.data.sources import open_source
from evlm_jax.demo.asked import (
    HELD_OUT,
    SCENES,
    SIZES,
    answered,
    family_rows,
    questions,
    taught,
    there,
    unseen,
)
from evlm_jax.demo.shown import caption_scores, emoji, facts, provenance, sections
from evlm_jax.evals import results, tasks
from evlm_jax.evals.answer import Generated, LowestLoss
from evlm_jax.evals.tasks.demo import ANSWERS
from evlm_jax.generate import Generator
from evlm_jax.launch import train_run
from evlm_jax.paths import place, probe
from evlm_jax.report import page as report
from evlm_jax.runs import feature_store, load_trained
from experiments import demo as experiment

STEPS = 400  # that half an hour has where products of bfloat16 are fast


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
    clock, out = Clock(), place(workdir)
    if dense:
        trained_names(dense)  # is there, before anything is fetched
    probe(workdir)
    with clock.part("fetch weights and data"):
        assets.fetch()
        assets.fetch(["scenes"])
    cfg, asked = configured(form), questions(SIZES[form])
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
    with clock.part("answer test questions by lowest loss"):
        chooses = LowestLoss(trained.model, trained.tokenizer, ANSWERS, features)
        found = {"vqa": answered("vqa", asked["vqa"], chooses)}
    with clock.part("answer test questions freely"):
        generates = Generated(
            Generator(trained.model, trained.tokenizer, features=features.get, rows=32),
            tasks.find("emoji").tokens,
        )
        found |= {n: answered(n, asked[n], generates) for n in asked if n not in found}
        guessed = answered(HELD_OUT, unseen(asked[HELD_OUT]), generates)
        learned = taught(cfg, generates)
    with clock.part("report"):
        page = sections(cfg, trained, features, workdir, asked, found)
    page |= {"sources": learned, "scenes": family_rows(found, guessed)}
    page |= {
        "time": clock.parts,
        **facts(cfg, trained, found, page["scenes"], clock.parts),
        "provenance": provenance(trained, workdir),
    }
    results.save(out / "results.json", found | {"sections": page, "provenance": page["provenance"]})
    print_table(found, page["scenes"], clock, written := report.render(page, out / "report.html"))
    return written


def configured(form: str) -> EVLMConfig:
    """The experiment on this machine: with the products that its CPU is fast at, as many steps as
    half an hour has with them, and the sources whose assets could be fetched.
    """
    config = experiment.get_config(form)
    if jax.default_backend() == "cpu":
        config.train.matmul_precision = fast_products()
    if not form and config.train.matmul_precision == "bfloat16":
        config.train.steps = STEPS
    shares = dict(zip(config.data.sources, config.data.weights, strict=True))
    kept = {
        name: share for name, share in shares.items() if there(name, partial(open_source, name))
    }
    config.data.sources, config.data.weights = tuple(kept), tuple(kept.values())
    return from_config_dict(config)


def upcycled(dense: str, cfg: EVLMConfig, out: PathLike) -> str:
    """The model with experts that `dense` becomes, made in `out` where it is not there yet."""
    if not steps(out):
        upcycle_run(dense, cfg, str(out))
    return str(out)


def print_table(found: dict, scenes: list[dict], clock: Clock, page: PathLike) -> None:
    """Prints the figures of the page."""
    names = (*SCENES, "guessed", "majority", "chance")
    print(f"\n{'scenes, free answers':<22}" + "".join(f"{name:>11}" for name in names))
    for row in scenes:
        cells = ("-" if row[name] is None else f"{100 * row[name]:.1f}%" for name in names)
        print(f"{row['kind']:<22}" + "".join(f"{cell:>11}" for cell in cells))
    for name in sorted(found.keys() & {"words", "chinese", "photographs"}):
        print(f"{name}: {found[name]['scores'][0]['value']:.1f}% of {len(found[name]['shown'])}")
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
    for name, title in emoji(found).items():
        scores = caption_scores(found[name]).items()
        print(f"{title}:", ", ".join(f"{metric} {np.round(value, 3)}" for metric, value in scores))
    print("\n".join(f"{report.duration(seconds):>14}  {name}" for name, seconds in clock.parts))
    print(f"{report.duration(sum(s for _, s in clock.parts)):>14}  in all\n\nreport: {page}")
