"""The preregistered study (docs/preregistration.md): the ablations' base on questions about scenes,
and the variants that its claims name.

All variants see equal documents in every update: rows are packed as if an image took four
positions, whatever it takes, and are longer where it takes more. MARGIN and BEST_TAP are what
`python -m benchmarks.pilot` says."""

from ml_collections import ConfigDict

from experiments import ablations

MARGIN = 0.0502  # nats that are worth 1.5 points
BEST_TAP = "tap-8"  # the single tap of lowest loss, by seeds of its own

RATE = 1.5e-3  # the demo's: 10,000 questions are half of the first study's
MEDIA, LENGTH = 4, 256  # positions that packing counts
FAMILIES = ("name", "count", "colour", "text", "where")
VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "tap-2": {"vit.taps": (2,)},
    "tap-8": {"vit.taps": (8,)},
    "tap-11": {"vit.taps": (11,)},
    "tap-last": {"vit.taps": (12,)},
    "fused": {"bridge.kind": "fused"},
    "flamingo": {"bridge.kind": "flamingo", "media.tokens": 1, "vit.taps": (12,)},
    "llava": {"bridge.kind": "llava", "xattn.every": 0, "media.tokens": 64},
    "moe": {"moe.copies": 4},
    "again": {"data.seed": 1000, "train.seed": 1000},  # the base's seeds begin behind these
}


def get_config(variant: str = "base") -> ConfigDict:
    """The base with a variant's fields changed. Raises ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    config = ablations.get_config("base")
    config.name = variant
    config.vit.taps = (2, 8, 11)
    config.optim.update(lr=RATE, min_lr=RATE)
    with config.unlocked():
        config.data.update(
            sources=("scenes-en",), weights=(1.0,), pack_length=LENGTH, pack_media=MEDIA
        )
    config.update_from_flattened_dict(VARIANTS[variant])
    more = max(0, config.media.tokens - MEDIA)
    config.data.length = LENGTH + config.data.images * more
    return config


def get_study() -> dict:
    """What is measured and claimed (evlm_jax/ablate/study.py)."""
    parts = [
        dict(key=f"scenes, {family}/{metric}", name=f"{family}, {unit}", sign=sign, digits=digits)
        for metric, unit, sign, digits in (("loss", "nats", -1, 3), ("greedy", "%", 1, 2))
        for family in FAMILIES
    ]
    claims = [
        ("Several taps beat the last block's", "base", "tap-last"),
        ("Several taps beat the best single one", "base", BEST_TAP),
        ("Routed taps beat fused ones", "base", "fused"),
        ("EVLM beats llava", "base", "llava"),
        ("EVLM beats flamingo", "base", "flamingo"),
        ("Experts beat a dense FFN", "moe", "base"),
    ]
    control = dict(text="Base against base", better="base", than=("again",), control=True)
    return dict(
        tested="unseen scenes, by the loss of right answers",
        tasks=(dict(name="scenes", how="losses", questions=2000),),  # of some 390 scenes
        measures=(
            dict(key="scenes/loss", name="scenes, nats", sign=-1, families=FAMILIES, digits=3),
            dict(key="scenes/greedy", name="scenes, exact, %", sign=1, families=FAMILIES),
            *parts,
        ),
        claims=(
            *(dict(text=text, better=better, than=(worse,)) for text, better, worse in claims),
            control,
        ),
        readings=3,
        apart=10,
        looks=(4, 6, 8, 12),
        margin=MARGIN,
    )
