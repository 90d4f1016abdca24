"""Matrices of a run rounded by GPTQ on rows of its own training data.

Step by step through the model, all rows side by side: the inputs of a step's matrices are summed
up, the matrices are rounded, and what the rounded step gives goes on to the next: each matrix is
rounded for the inputs that it will be given. One step's sums are held at a time, [in, in] a matrix.
Padding is left out: as a first token of its own it would count most of all.

Tried and left out: matrices that make up for what their inputs have lost (qwix's `qep`) were worse
than those that do not."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from evlm_jax.batch import Batch
from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.config import EVLMConfig, QuantConfig
from evlm_jax.convert.activations import Step, answered, in_float32, taken, walk
from evlm_jax.data.pipeline import batches
from evlm_jax.flops import real_tokens
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.layers import Linear
from evlm_jax.models.quant import NAMES, TABLE
from evlm_jax.ops.gptq import DAMPING, rounded
from evlm_jax.ops.quantised import dequantise
from evlm_jax.runs import load_trained

HEAD = "llm/head/kernel"
READ = 1.0  # damping of a table whose rows are read as embeddings too, whatever the head is given


def calibrated(
    source: str, step: int | None, how: QuantConfig, names: Collection[str], rows: int
) -> dict[str, Tensor]:
    """Bytes and scales of the matrices of the newest (or given) step of a run, rounded by GPTQ: all
    that `how` chooses but a table of words that no product reads.

    Args:
      names: of the quantised model's parameters.
      rows: of training data, at least so many.
    Raises:
      ValueError: the model is a baseline; inputs of one of the matrices are not seen, or not
        finite; as pipeline.batches.
    """
    trained = load_trained(source, step)
    model = in_float32(trained.model)
    if model.cfg.baseline:
        raise ValueError(
            f"{source} is a baseline ({model.cfg.baseline}), which calibration does not know:"
            " leave --calibrate out"
        )
    wanted = {name.removesuffix("_scale") for name in names if name.endswith(NAMES)}
    wanted -= set() if model.llm.head is None else {TABLE}  # no product reads it
    if not (wanted and model.cfg.data.sources):
        what = "data.sources is empty" if wanted else "quant.patterns choose nothing but a lookup"
        raise ValueError(f"{source}: config: {what}: leave --calibrate out")
    data = _rows(model.cfg, trained.tokenizer, rows)
    with tqdm(total=len(wanted), unit="matrix", desc="calibrated") as bar:
        made = _Calibration(how, wanted, bar.update).run(model, data)
    if unseen := wanted - made.keys():
        raise ValueError(
            f"config: quant.patterns choose {min(unseen)}, whose inputs calibration does not see:"
            " narrow them, or leave --calibrate out"
        )
    return {name: Tensor.of(array) for name, array in made.items()}


def _rows(cfg: EVLMConfig, tokenizer: Any, rows: int) -> list[Batch]:
    """As many batches of one image group as give `rows`, with pixels."""
    group = cfg.data.image_group
    cfg = replace(
        cfg,
        train=replace(cfg.train, batch=group, accumulate=1),
        data=replace(cfg.data, cache_features=False),
    )
    try:
        with closing(batches(cfg, tokenizer)) as found:
            return [next(found)[0] for _ in range(-(-rows // group))]
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; or take fewer rows, or leave --calibrate out") from error


@dataclass(frozen=True)
class _Calibration:
    """Rounds the matrices of `wanted`, one step of the model after the other."""

    how: QuantConfig
    wanted: Collection[str]
    tell: Callable[[], Any]  # that a matrix is done
    made: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, model: EVLM, data: Sequence[Batch]) -> dict[str, np.ndarray]:
        """Bytes and scales by name."""
        real = [_real(batch) for batch in data]
        with jax.default_matmul_precision("highest"):
            if TABLE in self.wanted and model.llm.head is None:
                # first, for layers read its rows; its own inputs are then those of whole layers
                gram = _added(
                    _gram(_hidden(model, batch), text) for batch, (text, _) in zip(data, real)
                )
                model.llm.embed[...] = self._round(TABLE, model.llm.embed[...].T, gram).T
            walks = [walk(model, batch) for batch in data]
            steps = [next(one) for one in walks]
            while steps[0]:
                module = self._step(steps, real)
                outputs = [taken(one.apply, one.how, module, *one.inputs) for one in steps]
                steps = [answered(*pair) for pair in zip(walks, outputs)]
            if HEAD in self.wanted:
                gram = _added(_gram(x, text) for x, (text, _) in zip(outputs, real))
                self._round(HEAD, model.llm.head.kernel[...], gram)
        return self.made

    def _step(self, steps: Sequence[Step], real: Sequence[tuple]) -> nnx.Module:
        """The module of a step with its matrices rounded."""
        name, apply, how, module, _ = steps[0]
        names = {
            path: f"{name}/{'/'.join(map(str, path))}/kernel"
            for path, _ in nnx.iter_modules(module)
        }
        paths = tuple(path for path in names if names[path] in self.wanted)
        if not paths:
            return module
        if name.startswith("vit/"):
            real = [(images, images) for _, images in real]
        grams = _added(
            _grams(apply, how, paths, module, masks, *step.inputs)
            for step, masks in zip(steps, real)
        )
        for path, gram in zip(paths, grams):
            linear = _at(module, path)
            linear.kernel[...] = self._round(names[path], linear.kernel[...], gram)
        return module

    def _round(self, name: str, matrix: jax.Array, gram: np.ndarray) -> np.ndarray:
        """The matrix [in, out] as its bytes and scales give it; they are kept."""
        damping, kind = READ if name == TABLE else DAMPING, self.how.kind_of(name)
        try:
            bits, scales = rounded(matrix, gram, kind, self.how.tile, damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made = dequantise(bits, scales, kind, -2)
        kept = (bits.T, scales.T) if name == TABLE else (bits, scales)
        self.made.update(zip((name, f"{name}_scale"), kept))
        self.tell()
        return made


def _at(module: nnx.Module, path: Sequence[str]) -> nnx.Module:
    return reduce(getattr, path, module)


class _Watched(nnx.Module):
    """A projection that tells what it is given."""

    def __init__(self, linear: Linear, tell: Callable[[jax.Array], None]):
        self.linear, self.tell = linear, tell

    def __call__(self, x: jax.Array, *filled: Any, **fills: Any) -> jax.Array:
        self.tell(x)
        return self.linear(x, *filled, **fills)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _grams(
    apply: Callable,
    how: Any,
    paths: Sequence[tuple],
    module: nnx.Module,
    real: tuple[jax.Array, jax.Array],
    *inputs: Any,
) -> list[jax.Array]:
    """Of the projections at `paths` of a step's module the sums of x x^T of their inputs: of text
    [B, T, in], of a ViT [B * I, S, in], of images beside text [B, I, S, in].
    """
    grams = [jnp.zeros(())] * len(paths)

    def tell(number: int, x: jax.Array) -> None:
        grams[number] += _gram(x, real[x.ndim == 4])

    for number, (*above, name) in enumerate(paths):
        holder = _at(module, above)
        setattr(holder, name, _Watched(getattr(holder, name), partial(tell, number)))
    apply(how, module, *inputs)
    return grams


@jax.jit
def _hidden(model: EVLM, batch: Batch) -> jax.Array:
    return model.hidden(batch)


def _added(grams: Iterable[Any]) -> Any:
    """The sum of sums, or of lists of them, in float64."""
    wide = (jax.tree.map(lambda gram: np.asarray(gram, np.float64), one) for one in grams)
    return reduce(partial(jax.tree.map, np.add), wide)


@jax.jit
def _gram(x: jax.Array, real: jax.Array) -> jax.Array:
    """x [..., in] -> the sum of x x^T, float32 [in, in], over what is `real`, bool of the leading
    axes of x or of some of them.
    """
    x = x.astype(jnp.float32).reshape(real.size, -1, x.shape[-1])
    return jnp.einsum("rsi,rsj->ij", jnp.where(real.reshape(-1, 1, 1), x, 0), x)


def _real(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [B, T] are no padding, and which image slots [C, I] a token sees."""
    groups, slots = batch.pixels.shape[:2]
    start, stop = (at.reshape(groups, -1, 1) for at in (batch.visible_start, batch.visible_stop))
    images = ((start <= np.arange(slots)) & (np.arange(slots) < stop)).any(1)
    return real_tokens(batch), images
