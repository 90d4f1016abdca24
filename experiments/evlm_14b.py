"""The paper's model, EVA02-CLIP-E+ and Qwen-14B-Chat 1.0: `get_config("pretrain" | "continual" |
"sft" | "moe")`.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(stage: str = "pretrain") -> ConfigDict:
    """Tables 1 and 6 of arXiv 2407.14177. `data.sources` is yours to fill.

    "moe" is "sft" with experts, 4 copies of 4 slices: EVLM-MoE. It starts from what `evlm upcycle`
    makes of "continual"."""
    config = base.set_stage(base.get_config(), "sft" if stage == "moe" else stage)
    if stage == "moe":
        config.name = "evlm_14b_moe"
        config.moe.copies = 4
    return config
