"""`evlm convert quantize`: a checkpoint whose matrices are held in 8 or 4 bits, and a receipt of
what that changed."""

import json
from dataclasses import asdict, replace

import numpy as np

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.lazy_tensors import Tensors
from evlm_jax.config import EVLMConfig, QuantConfig
from evlm_jax.convert.activations import look
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.convert.verify import built_in, compare, relative
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.models import quant
from evlm_jax.paths import place, write
from evlm_jax.runs import write_model

RECEIPT = "quantised.json"


def quantize_run(
    source: str, how: QuantConfig, out: str, step: int | None = None, logits: bool = True
) -> None:
    """Writes the newest (or given) step of a run as a model whose matrices are quantised, with
    RECEIPT beside it, and prints that: the relative error of each matrix, bytes, and as of
    `difference`.

    Args:
      logits: False leaves `difference` out, as a baseline does.
    Raises:
      FileExistsError: `out` exists.
      ValueError: the run is quantised already; patterns or tiles do not fit it.
    """
    tensors, before = store.open_params(source, step)
    if before.quant.patterns:
        raise ValueError(f"{source} is quantised: make it whole first, with `evlm convert merge`")
    cfg = replace(before, quant=how)
    made = quant.quantised(cfg, parameter_shapes(cfg), tensors)
    plan = {"source": store.identity(source, step), "quant": asdict(how)}
    trained, origin = store.trained(source, step), {"quantised": source}
    tokenizer = source_of_run(source, before.init.llm)
    write_model(cfg, made, out, plan, tokenizer, origin, trained & quant.plain(made))
    receipt = asdict(how) | _errors(cfg, tensors, store.open_params(out)[0])
    if logits and not before.baseline:
        receipt |= difference(source, out, step)
    write(place(out) / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    _tell(receipt)


def _errors(cfg: EVLMConfig, before: Tensors, after: Tensors) -> dict:
    """Bytes of all tensors, and of each quantised matrix |after - before| / |before|."""
    found, whole = {}, quant.whole(cfg, after)
    for name in sorted(before.keys() - quant.plain(after)):
        old = before[name].read().astype(np.float32)
        norm = np.linalg.norm(old)
        found[name] = float(np.linalg.norm(whole[name].read() - old) / norm) if norm else 0.0
    sizes = [sum(tensor.size for tensor in tensors.values()) for tensors in (before, after)]
    return {"bytes": dict(zip(("before", "after"), sizes)), "errors": found}


def difference(source: str, out: str, step: int | None = None) -> dict[str, dict[str, float]]:
    """Of two checkpoints on built-in prompts: "kl", of each prompt the mean over its tokens of
    KL(source || out), in nats; "layers", the largest relative difference behind each layer.
    """
    sides = look(source, step=step), look(out)
    examples = built_in(sides[0])
    pairs = list(zip(*(side.run(side, examples, False) for side in sides), strict=True))
    kl = [compare(*pair, tolerance=np.inf).kl for pair in pairs]
    layers = {
        name: max(relative(a.seen[name], b.seen[name]) for a, b in pairs if name in a.seen)
        for name in max((a.seen for a, _ in pairs), key=len)
    }
    return {"kl": dict(zip((example.name for example in examples), kl)), "layers": layers}


def _tell(receipt: dict) -> None:
    errors, sizes = receipt["errors"], receipt["bytes"]
    for name, error in errors.items():
        print(f"{name:48}  {error:.2%}")
    for name, error in receipt.get("layers", {}).items():
        print(f"behind {name:41}  {error:.2%}")
    print(
        f"{len(errors)} matrices in {receipt['kind']}: relative error {max(errors.values()):.2%} at"
        f" most; {sizes['before'] / 1e9:,.3f} GB are {sizes['after'] / 1e9:,.3f} GB"
    )
    if kl := receipt.get("kl"):
        print(
            f"KL {np.mean([*kl.values()]):.1e} on {len(kl)} prompts, {max(kl.values()):.1e} at most"
        )
