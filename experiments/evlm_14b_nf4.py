"""Instruction tuning of EVLM-14B on one card: towers in 4 bits, adapters of rank 16.

`get_config("adapters")` has adapters beside the language model's matrices and those of the
cross-attention, which stays as it is, in bfloat16; `get_config("cross")` beside the language
model's, and trains all of the cross-attention."""

from ml_collections import ConfigDict

from evlm_jax.config.model import TOWER_MATRICES
from experiments import evlm_14b

ADAPTED = {"adapters": "llm/layers|xattn", "cross": "llm/layers"}
TRAINED = {"adapters": "/lora_|^media/", "cross": "/lora_|^(xattn|media)/"}


def get_config(form: str = "adapters") -> ConfigDict:
    """`evlm_14b.get_config("sft")` a row at a time, from what `evlm convert quantize` makes of
    "continual". `data.sources` is yours to fill.
    """
    if form not in ADAPTED:
        raise ValueError(f"no form {form!r}; there are {', '.join(ADAPTED)}")
    config = evlm_14b.get_config("sft")
    config.name = f"evlm_14b_nf4_{form}"
    config.quant = {"patterns": TOWER_MATRICES, "kind": "nf4"}
    config.lora = {"patterns": (rf"^({ADAPTED[form]})/.*/kernel$",), "rank": 16, "alpha": 32.0}
    rules = {"pattern": TRAINED[form], "lr": 1.0}, {"pattern": "", "lr": None}
    config.optim.phases = ({"rules": rules},)
    config.train.update(remat="full", accumulate=config.train.batch)
    return config
