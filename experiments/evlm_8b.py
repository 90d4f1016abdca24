"""EVLM with towers of 2025, SigLIP 2 so400m/14 at 384 pixels and Qwen3-8B, in the paper's three
stages.
"""

from ml_collections import ConfigDict

from experiments import base


def siglip_so400m() -> ConfigDict:
    """SigLIP 2 so400m/14 at 384 pixels, of which 27 x 27 patches read 378."""
    return ConfigDict(
        dict(
            depth=27,
            width=1152,
            heads=16,
            mlp=4304,
            patch=14,
            image_size=378,
            pretrained_size=378,
            norm="pre",
            bias="all",
            activation="gelu_tanh",
            layer_scale=False,
            class_token=False,
            registers=0,
            patch_bias=True,
            embed_norm=False,
            eps=1e-6,
            taps=(12, 15, 18, 21, 24, 27),
            cuts=(13, 21),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
    )


def get_config(stage: str = "pretrain") -> ConfigDict:
    """Six taps serve six layers each.

    `data.sources`, `init.vision` and `init.llm` are yours to fill.
    """
    config = base.get_config()
    config.name = "evlm_8b"
    config.vit = siglip_so400m()
    config.llm = dict(
        vocab=151936,
        hidden=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=12288,
        rope_theta=1e6,
        eps=1e-6,
        qkv_bias=False,
        tied=False,
        dynamic_ntk=0,
        logn=0,
        qk_norm="head",
    )
    config.xattn.update(heads=8, kv_heads=8, head_dim=128, ffn=2048)
    config.media.placeholder = "<|image_pad|>"
    config.optim.phases = tuple(
        dict(start=s, rules=base.rules(27, first)) for s, first in ((0.0, None), (0.25, 13))
    )
    return base.set_stage(config, stage)
