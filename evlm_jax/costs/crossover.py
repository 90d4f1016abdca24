"""Where EVLM stops being cheaper than LLaVA's way: by frames, by text, by the language model's key
and value heads.

Found by search over what a case needs (cases.py). Each of MEASURES is at most quadratic in frames
and in text, so a difference of two changes its sign at most twice; no formula of a root is used.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from evlm_jax.config import EVLMConfig
from evlm_jax.costs.cases import EVLM, LLAVA, MEASURES, case, counterparts

MOST_FRAMES, MOST_TEXT = 2**14, 2**20
FRAMES, TEXTS = (1, 4, 16, 64, 256, 1024), (16, 64, 256, 1024, 4096)
BARS = {
    "KV bytes": 0.27,
    "prefill FLOPs": 1 / 20,
}  # of EVLM by LLaVA at BAR_FRAMES, with the paper's towers at 224 px
BAR_FRAMES = 256

Intervals = list[tuple[int, int]]  # first and last, both inside


def below(difference: Callable[[int], float], low: int, top: int) -> Intervals:
    """Where in low..top a difference, at most quadratic, is negative."""

    def negative(n):
        return difference(n) < 0

    edges = sorted({low, top, *(n for n in _vertex(difference, low, top) if low < n < top)})
    starts = [low]
    for a, b in zip(edges, edges[1:]):  # monotone in between
        here = negative(a)
        if negative(b) != here:
            starts.append(
                bisect_left(range(b + 1), True, lo=a, key=lambda n, here=here: negative(n) != here)
            )
    stops = [start - 1 for start in starts[1:]] + [top]
    return [(start, stop) for start, stop in zip(starts, stops) if negative(start)]


def _vertex(difference: Callable[[int], float], low: int, top: int) -> range:
    """Around where a quadratic turns; anything where it is linear, and then splits nothing that
    matters.
    """
    middle = (low + top) // 2
    if top - low < 2:
        return range(0)
    left, right = (
        (difference(b) - difference(a)) / (b - a) for a, b in ((low, middle), (middle, top))
    )
    if left == right:
        return range(0)
    # The slope is `left` half-way between low and middle, `right` half-way between middle and top.
    a, b = (low + middle) / 2, (middle + top) / 2
    turn = int(min(max(a - left * (b - a) / (right - left), low), top))
    return range(turn - 1, turn + 3)


def cheaper_frames(cfg: EVLMConfig, measure: str, text: int, most: float = 1.0) -> Intervals:
    """Numbers of frames at which EVLM takes less than `most` of what LLaVA's way takes."""
    return below(lambda frames: _difference(cfg, measure, frames, text, most), 1, MOST_FRAMES)


def cheaper_texts(cfg: EVLMConfig, measure: str, frames: int, most: float = 1.0) -> Intervals:
    """Numbers of text tokens, likewise."""
    return below(lambda text: _difference(cfg, measure, frames, text, most), 1, MOST_TEXT)


def _difference(cfg: EVLMConfig, measure: str, frames: int, text: int, most: float) -> float:
    ours, theirs = pair(cfg, measure, frames, text)
    return ours - most * theirs


def pair(cfg: EVLMConfig, measure: str, frames: int, text: int) -> tuple[float, float]:
    """What EVLM and LLaVA's way need."""
    models = counterparts(cfg)
    return tuple(MEASURES[measure](case(models[kind], frames, text)) for kind in (EVLM, LLAVA))


def ratio(cfg: EVLMConfig, measure: str, frames: int, text: int) -> float:
    """EVLM by LLaVA's way."""
    ours, theirs = pair(cfg, measure, frames, text)
    return ours / theirs


def by_heads(cfg: EVLMConfig, frames: int, text: int) -> list[dict]:
    """Ratios if the language model had another number of key and value heads, for every number that
    divides its heads.
    """

    def with_heads(n):
        return replace(cfg, llm=replace(cfg.llm, kv_heads=n))

    return [
        {"kv_heads": n}
        | {measure: ratio(with_heads(n), measure, frames, text) for measure in MEASURES}
        for n in _divisors(cfg.llm.heads)
    ]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def by_block(cfg: EVLMConfig, frames: int, text: int) -> dict:
    """What makes EVLM's cache the smaller one, each alone: key heads of cross-attention, distance
    of its blocks; None: nothing does.
    """

    def smaller(changed):
        return ratio(changed, "KV bytes", frames, text) < 1

    heads = (n for n in reversed(_divisors(cfg.xattn.heads)) if n <= cfg.xattn.kv_heads)
    every = range(cfg.xattn.every, cfg.llm.layers + 1)
    return {
        "kv_heads": next(
            (n for n in heads if smaller(replace(cfg, xattn=replace(cfg.xattn, kv_heads=n)))), None
        ),
        "every": next(
            (n for n in every if smaller(replace(cfg, xattn=replace(cfg.xattn, every=n)))), None
        ),
    }


def crossovers(cfg: EVLMConfig, text: int) -> dict:
    """All figures above, for JSON; `text` tokens where a figure is of one length."""
    return {
        "frames": {
            m: {t: cheaper_frames(cfg, m, t) for t in sorted({*TEXTS, text})} for m in MEASURES
        },
        "texts": {m: {f: cheaper_texts(cfg, m, f) for f in FRAMES} for m in MEASURES},
        "heads": by_heads(cfg, BAR_FRAMES, text),
        "block": by_block(cfg, BAR_FRAMES, text),
        "bars": {
            m: {
                "most": most,
                "needed": ratio(cfg, m, BAR_FRAMES, text),
                "texts": cheaper_texts(cfg, m, BAR_FRAMES, most),
            }
            for m, most in BARS.items()
        },
    }
