"""What the page of the demo shows."""

import random
from collections.abc import Sequence

from evlm_jax.checkpoint.store import steps
from evlm_jax.config import EVLMConfig
from evlm_jax.data.features import FeatureStore
from evlm_jax.data.samples import MARKER, Sample, question
from evlm_jax.demo.asked import HELD_OUT, KNOWN, STYLE
from evlm_jax.evals import results
from evlm_jax.paths import place
from evlm_jax.report import page as report
from evlm_jax.runs import Trained

ATTENTION = 4  # pictures in the report with attention by word
EMOJI = {"emoji": "unseen emoji", "emoji style": "known emoji of another hand"}
EXAMPLES = {  # what pictures are of, and how many
    HELD_OUT: ("drawings that were held out", 8),
    STYLE: ("drawings of another hand", 4),
    "chinese": ("in Chinese", 4),
}
PHOTOS = ("photographs", "photos")


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

    def pictures(name: str, **how) -> list[dict]:
        return report.vqa_section(found[name]["shown"], refs[name], **how)

    return report.training_sections(place(workdir) / "metrics.jsonl", cfg) | {
        "examples": {
            title: pictures(name, pictures=many, questions=6)
            for name, (title, many) in EXAMPLES.items()
            if name in found
        },
        "accuracy": report.accuracy_section(found["vqa"], found["greedy"]),
        "vqa": pictures("vqa", pictures=4),
        "caption_scores": {
            title: caption_scores(found[name]) for name, title in emoji(found).items()
        },
        "emoji": [
            row
            for name in emoji(found)
            for row in report.caption_section(found[name]["shown"], refs[name], 12, size=96)
        ],
        "photos": [
            row
            for name in PHOTOS
            if name in found
            for row in report.caption_section(found[name]["shown"], refs[name], 6, size=320)
        ],
        "attention": report.attention_section(
            trained.model, trained.tokenizer, looked(found[HELD_OUT], refs[HELD_OUT]), features
        ),
    }


def emoji(found: dict) -> dict[str, str]:
    """{name: title} of the results about emoji that there are."""
    return {name: title for name, title in EMOJI.items() if name in found}


def looked(result: dict, refs: dict) -> list[Sample]:
    """Right answers about different pictures, drawn by a seed, whose attention is drawn."""
    right = [e for e in result["shown"] if e["correct"]] or result["shown"]
    shown = {e["image"]: e for e in random.Random(0).sample(right, len(right))}
    samples = []
    for key, example in list(shown.items())[:ATTENTION]:
        dialog = question(MARKER + example["question"], example["prediction"] or "?")
        samples.append(Sample(key, HELD_OUT, ((refs[key],),), (dialog,)))
    return samples


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


def facts(
    cfg: EVLMConfig,
    trained: Trained,
    found: dict,
    scenes: Sequence[dict],
    time: Sequence[tuple[str, float]],
) -> dict:
    """Headline and setup of the report.

    Args:
      scenes: rows of asked.family_rows.
      time: seconds of each part of the demo.
    """

    def count(*parts):
        return sum(array.size for name, array in trained.params.items() if name.startswith(parts))

    percent, mean, easy = report.percent, scenes[-1], found["vqa"]["accuracy"][0]
    begin = "the dense run" if cfg.moe.copies else "nothing"
    return {
        "title": "A vision-language model, trained on this machine",
        "tagline": "EVLM: a frozen DINOv2 and a frozen SmolLM2, joined by gated cross-attention "
        "that was trained from zero on scenes of pasted drawings: what is shown, how many, which "
        "colour, what is written, where; and on emoji, shapes and photographs, in two languages.",
        "headline": [
            {
                "value": percent((mean[KNOWN] + mean[HELD_OUT]) / 2),
                "label": "of questions about new scenes right, in free words",
                "note": f"drawings it knows {percent(mean[KNOWN])}, held-out ones"
                f" {percent(mean[HELD_OUT])}, by guessing {percent(mean['guessed'])}",
            },
            {
                "value": f"{sum(seconds for _, seconds in time) / 60:.0f} min",
                "label": f"from {begin} to this page",
                "note": results.device(),
            },
            {
                "value": f"{count('xattn/', 'media/') / 1e6:.1f} M",
                "label": "trained parameters",
                "note": f"{count('vit/', 'llm/') / 1e6:.0f} M frozen",
            },
            {
                "value": percent(easy["accuracy"]),
                "label": "of easy-vqa's test questions right",
                "note": f"always “{easy['majority_answer']}” scores {percent(easy['majority'])}",
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
