"""Configuration: frozen dataclasses, made once from an `ml_collections.ConfigDict` at the door.

Experiments return ConfigDicts (overridable as `--config.optim.lr=1e-4`); `from_config_dict` turns one into an `EVLMConfig`
and refuses unknown keys, missing keys and wrong types with the key's full name. Sizes are read from here and nowhere else.

Letters used for shapes everywhere in this package:
  B batch rows     T text positions   I image slots of a pool  S visual tokens of one image   D LLM hidden
  V visual width   N query heads      K key/value heads        H head dim                     F FFN hidden
  L layers         G tap groups       M supervised targets     J tiles of a pool              P (tile, image) pairs
  E experts        C pools of rows
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import ml_collections

from evlm_jax.config_data import CleanConfig, DataConfig
from evlm_jax.strict import build

Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ViTConfig:
    """A ViT by choices, not by family.

    DINOv2: pre, all, gelu, layer_scale. EVA02-CLIP-E: res_post, qv, gelu. CLIP: pre, all, quick_gelu, embed_norm.
    """

    depth: int
    width: int
    heads: int
    mlp: int
    patch: int
    image_size: int  # pixels of the square input; S = (image_size / patch)**2 + prefix tokens
    pretrained_size: int  # pixels the stored position table was trained at
    norm: Literal["pre", "res_post"]  # x + f(norm(x)) or x + norm(f(x))
    bias: Literal["all", "qv"]  # "qv": no bias on the keys
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"]  # "gelu" is by erf
    layer_scale: bool
    class_token: bool
    registers: int  # tokens after the class token, without position
    patch_bias: bool
    embed_norm: bool  # CLIP's ln_pre
    eps: float
    taps: tuple[int, ...]  # 1-based block numbers whose outputs are returned, ascending
    cuts: tuple[int, ...]  # further block numbers where the stack is cut: the freeze boundaries of every stage
    interpolation: Literal["bicubic", "antialias"]  # position table, pretrained_size -> image_size; a = -0.75 or -0.5
    mean: tuple[float, float, float]  # RGB normalisation of the tower
    std: tuple[float, float, float]

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers, in front of the patches."""
        return int(self.class_token) + self.registers

    @property
    def tokens(self) -> int:
        """S, the visual tokens of one image."""
        return self.grid**2 + self.prefix_tokens


@dataclass(frozen=True)
class LLMConfig:
    """A pre-norm decoder with RMSNorm, rotary positions and a gated SiLU MLP: Llama, SmolLM2, Qwen 1.0, Qwen2."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    eps: float
    qkv_bias: bool
    tied: bool  # the output head is the embedding
    dynamic_ntk: int  # tokens of a prompt beyond which its rotary base grows in generation (models/long_context.py); 0: never
    logn: int  # tokens beyond which queries are scaled up in generation; 0: never


@dataclass(frozen=True)
class XAttnConfig:
    """Gated cross-attention before the LLM layers (paper section 2)."""

    heads: int
    head_dim: int  # r_c = heads * head_dim / hidden
    ffn: int  # r_f = ffn / hidden
    every: int  # a block before layers 0, every, 2 * every, ...
    schedule: Literal["blocked", "cyclic"]  # tap i serves neighbouring layers, or layer l gets tap l mod G
    sinks: int  # zero keys padded to the visual sequence
    tile: int  # tokens of one attention tile; all tokens of a tile see the same images
    eps: float


@dataclass(frozen=True)
class MoEConfig:
    """Fine-grained experts in the FFN of the cross-attention, beside a world expert that is a whole FFN (paper section 2)."""

    copies: int  # of the dense FFN; 0: the FFN is dense, and nothing below counts
    slices: int  # of a copy, along its hidden dimension: E = copies * slices experts of hidden xattn.ffn / slices
    top_k: int  # experts of a token
    gates: Literal["renormalise", "softmax"]  # of the chosen k: they sum to 1, or as they are among all E
    capacity: float  # an expert takes at most capacity * tokens * top_k / E choices and drops the rest; 0: no limit
    balance: float  # coefficient of the load-balance loss, a layer
    z: float  # coefficient of the router's z-loss, a layer
    tile: int  # rows of a tile; all rows of a tile have the same expert
    upcycle: Literal["preserve", "preserve_zero", "paper"]  # how a dense FFN becomes experts (upcycle.py)

    @property
    def experts(self) -> int:
        """E; 0 where the FFN is dense."""
        return self.copies * self.slices


@dataclass(frozen=True)
class MediaConfig:
    """Learnable embeddings that stand for an image in the text stream."""

    tokens: int  # 16 in the paper
    placeholder: str  # a spare token of the vocabulary, repeated `tokens` times


@dataclass(frozen=True)
class Rule:
    """First match wins. `lr` multiplies the schedule; None freezes."""

    pattern: str  # regular expression, searched in the canonical parameter name
    lr: float | None


@dataclass(frozen=True)
class Phase:
    """What is trained from `start` (a fraction of the steps) on."""

    start: float
    warmup: int  # extra linear warm-up, in steps, of the parameters that become trainable in this phase
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine to `min_lr`, clip by global norm (paper table 6)."""

    lr: float
    min_lr: float
    warmup: int
    b1: float
    b2: float
    eps: float
    mu_dtype: Float  # first moments; second ones need the mantissa of param_dtype
    weight_decay: float
    no_decay: tuple[str, ...]  # patterns of canonical names without weight decay
    clip: float
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int
    batch: int  # rows of an optimizer step, over all devices
    accumulate: int  # micro-batches of a step; divides `batch`
    dtype: Float  # compute
    matmul_precision: Float  # operands of products, where the dtype is wider
    param_dtype: Float  # trainable parameters and second moments
    frozen_dtype: Float  # frozen towers
    remat: Literal["none", "dots", "full"]  # computed again in the backward pass: nothing, all but linear layers, all
    loss_chunk: int  # targets of a row whose logits exist together, computed again in the backward pass; 0: all, kept
    save_every: int
    keep: int
    log_every: int
    seed: int
    peak_flops: float  # of one device, for MFU; 0 leaves MFU out

    @property
    def operands(self) -> str:
        """Dtype of the operands of products."""
        return "bfloat16" if "bfloat16" in (self.dtype, self.matmul_precision) else "float32"


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis (mesh.py); their product is the number of devices. One of `data` and `fsdp` may be -1: what the others leave."""

    data: int  # copies of everything, each with its own rows; several slices of a pod are joined along this axis
    fsdp: int  # rows, and what is stored in pieces
    expert: int  # rows and pieces likewise, and the experts of a mixture
    tensor: int  # heads, hidden layers of FFNs, and the vocabulary
    slices: int  # of a multi-slice machine; divides `data`
    zero: Literal[2, 3]  # trainable parameters are gathered once a step, or layer by layer when they are needed
    frozen: Literal["sharded", "replicated"]  # frozen parameters, over `fsdp` and `expert`
    images: Literal["all", "rows"]  # the ViT's images over all axes, or over the axes of rows and its heads over `tensor`


@dataclass(frozen=True)
class InitConfig:
    """Where the towers come from, an asset name, a directory or a file; how the new parameters start."""

    vision: str
    llm: str
    centre_norms: bool  # the cross-attention's norms from the first batch (models/norm_init.py); False: scale 1, bias 0


@dataclass(frozen=True)
class EVLMConfig:
    """Everything that decides a run."""

    name: str
    vit: ViTConfig
    llm: LLMConfig
    xattn: XAttnConfig
    moe: MoEConfig
    media: MediaConfig
    data: DataConfig
    clean: CleanConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig
    init: InitConfig

    def __post_init__(self):
        check(self)

    @property
    def pools(self) -> int:
        """Pools of a batch."""
        return self.train.batch // self.data.pool

    @property
    def apart(self) -> "EVLMConfig":
        """For evaluation and generation: where rows share image slots, every row has its own instead, and pairs for all its text."""
        data = self.data
        if data.pool == 1:
            return self
        pairs = min(data.pairs, -(-data.length // self.xattn.tile) + data.images)
        return dataclasses.replace(self, data=dataclasses.replace(data, pool=1, slots=data.images, pairs=pairs))

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """LLM layers that have a cross-attention block in front of them."""
        return tuple(range(0, self.llm.layers, self.xattn.every))

    @property
    def tap_of_cross_layer(self) -> tuple[int, ...]:
        """Index into `vit.taps` for each cross-attention block."""
        n, g = len(self.cross_layers), len(self.vit.taps)
        return tuple(i * g // n if self.xattn.schedule == "blocked" else i % g for i in range(n))


def check(cfg: EVLMConfig) -> None:
    """Relations between fields. Raises ValueError naming the field and the mend."""
    vit, llm, xattn, moe, data, train = cfg.vit, cfg.llm, cfg.xattn, cfg.moe, cfg.data, cfg.train
    rules = [
        (vit.image_size % vit.patch == 0, "vit.image_size", f"must be a multiple of vit.patch = {vit.patch}"),
        (vit.pretrained_size % vit.patch == 0, "vit.pretrained_size", f"must be a multiple of vit.patch = {vit.patch}"),
        (vit.width % vit.heads == 0, "vit.heads", f"must divide vit.width = {vit.width}"),
        (len(vit.taps) > 0, "vit.taps", "needs at least one block number"),
        (list(vit.taps) == sorted(set(vit.taps)), "vit.taps", "must ascend without repeats"),
        (all(1 <= t <= vit.depth for t in vit.taps), "vit.taps", f"must lie in 1..vit.depth = {vit.depth} (1-based)"),
        (all(1 <= t <= vit.depth for t in vit.cuts), "vit.cuts", f"must lie in 1..vit.depth = {vit.depth}"),
        (llm.heads % llm.kv_heads == 0, "llm.kv_heads", f"must divide llm.heads = {llm.heads}"),
        (llm.dynamic_ntk >= 0, "llm.dynamic_ntk", "must be the trained context in tokens, or 0 for never"),
        (llm.logn == 0 or llm.logn >= 2, "llm.logn", "must be the trained context in tokens, at least 2, or 0 for never"),
        (1 <= xattn.every <= llm.layers, "xattn.every", f"must lie in 1..llm.layers = {llm.layers}"),
        (xattn.sinks >= 0, "xattn.sinks", "must not be negative"),
        (xattn.tile >= 1, "xattn.tile", "must be positive"),
        (moe.copies >= 0, "moe.copies", "must not be negative"),
        (moe.slices >= 1 and xattn.ffn % moe.slices == 0, "moe.slices", f"must divide xattn.ffn = {xattn.ffn}"),
        (not moe.copies or 1 <= moe.top_k <= moe.experts, "moe.top_k", f"must lie in 1..moe.copies * moe.slices = {moe.experts}"),
        (min(moe.capacity, moe.balance, moe.z) >= 0, "moe.capacity, moe.balance, moe.z", "must not be negative"),
        (moe.tile >= 1, "moe.tile", "must be positive"),
        (cfg.media.tokens >= 1, "media.tokens", "must be positive"),
        (train.batch % train.accumulate == 0, "train.accumulate", f"must divide train.batch = {train.batch}"),
        (train.batch % (train.accumulate * data.pool) == 0, "data.pool", "must divide the rows of train.batch / train.accumulate"),
        (train.loss_chunk >= 0, "train.loss_chunk", "must not be negative"),
        (len(cfg.optim.phases) > 0 and cfg.optim.phases[0].start == 0, "optim.phases", "the first must start at 0"),
    ]
    for ok, name, mend in rules:
        if not ok:
            raise ValueError(f"config: {name} {mend}")


def from_config_dict(config: ml_collections.ConfigDict) -> EVLMConfig:
    """The one door from an experiment file to the code.

    Raises:
      ValueError: unknown key, missing key, or a value of the wrong type; the message lists the full names.
    """
    return build(EVLMConfig, config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config, "")


def to_dict(cfg: EVLMConfig) -> dict:
    """Plain dict for JSON; `from_config_dict` reads it back."""
    return dataclasses.asdict(cfg)
