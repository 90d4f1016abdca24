"""A study in a few sentences."""

from evlm_jax.costs.cases import EVLM, LLAVA
from evlm_jax.costs.crossover import BAR_FRAMES
from evlm_jax.costs.tables import executed, intervals, vision


def summary(study: dict) -> list[str]:
    """Lines about the frames of the bars and the most frames, and where EVLM is no longer cheaper
    than LLaVA's way.
    """
    told = [n for n in study["frames"] if n in (BAR_FRAMES, study["frames"][-1])]
    return [*(_at(study, str(n)) for n in told), *_stops(study), _heads(study)]


def _at(study: dict, n: str) -> str:
    needs = {kind: study["needs"][kind][n] for kind in (EVLM, LLAVA)}

    def times(value):
        return f"1/{value(LLAVA) / value(EVLM):.1f}"

    size, done = (
        lambda kind: sum(needs[kind]["cache"].values()),
        lambda kind: executed(study, kind, "prefill", n),
    )
    share = needs[EVLM]["media scores"] / needs[EVLM]["prefill"]
    return (
        f"At {int(n):,} frames and {study['text']} text tokens EVLM keeps"
        f" {size(EVLM) / size(LLAVA):.3f} of the cache of LLaVA's way. Its prefill behind the ViT"
        f" takes {times(done)} of the FLOPs as compiled,"
        f" {times(lambda kind: needs[kind]['prefill'])} of those needed, and"
        f" {times(lambda kind: done(kind) + vision(study, n))} as compiled with the ViT. A token of"
        f" an answer reads {needs[EVLM]['decode bytes'] / needs[LLAVA]['decode bytes']:.3f} of the"
        f" bytes. {share:.1%} of EVLM's needed prefill are self-attention among media tokens."
    )


def _stops(study: dict) -> list[str]:
    text, found, out = str(study["text"]), study["crossovers"], []
    for measure, frames in found["frames"].items():
        out.append(
            f"{measure}: with {text} text tokens EVLM takes less at these numbers of frames:"
            f" {intervals(frames[text])}."
        )
        limits = {n: intervals(where) for n, where in found["texts"][measure].items() if where}
        stops = [
            f"{said} with {int(n):,} frame{'s' * (n != '1')}"
            for n, said in limits.items()
            if said != "all"
        ]
        out[-1] += (
            f" Of text tokens, where it is not whatever their number: {'; '.join(stops)}."
            if stops
            else ""
        )
    return out


def _heads(study: dict) -> str:
    """By the language model's key and value heads."""
    found, block, have = (
        study["crossovers"]["heads"],
        study["crossovers"]["block"],
        study["sizes"]["key and value heads"],
    )
    needed = next((row["kv_heads"] for row in found if row["KV bytes"] < 1), None)
    where = (
        f"smaller one from {needed} key and value heads of the language model on"
        if needed
        else "larger one with any number of heads"
    )
    says = f"EVLM's cache is the {where}; this one has {have}."
    if needed and needed <= have:
        return says
    ways = [f"{name} = {block[name]}" for name in ("kv_heads", "every") if block[name]]
    return (
        f"{says} With {have} it would be with cross-attention of {' or '.join(ways) or 'no size'}."
    )
