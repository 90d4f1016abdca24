"""Llama 3.2 Vision, 11B (meta-llama/Llama-3.2-11B-Vision): a vision tower with up to four tiles of
560 pixels, and Llama 3.1 8B with a gated block before every fourth layer. docs/conversion.md says
how its weights come in.
"""

from ml_collections import ConfigDict

from experiments import base


def tower() -> dict:
    """ViT-H/14 whose last eight blocks are global, and up to four tiles of 560 pixels."""
    return dict(
        depth=40,
        width=1280,
        heads=16,
        mlp=5120,
        patch=14,
        image_size=(2240, 560),
        pretrained_size=560,
        norm="pre",
        bias="mlp",
        activation="gelu",
        layer_scale=False,
        class_token=True,
        registers=0,
        patch_bias=False,
        embed_norm=True,
        eps=1e-5,
        taps=(4, 8, 16, 24, 31, 40),
        cuts=(),
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        tiles=4,
        grid_by_picture=True,
        global_blocks=8,
    )


def llama_8b() -> dict:
    """Llama 3.1 8B, with room for the words that stand for images."""
    return dict(
        vocab=128256,
        more_words=8,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        rope_theta=5e5,
        rope_scaling=dict(kind="llama3", factor=8.0, original=8192, slow=1.0, fast=4.0),
        eps=1e-5,
        qkv_bias=False,
        tied=False,
        dynamic_ntk=0,
        logn=0,
    )


def get_config() -> ConfigDict:
    """Fine-tunes the blocks; rows have room for four pictures of four tiles. `data.sources`,
    `init.vision` and `init.llm` are yours to fill.
    """
    config = base.get_config()
    config.name = "llama_3_2_11b_vision"
    config.vit, config.llm = tower(), llama_8b()
    config.xattn.update(
        heads=32, kv_heads=8, head_dim=128, ffn=14336, every=4, first=3, sinks=0, eps=1e-5
    )
    config.xattn.update(norm_kind="rms", qk_norm="head", gated=True, kv_norm=False)
    config.xattn.ffn_without_image = False
    config.bridge.kind = "joined"
    config.media = dict(tokens=1, placeholder="<|image|>", sight="neighbours")
    config.data.template = "own"
    config.data.update(image_group=1, images=4, slots=4, block_pairs=128)
    config.init.centre_norms = False
    config.optim.update(lr=1e-5, min_lr=1e-6, warmup=100)
    config.train.update(steps=10_000, batch=64)
    config.optim.phases = (dict(start=0.0, warmup=0, rules=base.rules(40)),)
    return config
