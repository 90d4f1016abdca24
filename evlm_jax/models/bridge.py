"""What lies between the ViT's taps and the language model: nothing in EVLM, which hands taps to
layers; a module in the baselines.

    kind      taps [G, ..., S, V] become           after
    routed    themselves                           EVLM
    fused     one sequence [1, ..., S, V]          all taps beside each other, one projection: the
                                                   fair rival of routed taps
    joined    one sequence [1, ..., S, D]          all taps beside each other as they are, one
                                                   projection (Llama 3.2 Vision)
    flamingo  latents [1, ..., latents, V]         Flamingo's resampler of the last tap
                                                   (arXiv 2204.14198, appendix A.1.1)
    linear    one sequence [1, ..., S, D]          mPLUG-Owl3's linear layer of the last tap
                                                   (arXiv 2408.04840)
    llava     patches in the text [1, ..., P, D]   LLaVA-1.5's projector of the last tap
                                                   (arXiv 2310.03744)

All but the last are looked at by cross-attention. `llava` has none: its P patches stand in the text
at the image's media positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from evlm_jax.config import EVLMConfig
from evlm_jax.models.attention import attention
from evlm_jax.models.layers import ACTIVATIONS, MLP, REMAT, LayerNorm, Linear, heads, param, stack
from evlm_jax.parallel.sharding import shard


class Fused(nnx.Module):
    """A LayerNorm for each tap, whose scales grow with depth, and one projection of all:
    [G, ..., S, V] -> [1, ..., S, V].
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        taps, width = len(cfg.vit.taps), cfg.vit.width
        self.norms = stack(lambda r: LayerNorm(width, cfg.xattn.eps, r), taps, rngs)
        self.proj = Linear((taps * width, width), ("vision_mlp", "whole"), rngs)

    def __call__(self, taps: jax.Array) -> jax.Array:
        normed = jax.vmap(lambda norm, tap: norm(tap))(self.norms, taps)
        return self.proj(jnp.concatenate(tuple(normed), -1))[None]


class Joined(nnx.Module):
    """One projection of the last tap and, channel by channel, the others: [G, ..., S, V] ->
    [1, ..., S, D].
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        shape = (len(cfg.vit.taps) * cfg.vit.width, cfg.llm.hidden)
        self.proj = Linear(shape, ("vision_mlp", "whole"), rngs, bias=True)
        self.by_picture = cfg.vit.grid_by_picture

    def __call__(self, taps: jax.Array) -> jax.Array:
        others, last = jnp.moveaxis(taps[:-1], 0, -1), taps[-1]
        others = others.reshape(*last.shape[:-1], (len(taps) - 1) * last.shape[-1])
        states = self.proj(jnp.concatenate([last, others], -1))
        if self.by_picture:  # what a picture does not have stays zeros
            states = jnp.where((last != 0).any(-1, keepdims=True), states, 0)
        return states[None]


class ResamplerLayer(nnx.Module):
    """Latents attend to the picture and to themselves, then pass an FFN.

    Only the norms have a bias.
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        width, inner, eps = cfg.vit.width, cfg.bridge.heads * cfg.bridge.head_dim, cfg.resampler_eps
        self.norm_media, self.norm_latents, self.ffn_norm = (
            LayerNorm(width, eps, rngs) for _ in range(3)
        )
        self.q, self.k, self.v = (
            Linear((width, inner), ("vision", "vision_heads"), rngs) for _ in range(3)
        )
        self.o = Linear((inner, width), ("vision_heads", "vision"), rngs)
        self.q_norm, self.k_norm = (
            LayerNorm(cfg.bridge.head_dim, eps, rngs) if cfg.bridge.qk_norm == "head" else None
            for _ in range(2)
        )
        ffn, activation = cfg.bridge.ffn * width, cfg.bridge.activation
        self.ffn = MLP(width, ffn, activation, False, rngs, ("whole", "vision_mlp"))
        self.head_dim = cfg.bridge.head_dim

    def __call__(self, latents: jax.Array, picture: jax.Array) -> jax.Array:
        """latents [pictures, R, V], picture [pictures, S, V] -> latents."""
        own = self.norm_latents(latents)
        seen = jnp.concatenate([self.norm_media(picture), own], 1)
        q, k, v = (heads(x, self.head_dim) for x in (self.q(own), self.k(seen), self.v(seen)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        latents = latents + self.o(attention(q, k, v).reshape(*own.shape[:-1], -1))
        return latents + self.ffn(self.ffn_norm(latents))


class Resampler(nnx.Module):
    """The last tap by a fixed number of latents, after open_flamingo's PerceiverResampler:
    [G, ..., S, V] -> [1, ..., latents, V].
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.latents = param(rngs, (cfg.bridge.latents, cfg.vit.width), ("whole", "norm"), std=1.0)
        self.layers = stack(lambda r: ResamplerLayer(cfg, r), cfg.bridge.depth, rngs)
        self.norm = LayerNorm(cfg.vit.width, cfg.resampler_eps, rngs)
        self.remat = cfg.train.remat
        self.first = 0 if cfg.bridge.prefix else cfg.vit.prefix_tokens

    def __call__(self, taps: jax.Array) -> jax.Array:
        tap = taps[-1][..., self.first :, :]
        pictures = shard(tap.reshape(-1, *tap.shape[-2:]), "pictures")
        latents = jnp.broadcast_to(
            self.latents[...].astype(tap.dtype), (len(pictures), *self.latents.shape)
        )
        step = REMAT[self.remat](lambda x, layer: (shard(layer(x, pictures), "pictures"), None))
        latents = self.norm(jax.lax.scan(step, latents, self.layers)[0])
        return latents.reshape(1, *tap.shape[:-2], *self.latents.shape)


class Projector(nnx.Module):
    """Two layers around a GELU for each patch of the last tap, the tokens in front left out:
    [G, ..., S, V] -> [1, ..., P, D].
    """

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.fc1 = Linear((cfg.vit.width, cfg.llm.hidden), ("whole", "vision_mlp"), rngs, bias=True)
        self.fc2 = Linear(
            (cfg.llm.hidden, cfg.llm.hidden), ("vision_mlp", "whole"), rngs, bias=True
        )
        self.first = cfg.vit.prefix_tokens

    def __call__(self, taps: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS["gelu"](self.fc1(taps[-1][..., self.first :, :])))[None]


class Widened(nnx.Module):
    """The last tap in the width of the text: [G, ..., S, V] -> [1, ..., S, D]."""

    def __init__(self, cfg: EVLMConfig, rngs: nnx.Rngs):
        self.proj = Linear(
            (cfg.vit.width, cfg.llm.hidden), ("vision_mlp", "whole"), rngs, bias=True
        )

    def __call__(self, taps: jax.Array) -> jax.Array:
        return self.proj(taps[-1])[None]


KINDS = {
    "fused": Fused,
    "joined": Joined,
    "flamingo": Resampler,
    "linear": Widened,
    "llava": Projector,
}


def make(cfg: EVLMConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    """The bridge of `cfg`; None where cross-attention reads the taps themselves."""
    return None if cfg.bridge.kind == "routed" else KINDS[cfg.bridge.kind](cfg, rngs)


def write(views: jax.Array, image: jax.Array, patch: jax.Array) -> jax.Array:
    """Embeddings of media positions: views [1, C, I, P, D], image slot and patch number [B, T] ->
    [B, T, D].

    B / C neighbouring rows are an image group. Values at other positions are undefined, and unused.
    """
    _, groups, _, patches, width = views.shape
    index = (image * patches + jnp.maximum(patch, 0)).reshape(groups, -1, 1)
    return jnp.take_along_axis(views.reshape(groups, -1, width), index, axis=1).reshape(
        *image.shape, width
    )
