"""The section of the configuration for cross-attention, and what is to be known of variants of its
block besides their computation: who has them, products of gates, fields that they demand.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evlm_jax.config.ranges import Count, Positive, PositiveFloat
from evlm_jax.config.relations import Relation

if TYPE_CHECKING:
    from evlm_jax.config import EVLMConfig


@dataclass(frozen=True)
class XAttnConfig:
    """Gated cross-attention before the LLM layers (paper section 2)."""

    heads: Positive  # queries
    # keys and values, each shared by heads / kv_heads queries; the paper has as many as heads
    kv_heads: Positive
    head_dim: Positive  # r_c = heads * head_dim / hidden
    ffn: Positive  # r_f = ffn / hidden
    # a block before layers first, first + every, first + 2 * every, ...; 0: no block at all
    every: Count
    schedule: Literal[
        "blocked", "cyclic"
    ]  # tap i serves neighbouring layers, or layer l gets tap l mod G
    sinks: Count  # zero keys padded to the visual sequence
    query_block: Positive  # tokens of a query block; all of them see the same images
    eps: PositiveFloat  # of the norms
    first: Count = 0  # layers in front of the first block; open_flamingo has every - 1
    kv_norm: bool = True  # a norm of the visual states; open_flamingo has none
    norm_kind: Literal["layer", "rms"] = "layer"  # of the norms of the text
    qk_norm: Literal["none", "head"] = "none"  # an RMSNorm over the queries and keys of each head
    gated: bool = False  # the FFN is fc2(silu(fc1(x)) * up(x)), not fc2(gelu(fc1(x)))
    # tokens that see no image pass the FFN; False: the block is the identity for them
    ffn_without_image: bool = True
    # "parallel": within the layer, beside its self-attention, whose norm and output projection it
    # shares (mPLUG-Owl3); it has no FFN, so that `ffn` counts for nothing. All below is of that
    placement: Literal["before", "parallel"] = "before"
    query: Literal["own", "shared"] = "own"  # "shared": the queries of the self-attention
    # "mixing": what images give takes the place of a share of what the text gives, by token and
    # channel: sigmoid of a linear layer over what the text gives each head. "softmax": no gate, one
    # softmax over the keys of text and images
    gate: Literal["tanh", "mixing", "softmax"] = "tanh"
    # keys of an image turn by the position of its first media token, own queries by theirs
    key_rotary: bool = False

    @property
    def one_softmax(self) -> bool:
        """Whether attention to text and to images share their softmax."""
        return self.gate == "softmax"

    def unlike(self, fields: dict[str, Any]) -> list[str]:
        """Which of `fields` have other values here, in words."""
        own = {name: getattr(self, name) for name in fields}
        return [f"xattn.{name} = {own[name]}" for name in own if own[name] != fields[name]]


# A block of EVLM, and of every published model but mPLUG-Owl3.
PLAIN = {"placement": "before", "query": "own", "gate": "tanh", "key_rotary": False}
# Blocks that the PyTorch twin has: exports and `evlm convert verify` refuse others by name.
TWIN = {"placement": "before", "ffn_without_image": True}


def gate_products(cfg: "EVLMConfig") -> dict[str, tuple[int, tuple[int, int]]]:
    """{matrix of the attention's gate (models/gate.py): how often a token is multiplied by it, its
    inputs and outputs}.
    """
    x = cfg.xattn
    return {"linear": (x.heads, (x.head_dim, x.head_dim))} if x.gate == "mixing" else {}


def relations(cfg: "EVLMConfig") -> list[Relation]:
    """Relations of variants of the block, and of what sees images by it alone."""
    x, parallel, scaling = cfg.xattn, cfg.xattn.placement == "parallel", cfg.llm.rope_scaling
    alike = [
        (
            not parallel or getattr(x, name) == getattr(cfg.llm, name),
            f"xattn.{name}",
            f"must be llm.{name} = {getattr(cfg.llm, name)} where xattn.placement is parallel: both"
            " attentions have one output projection",
        )
        for name in ("heads", "head_dim")
    ]
    return alike + [
        (
            parallel or x.query == "own",
            "xattn.query",
            "can be shared where xattn.placement is parallel",
        ),
        (
            parallel or x.gate == "tanh",
            "xattn.gate",
            f"can be {x.gate} where xattn.placement is parallel: it joins two attentions",
        ),
        *_one_softmax(cfg),
        (
            parallel or not x.key_rotary,
            "xattn.key_rotary",
            "can be True where xattn.placement is parallel",
        ),
        (
            not x.key_rotary or scaling is None or scaling.kind != "dynamic",
            "xattn.key_rotary",
            "must be False where llm.rope_scaling.kind is dynamic",
        ),
        (
            x.every > 0 or cfg.media.sight == "last",
            "media.sight",
            "must be last where xattn.every is 0: what sees images is cross-attention",
        ),
        (
            not parallel or not cfg.moe.copies,
            "moe.copies",
            "must be 0 where xattn.placement is parallel: such a block has no FFN",
        ),
        (
            not parallel or not cfg.init.centre_norms,
            "init.centre_norms",
            "must be False where xattn.placement is parallel: the norm of the text is the layer's",
        ),
    ]


def _one_softmax(cfg: "EVLMConfig") -> list[Relation]:
    """Relations of a block whose scores share the softmax of its layer's."""
    x, scales = cfg.xattn, cfg.llm.scales
    if not x.one_softmax:
        return []
    return [
        (
            x.query == "shared",
            "xattn.query",
            "must be shared where xattn.gate is softmax: its scores are of the same queries",
        ),
        (
            not x.sinks,
            "xattn.sinks",
            "must be 0 where xattn.gate is softmax: who sees no image sees its text",
        ),
        (
            not (scales.query or scales.score_cap),
            "xattn.gate",
            "can be softmax where llm.scales.query and score_cap are 0: scores of images have"
            " neither",
        ),
        (
            cfg.train.attention == "xla",
            "train.attention",
            "must be xla where xattn.gate is softmax",
        ),
    ]
