"""The paper's model, EVA02-CLIP-E+ and Qwen-14B-Chat 1.0, in its three stages: `get_config("pretrain" | "continual" | "sft")`."""

from ml_collections import ConfigDict

from experiments import base


def get_config(stage: str = "pretrain") -> ConfigDict:
    """Tables 1 and 6 of arXiv 2407.14177. `data.sources` is yours to fill."""
    return base.set_stage(base.get_config(), stage)
