"""A whole EVLM that compiles in seconds, and valid packed batches for it: what most tests are made
of.
"""

# ruff: noqa: C408 (sections as keyword arguments read like the config)

import math
from dataclasses import replace

import jax.numpy as jnp
import ml_collections
import numpy as np

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig, QuantConfig, from_config_dict
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan

CROSS_ONLY = (
    {"pattern": "^(xattn|media|bridge)/", "lr": 1.0},
    {"pattern": "^(vit|llm)/", "lr": None},
)
UPPER_VIT = (
    {"pattern": "^vit/blocks/[23]/", "lr": 0.5},
    *CROSS_ONLY,
)  # blocks 3 and 4 of 4, in 1-based numbers

_TINY = dict(
    name="tiny",
    vit=dict(
        depth=4, width=32, heads=4, mlp=64, patch=4, image_size=8, pretrained_size=8, norm="pre",
        bias="all", activation="gelu", layer_scale=True, class_token=True, registers=0,
        patch_bias=True, embed_norm=False, eps=1e-6, taps=(2, 3, 4), cuts=(),
        interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    ),
    llm=dict(
        vocab=256, hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=128, rope_theta=1e4,
        eps=1e-5, qkv_bias=False, tied=True, dynamic_ntk=0, logn=0,
    ),
    xattn=dict(
        heads=2, kv_heads=2, head_dim=16, ffn=32, every=1, schedule="blocked", sinks=1,
        query_block=8, eps=1e-5,
    ),
    moe=dict(
        copies=0, slices=2, top_k=2, gates="renormalise", capacity=0.0, balance=0.01, z=0.001,
        expert_block=8, upcycle="preserve",
    ),
    media=dict(tokens=2, placeholder="<|media|>"),
    bridge=dict(kind="routed", latents=3, depth=2, heads=2, head_dim=16, ffn=2),
    data=dict(
        sources=("vqa", "caption"), weights=(1.0, 1.0), tasks=(), ends="repeat", template="chatml",
        length=48, images=4, targets=24, image_group=1, slots=4, block_pairs=12, dialogs=0,
        isolate=True, window=8, resize="squash", scaled_decoding=False, most_drops=1.0,
        cache_features=False, seed=0,
    ),
    clean=dict(
        letters=0.2, digits=7, duplicates=0.5, links=("https?:", r"\.(com|png)"), words=3,
        dates=(r"\d{4}-\d\d-\d\d",), simplify=True, similarity=0.3, deviation=2.0, aspect=3.0,
        side=8, web_images=5, web_characters=200, web_similarity=0.2, page_confidence=0.8,
        page_characters=8, page_similarity=0.8,
    ),
    optim=dict(
        lr=1e-3, min_lr=1e-4, warmup=2, b1=0.9, b2=0.999, eps=1e-8, mu_dtype="float32",
        weight_decay=0.05, no_decay=("gate$", "norm", "bias$", "^media/"), clip=1.0,
        phases=(dict(start=0.0, warmup=0, rules=CROSS_ONLY),),
    ),
    train=dict(
        steps=8, batch=2, accumulate=1, dtype="float32", matmul_precision="float32",
        param_dtype="float32", frozen_dtype="float32", remat="none", loss_chunk=0, save_every=4,
        keep=2, log_every=1, monitors=(), monitor_every=0, monitor_questions=0, seed=0,
        peak_flops=0.0,
    ),
    mesh=dict(
        data=-1, fsdp=1, expert=1, tensor=1, slices=1, zero=2, frozen="replicated", images="all",
    ),
    init=dict(vision="", llm="", centre_norms=False),
)  # fmt: skip


BASELINES = {  # sections of the tiny config; its pictures have 4 patches
    "fused": dict(bridge=dict(kind="fused")),
    "flamingo": dict(bridge=dict(kind="flamingo"), media=dict(tokens=1)),
    "open_flamingo": dict(
        bridge=dict(kind="flamingo", prefix=False),
        xattn=dict(every=2, first=1, kv_norm=False, sinks=0),
        media=dict(tokens=1),
    ),
    "idefics": dict(
        bridge=dict(kind="flamingo", activation="relu", qk_norm="head", eps=1e-4),
        xattn=dict(every=2, kv_norm=False, sinks=0, norm_kind="rms", qk_norm="head", gated=True),
        media=dict(tokens=1),
    ),
    "mplug_owl3": dict(
        bridge=dict(kind="linear"),
        xattn=dict(
            every=2, first=1, kv_norm=False, sinks=0, heads=4, placement="parallel",
            query="shared", gate="mixing", key_rotary=True,
        ),
        media=dict(tokens=1, sight="all"),
    ),
    "mllama": dict(
        vit=dict(
            tiles=2, global_blocks=1, bias="mlp", layer_scale=False, patch_bias=False,
            embed_norm=True,
        ),
        llm=dict(tied=False, more_words=8),
        bridge=dict(kind="joined"),
        xattn=dict(
            every=2, first=1, kv_norm=False, sinks=0, norm_kind="rms", qk_norm="head", gated=True,
            ffn_without_image=False,
        ),
        media=dict(tokens=1, sight="neighbours"),
    ),
    "llava": dict(bridge=dict(kind="llava"), xattn=dict(every=0), media=dict(tokens=4)),
    "text only": dict(xattn=dict(every=0)),
}  # fmt: skip


def tiny_config(**overrides) -> EVLMConfig:
    """The tiny config with sections changed: `tiny_config(train=dict(steps=50),
    optim=dict(lr=1e-4))`.
    """
    config = ml_collections.ConfigDict(_TINY, type_safe=False)
    for section, values in overrides.items():
        if isinstance(values, dict) and section in config:
            for key, value in values.items():
                setattr(config[section], key, value)
        else:
            config[section] = values
    if "slots" not in overrides.get("data", {}):
        config.data.slots = config.data.image_group * config.data.images
    return from_config_dict(config)


def tiny_batch(cfg: EVLMConfig, seed: int, rows: int | None = None, fill: float = 1.0) -> Batch:
    """Random but valid packed rows as numpy, a function of `seed`: several documents a row, with 0
    to 2 images each. Image groups do not change the documents.

    Args:
      rows: of the batch; train.batch where left out.
      fill: share of the positions (and so of the targets) that rows may use; the rest is padding.
    """
    rng = np.random.default_rng(seed)
    made = [_row(cfg.ungrouped, rng, fill) for _ in range(rows or cfg.train.batch)]
    batch = Batch(
        *(
            None if made[0][name] is None else np.stack([row[name] for row in made])
            for name in Batch._fields
        )
    )
    return batch if cfg.data.image_group == 1 else in_groups(cfg, batch)


def in_groups(cfg: EVLMConfig, batch: Batch) -> Batch:
    """Rows that have image slots of their own, in image groups: used slots stand one behind
    another.
    """
    data, spec = cfg.data, Batch.spec(cfg, len(batch.tokens))
    fields = {
        name: None if array is None else array.copy() for name, array in batch._asdict().items()
    }
    kind = "taps" if batch.pixels is None else "pixels"
    fields[kind], plans = np.zeros(getattr(spec, kind).shape, getattr(batch, kind).dtype), []
    for first in range(0, len(batch.tokens), data.image_group):
        slot = 0
        for row in range(first, first + data.image_group):
            images, sees = (
                batch.visible_stop[row].max(),
                batch.visible_stop[row] > batch.visible_start[row],
            )
            fields[kind][first // data.image_group, slot : slot + images] = getattr(batch, kind)[
                row, :images
            ]
            for name in ("visible_start", "visible_stop"):
                fields[name][row, sees] += slot
            slot += images
        seen = (
            fields[name][first : first + data.image_group].ravel()
            for name in ("visible_start", "visible_stop")
        )
        plans.append(attention_plan(*seen, cfg.xattn.query_block, data.block_pairs))
    return Batch(**fields | {name: np.stack([p[name] for p in plans]) for name in plans[0]})


def _row(cfg: EVLMConfig, rng: np.random.Generator, fill: float) -> dict:
    data, vit, n = cfg.data, cfg.vit, cfg.media.tokens
    length = data.length
    row = dict(
        tokens=np.zeros(length),
        positions=np.zeros(length),
        visible_until=np.arange(length) + 1,
        media_slot=np.full(length, -1),
        visible_start=np.zeros(length),
        visible_stop=np.zeros(length),
        target_positions=np.zeros(data.targets),
        targets=np.full(data.targets, -1),
        target_source=np.zeros(data.targets),
    )
    row = {name: value.astype(np.int32) for name, value in row.items()}
    at, image, target, document = 0, 0, 0, 0
    while True:
        images, words = min(int(rng.integers(0, 3)), data.images - image), int(rng.integers(4, 9))
        size = (
            images * (n + 1) + words
        )  # a text token in front of every image sees what was visible before
        if at + size > fill * length:
            break
        row["positions"][at : at + size] = np.arange(size)
        row["visible_until"][at : at + size] = at + size
        row["tokens"][at : at + size] = rng.integers(0, cfg.llm.vocab - 1, size)
        for k in range(images):
            media = slice(at + k * (n + 1) + 1, at + (k + 1) * (n + 1))
            row["tokens"][media], row["media_slot"][media] = cfg.llm.vocab - 1, np.arange(n)
            first = image + k if cfg.media.sight == "last" else image
            row["visible_start"][media.start : at + size] = first
            row["visible_stop"][media.start : at + size] = image + k + 1
        answer = np.arange(at + size - words + 1, at + size)[: data.targets - target]
        spots = slice(target, target + len(answer))
        row["target_positions"][spots], row["targets"][spots] = answer - 1, row["tokens"][answer]
        row["target_source"][spots] = document % len(data.sources)
        at, image, target, document = at + size, image + images, target + len(answer), document + 1
    row |= (
        attention_plan(row["visible_start"], row["visible_stop"], cfg.query_block, data.block_pairs)
        if cfg.query_block
        else dict.fromkeys(AttentionPlan._fields)
    )
    pixels = rng.integers(0, 256, (data.images, *vit.input_shape)).astype(np.uint8)
    if vit.grid_by_picture:
        pixels[..., 3] = rng.integers(1, len(vit.grids) + 1, (data.images, 1, 1))
    taps = rng.standard_normal((data.images, len(vit.taps), vit.tokens, vit.width)).astype(
        jnp.bfloat16
    )
    return row | dict(
        pixels=None if data.cache_features else pixels, taps=taps if data.cache_features else None
    )


def tiny_towers(cfg: EVLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random towers by canonical name, of floats, in place of `convert.engine.load_towers`. They
    begin as the model's own, made by NumPy: compiling those takes longer than most tests.
    """
    rng = np.random.default_rng(seed)

    def values(name, shape):
        if "scale" in name or name.endswith("bias"):
            return np.full(shape, float("scale" in name), np.float32)
        spread = math.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.02
        return (spread * rng.standard_normal(shape)).astype(np.float32)

    shapes = parameter_shapes(replace(cfg, quant=QuantConfig())).items()
    return {name: values(name, shape) for name, shape in shapes if name[:4] in ("vit/", "llm/")}


class TinyData:
    """Batches that are a function of (seed, index), in place of `data.pipeline.batches`.

    `change(index, batch)` may spoil one.
    """

    def __init__(self, cfg: EVLMConfig, seed: int = 0, change=lambda index, batch: batch):
        self.cfg, self.seed, self.change, self.next = cfg, seed, change, 0

    def __iter__(self):
        return self

    def __next__(self):
        index, self.next = self.next, self.next + 1
        batch = tiny_batch(self.cfg, seed=1000 * self.seed + index)
        keys = [f"{index}/{row}" for row in range(self.cfg.train.batch)]
        return self.change(index, batch), {"keys": keys, "fill": {}, "drops": [], "cut": 0}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]
