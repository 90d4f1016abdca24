"""The smallest EVLM of full-size parts, for one accelerator: CLIP ViT-L/14 and
Qwen2.5-0.5B-Instruct, in the paper's three stages.
"""

from ml_collections import ConfigDict

from experiments import base, evlm_7b


def get_config(stage: str = "pretrain") -> ConfigDict:
    """As evlm_7b, with six taps for 24 layers.

    `data.sources`, `init.vision` and `init.llm` are yours to fill.
    """
    config = evlm_7b.get_config("pretrain")
    config.name = "evlm_1b"
    config.vit.taps = (14, 16, 18, 20, 22, 24)
    config.llm = dict(
        vocab=151936,
        hidden=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        mlp=4864,
        rope_theta=1e6,
        eps=1e-6,
        qkv_bias=True,
        tied=True,
        dynamic_ntk=0,
        logn=0,
    )
    config.xattn.update(heads=3, kv_heads=3, head_dim=64, ffn=448)
    return base.set_stage(config, stage)
