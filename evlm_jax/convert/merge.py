"""Adapters become part of the matrices that they stand beside, and what is quantised is float32
again: `evlm convert merge`, and every export that has no place for them."""

import numpy as np

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors
from evlm_jax.config import EVLMConfig
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.models import quant
from evlm_jax.models.lora import is_adapter
from evlm_jax.runs import write_model


def merge_run(source: str, out: str, step: int | None = None) -> None:
    """Writes the newest (or given) step of a run as a model without adapters and quantised matrices
    that computes the same: to export it, to evaluate it, or to train from it.

    Raises:
      FileExistsError: `out` exists.
      ValueError: the run has neither.
    """
    tensors, cfg = store.open_params(source, step)
    if not (cfg.lora.patterns or cfg.quant.patterns):
        raise ValueError(f"{source} has no adapters: there is nothing to merge")
    made, trained = merged(tensors, cfg), store.trained(source, step)
    kept = {name for name in made if name in trained or made[name] is not tensors[name]}
    plan = {"source": store.identity(source, step), "merged": True}
    tokenizer = source_of_run(source, cfg.init.llm)
    write_model(cfg.merged, made, out, plan, tokenizer, {"merged": source}, kept)


def merged(tensors: Tensors, cfg: EVLMConfig) -> dict[str, Tensor]:
    """The tensors of a model without its adapters: kernel + lora.scale * lora_a @ lora_b,
    of the widest dtype of the three, so that nothing small is lost beside a 16-bit kernel.
    A quantised kernel is float32.
    """
    tensors = quant.whole(cfg, tensors)
    return {
        name: _with_adapter(tensors, name, cfg.lora.scale)
        for name in tensors
        if not is_adapter(name)
    }


def _with_adapter(tensors: Tensors, name: str, scale: float) -> Tensor:
    """A tensor with its adapter's product; itself where it has none."""
    place, _, last = name.rpartition("/")
    if last != "kernel" or f"{place}/lora_a" not in tensors:
        return tensors[name]
    parts = [tensors[f"{place}/{part}"] for part in ("kernel", "lora_a", "lora_b")]
    dtype = np.result_type(*(part.dtype for part in parts))

    def read() -> np.ndarray:
        kernel, a, b = (part.read().astype(np.float32) for part in parts)
        return (kernel + np.float32(scale) * (a @ b)).astype(dtype)

    return Tensor(parts[0].shape, dtype, read)
