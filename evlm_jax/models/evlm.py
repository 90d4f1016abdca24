"""EVLM: ViT taps, gated cross-attention before the layers of a language model, learnable media
tokens. Composition only.

Its baselines are the same model with something between taps and layers (bridge.py), or without
cross-attention.

Unusual: all taps are stacked, and each cross-attention block picks its own by number: `blocked`,
`cyclic` and any other schedule are the same program.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig
from evlm_jax.flops import real_tokens
from evlm_jax.models import bridge, lora, moe, quant, xattn
from evlm_jax.models.layers import param
from evlm_jax.models.llm import LLM, finished, scaled
from evlm_jax.models.rotary import image_turns, rope_tables
from evlm_jax.models.text_attention import TEXT, text_attention_op
from evlm_jax.models.trunk import Passed, run_layers
from evlm_jax.models.vit import ViT
from evlm_jax.ops.grouped_attention import AttentionPlan, attention_form, grouped_attention
from evlm_jax.ops.matmul import product
from evlm_jax.ops.platform import platform
from evlm_jax.parallel.sharding import shard, shard_map_local

IMAGE_KEYS = ("rows", None, None, "kv_heads")


def cross_attention_op(cfg: EVLMConfig) -> Callable:
    """`grouped_attention` of a device's image groups and heads: q [B, T, N, H], k and v
    [C, I, S', K, H], plan, `tokens_there`.
    """
    form = attention_form(cfg.train.attention, cfg.train.dtype)
    sums = cfg.xattn.one_softmax
    if form != "pallas":  # cuDNN knows no pairs of a block of tokens and an image
        form = "loop" if platform() == "cpu" and not sums else "xla"

    def attend(q, k, v, plan, *there):
        return grouped_attention(q, k, v, plan, cfg.xattn.sinks, *there, form=form, sums=sums)

    there = (("rows",),) * cfg.vit.grid_by_picture
    outputs = (TEXT, TEXT) if sums else TEXT
    return shard_map_local(attend, (TEXT, IMAGE_KEYS, IMAGE_KEYS, ("rows",), *there), outputs)


def tokens_there(cfg: EVLMConfig, states: jax.Array | None) -> tuple[jax.Array, ...]:
    """Of visual states [G', ..., S', V] those that a picture has, bool [..., S'], for
    `cross_attention_op`; () where every picture has all, or none is seen.
    """
    by_picture = cfg.vit.grid_by_picture and states is not None
    return ((states[0] != 0).any(-1),) if by_picture else ()


class Media(nnx.Module):
    """Learnable embeddings that represent an image in the text stream."""

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.embedding = param(
            rngs, (cfg.media.tokens, cfg.llm.hidden), ("whole", "whole"), std=0.02
        )


def _cross_attention(cfg: EVLMConfig, rngs: nnx.Rngs) -> xattn.Block | None:
    """The stack of all blocks."""
    if not cfg.cross_layers:
        return None
    return jax.vmap(lambda r: xattn.Block(cfg, r))(xattn.layer_rngs(cfg, rngs))


# Parts of the model, in the order in which they draw random numbers; None where `cfg` has none.
PARTS: dict[str, Callable[[EVLMConfig, nnx.Rngs], nnx.Module | None]] = {
    "vit": lambda cfg, rngs: ViT(cfg.vit, rngs, cfg.train.remat, cfg.train.attention),
    "llm": lambda cfg, rngs: LLM(cfg.llm, rngs),
    "xattn": _cross_attention,
    # Where a bridge is "llava", patches stand in their place.
    "media": lambda cfg, rngs: Media(cfg, rngs) if cfg.bridge.kind != "llava" else None,
    "bridge": bridge.make,
}
TOWERS = ("vit", "llm")  # come from checkpoints, the other parts may begin as they declare


def _precisely(method: Callable) -> Callable:
    """The method under train.matmul_precision."""

    @functools.wraps(method)
    def call(self, *args, **named):
        with jax.default_matmul_precision(self.cfg.train.matmul_precision):
            return method(self, *args, **named)

    return call


def encoder(model: "EVLM", jit: Callable = jax.jit) -> Callable[[jax.Array], jax.Array]:
    """`model.encode`, compiled, which holds the vision tower alone."""
    graphdef, tower, rest = nnx.split(model, nnx.PathContains("vit"), ...)
    shapes = jax.eval_shape(lambda: rest)
    encode = jit(lambda tower, pixels: nnx.merge(graphdef, tower, shapes).encode(pixels))
    return functools.partial(encode, tower)


class EVLM(nnx.Module):
    """The whole model. Parameters are float32 at initialisation;
    compute is in `cfg.train.dtype`.
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        for name, make in PARTS.items():
            setattr(self, name, make(cfg, rngs))
        lora.adapt(self, cfg, rngs)
        quant.hold(self, cfg)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of all activations."""
        return jnp.dtype(self.cfg.train.dtype)

    @_precisely
    def encode(self, pixels: jax.Array) -> jax.Array:
        """uint8 [..., h, w, 3] -> taps [..., G, S, V]; with a fourth value that numbers the grid of
        each picture, zeros where it has no tile.
        """
        mean, std = jnp.array(self.cfg.vit.mean), jnp.array(self.cfg.vit.std)
        x = ((pixels[..., :3] / 255.0 - mean) / std).astype(self.dtype)
        grids = pixels[..., 0, 0, 3].ravel() if self.cfg.vit.grid_by_picture else None
        taps = self.vit(x.reshape(-1, *x.shape[-3:]), grids)
        return taps.reshape(*pixels.shape[:-3], *taps.shape[1:])

    def embed(
        self, tokens: jax.Array, media_slot: jax.Array, patches: jax.Array | None = None
    ) -> jax.Array:
        """Word embeddings, and at media positions the learnable rows, or `patches` [B, T, D] where
        given: [B, T] -> [B, T, D].
        """
        media = (
            self.media.embedding[...][jnp.maximum(media_slot, 0)] if patches is None else patches
        )
        return jnp.where(
            media_slot[..., None] >= 0,
            media.astype(self.dtype),
            scaled(self.llm.words(tokens).astype(self.dtype), self.cfg.llm.scales.embedding),
        )

    def hidden(self, batch: Batch) -> jax.Array:
        """The language model's output after its final norm, [B, T, D]."""
        return self.forward_with_aux(batch)[0]

    def forward_with_aux(self, batch: Batch) -> tuple[jax.Array, moe.Routing | None]:
        """`hidden`, and the routing of each block's mixture of experts, stacked; None where the
        FFNs are dense.
        """
        hidden, passed = self.forward_with_observer(batch, self.visual_states(batch))
        return hidden, passed.routing

    def taps(self, batch: Batch) -> jax.Array:
        """The batch's taps [G, C, I, S, V], from pixels or as they are given."""
        taps = self.encode(batch.pixels) if batch.taps is None else batch.taps.astype(self.dtype)
        return shard(jnp.moveaxis(shard(taps, "rows", "images"), 2, 0), None, "rows", "images")

    def visual_states(self, batch: Batch) -> jax.Array | None:
        """What the language model sees of images, [G', C, I, S', V or D] as bridge.py has it; None
        where it sees nothing.
        """
        return self.bridged(self.taps(batch)) if self.cfg.uses_images else None

    @_precisely
    def bridged(self, taps: jax.Array) -> jax.Array:
        """[G, C, I, S, V] -> `visual_states`."""
        if self.bridge is None:
            return taps
        with jax.named_scope("bridge"):
            return shard(self.bridge(taps), None, "rows", "images")

    def _self_attention(self, batch: Batch) -> Callable:
        """(number of the layer, q [B, T, N, H], k and v [B, T, K, H]) -> (attention outputs, None),
        by what tokens of the batch see.
        """
        attend = text_attention_op(self.cfg, batch.visible_until, batch.positions)
        return lambda number, q, k, v: (attend(number, q, k, v), None)

    def _grouped_cross_attention(self, batch: Batch, states: jax.Array | None) -> Callable:
        """(queries [B, T, N, H], keys and values [C, I, S', K, H]) -> (attention outputs, None), by
        the batch's plan.
        """
        plan, attend = (
            AttentionPlan(
                batch.block_tokens, batch.token_place, batch.pair_block, batch.pair_image
            ),
            cross_attention_op(self.cfg),
        )
        there = tokens_there(self.cfg, states)
        return lambda q, k, v: (attend(q, k, v, plan, *there), None)

    def _turned(self, batch: Batch, states: jax.Array | None) -> Callable:
        """`image_turns` of a batch."""
        place = batch.media_slot, batch.visible_stop - 1, batch.positions
        return image_turns(self.cfg, *place, () if states is None else states.shape[1:3])

    @_precisely
    def forward_with_observer(
        self,
        batch: Batch,
        states: jax.Array | None,
        observe: Callable = lambda block, state, x: None,
        cross_attend: Callable | None = None,
    ) -> tuple[jax.Array, Passed]:
        """`hidden`, and what the layers and blocks give besides.

        Args:
          states: `visual_states`.
          observe: (block, its visual state [C, I, S', V], its input x [B, T, D]) -> anything;
            stacked over blocks in `Passed.observed`.
          cross_attend: (q [B, T, N, H], k and v [C, I, S', K, H]) -> (attention output, anything);
            by default by the batch's plan.
        """
        patches = None
        if self.cfg.bridge.kind == "llava":
            patches = shard_map_local(
                bridge.write, ((None, "rows"), ("rows",), ("rows",)), ("rows",)
            )(states, batch.visible_start, batch.media_slot)
        x = self.embed(batch.tokens, batch.media_slot, patches)
        rope = rope_tables(self.cfg.llm, batch.positions)
        kind = jnp.where(
            batch.media_slot >= 0, moe.MEDIA, jnp.where(real_tokens(batch), moe.TEXT, moe.PADDING)
        )
        tap_of = jnp.array(self.cfg.tap_of_cross_layer)
        cross_attend = cross_attend or self._grouped_cross_attention(batch, states)
        turned = self._turned(batch, states)

        def look(block, number, q):
            keys, values = block.keys_values(states[tap_of[number]])
            kept = (turned(keys, number), values)
            return cross_attend(q, *(shard(a, "rows", "images", None, "image_heads") for a in kept))

        x, passed = run_layers(
            self.cfg,
            self.llm.layers,
            self.xattn,
            x,
            rope,
            self_attend=self._self_attention(batch),
            cross_attend=look,
            observe=lambda block, number, x: observe(block, states[tap_of[number]], x),
            kind=kind,
            sees=batch.visible_stop > batch.visible_start,
            remat=self.cfg.train.remat,
        )
        return self.llm.ln_f(x), passed

    def readout(self) -> Callable[[jax.Array], jax.Array]:
        """A function [..., D] -> float32 [..., vocab].

        On a mesh the head is gathered once, for all its calls.
        """
        spec, head = self.llm.head_matrix(self.cfg.train.operands)

        def logits(hidden: jax.Array) -> jax.Array:
            with (
                jax.default_matmul_precision(self.cfg.train.matmul_precision),
                jax.named_scope("head"),
            ):
                return finished(self.cfg.llm, product(spec, hidden, head))

        return logits

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of `hidden`: [..., D] -> float32 [..., vocab]."""
        return self.readout()(hidden)
