"""The tables of a study (study.py), for the screen and for pages."""

from collections.abc import Callable
from typing import NamedTuple

from evlm_jax.costs.cases import EVLM, FLAMINGO, LLAVA
from evlm_jax.costs.crossover import BAR_FRAMES, MOST_FRAMES, MOST_TEXT
from evlm_jax.parallel.chips import GIB

KINDS = EVLM, LLAVA, FLAMINGO
MIB = 2**20


class Table(NamedTuple):
    """A title, what has to be said, and the cells."""

    title: str
    says: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(study: dict) -> list[Table]:
    """All tables of a study, in the order in which they are read."""
    out = [cache(study), prefill(study), train(study), decode(study)]
    out += [memory(study)] if study["chip"] else []
    out += [notes(study)] if any(p.get("notes") for p in study["programs"].values()) else []
    out += [by_frames(study), by_text(study), by_heads(study), bars(study)]
    return out + ([measured(study)] if "measured" in study else [])


def cache(study: dict) -> Table:
    """KV-cache bytes."""

    def size(kind, n, part):
        return study["needs"][kind][n]["cache"][part]

    def total(kind, n):
        return size(kind, n, "own") + size(kind, n, "cross")

    def row(n):
        return (
            *_first(study, n),
            *(mib(size(EVLM, n, part)) for part in ("own", "cross")),
            mib(total(LLAVA, n)),
            *(mib(size(FLAMINGO, n, part)) for part in ("own", "cross")),
            f"{total(EVLM, n) / total(LLAVA, n):.4f}",
            f"{total(FLAMINGO, n) / total(LLAVA, n):.4f}",
        )

    head = (
        "evlm: self",
        "cross",
        "llava",
        "flamingo: self",
        "cross",
        "evlm / llava",
        "flamingo / llava",
    )
    return Table("KV cache, MiB", _beyond(study), (*FIRST, *head), _each(study, row))


def prefill(study: dict) -> Table:
    """FLOPs of prefill, with the media tokens' own attention and the ViT apart."""

    def own(n):
        return study["needs"][EVLM][n]["media scores"]

    def done(kind, n):
        return executed(study, kind, "prefill", n)

    def row(n):
        return (
            *_first(study, n),
            *(tera(study["needs"][kind][n]["prefill"]) for kind in KINDS),
            *(tera(done(kind, n)) for kind in KINDS),
            f"1/{done(LLAVA, n) / done(EVLM, n):.1f}",
            f"{tera(own(n))} ({own(n) / study['needs'][EVLM][n]['prefill']:.1%})",
            tera(vision(study, n)),
            f"1/{(done(LLAVA, n) + vision(study, n)) / (done(EVLM, n) + vision(study, n)):.1f}",
        )

    head = *(f"needed: {kind}" for kind in KINDS), *(f"compiled: {kind}" for kind in KINDS)
    says = (
        "Behind the ViT: bridge, keys and values of images, cross-attention, language model, head "
        "of one position. Compiled programs compute all pairs of self-attention and mask half of "
        "them; needed are the others. `media x media`: the part of EVLM's needed FLOPs that is "
        "self-attention of media tokens among themselves. The ViT's, the same for all, are of its "
        "compiled program."
    )
    return Table(
        "Prefill, TFLOP",
        says,
        (
            *FIRST,
            *head,
            "evlm / llava, compiled",
            "evlm: media x media",
            "ViT",
            "evlm / llava, with it",
        ),
        _each(study, row),
    )


def train(study: dict) -> Table:
    """FLOPs of a train step."""

    def needed(kind, n):
        return _sum(study["programs"][f"{kind}, train, {n} frames, FLOPs"]["needed"])

    def done(kind, n):
        return executed(study, kind, "train", n)

    def row(n):
        return (
            *_first(study, n),
            *(tera(needed(kind, n)) for kind in KINDS),
            *(tera(done(kind, n)) for kind in KINDS),
            f"1/{done(LLAVA, n) / done(EVLM, n):.1f}",
        )

    head = (
        *(f"needed: {kind}" for kind in KINDS),
        *(f"compiled: {kind}" for kind in KINDS),
        "evlm / llava, compiled",
    )
    says = (
        "One row, towers frozen, the ViT left out; what is computed again in the backward pass "
        "(train.remat) counts as compiled."
    )
    return Table("Train step, TFLOP", says, (*FIRST, *head), _each(study, row))


def decode(study: dict) -> Table:
    """FLOPs and bytes of one token of an answer."""
    needs, chip = study["needs"], study["chip"]

    def row(n):
        return (
            *_first(study, n),
            *(f"{executed(study, kind, 'decode', n) / 1e9:,.1f}" for kind in KINDS),
            *(gib(needs[kind][n]["decode bytes"]) for kind in KINDS),
            f"{needs[EVLM][n]['decode bytes'] / needs[LLAVA][n]['decode bytes']:.3f}",
            *(
                (*(_bytes(study, kind, "decode", n) for kind in KINDS), _by_llava(study, n))
                if chip
                else ()
            ),
        )

    head = (
        *(f"GFLOP: {kind}" for kind in KINDS),
        *(f"GiB: {kind}" for kind in KINDS),
        "evlm / llava",
    )
    says = (
        "One row. GiB: every matrix and the whole cache once; the matrices alone are "
        f"{gib(needs[EVLM][_one(study)]['matrix bytes'])} GiB "
        f"(evlm) and {gib(needs[LLAVA][_one(study)]['matrix bytes'])} (llava)."
    )
    if chip:
        head = (*head, *(f"on {chip}: {kind}" for kind in KINDS), "evlm / llava")
        says += (
            f" On {chip}: bytes through HBM of the compiled program, an estimate; above the needed "
            "ones is what it reads and writes again."
        )
    return Table("A token of an answer", says, (*FIRST, *head), _each(study, row))


def memory(study: dict) -> Table:
    """Bytes of prefill and train step on one chip."""

    def row(n):
        return (
            *_first(study, n),
            *(_bytes(study, kind, what, n) for what in ("prefill", "train") for kind in KINDS),
        )

    head = (*FIRST, *(f"{what}: {kind}" for what in ("prefill", "train") for kind in KINDS))
    says = (
        f"Of the program for one {study['chip']} chip, an estimate; -: the compiler refuses it, "
        "for it does not fit. Scores of self-attention are stored, [heads, tokens, tokens] in "
        "float32, and that is what fills the memory. Blank: not compiled yet."
    )
    return Table("Bytes through HBM of prefill and train step, GiB", says, head, _each(study, row))


def notes(study: dict) -> Table:
    """What could not be counted exactly."""
    said = {
        (note, name)
        for name, program in study["programs"].items()
        for note in program.get("notes", ())
    }
    rows = [
        (note, f"{sum(other == note for other, _ in said)}")
        for note in sorted({note for note, _ in said})
    ]
    return Table(
        "Not counted exactly", "Loops whose length depends on data.", ("what", "programs"), rows
    )


def by_frames(study: dict) -> Table:
    """Where EVLM is cheaper, by frames."""
    found = study["crossovers"]["frames"]
    rows = [(measure, *(intervals(found[measure][t]) for t in found[measure])) for measure in found]
    head = "evlm takes less", *(f"{t} text tokens" for t in next(iter(found.values())))
    says = f"Of what is needed, up to {MOST_FRAMES:,} frames."
    return Table("Numbers of frames at which EVLM is cheaper than LLaVA's way", says, head, rows)


def by_text(study: dict) -> Table:
    """Where EVLM is cheaper, by text."""
    found = study["crossovers"]["texts"]
    rows = [(measure, *(intervals(found[measure][n]) for n in found[measure])) for measure in found]
    head = "evlm takes less", *(f"{n} frames" for n in next(iter(found.values())))
    says = f"Of what is needed, up to {MOST_TEXT:,} text tokens, all of them behind the frames."
    return Table(
        "Numbers of text tokens at which EVLM is cheaper than LLaVA's way", says, head, rows
    )


def by_heads(study: dict) -> Table:
    """Ratios by the language model's key and value heads."""
    found, have = study["crossovers"]["heads"], study["sizes"]["key and value heads"]
    says = (
        f"Ratios evlm / llava of what is needed at {BAR_FRAMES} frames, if the language model had "
        "other numbers of key and value heads; "
    )
    says += f"this one has {have}."
    rows = [
        (str(r["kv_heads"]), *(f"{value:.3f}" for key, value in r.items() if key != "kv_heads"))
        for r in found
    ]
    return Table(
        "Shared key and value heads",
        says,
        ("heads", *(key for key in found[0] if key != "kv_heads")),
        rows,
    )


def bars(study: dict) -> Table:
    """The two bars of the paper's towers."""
    rows = []
    for measure, bar in study["crossovers"]["bars"].items():
        values = {"needed": bar["needed"]}
        if measure == "prefill FLOPs" and (n := str(BAR_FRAMES)) in study["tokens"][EVLM]:
            values["compiled"] = executed(study, EVLM, "prefill", n) / executed(
                study, LLAVA, "prefill", n
            )
        for how, value in values.items():
            verdict = "met" if value <= bar["most"] else "not met"
            rows.append(
                (
                    f"{measure}, {how}",
                    f"{bar['most']:.3f}",
                    f"{value:.4f}",
                    verdict,
                    intervals(bar["texts"]),
                )
            )
    says = (
        f"Ratios evlm / llava at {BAR_FRAMES} frames and {study['text']} text tokens; last, for "
        "which text what is needed is below the bar."
    )
    return Table("Bars", says, ("of", "at most", "found", "", "text tokens"), rows)


def measured(study: dict) -> Table:
    """Seconds on this machine."""
    found = study["measured"]

    def row(n, m):
        return (
            n,
            *(f"{m[kind]['prefill']:.3f}" for kind in KINDS),
            f"{m[EVLM]['prefill'] / m[LLAVA]['prefill']:.3f}",
            f"{m[FLAMINGO]['prefill'] / m[LLAVA]['prefill']:.3f}",
            *(f"{1000 * m[kind]['decode']:.2f}" for kind in KINDS),
            f"{m[EVLM]['decode'] / m[LLAVA]['decode']:.3f}",
            f"{m['encode']:.3f}",
        )

    head = "frames", *(f"prefill, s: {kind}" for kind in KINDS), "evlm / llava", "flamingo / llava"
    head += *(f"ms a token: {kind}" for kind in KINDS), "evlm / llava", "ViT, s"
    says = (
        f"{found['device']}, {found['text']} text tokens, answers of {found['new']}, "
        f"load {found['load']:.1f} at the end. Read the ratios."
    )
    return Table("Measured", says, head, [row(n, m) for n, m in found["frames"].items()])


# -------------------------------------------------------------------------------------------- cells

FIRST = "frames", "tokens: evlm", "llava", "flamingo"


def executed(study: dict, kind: str, what: str, n: str) -> float:
    """FLOPs of one row's compiled program."""
    return _sum(study["programs"][f"{kind}, {what}, {n} frames, FLOPs"]["executed"])


def vision(study: dict, n: str) -> float:
    """FLOPs of the compiled ViT on all frames."""
    return int(n) * _sum(study["programs"]["encode, 1 frames, FLOPs"]["executed"])


def intervals(found: list[list[int]]) -> str:
    """Intervals in words."""
    ends = {MOST_FRAMES, MOST_TEXT}

    def say(a, b):
        return (
            "all"
            if a == 1 and b in ends
            else f"{a:,} and more"
            if b in ends
            else f"up to {b:,}"
            if a == 1
            else f"{a:,} to {b:,}"
        )

    return ", ".join(say(*pair) for pair in found) or "none"


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:,.1f}"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.3f}"


def tera(count: float) -> str:
    """A count as so many 10^12."""
    return f"{count / 1e12:,.3g}" if count < 1e15 else f"{count / 1e12:,.0f}"


def _first(study: dict, n: str) -> tuple[str, ...]:
    tokens = [study["tokens"][kind][n] for kind in KINDS]
    return n, *(f"{count:,}{'*' if count > study['context'] else ''}" for count in tokens)


def _beyond(study: dict) -> str:
    return (
        f"*: beyond the {study['context']:,} tokens that the language model is made for; a cost "
        "alone, no use."
    )


def _each(study: dict, row: Callable) -> list[tuple[str, ...]]:
    return [row(str(n)) for n in study["frames"]]


def _one(study: dict) -> str:
    return str(study["frames"][0])


def _bytes(study: dict, kind: str, what: str, n: str) -> str:
    found = study["programs"].get(f"{kind}, {what}, {n} frames, bytes")
    return "" if found is None else gib(found["bytes"]) if found["fits"] else "-"


def _by_llava(study: dict, n: str) -> str:
    """Compiled bytes of a token of an answer, EVLM's by LLaVA's; blank where one is not known."""
    found = [
        study["programs"].get(f"{kind}, decode, {n} frames, bytes", {}).get("bytes")
        for kind in (EVLM, LLAVA)
    ]
    return f"{found[0] / found[1]:.3f}" if all(found) else ""


def _sum(parts: dict[str, float]) -> float:
    return sum(parts.values())
