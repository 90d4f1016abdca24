"""What finished runs say, from saved JSON alone: numbers by hand, verdicts, and the refusal to
judge.
"""

import json
import re

import numpy as np
import pytest
from scipy import stats

from benchmarks.results import page as markdown
from evlm_jax.ablate import claims, collect, finished, page
from evlm_jax.ablate.budget import FLOPS, QUESTIONS
from evlm_jax.ablate.study import EASY_VQA
from evlm_jax.report import figures

pytestmark = pytest.mark.ci

ACCURACY = EASY_VQA.primary
CHOICE, CAPTION = (task.name for task in EASY_VQA.tasks)
SIZES, EMOJI = [5] * 40, [1] * 30
SPREAD = np.random.default_rng(0).permutation(
    200
)  # wrong answers are not all about the same images
RIGHT = {
    "base": 0.95,
    "tap-4": 0.7,
    "tap-8": 0.8,
    "tap-11": 0.85,
    "tap-last": 0.6,
    "cyclic": 0.95,
    "media-1": 0.9,
    "fused": 0.99,
}


def run(variant, seed, share, questions=24_000, cheap=False):
    """A finished run; `cheap`: its budgets are two readings, of which the second is better."""
    rng = np.random.default_rng([seed, len(variant)])
    budgets = {QUESTIONS: {"step": 10, "questions": questions, "flops": 2e14}}
    budgets[FLOPS] = (
        {"step": 12, "questions": questions + 9, "flops": 3e14} if cheap else budgets[QUESTIONS]
    )
    made = {}
    for number, step in enumerate(sorted({cut["step"] for cut in budgets.values()})):
        right = 100.0 * (SPREAD < 200 * min(share + 0.03 * number, 1) + seed)
        measured = {
            "easy-vqa-choice/accuracy": finished.pack(right),
            "emoji/loss": finished.pack(rng.normal(5, 1, 30)),
        }
        measured |= {
            "emoji/CIDEr (words)": finished.pack(rng.random(30)),
            "emoji/exact match (words)": finished.pack([0.0, 100.0] * 15),
        }
        facts = {
            "loss": 0.2,
            "step_seconds": 2.0,
            "peak_bytes": 2**31,
            "device": "1 x cpu, 2 CPU cores",
            "weights_sha256": "0" * 64,
        }
        made[str(step)] = {
            "measured": measured,
            "clusters": {CHOICE: SIZES, CAPTION: EMOJI},
            "scores": {},
            **facts,
        }
    settings = {
        "questions": 24_000,
        "limit": None,
        "base": {"name": "base", "phases": [{"warmup": 0}]},
    }
    changes = {} if variant == "base" else {"vit.taps": [4]}
    return {
        "variant": variant,
        "seed": seed,
        "changes": changes,
        "settings": settings,
        "trained": 21_000_000,
        "budgets": budgets,
    } | {"readings": made}


@pytest.fixture
def saved(tmp_path):
    """Writes runs as `evlm ablate` leaves them; returns what it collects of them."""

    def save(runs):
        files = [
            finished.save(tmp_path / one["variant"] / str(one["seed"]) / "result.json", one)
            for one in runs
        ]
        return json.loads(json.dumps(collect.collect(files)))

    return save


def every(seeds=3, **shares):
    return [
        run(variant, seed, share, cheap=variant == "media-1")
        for variant, share in (RIGHT | shares).items()
        for seed in range(seeds)
    ]


def test_packed_values_come_back():
    rng = np.random.default_rng(0)
    right = 100.0 * (rng.random(9673) < 0.9)
    assert len(finished.pack(right)) < 1700 and np.array_equal(
        finished.unpack(finished.pack(right), 9673), right
    )
    losses = rng.normal(5, 1, 162)
    rare = losses * (rng.random(162) < 0.1)
    for values in (losses, rare):
        np.testing.assert_allclose(finished.unpack(finished.pack(values), 162), values, atol=5.1e-5)
    assert len(json.dumps(finished.pack(rare))) < len(json.dumps(finished.pack(losses))) / 4


def test_rows_by_hand(saved):
    found = saved(every())
    first, *others = collect.rows(found, FLOPS)
    assert (first.variant, first.against[ACCURACY.key]) == ("base", None)
    row = next(row for row in others if row.variant == "media-1")
    base, media = (
        [100 * (200 * share + seed) / 200 for seed in range(3)] for share in (0.95, 0.93)
    )  # its second reading
    assert row.means[ACCURACY.key] == pytest.approx(media) and (
        row.steps,
        row.questions,
        row.flops,
    ) == (12, 24_009, 3e14)
    apart = row.against[ACCURACY.key]
    assert apart.mean == pytest.approx(np.mean(media) - np.mean(base)) and apart.seeds == 3
    losses = {
        name: collect.values(found, name, QUESTIONS, EASY_VQA.measures[1])
        for name in ("base", "media-1")
    }
    a, b = (
        np.array([losses[name][seed].mean() for seed in range(3)]) for name in ("media-1", "base")
    )
    at_questions = next(row for row in collect.rows(found, QUESTIONS) if row.variant == "media-1")
    assert at_questions.against["emoji/loss"].p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert f"{np.mean(media):.2f} ± {np.std(media, ddof=1):.2f}" in collect.table(found)


def test_verdicts(saved):
    found = saved(every())
    assert claims.obstacles(found) == []
    judged = {
        (j.claim.better, j.claim.than, j.budget): j
        for j in claims.judge(found)
        if j.measure == ACCURACY
    }
    assert {
        (verdict.rival, verdict.verdict)
        for (_, than, _), verdict in judged.items()
        if len(than) == 4
    } == {("tap-11", "holds")}
    assert judged["base", ("fused",), QUESTIONS].verdict == "does not"
    assert (
        judged["base", ("cyclic",), QUESTIONS].verdict == "undecided"
        and judged["base", ("cyclic",), QUESTIONS].apart.mean == 0
    )
    assert not any("media-16" in key or ("llava",) in key for key in judged)  # nobody ran them
    losses = [j for j in claims.judge(found) if j.measure.sign < 0]
    assert all(
        (j.apart.high < 0) == (j.verdict == "holds")
        and (j.apart.low > 0) == (j.verdict == "does not")
        for j in losses
    )


@pytest.mark.parametrize(
    "spoil, why",
    [
        (
            lambda runs: [run("base", seed, 0.78) for seed in range(3)] + runs[3:],
            "the base reaches 78.50 (easy-vqa test, %), 80 is needed",
        ),
        (
            lambda runs: [*runs[:-1], run("fused", 2, 0.99, questions=19_999)],
            "fused/2 saw fewer than 20,000 questions",
        ),
        (
            lambda runs: [one | {"settings": one["settings"] | {"limit": 500}} for one in runs],
            "only 500 questions of easy-vqa",
        ),
    ],
)
def test_no_claim_is_judged_too_early(saved, tmp_path, spoil, why):
    found = saved(spoil(every()))
    assert why in "; ".join(claims.obstacles(found))
    assert {j.verdict for j in claims.judge(found)} == {"not judged"}
    for text in (markdown(found), page.render(found, tmp_path / "p.html").read_text("utf-8")):
        assert (
            "No claim is judged" in text
            and why in text
            and not re.search(r"(<td[^>]*>|\| )(holds|does not|undecided)", text)
        )


def test_one_seed_or_a_missing_rival_decides_nothing(saved):
    assert {j.verdict for j in claims.judge(saved(every(seeds=1)))} == {"undecided"}
    part = [one for one in every() if one["variant"] != "tap-8"]
    assert {j.verdict for j in claims.judge(saved(part)) if len(j.claim.than) == 4} == {
        "not judged"
    }


def test_pages_say_what_was_found(saved, tmp_path):
    found = saved(every())
    html, text = page.render(found, tmp_path / "p.html").read_text("utf-8"), markdown(found)
    for shown in (
        "Several taps beat the best single one",
        "base less tap-11",
        "holds",
        "24 runs",
        "vit.taps = [4]",
        "equal training FLOPs",
    ):
        assert shown in html and shown in text
    assert (
        html.count("<svg") == 4
        and "<script" not in html
        and not re.search(r'(src|href)="(?!#|data:)', html)
    )
    widths = {
        line.count("|")
        for line in text.splitlines()
        if line.startswith("| base") or line.startswith("| variant | trained")
    }
    assert len(widths - {3}) == 1 and "evlm ablate --variants tap-4,tap-8," in text


def test_the_page_opens_with_every_variant_at_both_budgets(saved, tmp_path):
    runs = [
        run(variant, seed, RIGHT[variant])
        for variant in ("base", "tap-4", "media-1")
        for seed in range(2)
    ]
    runs += [run("fused", 7, 0.9)]  # a seed that the base does not have
    html = page.render(saved(runs), tmp_path / "p.html").read_text("utf-8")
    figure = html[html.index("<figure>") : html.index("</figure>")]
    assert html.index("<figure>") < html.index("<table")
    panels = re.findall("<svg.*?</svg>", figure, re.S)
    assert len(panels) == len(EASY_VQA.measures)
    for panel, measure in zip(panels, EASY_VQA.measures):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", panel)
        assert (
            {"tap-4", "media-1", "fused"} <= {*texts}
            and "base" not in texts
            and measure.name in "".join(texts)
        )
        assert {*collect.BUDGETS.values()} <= {*texts}
    alone = page.render(saved(runs[:2]), tmp_path / "alone.html").read_text("utf-8")
    assert "<figure" not in alone


def test_the_first_figure_draws_each_interval():
    drawn = figures.intervals(
        {
            "a": {"one": (1, -2, 4, [0, 2]), "two": (2, 1, 3, [2])},
            "b": {"one": (-1, -2, 0, [-1])},
            "c": {},
        },
        "label",
    )
    strokes = [drawn.count(f"stroke: var(--series-{i}); stroke-width: 2") for i in range(2)]
    assert strokes == [2, 1]


def test_runs_that_cannot_be_compared_are_refused(saved):
    runs = every()
    other = runs[-1] | {"settings": runs[-1]["settings"] | {"questions": 9}}
    with pytest.raises(ValueError, match="fused/2/result.json: its questions differ"):
        saved([*runs[:-1], other])
    begun = runs[-1] | {"settings": runs[-1]["settings"] | {"init": "0" * 64}}
    with pytest.raises(ValueError, match="fused/2/result.json: its init differ"):
        saved([*runs[:-1], begun])
    bases = (
        {"name": "base", "phases": [{"warmup": 1}]},
        {
            "name": "base",
            "phases": [{"warmup": 0, "step": None}],
            "later": 1,
        },
    )
    changed, newer = (
        runs[-1] | {"settings": runs[-1]["settings"] | {"base": base}} for base in bases
    )
    with pytest.raises(ValueError, match="fused/2/result.json: its base differ"):
        saved([*runs[:-1], changed])
    assert len(saved([*runs[:-1], newer])["runs"]) == len(runs)  # a field that came later
    for reading in runs[-1]["readings"].values():
        reading["clusters"] = {CHOICE: [5] * 39, CAPTION: EMOJI}
    with pytest.raises(ValueError, match="fused/2/result.json: its test questions"):
        saved(runs)
    with pytest.raises(ValueError, match="no run is finished"):
        collect.collect([])
