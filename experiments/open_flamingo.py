"""OpenFlamingo-9B, CLIP ViT-L/14 and LLaMA-7B with a gated block before every fourth layer
(open_flamingo 2.0.1): three sections beside the towers. docs/conversion.md says how its weights
come in.
"""

from ml_collections import ConfigDict

from experiments import base, evlm_7b


def llama_7b() -> dict:
    """LLaMA-7B with the three words that open_flamingo adds to its 32,000."""
    return dict(
        vocab=32003,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        rope_theta=1e4,
        eps=1e-6,
        qkv_bias=False,
        tied=False,
        dynamic_ntk=0,
        logn=0,
    )


def get_config() -> ConfigDict:
    """`data.sources`, `init.vision` and `init.llm` are yours to fill."""
    config = base.get_config()
    config.name = "open_flamingo_9b"
    config.vit, config.llm = evlm_7b.clip_large(), llama_7b()
    config.vit.update(taps=(24,), cuts=())  # the last block's patches are read
    config.xattn.update(
        heads=8, kv_heads=8, head_dim=64, ffn=16384, every=4, first=3, sinks=0, kv_norm=False
    )
    config.bridge.update(kind="flamingo", prefix=False)
    config.media = dict(tokens=1, placeholder="<image>")
    config.data.template = "plain"
    config.optim.phases = (dict(start=0.0, warmup=0, rules=base.rules(24)),)
    return config
