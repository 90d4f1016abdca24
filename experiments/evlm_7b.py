"""An EVLM that one host can train: CLIP ViT-L/14 and Qwen2.5-7B-Instruct, in the paper's three
stages and proportions.
"""

from ml_collections import ConfigDict

from experiments import base


def clip_large() -> dict:
    """OpenAI's CLIP ViT-L/14 at 224 px.

    Taps of every second block of the upper 60%, as deep in the tower as the paper's.
    """
    return dict(
        depth=24,
        width=1024,
        heads=16,
        mlp=4096,
        patch=14,
        image_size=224,
        pretrained_size=224,
        norm="pre",
        bias="all",
        activation="quick_gelu",
        layer_scale=False,
        class_token=True,
        registers=0,
        patch_bias=False,
        embed_norm=True,
        eps=1e-5,
        taps=(12, 14, 16, 18, 20, 22, 24),
        cuts=(12, 18),
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


def get_config(stage: str = "pretrain") -> ConfigDict:
    """Seven taps serve four layers each.

    `data.sources`, `init.vision` and `init.llm` are yours to fill.
    """
    config = base.get_config()
    config.name = "evlm_7b"
    config.vit = clip_large()
    config.llm = dict(
        vocab=152064,
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        mlp=18944,
        rope_theta=1e6,
        eps=1e-6,
        qkv_bias=True,
        tied=False,
        dynamic_ntk=0,
        logn=0,
    )
    config.xattn.update(heads=6, kv_heads=6, head_dim=128, ffn=1792)
    config.media.placeholder = "<|image_pad|>"
    config.optim.phases = tuple(
        dict(start=s, rules=base.rules(24, first)) for s, first in ((0.0, None), (0.25, 12))
    )
    return base.set_stage(config, stage)
