"""`evlm convert quantize`: a checkpoint whose matrices are held in 8 or 4 bits, and a receipt of
what that changed."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from flax import nnx

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.atomic_dir import check_free
from evlm_jax.checkpoint.lazy_tensors import Tensors
from evlm_jax.config import QuantConfig
from evlm_jax.convert.activations import Example, batch_of, in_float32, logits_of, look
from evlm_jax.convert.calibrate import calibrated
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.convert.verify import built_in, compare, divergence, relative
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.models import quant
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import canonical, is_stacked
from evlm_jax.paths import place, write
from evlm_jax.runs import load_trained, write_model

RECEIPT = "quantised.json"


def quantize_run(
    source: str,
    how: QuantConfig,
    out: str,
    step: int | None = None,
    logits: bool = True,
    rows: int = 0,
) -> None:
    """Writes the newest (or given) step of a run as a model whose matrices are quantised, with
    RECEIPT beside it, and prints that: the relative error of each matrix, bytes, and as of
    `difference` and `alone`.

    Args:
      logits: False leaves these two out, as a baseline does.
      rows: of the run's training data, on which GPTQ rounds (calibrate.py); 0: each value is
        rounded by itself.
    Raises:
      FileExistsError: `out` exists.
      ValueError: the run is quantised already; patterns or tiles do not fit it; as of calibrated.
    """
    check_free(out)  # before calibration, which takes long
    tensors, before = store.open_params(source, step)
    if before.quant.patterns:
        raise ValueError(f"{source} is quantised: make it whole first, with `evlm convert merge`")
    cfg = replace(before, quant=how)
    names, plan = parameter_shapes(cfg), {"source": store.identity(source, step)}
    given = calibrated(source, step, how, names, rows) if rows else {}
    plan |= {"quant": asdict(how)} | ({"rounded": _digest(given)} if rows else {})
    made = quant.quantised(cfg, names, tensors | given)
    trained, origin = store.trained(source, step), {"quantised": source}
    tokenizer = source_of_run(source, before.init.llm)
    write_model(cfg, made, out, plan, tokenizer, origin, trained & quant.plain(made))
    whole = quant.whole(cfg, store.open_params(out)[0])
    changed = {name: whole[name] for name in sorted(whole.keys() - quant.plain(made))}
    receipt = asdict(how) | ({"rows": rows} if rows else {})
    receipt |= {"bytes": _bytes(tensors, made), "errors": _errors(tensors, changed)}
    if logits and not before.baseline:
        receipt |= difference(source, out, step) | {"alone": alone(source, changed, step)}
    write(place(out) / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    _tell(receipt, how)


def _digest(tensors: Tensors) -> str:
    """Of names and values: what was begun with others is not gone on with."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].read().tobytes())
    return found.hexdigest()


def _bytes(before: Tensors, after: Tensors) -> dict[str, int]:
    sides = {"before": before, "after": after}
    return {name: sum(tensor.size for tensor in side.values()) for name, side in sides.items()}


def _errors(before: Tensors, whole: Tensors) -> dict[str, float]:
    """Of each matrix |whole - before| / |before|."""
    found = {}
    for name, tensor in whole.items():
        old = before[name].read().astype(np.float32)
        norm = np.linalg.norm(old)
        found[name] = float(np.linalg.norm(tensor.read() - old) / norm) if norm else 0.0
    return found


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


def alone(source: str, changed: Tensors, step: int | None = None) -> dict[str, float]:
    """Of each layer, with its matrices of `changed` and all else as in the checkpoint:
    KL(checkpoint || that), in nats, the mean over the built-in prompts' tokens. Embeddings and head
    count as layers.
    """
    examples, model = built_in(look(source, step=step)), load_trained(source, step).model
    batch = batch_of(examples, model.cfg.xattn.query_block, model.cfg.vit.size)
    in_float32(model)
    shown, before = batch._replace(taps=model.encode(batch.pixels)), logits_of(model, batch)
    layers: dict[str, dict] = {}
    for name, tensor in changed.items():
        layer = re.match(r"(vit/blocks|llm/layers|xattn)/\d+|\w+/\w+", name)[0]
        layers.setdefault(layer, {})[name] = tensor
    return {
        layer: _apart(
            examples,
            before,
            logits_of(_with(model, matrices), batch if layer.startswith("vit/") else shown),
        )
        for layer, matrices in layers.items()
    }


def _with(model: EVLM, matrices: Tensors) -> EVLM:
    """The model with these matrices in place of its own."""
    graphdef, state = nnx.split(model)
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        array = leaf[...]
        for i, name in enumerate(canonical(model.cfg, path)):
            if name in matrices:
                new = matrices[name].read()
                array = array.astype(new.dtype).at[i].set(new) if is_stacked(path) else new
        leaves.append((path, leaf.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _apart(examples: Sequence[Example], before: np.ndarray, after: np.ndarray) -> float:
    """The mean over examples of the divergence of their logits, rows of [B, T, vocab]."""
    rows = ((len(e.tokens), *pair) for e, *pair in zip(examples, before, after))
    return float(np.mean([divergence(a[:length], b[:length]) for length, a, b in rows]))


def _tell(receipt: dict, how: QuantConfig) -> None:
    errors, sizes = receipt["errors"], receipt["bytes"]
    for name, error in errors.items():
        print(f"{name:48}  {error:.2%}")
    for name, error in receipt.get("layers", {}).items():
        print(f"behind {name:41}  {error:.2%}")
    for name, kl in receipt.get("alone", {}).items():
        print(f"{name + ' alone':48}  KL {kl:.1e}")
    kinds = " and ".join(sorted({how.kind_of(name) for name in errors}))
    print(
        f"{len(errors)} matrices in {kinds}: relative error {max(errors.values()):.2%} at"
        f" most; {sizes['before'] / 1e9:,.3f} GB are {sizes['after'] / 1e9:,.3f} GB"
    )
    if kl := receipt.get("kl"):
        print(
            f"KL {np.mean([*kl.values()]):.1e} on {len(kl)} prompts, {max(kl.values()):.1e} at most"
        )
