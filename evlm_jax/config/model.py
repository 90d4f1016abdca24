"""The sections of the configuration (config/__init__.py) that say what the model is."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from evlm_jax.config.ranges import (
    Count,
    NonNegative,
    Positive,
    PositiveFloat,
    PositiveShare,
    Share,
)
from evlm_jax.config.schema import Pattern


@dataclass(frozen=True)
class ViTConfig:
    """A ViT by choices, not by family.

    DINOv2 is pre, all, gelu, layer_scale; EVA02-CLIP-E is res_post, qv, gelu; CLIP is pre, all,
    quick_gelu, embed_norm.
    """

    depth: Positive  # blocks
    width: Positive  # V
    heads: Positive  # divide width
    mlp: Positive  # hidden width of a block's MLP
    patch: Positive  # side in pixels
    # pixels of the input: the side of a square, or height and width; S = patches + prefix tokens
    image_size: Positive | tuple[Positive, Positive]
    pretrained_size: Positive  # side of the square that the stored position table was trained at
    norm: Literal["pre", "res_post"]  # x + f(norm(x)) or x + norm(f(x))
    # "qv": no bias on the keys; "out": none on queries, keys and values; "mlp": of the MLP alone;
    # "none": none in blocks
    bias: Literal["all", "qv", "out", "mlp", "none"]
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]  # "gelu" is by erf
    layer_scale: bool  # a factor a channel behind attention and MLP
    class_token: bool  # in front of the patches, with a position
    registers: Count  # tokens after the class token, without position
    patch_bias: bool  # of the patch embedding
    embed_norm: bool  # CLIP's ln_pre
    eps: PositiveFloat  # of the norms
    taps: tuple[Positive, ...]  # 1-based block numbers whose outputs are returned, ascending
    cuts: tuple[
        Positive, ...
    ]  # further block numbers where the stack is cut: the freeze boundaries of every stage
    interpolation: Literal[
        "bicubic", "antialias"
    ]  # position table, pretrained_size -> image_size; a = -0.75 or -0.5
    mean: tuple[Share, Share, Share]  # RGB normalisation of the tower
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    # base of rotary positions of the patches, in place of a table; 0: the table (DINOv3 has 100)
    rotary: NonNegative = 0.0
    gated: bool = False  # the MLP is fc2(activation(fc1(x)) * up(x)): DINOv2 giant
    norm_kind: Literal["layer", "rms"] = "layer"  # of all norms of the tower (AIMv2 has RMSNorm)
    patch_norm: bool = False  # a norm of the patches before their positions are added: AIMv2
    # "all": an RMSNorm over the queries and one over the keys of all heads (InternViT)
    qk_norm: Literal["none", "all"] = "none"
    # most tiles of a picture, squares of pretrained_size that see each other (models/tiles.py):
    # image_size is a grid of them; 0: a picture is one (Llama 3.2 Vision has 4)
    tiles: Count = 0
    # each picture has the grid that fits it best (data/tiling.py), and image_size is room for
    # `tiles` below one another; False: image_size is the grid of all pictures
    grid_by_picture: bool = False
    # of a tower with tiles, the last blocks, which have gates and stand behind a norm
    global_blocks: Count = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        side = self.image_size
        return side if isinstance(side, tuple) else (side, side)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of a picture's pixels: height, width and red, green, blue; where each picture has a grid
        of its own, its number is a fourth value of every pixel.
        """
        return *self.size, 3 + self.grid_by_picture

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Grids of at most `tiles` tiles, down and across, in the order of their numbers."""
        sides = range(1, self.tiles + 1)
        return tuple((a, b) for a in sides for b in sides if a * b <= self.tiles)

    @property
    def laid(self) -> tuple[int, int]:
        """The grid of tiles that a picture is cut into; one of a tower without tiles."""
        height, width = self.size
        side = self.pretrained_size
        return (height // side, width // side) if self.tiles else (1, 1)

    @property
    def table_grid(self) -> tuple[int, int]:
        """Patches down and across of a picture, or of a tile: those that have positions."""
        (rows, columns), (down, across) = self.grid, self.laid
        return rows // max(down, 1), columns // max(across, 1)

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers, in front of the patches of a picture or of a tile."""
        return int(self.class_token) + self.registers

    @property
    def tokens(self) -> int:
        """S, the visual tokens of one image: its tiles one behind the other."""
        return self.patches + self.prefix_tokens * math.prod(self.laid)

    @property
    def sequence(self) -> int:
        """Tokens of one image in the blocks: S; with tiles those of all, each filled up to a
        multiple of 8.
        """
        if not self.tiles:
            return self.tokens
        return self.tiles * 8 * -(-self.tokens // math.prod(self.laid) // 8)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change so that a model reads more than it was trained on first
    (models/rotary.py).

    Frequencies that turn more than `fast` times in `original` tokens stay, those below `slow` are
    divided by `factor`; "linear" divides all. "dynamic" makes the base of a document grow that is
    longer than `original`.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: PositiveFloat
    original: Count = 0  # tokens; not of "linear"
    slow: PositiveFloat = 1.0  # this and the next are of "yarn" and "llama3"
    fast: PositiveFloat = 32.0
    attention: PositiveFloat = 1.0  # on cos and sin
    truncate: bool = True  # yarn: what stays begins and ends at whole numbers of frequencies
    layers: Literal["all", "full"] = "all"  # "full": those without a window alone
    # queries at position p are multiplied by 1 + query * log(1 + p // original): Ministral 3
    query: NonNegative = 0.0


@dataclass(frozen=True)
class Scales:
    """Factors beside the weights. 1, and 0 where 0 is named, are of no effect."""

    embedding: PositiveFloat = 1.0  # of words; not of media tokens
    residual: PositiveFloat = 1.0  # of what attention and MLP add
    query: NonNegative = 0.0  # of products of queries and keys; 0: head_dim ** -0.5
    logits: PositiveFloat = 1.0  # logits are divided by it
    score_cap: NonNegative = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    logit_cap: NonNegative = 0.0  # logits likewise


@dataclass(frozen=True)
class LLMConfig:
    """A decoder with RMSNorm, rotary positions and a gated MLP, by choices, not by family.

    What has a default is Llama's. Where a field has a value a layer, they are taken in turn: layer
    l has number l modulo their count.
    """

    vocab: Positive  # words that are predicted, the first rows of the embedding
    hidden: Positive  # D
    layers: Positive  # L
    heads: Positive  # N
    kv_heads: Positive  # K; divides heads
    head_dim: Positive  # H
    mlp: Positive  # hidden width of a layer's MLP
    rope_theta: PositiveFloat  # base of the rotary positions
    eps: PositiveFloat  # of the norms
    qkv_bias: bool  # of queries, keys and values
    tied: bool  # the output head is the embedding
    # tokens of a prompt beyond which its rotary base grows in generation (models/long_context.py);
    # 0: never
    dynamic_ntk: Count
    logn: Count  # tokens beyond which queries are scaled up in generation; 0: never
    # an RMSNorm over the queries and keys of each head (Qwen3), or over those of all heads (OLMo 2)
    qk_norm: Literal["none", "head", "all"] = "none"
    # "pre": x + f(norm(x)); "post": x + norm(f(x)) (OLMo 2); "both": x + norm(f(norm(x))). "+1":
    # scales are 1 + the stored ones (Gemma)
    norms: Literal["pre", "post", "both", "pre+1", "both+1"] = "pre"
    window: tuple[Count, ...] = (
        0,
    )  # a layer's last tokens that it sees, its own with them; 0: all
    rope: tuple[NonNegative, ...] = ()  # a layer's rotary base, 0: no rotation; (): rope_theta
    rope_scaling: RopeScaling | None = None
    rotary_share: PositiveShare = 1.0  # of a head's dimensions, from the first on, that turn
    scales: Scales = Scales()
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the MLP's gate
    more_words: Count = 0  # rows of the embedding beyond `vocab`: words that are never predicted

    @property
    def words(self) -> int:
        """Rows of the embedding."""
        return self.vocab + self.more_words

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each layer; 0 sees all."""
        return tuple(self.window[i % len(self.window)] for i in range(self.layers))

    @property
    def layers_of_window(self) -> dict[int, tuple[int, ...]]:
        """Numbers of the layers with each window, in the order of their first layers."""
        windows = self.layer_windows
        return {
            window: tuple(i for i, own in enumerate(windows) if own == window)
            for window in dict.fromkeys(windows)
        }

    @property
    def layer_ropes(self) -> tuple[tuple[float, bool], ...]:
        """(base, whether its frequencies are scaled) of each layer."""
        bases = self.rope or (self.rope_theta,)
        every = self.rope_scaling is not None and self.rope_scaling.layers == "all"
        return tuple(
            (base, base > 0 and (every or (self.rope_scaling is not None and not window)))
            for i, window in enumerate(self.layer_windows)
            for base in [bases[i % len(bases)]]
        )

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that turn."""
        return int(self.head_dim * self.rotary_share)


@dataclass(frozen=True)
class MoEConfig:
    """Fine-grained experts in the FFN of the cross-attention, beside a world expert that is a whole
    FFN (paper section 2).
    """

    copies: Count  # of the dense FFN; 0: the FFN is dense, and nothing below counts
    # of a copy, along its hidden dimension: E = copies * slices experts of hidden xattn.ffn /
    # slices
    slices: Positive
    top_k: Count  # experts of a token
    gates: Literal[
        "renormalise", "softmax"
    ]  # of the chosen k: they sum to 1, or as they are among all E
    # an expert takes at most capacity * tokens * top_k / E choices and drops the rest; 0: no limit
    capacity: NonNegative
    balance: NonNegative  # coefficient of the load-balance loss, a layer
    z: NonNegative  # coefficient of the router's z-loss, a layer
    expert_block: Positive  # rows that are multiplied together; all of them have one expert
    upcycle: Literal[
        "preserve", "preserve_zero", "paper"
    ]  # how a dense FFN becomes experts (upcycle.py)

    @property
    def experts(self) -> int:
        """E; 0 where the FFN is dense."""
        return self.copies * self.slices


@dataclass(frozen=True)
class MediaConfig:
    """Learnable embeddings that represent an image in the text stream."""

    # 16 in the paper; the number of patches where bridge.kind is "llava", which writes them here
    # instead
    tokens: Positive
    placeholder: str  # a spare token of the vocabulary, repeated `tokens` times
    # a token on both sides of an image, one between neighbours, as IDEFICS has it; empty: none
    around: str = ""
    # images that a token sees: a media token its own, text the last one or all frames of its video;
    # or images that stand side by side, each with those before it, and text behind them all of
    # them, as in Llama 3.2 Vision; or each all that do not stand behind it, as in mPLUG-Owl3
    sight: Literal["last", "neighbours", "all"] = "last"


@dataclass(frozen=True)
class BridgeConfig:
    """What the language model sees of an image: EVLM, or a baseline it is compared with
    (models/bridge.py).
    """

    # taps by layer; all taps in one; latents of the last; its patches as text; the last by a linear
    # layer in the width of the text, or all of them
    kind: Literal["routed", "fused", "flamingo", "llava", "linear", "joined"]
    latents: Positive  # of an image; this and what follows is of the resampler of "flamingo"
    depth: Positive  # layers
    heads: Positive  # of its attention
    head_dim: Positive  # width of one
    ffn: Positive  # hidden width of its FFNs, in widths of the ViT
    # it reads the class token and registers, too; open_flamingo's patches alone
    prefix: bool = True
    eps: NonNegative = 0.0  # of its norms; 0: xattn.eps
    activation: Literal["gelu", "relu"] = "gelu"  # of its FFNs
    qk_norm: Literal["none", "head"] = "none"  # a LayerNorm over the queries and keys of each head


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters (LoRA, arXiv 2106.09685): beside a matrix stands the product of two small ones,
    `lora_a` and `lora_b`, which begins at 0 (models/lora.py). What is trained is said by the rules
    of optim.phases alone.
    """

    # regular expressions, searched in the canonical names of matrices: those that one is found in
    # are adapted; (): none
    patterns: tuple[Pattern, ...] = ()
    rank: Positive = 16  # inner width of the product
    alpha: PositiveFloat = 16.0  # the product counts alpha / rank times

    @property
    def scale(self) -> float:
        """How often the product counts."""
        return self.alpha / self.rank


# Patterns of all that can be quantised of the towers.
TOWER_MATRICES = (r"^(vit/blocks|llm/layers)/.*/kernel$", "^llm/(embed$|head/)")


@dataclass(frozen=True)
class QuantConfig:
    """Frozen matrices that are held in 8 or 4 bits, on disk and in memory (models/quant.py)."""

    # regular expressions, searched in the canonical names of matrices: those that one is found in
    # are quantised; (): none
    patterns: tuple[Pattern, ...] = ()
    kind: Literal["int8", "int4", "nf4"] = "int8"  # "nf4": 16 quantiles of a normal distribution
    tile: Positive = 64  # values, along the axis that products sum over, that share a scale
    int8: tuple[Pattern, ...] = ()  # of the matrices chosen, those held in int8 whatever `kind` is

    def kind_of(self, name: str) -> str:
        """How a chosen matrix with this canonical name is held."""
        return "int8" if any(re.search(pattern, name) for pattern in self.int8) else self.kind
