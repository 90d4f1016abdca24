"""IDEFICS-9B (HuggingFaceM4/idefics-9b), CLIP ViT-H/14 and LLaMA-7B with a gated block before every
fourth layer: three sections beside the towers. docs/conversion.md says how its weights come in.
"""

from ml_collections import ConfigDict

from experiments import base, open_flamingo


def get_config() -> ConfigDict:
    """`data.sources`, `init.vision` and `init.llm` are yours to fill."""
    config = open_flamingo.get_config()
    config.name = "idefics_9b"
    config.vit.update(depth=32, width=1280, mlp=5120, activation="gelu", taps=(32,))
    config.llm.vocab = 32002  # with <fake_token_around_image> and <image>
    config.xattn.update(heads=32, kv_heads=32, head_dim=128, ffn=11008, first=0, eps=1e-6)
    config.xattn.update(norm_kind="rms", qk_norm="head", gated=True)
    config.media.around = "<fake_token_around_image>"
    config.bridge.update(heads=16, head_dim=96, prefix=True, eps=1e-5)
    config.bridge.update(activation="relu", qk_norm="head")
    config.optim.phases = (dict(start=0.0, warmup=0, rules=base.rules(32)),)
    return config
