"""mPLUG-Owl3-7B, SigLIP so400m/14 at 384 pixels and Qwen2-7B: beside self-attention of layers 1, 9,
17 and 25 its queries also look at images. Its weights are not read.

`get_config("240728")` mixes the two attentions by a gate, `get_config("241101")`, the later form,
has one softmax over the keys of both.
"""

from ml_collections import ConfigDict

from experiments import base, evlm_7b, evlm_8b


def get_config(form: str = "240728") -> ConfigDict:
    """Trains what is new; mPLUG-Owl3's later stages train the language model, too, by
    `optim.phases`. `data.sources`, `init.vision` and `init.llm` are yours to fill.
    """
    config = base.get_config()
    config.name = f"mplug_owl3_7b_{form}"
    config.vit, config.llm = evlm_8b.siglip_so400m(), evlm_7b.get_config().llm
    config.vit.update(taps=(26,), cuts=())  # the last block but one
    config.llm.vocab = 151851
    config.xattn.update(heads=28, kv_heads=4, head_dim=128, every=8, first=1, sinks=0)
    config.xattn.update(
        kv_norm=False,
        placement="parallel",
        query="shared",
        gate={"240728": "mixing", "241101": "softmax"}[form],
        key_rotary=True,
    )
    config.media = dict(tokens=1, placeholder="<|image|>", sight="all")
    config.bridge.kind = "linear"
    config.data.update(dialogs=1, image_group=1, images=16, slots=16, block_pairs=1024)
    config.optim.phases = (dict(start=0.0, warmup=0, rules=base.rules(27)),)
    return config
