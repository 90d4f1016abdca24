"""Are two models the same function? `evlm convert verify A B`: logits, and the first step at which
they part.

A and B are checkpoints of ours or Hugging Face directories, in any mix. Both read the same token
ids and the same pixels. Where one is a language model alone (`--format llm`, or what an import was
made from) prompts are text and the other's cross-attention is left out.
Blocks whose gates are closed are named: of their weights nothing shows.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from evlm_jax.config import MediaConfig
from evlm_jax.convert.activations import Example, Side, Trace, look
from evlm_jax.data import image
from evlm_jax.data.samples import MARKER, ImageRef, Turn
from evlm_jax.data.text import Template, whole_steps

HISTORY = (
    "vit.depth",
    "vit.cuts",
    "vit.pretrained_size",
    "vit.interpolation",
    "xattn.query_block",
)  # change no output
QUESTION = "Describe what you see."  # about images that are given without a prompt


class Difference(NamedTuple):
    """Differences between two traces of one prompt."""

    largest: float  # of logits, absolute
    mean: float
    kl: float  # of B's next token from A's, nats, mean over positions
    agreement: float  # share of positions with the same best token
    relative: float  # `largest` by the largest logit
    parted: (
        tuple[str, float] | None
    )  # the first step whose relative error exceeds the tolerance, and that error


def verify(
    a: str,
    b: str,
    images: Sequence[str] = (),
    prompts: Sequence[str] = (),
    tolerance: float = 1e-3,
    folder_code: bool = False,
) -> bool:
    """Prints a line a prompt and a verdict; returns True where logits and all intermediates agree.

    Args:
      images: files, seen by every prompt, at its `<image>` markers or in front; without images and
        prompts, the built-in ones are used.
      tolerance: of the logits' largest difference, relative to the largest logit; of intermediates
        as `relative`.
      folder_code: as of activations.look.
    Raises:
      FileNotFoundError: there is no model.
      ValueError: as activations.look; or the two differ in a field or a vocabulary, which is named.
    """
    sides = look(a, folder_code), look(b, folder_code)
    check_alike(*sides)
    alone = [side.path for side in sides if "vit" not in side.sections]
    if alone and images:
        raise ValueError(f"{alone[0]} is a language model alone: leave --image out")
    if images or prompts:
        examples = [_example(sides[0], *one) for one in _given(images, prompts)]
    else:
        examples = built_in(sides[0], text_only=bool(alone))
    traces = [
        side.run(side, examples, bool(alone)) for side in sides
    ]  # one model in memory at a time
    return report(examples, *traces, tolerance)


def check_alike(a: Side, b: Side) -> None:
    """Raises ValueError naming every field that decides outputs and differs, or the first word with
    another id.
    """
    shared = [name for name in a.sections if name in b.sections]
    keys = [
        (section, key) for section in shared for key in a.sections[section] | b.sections[section]
    ]
    values = [
        (f"{section}.{key}", a.sections[section].get(key), b.sections[section].get(key))
        for section, key in keys
    ]
    if wrong := [
        f"{name}: {x} in A, {y} in B" for name, x, y in values if x != y and name not in HISTORY
    ]:
        raise ValueError(
            f"{a.path} and {b.path} are different architectures:\n  " + "\n  ".join(wrong)
        )
    words = [side.tokenizer.inner.get_vocab(with_added_tokens=True) for side in (a, b)]
    if other := sorted(
        word for word in words[0] | words[1] if words[0].get(word) != words[1].get(word)
    ):
        ids = " in A, ".join(str(word.get(other[0])) for word in words)
        raise ValueError(
            f"{a.path} and {b.path} have different vocabularies: {other[0]!r} is {ids} in B, and"
            f" {len(other) - 1} more"
        )


# ------------------------------------------------------------------------------------------ prompts


Visuals = list[list[ImageRef | str]]  # pictures and frames of videos: files, or names of PICTURES


def _given(images: Sequence[str], prompts: Sequence[str]) -> list[tuple[str, Visuals]]:
    """(text with markers, visuals) of the user's prompts."""
    visuals = [[ImageRef(path)] for path in images]
    return [
        (text if MARKER in text else MARKER * len(visuals) + text, visuals)
        for text in prompts or (QUESTION,)
    ]


def built_in(side: Side, text_only: bool = False) -> list[Example]:
    """Prompts of each kind, as a model reads them."""
    return [_example(side, *one) for one in _built_in(text_only)]


def _built_in(text_only: bool) -> list[tuple[str, Visuals]]:
    """Text alone; one image, with and without text in front; two images; a video."""
    ramp, disc, stripes, *video = PICTURES
    prompts = [
        ("What is the capital of France?", []),
        ("Count from one to nine, then say why water is wet.", []),
    ]
    if text_only:
        return prompts
    prompts = [
        prompts[0],
        (f"{MARKER}What do you see?", [[disc]]),
        (f"Here is a picture: {MARKER} Which colours has it?", [[ramp]]),
    ]
    return [
        *prompts,
        (f"{MARKER} or {MARKER}, which one has stripes?", [[ramp], [stripes]]),
        (f"{MARKER}What moves, and where?", [video]),
    ]


def _picture(name: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    y, x = y / height, x / width
    return (255 * np.stack(np.broadcast_arrays(*PICTURES[name](x, y)), -1)).round().astype(np.uint8)


PICTURES = {  # red, green, blue in 0..1 at (x, y) in 0..1
    "ramp": lambda x, y: (x, y, 0.5),
    "disc": lambda x, y: (0.1 + 0.8 * (np.hypot(x - 0.5, y - 0.5) < 0.3), 0.2, 0.7 - 0.5 * y),
    "stripes": lambda x, y: ((x * 7 + y * 3) % 1 > 0.5, 0.9, x * y),
    **{
        f"frame {i}": lambda x, y, i=i: (
            0.0,
            np.maximum(abs(x - 0.25 * (i + 1)), abs(y - 0.5)) < 0.15,
            0.3,
        )
        for i in range(3)
    },
}


def _example(side: Side, text: str, visuals: Visuals) -> Example:
    """The prompt in the words of the side's tokenizer, pictures stretched to its tower's size.

    Raises SampleError as text.prompt.
    """
    stops = list(accumulate(map(len, visuals)))
    spans = [(stop - len(visual), stop) for stop, visual in zip(stops, visuals)]
    template = Template(
        "chatml" if "<|im_start|>" in side.tokenizer.specials else "plain", side.tokenizer
    )
    media = (
        MediaConfig(**{key: side.sections["media"][key] for key in ("tokens", "placeholder")})
        if visuals
        else None
    )
    laid, _ = whole_steps(template.prompt([Turn("user", text)], spans), side.tokenizer, media)
    size = image.sides(side.sections["vit"]["image_size"] if "vit" in side.sections else 1)

    def load(what):
        return _picture(what, *size) if isinstance(what, str) else image.load(what, size, "squash")

    pixels = np.array([load(what) for visual in visuals for what in visual], np.uint8).reshape(
        -1, *size, 3
    )
    groups = np.repeat(np.arange(len(visuals)), [len(visual) for visual in visuals])
    return Example(text, *np.array(laid, np.int32).T.copy(), pixels, groups)


# --------------------------------------------------------------------------------------- comparison


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference at a position [..., D] by its own largest magnitude, at the worst
    position; NaN where there is one.

    The magnitude of the whole array would not do: language models have single positions a hundred
    times as large as all others, behind which what a wrong layer changes elsewhere would show some
    layers later only."""
    scale = np.maximum(abs(a).max(-1), abs(b).max(-1))
    return float((abs(a - b).max(-1) / np.maximum(scale, np.finfo(np.float32).tiny)).max())


def compare(a: Trace, b: Trace, tolerance: float) -> Difference:
    """Steps that both models have, in order of computation, and the logits last of them."""
    errors = [(name, relative(a.seen[name], b.seen[name])) for name in a.seen if name in b.seen]
    apart = abs(a.logits - b.logits)
    errors.append(("logits", relative(a.logits.reshape(1, -1), b.logits.reshape(1, -1))))
    kl = divergence(a.logits, b.logits)
    same = (a.logits.argmax(-1) == b.logits.argmax(-1)).mean()
    parted = next(
        (error for error in errors if not error[1] <= tolerance), None
    )  # so that NaN parts
    return Difference(*map(float, (apart.max(), apart.mean(), kl, same)), errors[-1][1], parted)


def closed(trace: Trace) -> list[str]:
    """Cross-attention blocks that changed nothing."""
    text = [name for name in trace.seen if not name.startswith("vit/")]
    return [
        name
        for before, name in pairwise(text)
        if name.startswith("xattn/") and np.array_equal(trace.seen[before], trace.seen[name])
    ]


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """KL of the next token by logits `b` [T, vocab] from that by `a`, in nats: the mean over T."""
    p, q = _log_softmax(a), _log_softmax(b)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def report(
    examples: Sequence[Example], a: Sequence[Trace], b: Sequence[Trace], tolerance: float
) -> bool:
    """Prints the table and the verdict."""
    found = [compare(*traces, tolerance) for traces in zip(a, b, strict=True)]
    names = [
        name if len(name) <= 48 else name[:45] + "..."
        for name in (example.name.replace("\n", " ") for example in examples)
    ]
    print(
        f"{'prompt':48}  {'max':>8}  {'mean':>8}  {'relative':>8}  {'KL(A||B)':>9}  {'top-1':>6} "
        " apart from"
    )
    for name, d in zip(names, found):
        apart = f"{d.parted[0]} ({d.parted[1]:.1e})" if d.parted else "-"
        print(
            f"{name:48}  {d.largest:8.1e}  {d.mean:8.1e}  {d.relative:8.1e}  {d.kl:9.1e} "
            f" {d.agreement:6.1%}  {apart}"
        )
    longest = max(a, key=lambda trace: len(trace.seen))
    order = [*longest.seen, "logits"]
    if idle := [name for name in closed(longest) if any(name in trace.seen for trace in b)]:
        every = len(idle) == sum(name.startswith("xattn/") for name in order)
        print(
            "weights not compared, because their gates are closed:"
            f" {'all of xattn' if every else ', '.join(idle)}"
        )
    parted = sorted((d.parted for d in found if d.parted), key=lambda step: order.index(step[0]))
    if parted:
        name, error = parted[0]
        print(
            f"FAIL: {len(parted)} of {len(found)} prompts differ; first at {name}: relative error"
            f" {error:.1e}, tolerance {tolerance:g}"
        )
        return False
    steps = len([name for name in order if any(name in trace.seen for trace in b)])
    print(
        f"PASS: {len(found)} prompts; logits and {steps} intermediates agree within {tolerance:g}"
    )
    return True
