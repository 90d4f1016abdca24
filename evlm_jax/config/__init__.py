"""Configuration: frozen dataclasses, made once from an `ml_collections.ConfigDict` at the door.

Experiments return ConfigDicts (overridable as `--config.optim.lr=1e-4`); `from_config_dict` turns
one into an `EVLMConfig` and refuses unknown keys, missing keys and wrong types with the key's full
name. Sizes are read from here and nowhere else. A field with a default came later than the others,
and the default is what the code did before. Saved configs carry the number of their
format: `from_saved` reads every former one (compat.py).

Letters used for shapes everywhere in this package:

    B batch rows     T text positions   I image slots of a group  S visual tokens of one image
    D LLM hidden     V visual width     N query heads             K key/value heads
    H head dim       F FFN hidden       L layers                  G tap groups
    E experts        C image groups     J query blocks of a group M supervised targets
    P block pairs, (query block, image), of a group
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import ml_collections

from evlm_jax.config import compat, relations, xattn
from evlm_jax.config.data import CleanConfig, DataConfig
from evlm_jax.config.model import (
    BridgeConfig,
    LLMConfig,
    LoRAConfig,
    MediaConfig,
    MoEConfig,
    QuantConfig,
    ViTConfig,
)
from evlm_jax.config.model import (
    RopeScaling as RopeScaling,
)
from evlm_jax.config.model import (
    Scales as Scales,
)
from evlm_jax.config.ranges import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Range,
    Seed,
)
from evlm_jax.config.schema import Pattern, build
from evlm_jax.config.xattn import XAttnConfig

Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Rule:
    """First match wins. `lr` multiplies the schedule; None freezes."""

    pattern: Pattern  # regular expression, searched in the canonical parameter name
    lr: NonNegative | None  # of the schedule's rate


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is trained from `start` (a fraction of the steps) or behind update `step` on.

    A run that may become longer needs the latter.
    """

    start: Fraction = 0.0  # fraction of train.steps
    step: Count | None = None  # the last update without the phase
    # Extra linear warm-up, in steps, of the parameters that become trainable in this phase. None:
    # optim.warmup in a later phase, where a fresh Adam would move what is pretrained at the full
    # rate; 0 in the first, which the schedule warms up.
    warmup: Count | None = None
    rules: tuple[Rule, ...]  # each parameter needs one that matches


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine to `min_lr`, clip by global norm (paper table 6)."""

    lr: PositiveFloat  # peak of the schedule
    min_lr: NonNegative  # at the last update
    warmup: Count  # updates
    b1: Fraction  # decay of Adam's first moments
    b2: Fraction  # decay of the second ones
    eps: PositiveFloat  # Adam's
    mu_dtype: Float  # first moments; second ones need the mantissa of param_dtype
    weight_decay: NonNegative  # decoupled, times the rate
    no_decay: tuple[Pattern, ...]  # patterns of canonical names without weight decay
    clip: PositiveFloat  # largest global norm of the gradients
    phases: tuple[Phase, ...]  # in order; the first begins the run


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Positive  # updates of the whole run
    batch: Positive  # rows of an optimizer step, over all devices
    accumulate: Positive  # micro-batches of a step; divides `batch`
    dtype: Float  # compute
    matmul_precision: Float  # operands of products, where the dtype is wider
    # trainable parameters and second moments; training refuses bfloat16, which loses small updates
    param_dtype: Float
    frozen_dtype: Float  # frozen towers
    remat: Literal[
        "none", "dots", "full"
    ]  # computed again in the backward pass: nothing, all but linear layers, all
    # targets of a row whose logits exist together, computed again in the backward pass; 0: all,
    # kept
    loss_chunk: Count
    save_every: Positive  # updates
    keep: Positive  # newest checkpoints that stay
    log_every: Positive  # updates
    monitors: tuple[
        str, ...
    ]  # eval tasks that are followed (evals/monitor.py): TASK, or TASK:PATH of its official files
    monitor_every: Count  # updates between two looks; there is one at the end as well
    monitor_questions: Count  # the first of each task, as `evlm eval --limit` takes them; 0: all
    seed: Seed  # of new parameters
    peak_flops: NonNegative  # of one device, for MFU; 0: the published one, where it is known
    save_minutes: NonNegative = (
        30.0  # a save is also due when so much time has gone since the last; 0: never for that
    )
    bad_updates: Count = (
        10  # of a run: so many whose loss or gradient is not finite are left out, then it stops
    )
    # checkpoints at multiples of so many updates stay, beside the newest `keep`; 0: those alone
    keep_every: Count = 0
    # attention by "xla", or in forms that keep scores out of HBM: on TPUs to images, of packed rows
    # and of the ViT by kernels ("pallas"), on GPUs of rows and of the ViT by cuDNN in bfloat16
    # ("cudnn"); elsewhere by XLA all the same, which is said
    attention: Literal["xla", "pallas", "cudnn"] = "xla"

    @property
    def operands(self) -> str:
        """Dtype of the operands of products."""
        return "bfloat16" if "bfloat16" in (self.dtype, self.matmul_precision) else "float32"


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis (mesh.py); their product is the number of devices.

    One of `data` and `fsdp` may be -1: what the others leave.
    """

    # copies of everything, each with its own rows; several slices of a pod are joined along this
    # axis
    data: Annotated[int, Range(-1)]
    fsdp: Annotated[int, Range(-1)]  # rows, and what is stored in pieces
    expert: Positive  # rows and pieces likewise, and the experts of a mixture
    tensor: Positive  # heads, hidden layers of FFNs, and the vocabulary
    slices: Positive  # of a multi-slice machine; divides `data`
    # trainable parameters are gathered once a step, or layer by layer when they are needed
    zero: Literal[2, 3]
    frozen: Literal["sharded", "replicated"]  # frozen parameters, over `fsdp` and `expert`
    # the ViT's images over all axes, or over the axes of rows and its heads over `tensor`
    images: Literal["all", "rows"]


@dataclass(frozen=True)
class InitConfig:
    """Where the towers come from, an asset name, a directory or a file; how the new parameters
    start.
    """

    vision: str  # vision tower
    llm: str  # language model, with its tokenizer
    # the cross-attention's norms, where it has any, from the first batch (models/norm_init.py);
    # False: scale 1, bias 0
    centre_norms: bool
    # rows may be longer than the positions that `llm` was trained on (convert/context.py)
    beyond_context: bool = False


@dataclass(frozen=True)
class EVLMConfig:
    """Everything that decides a run."""

    name: str  # what reports call it
    vit: ViTConfig
    llm: LLMConfig
    xattn: XAttnConfig
    moe: MoEConfig
    media: MediaConfig
    bridge: BridgeConfig
    data: DataConfig
    clean: CleanConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig
    init: InitConfig
    lora: LoRAConfig = LoRAConfig()
    quant: QuantConfig = QuantConfig()

    def __post_init__(self):
        check(self)

    @property
    def image_groups(self) -> int:
        """Image groups of a batch."""
        return self.train.batch // self.data.image_group

    @property
    def ungrouped(self) -> "EVLMConfig":
        """The config of evaluation and generation: where rows share image slots, every row has its
        own instead, and block pairs for all its text.
        """
        data = self.data
        if data.image_group == 1:
            return self
        pairs = min(data.block_pairs, -(-data.length // self.xattn.query_block) + data.images)
        return dataclasses.replace(
            self,
            data=dataclasses.replace(data, image_group=1, slots=data.images, block_pairs=pairs),
        )

    @property
    def merged(self) -> "EVLMConfig":
        """The config without adapters and quantisation: of the model whose matrices hold them."""
        return dataclasses.replace(self, lora=LoRAConfig(), quant=QuantConfig())

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """LLM layers that have a cross-attention block, in front of them or within."""
        first, every = self.xattn.first, self.xattn.every
        return tuple(range(first, self.llm.layers, every)) if every else ()

    @property
    def tap_of_cross_layer(self) -> tuple[int, ...]:
        """Which of the feature sequences each cross-attention block looks at: an index into
        `vit.taps`, or 0 where the bridge makes one.
        """
        n, g = len(self.cross_layers), len(self.vit.taps) if self.bridge.kind == "routed" else 1
        return tuple(i * g // n if self.xattn.schedule == "blocked" else i % g for i in range(n))

    @property
    def view_tokens(self) -> int:
        """S', the keys of one image in cross-attention."""
        return self.bridge.latents if self.bridge.kind == "flamingo" else self.vit.tokens

    @property
    def view_width(self) -> int:
        """Width of what keys and values of cross-attention are made from."""
        widened = self.bridge.kind in ("linear", "joined")
        return self.llm.hidden if widened else self.vit.width

    @property
    def resampler_eps(self) -> float:
        """Of the resampler's norms."""
        return self.bridge.eps or self.xattn.eps

    @property
    def query_block(self) -> int:
        """Tokens of a query block of cross-attention; 0 where there is none."""
        return self.xattn.query_block if self.cross_layers else 0

    @property
    def uses_images(self) -> bool:
        """Whether anything of an image reaches the language model."""
        return bool(self.cross_layers) or self.bridge.kind == "llava"

    @property
    def baseline(self) -> str:
        """What distinguishes this model from EVLM, in words; empty for EVLM itself."""
        fields = {
            "bridge.kind": (self.bridge.kind, "routed"),
            "media.around": (self.media.around, ""),
            "media.sight": (self.media.sight, "last"),
            "vit.tiles": (self.vit.tiles, 0),
            "llm.more_words": (self.llm.more_words, 0),
        }
        other = [f"{name} = {own}" for name, (own, evlm) in fields.items() if own != evlm]
        other += self.xattn.unlike(xattn.TWIN)
        if other or self.cross_layers:
            return ", ".join(other)
        return "xattn.every = 0, no cross-attention"


def check(cfg: EVLMConfig) -> None:
    """Relations between fields. Raises ValueError naming the field and the mend."""
    for holds, name, mend in (
        *relations.vision(cfg),
        *relations.language(cfg),
        *xattn.relations(cfg),
        *relations.training(cfg),
    ):
        if not holds:
            raise ValueError(f"config: {name} {mend}")


def from_config_dict(config: ml_collections.ConfigDict) -> EVLMConfig:
    """The one door from an experiment file to the code.

    Raises:
      ValueError: unknown key, missing key, or a value of the wrong type; the message lists the full
        names.
    """
    return build(
        EVLMConfig,
        compat.renamed(
            config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
        ),
        "",
    )


def to_dict(cfg: EVLMConfig) -> dict:
    """Plain dict of all fields; `from_config_dict` reads it back."""
    return dataclasses.asdict(cfg)


def to_saved(cfg: EVLMConfig) -> dict:
    """`to_dict` with the number of its format, for files; `from_saved` reads it back in later
    versions, too.
    """
    return {"format": compat.FORMAT} | to_dict(cfg)


def from_saved(saved: dict) -> EVLMConfig:
    """A config from a file of this or a former version.

    Raises ValueError as `from_config_dict` does, and for a later format.
    """
    return from_config_dict(compat.upgraded(saved))
