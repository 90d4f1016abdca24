"""A declared study on made runs: the primary measure by families, looks, who leaves, what pages
say; and what a wrong declaration is told.
"""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from benchmarks.results import section
from evlm_jax import cli
from evlm_jax.ablate import claims, collect, command, finished, page, slots
from evlm_jax.ablate.budget import FLOPS, QUESTIONS
from evlm_jax.ablate.study import EASY_VQA, Study, load_study, saved, study_of
from evlm_jax.config import to_saved
from evlm_jax.config.schema import build
from evlm_jax.evals.group_sequential import decide
from tests.helpers.tiny import tiny_config

FAMILIES = {"name": 40, "count": 20, "colour": 60}
STUDY = dict(
    tested="made questions",
    tasks=(dict(name="made"),),
    measures=(
        dict(key="made/loss", name="nats", sign=-1, families=tuple(FAMILIES), digits=3),
        dict(key="made, name/greedy", name="names, %", sign=1),
    ),
    claims=(
        dict(text="Several beat one", better="base", than=("one",)),
        dict(text="Routed beat fused", better="base", than=("fused",)),
        dict(text="Experts beat dense", better="moe", than=("base",)),
        dict(text="Other seeds", better="base", than=("again",), control=True),
    ),
    readings=3,
    apart=2,
    looks=(4, 8, 12),
    margin=0.05,
)
# nats above the base's: one is worse, fused the same, experts neither for certain
APART, NOISE = {"base": 0, "one": 0.2, "fused": 0, "moe": 0.0, "again": 0}, {"moe": 0.4}


def outcome(variant, seed, step):
    """Losses of every family at a reading; a step further is 0.1 less."""
    rng = np.random.default_rng([seed, len(variant)])
    level = 1 + APART[variant] - 0.1 * step + rng.normal(0, NOISE.get(variant, 0.01))
    spread = np.random.default_rng(0)
    return {name: level + spread.normal(0, 0.3, count) for name, count in FAMILIES.items()}


def run(study, variant, seed):
    cuts = {name: {"step": 9, "questions": 90, "flops": 1e9} for name in (QUESTIONS, FLOPS)}
    readings = {}
    for step in (5, 7, 9):
        found = outcome(variant, seed, step)
        measured = {f"made, {name}/loss": finished.pack(x) for name, x in found.items()}
        measured["made, name/greedy"] = finished.pack(100.0 * (found["name"] < 0.5))
        clusters = {f"made, {name}": [1] * count for name, count in FAMILIES.items()}
        facts = dict(loss=1.0, step_seconds=1.0, peak_bytes=2**30, device="1 x cpu")
        readings[str(step)] = {"measured": measured, "clusters": clusters, **facts}
    settings = {"questions": 90, "limit": None, "base": {"name": "base"}} | saved(study)
    about = dict(variant=variant, seed=seed, changes={}, trained=9, settings=settings)
    return about | {"budgets": cuts, "readings": readings}


@pytest.fixture
def study():
    return build(Study, STUDY, "study")


@pytest.fixture
def found(study, tmp_path):
    """Of 12 seeds of each variant but `one`, which left after 4."""
    files = [
        finished.save(tmp_path / variant / str(seed) / "result.json", run(study, variant, seed))
        for variant in APART
        for seed in range(4 if variant == "one" else 12)
    ]
    return json.loads(json.dumps(collect.collect(files)))


def test_a_study_comes_back_from_settings(study):
    assert study_of(json.loads(json.dumps(saved(study)))) == study
    assert study_of({}) == EASY_VQA and saved(EASY_VQA) == {}
    assert study.steps(9) == [5, 7, 9] and EASY_VQA.steps(9) == [9]
    with pytest.raises(ValueError, match="3 readings 2 updates apart do not fit a run of 4"):
        study.steps(4)


def test_the_primary_measure_is_the_mean_over_families_and_readings(found, study):
    value = collect.values(found, "one", QUESTIONS, study.primary)[2]
    by_hand = np.mean([[x.mean() for x in outcome("one", 2, step).values()] for step in (5, 7, 9)])
    assert len(value) == sum(FAMILIES.values())
    assert value.mean() == pytest.approx(by_hand, abs=1e-4)  # as rounded in the file


def test_verdicts_by_seeds_in_order(found, study):
    ended = {(j.claim.text, j.budget): j for j in claims.judge(found) if j.measure == study.primary}
    assert len(ended) == 8
    verdicts = {text: judged.verdict for (text, _), judged in ended.items()}
    assert verdicts == {
        "Several beat one": "holds",
        "Routed beat fused": "equivalent",
        "Experts beat dense": "open",
        "Other seeds": "equivalent",
    }
    first = ended["Several beat one", QUESTIONS].apart
    assert first.seeds == 4 and first.high < 0 and first.mean == pytest.approx(-0.2, abs=0.02)
    means = [
        np.mean([x.mean() for step in (5, 7, 9) for x in outcome(name, seed, step).values()])
        for seed in range(12)
        for name in ("base", "moe")
    ]
    wanted = decide(np.subtract(means[::2], means[1::2]), study.looks, study.margin)
    judged = ended["Experts beat dense", FLOPS].apart
    assert (judged.seeds, judged.mean) == (12, pytest.approx(-wanted.mean, abs=1e-4))
    assert (judged.low, judged.high) == pytest.approx((-wanted.high, -wanted.low), abs=1e-4)
    others = [j.verdict for j in claims.judge(found) if j.measure != study.primary]
    assert others and {*others} == {"reported"}


def test_seeds_count_up_to_the_first_that_is_missing(found):
    for variant, seed in (("fused", 3), ("moe", 9)):
        found["runs"] = [r for r in found["runs"] if (r["variant"], r["seed"]) != (variant, seed)]
    routed, experts = (
        claims.decided(found, claim, QUESTIONS) for claim in study_of(found["settings"]).claims[1:3]
    )
    assert (routed.verdict, routed.seeds) == ("open", 0) and experts.seeds == 8


def test_a_variant_leaves_when_its_claims_are_decided(study, tmp_path, monkeypatch, capsys):
    """`--sequential` with runs that are made at once: base and experts go on to the last look."""
    made = []

    def run_all(todo, *_):
        for one in todo:
            variant, seed = one.name.split("/")
            result = run(study, variant, int(seed))
            result["settings"] |= {"base": to_saved(tiny_config())}
            finished.save(one.log.parent / "result.json", result)
            made.append(one.name)
        return []

    monkeypatch.setattr(slots, "run_all", run_all)
    monkeypatch.setattr(command, "load_study", lambda spec: study)
    words = ["ablate", "--config", "e.py", "--variants", ",".join(APART), "--out", str(tmp_path)]
    words += ["--sequential", "--questions", "90"]
    monkeypatch.setattr(cli, "load_config", lambda spec, overrides: tiny_config())
    assert cli.main([*words, "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert len(listed) == 4 * len(APART) and not made
    assert cli.main(words) == 0
    seeds = {name: sum(n.startswith(f"{name}/") for n in made) for name in APART}
    assert seeds == {"base": 12, "one": 4, "fused": 4, "moe": 12, "again": 4}
    capsys.readouterr()
    assert cli.main([*words, "--list"]) == 0 and capsys.readouterr().out == ""


def test_pages_say_how_it_ended(found, tmp_path):
    html, text = page.render(found, tmp_path / "p.html").read_text("utf-8"), section(found, "made")
    for shown in ("Several beat one", "base less fused", "equivalent", "open", "within 0.05"):
        assert shown in html and shown in text
    assert (
        "Of these rows but the control: 2 holds, 2 equivalent, 2 open." in text
        and "names, %" in text
    )
    assert "The control" not in text
    for one in found["runs"]:  # a control that is decided is said
        for reading in one["readings"].values():
            if one["variant"] == "again":
                reading["measured"]["made, count/loss"] = finished.pack([9.0] * 20)
    assert "The control (Other seeds, equal questions seen) ended as: holds." in section(
        found, "made"
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(looks=(1, 4)), "study.looks must ascend, from 2 seeds or more"),
        (dict(looks=(8, 4)), "study.looks must ascend"),
        (dict(margin=None), "study.margin belongs to study.looks"),
        (dict(margin=-1.0), "study.margin"),
        (dict(apart=0), "study.apart is needed for several readings"),
        (dict(measures=(dict(key="other/loss", name="x", sign=1),)), "one of study.tasks each"),
        (dict(claims=(dict(text="a", better="b", than=("c", "d")),)), "have one rival each"),
        (dict(hope=1), "unknown key study.hope"),
    ],
)
def test_a_wrong_study_is_told(tmp_path, wrong, said):
    file = tmp_path / "mine.py"
    file.write_text(f"def get_study():\n    return {dict(STUDY, **wrong)!r}\n")
    with pytest.raises(ValueError, match=said):
        load_study(str(file))


def test_looks_must_be_declared(study, tmp_path):
    plain = dataclasses.replace(study, looks=(), margin=None)
    order = argparse.Namespace(study=plain)
    with pytest.raises(ValueError, match="--sequential: e.py declares no looks"):
        command._rounds(argparse.Namespace(sequential=True, config="e.py"), order)
