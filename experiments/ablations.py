"""Ablations: a base that trains in minutes on two cores, and variants of it that change at most
three fields each.

`get_config(variant)`; `evlm ablate --variants base,tap-8,cyclic` trains and compares them
(docs/ablations.md). A new variant is a line of VARIANTS: the field's full name and its value.

The base is the demo's model and data, all of it written down here, so that no change of the demo
moves what was measured. After the warm-up the rate is constant: a run has no end of its own, and
may be read wherever a budget is reached."""

from ml_collections import ConfigDict

from experiments import base, demo

SOURCES = ("easy-vqa", "emoji-en")


def rules(gates: float = 15.0, vit: tuple[int, ...] = ()) -> tuple[dict, ...]:
    """One phase. `gates`: their rate, of the schedule's; `vit`: 0-based blocks of the tower that
    are trained.
    """
    trained = [dict(pattern=rf"^vit/blocks/({'|'.join(map(str, vit))})/", lr=0.1)] if vit else []
    trained += [
        dict(pattern=r"^xattn/.*gate$", lr=gates),
        dict(pattern=r"^xattn/\d+/o/", lr=3.0),
        dict(pattern=r"^(xattn|media|bridge)/", lr=1.0),
    ]
    return (dict(start=0.0, warmup=0, rules=(*trained, dict(pattern=r"^(vit|llm)/", lr=None))),)


VARIANTS: dict[str, dict[str, object]] = {
    "base": {},  # a tap from each third of the tower, blocked; 4 media tokens; a dense FFN
    # which depths of the tower
    "taps-all": {"vit.taps": tuple(range(1, 13))},
    "taps-4": {"vit.taps": (3, 6, 9, 12)},
    "taps-2": {"vit.taps": (6, 11)},
    "tap-4": {"vit.taps": (4,)},
    "tap-8": {"vit.taps": (8,)},
    "tap-11": {"vit.taps": (11,)},
    "tap-last": {"vit.taps": (12,)},
    "cyclic": {"xattn.schedule": "cyclic"},
    # what stands for an image in the text
    "media-1": {"media.tokens": 1},
    "media-16": {"media.tokens": 16},
    "media-64": {"media.tokens": 64},
    # a tower of 42 pixels, and tiles of what is larger
    "small": {"vit.image_size": 42},
    "small-tiles": {"vit.image_size": 42, "data.tiles": 4, "data.block_pairs": 48},
    # the blocks
    "no-sink": {"xattn.sinks": 0},
    "slow-gates": {"optim.phases": rules(gates=1.0)},
    "every-2": {"xattn.every": 2},
    "every-4": {"xattn.every": 4},
    "narrow": {"xattn.heads": 1, "xattn.kv_heads": 1},  # r_c = 1/9 instead of 1/3
    "wide": {"xattn.heads": 6, "xattn.kv_heads": 6},  # 2/3
    "shared-keys": {"xattn.kv_heads": 1},  # of all heads
    "ffn-quarter": {"xattn.ffn": 144},  # r_f = 1/4 instead of 1/2
    "ffn-whole": {"xattn.ffn": 576},  # 1
    # beside self-attention, whose output projection it shares; all nine heads then
    "parallel": {
        "xattn.placement": "parallel",
        "xattn.heads": 9,
        "init.centre_norms": False,
    },
    "not-isolated": {"data.isolate": False},
    # experts, from zero as the base's FFN; with --init the base goes on with its run and they are
    # made of that run's FFNs (upcycle.py)
    "moe": {"moe.copies": 4},
    "moe-paper": {"moe.copies": 4, "moe.upcycle": "paper"},
    "moe-preserve-zero": {"moe.copies": 4, "moe.upcycle": "preserve_zero"},
    "moe-top-1": {"moe.copies": 4, "moe.top_k": 1},
    "moe-top-8": {"moe.copies": 4, "moe.top_k": 8},
    "moe-softmax": {"moe.copies": 4, "moe.gates": "softmax"},
    # other models on the same towers (evlm_jax/models/bridge.py); llava reads the highest of the
    # base's taps
    "fused": {"bridge.kind": "fused"},
    "flamingo": {"bridge.kind": "flamingo", "media.tokens": 1, "vit.taps": (12,)},
    "llava": {"bridge.kind": "llava", "xattn.every": 0, "media.tokens": 64},
    "text-only": {"xattn.every": 0},
    # the tower
    "vit-upper-half": {
        "optim.phases": rules(vit=tuple(range(6, 12))),
        "data.cache_features": False,
    },
}


def get_config(variant: str = "base") -> ConfigDict:
    """The base with a variant's fields changed. Raises ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    config = _base()
    config.name = variant
    config.update_from_flattened_dict(VARIANTS[variant])
    return config


def _base() -> ConfigDict:
    config = base.get_config()
    config.vit = demo.dinov2_small(image_size=112) | dict(taps=(4, 8, 11), cuts=(6,))
    config.llm = demo.smollm2_135m()
    config.xattn.update(
        heads=3,
        kv_heads=3,
        head_dim=64,
        ffn=288,
        every=1,
        schedule="blocked",
        sinks=1,
        query_block=32,
        eps=1e-5,
    )
    config.moe.update(
        copies=0,
        slices=4,
        top_k=4,
        gates="renormalise",
        capacity=0.0,
        balance=0.01,
        z=0.001,
        expert_block=64,
        upcycle="preserve",
    )
    config.media.update(tokens=4, placeholder="<repo_name>")
    _trained(config)
    config.mesh.update(data=-1, fsdp=1, frozen="replicated")
    config.init.update(vision="dinov2-small", llm="smollm2-135m-instruct", centre_norms=True)
    return config


def _trained(config: ConfigDict) -> None:
    """On which data, and by which rates."""
    config.data.update(
        sources=SOURCES,
        weights=(0.85, 0.15),
        template="plain",
        length=256,
        images=8,
        targets=80,
        image_group=1,
        slots=8,
        block_pairs=16,
        window=64,
        isolate=True,
        resize="squash",
        cache_features=True,
    )
    config.clean.update(similarity=0.0, web_similarity=0.0)
    config.optim.update(
        lr=1e-3,
        min_lr=1e-3,
        warmup=10,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        clip=1.0,
        phases=rules(),
    )
    config.train.update(
        steps=180,  # about 20,000 questions
        batch=4,
        dtype="float32",
        frozen_dtype="float32",
        matmul_precision="bfloat16",
        remat="dots",
        loss_chunk=0,
        save_every=100,
        keep=2,
        log_every=5,
        peak_flops=195e9,
    )
