"""The only place where foreign parameter names stand: one table a family, used in both directions.

A row says: foreign name with {} for the block number -> canonical path, and the einops pattern that
turns one into the other (the inverse swaps the pattern's sides). A row with several paths is a
fused tensor: the pattern's first axis on the right, `n`, runs over the paths. Axis lengths that a
pattern cannot know (`heads`, `kv_heads`) come from the config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LINEAR = "o i -> i o"
UNUSED = ""  # a part of the model that no tap depends on: dropped whatever its values


@dataclass(frozen=True)
class Row:
    """One foreign tensor (of every block, with {})."""

    foreign: str
    paths: tuple[str, ...]
    pattern: str = ""  # empty: as it is
    written: bool = True  # False: a name that is read alone

    def match(self, name: str) -> tuple[str, ...] | None:
        """Canonical names that the foreign `name` fills, or None."""
        found = re.fullmatch(re.escape(self.foreign).replace(r"\{\}", r"(\d+)"), name)
        return found and tuple(path.format(*found.groups()) for path in self.paths)

    def unmatch(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """The foreign name that the canonical `name` goes to, and all canonical names that go
        there; None unless `name` is the first.
        """
        found = self.written and re.fullmatch(
            re.escape(self.paths[0]).replace(r"\{\}", r"(\d+)"), name
        )
        return found and (
            self.foreign.format(*found.groups()),
            tuple(path.format(*found.groups()) for path in self.paths),
        )


@dataclass(frozen=True)
class Family:
    """A naming scheme. It is recognised by `signature`, a tensor that no other family has;
    `prefixes` may stand before every name.
    """

    name: str
    tower: str  # "vit" | "llm" | "evlm": all of it
    signature: str
    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ("",)
    drop: Mapping[str, str] = field(
        default_factory=dict
    )  # patterns of names (after the prefix) without a place in EVLM: rule of inert.py
    drop_outside: bool = False  # other parts of a larger model, without the prefix, are dropped too


def _row(foreign: str, path: str, pattern: str = "") -> Row:
    return Row(foreign, (path,), pattern)


def _linear(foreign: str, path: str, bias: bool = True) -> tuple[Row, ...]:
    rows = (
        _row(f"{foreign}.weight", f"{path}/kernel", LINEAR),
        _row(f"{foreign}.bias", f"{path}/bias"),
    )
    return rows if bias else rows[:1]


def _norm(foreign: str, path: str) -> tuple[Row, ...]:
    return _row(f"{foreign}.weight", f"{path}/scale"), _row(f"{foreign}.bias", f"{path}/bias")


def _patch(foreign: str) -> tuple[Row, ...]:
    return _row(f"{foreign}.weight", "vit/patch/kernel", "v c h w -> h w c v"), _row(
        f"{foreign}.bias", "vit/patch/bias"
    )


def _dinov2(name: str, qkv: dict[str, str], out: str) -> Family:
    """Hugging Face's Dinov2Model, with and without registers; `qkv` and `out` changed names in
    transformers 5.
    """
    foreign, path = "encoder.layer.{}", "vit/blocks/{}"
    attention = [
        row
        for letter, module in qkv.items()
        for row in _linear(f"{foreign}.{module}", f"{path}/attn/{letter}")
    ]
    rows = (
        _row("embeddings.cls_token", "vit/cls", "1 1 v -> v"),
        _row("embeddings.register_tokens", "vit/registers", "1 r v -> r v"),
        _row("embeddings.position_embeddings", "vit/pos", "1 s v -> s v"),
        *_patch("embeddings.patch_embeddings.projection"),
        *attention,
        *_linear(f"{foreign}.{out}", f"{path}/attn/o"),
        *_norm(f"{foreign}.norm1", f"{path}/norm1"),
        *_norm(f"{foreign}.norm2", f"{path}/norm2"),
        *_linear(f"{foreign}.mlp.fc1", f"{path}/mlp/fc1"),
        *_linear(f"{foreign}.mlp.fc2", f"{path}/mlp/fc2"),
        _row(f"{foreign}.layer_scale1.lambda1", f"{path}/scale1"),
        _row(f"{foreign}.layer_scale2.lambda1", f"{path}/scale2"),
    )
    signature = f"{foreign}.{qkv['q']}.weight".format(0)
    drop = dict.fromkeys((r"embeddings\.mask_token", r"layernorm\.(weight|bias)"), UNUSED)
    return Family(
        name,
        "vit",
        signature,
        rows,
        ("", "dinov2.", "dinov2_with_registers.", "backbone."),
        drop,
        drop_outside=True,
    )


def _huggingface_encoder() -> tuple[Row, ...]:
    """The blocks of Hugging Face's CLIP and SigLIP."""
    foreign, path = "encoder.layers.{}", "vit/blocks/{}"
    return (
        *(
            row
            for x in "qkv"
            for row in _linear(f"{foreign}.self_attn.{x}_proj", f"{path}/attn/{x}")
        ),
        *_linear(f"{foreign}.self_attn.out_proj", f"{path}/attn/o"),
        *_norm(f"{foreign}.layer_norm1", f"{path}/norm1"),
        *_norm(f"{foreign}.layer_norm2", f"{path}/norm2"),
        *_linear(f"{foreign}.mlp.fc1", f"{path}/mlp/fc1"),
        *_linear(f"{foreign}.mlp.fc2", f"{path}/mlp/fc2"),
    )


def _clip() -> Family:
    """Hugging Face's CLIPVisionModel, alone or inside CLIPModel. `pre_layrnorm` is spelled so."""
    rows = (
        _row("embeddings.class_embedding", "vit/cls"),
        _row("embeddings.position_embedding.weight", "vit/pos"),
        *_patch("embeddings.patch_embedding"),
        *_norm("pre_layrnorm", "vit/embed_norm"),
        *_huggingface_encoder(),
    )
    drop = {r"post_layernorm\.(weight|bias)": UNUSED, r"embeddings\.position_ids": "positions"}
    return Family(
        "clip",
        "vit",
        "embeddings.class_embedding",
        rows,
        ("", "vision_model."),
        drop,
        drop_outside=True,
    )


def _siglip() -> Family:
    """Hugging Face's SiglipVisionModel, alone or inside SiglipModel: no class token; the pooling
    head is dropped.
    """
    rows = (
        _row("embeddings.position_embedding.weight", "vit/pos"),
        *_patch("embeddings.patch_embedding"),
        *_huggingface_encoder(),
    )
    drop = {
        r"post_layernorm\.(weight|bias)": UNUSED,
        r"embeddings\.position_ids": "positions",
        r"head\..*": UNUSED,
    }
    return Family(
        "siglip",
        "vit",
        "embeddings.patch_embedding.bias",
        rows,
        ("", "vision_model."),
        drop,
        drop_outside=True,
    )


def _eva() -> Family:
    """EVA02-CLIP-E in the names of the EVA repository, of timm and of open_clip: fused qkv without
    bias, a bias for q and for v.
    """
    foreign, path = "blocks.{}", "vit/blocks/{}"
    rows = (
        _row("cls_token", "vit/cls", "1 1 v -> v"),
        _row("pos_embed", "vit/pos", "1 s v -> s v"),
        *_patch("patch_embed.proj"),
        Row(
            f"{foreign}.attn.qkv.weight",
            tuple(f"{path}/attn/{x}/kernel" for x in "qkv"),
            "(n o) i -> n i o",
        ),
        _row(f"{foreign}.attn.q_bias", f"{path}/attn/q/bias"),
        _row(f"{foreign}.attn.v_bias", f"{path}/attn/v/bias"),
        *_linear(f"{foreign}.attn.proj", f"{path}/attn/o"),
        *_norm(f"{foreign}.norm1", f"{path}/norm1"),
        *_norm(f"{foreign}.norm2", f"{path}/norm2"),
        *_linear(f"{foreign}.mlp.fc1", f"{path}/mlp/fc1"),
        *_linear(f"{foreign}.mlp.fc2", f"{path}/mlp/fc2"),
    )
    drop = dict.fromkeys((r"norm\.(weight|bias)", r"head\.(weight|bias)"), UNUSED)
    return Family(
        "eva02",
        "vit",
        "blocks.0.attn.q_bias",
        rows,
        ("", "visual.", "visual.trunk."),
        drop,
        drop_outside=True,
    )


def _llama() -> Family:
    """Llama, SmolLM2 and Qwen2 in Hugging Face names; the q, k and v biases are Qwen2's."""
    foreign, path = "model.layers.{}", "llm/layers/{}"
    attention = [
        row for x in "qkv" for row in _linear(f"{foreign}.self_attn.{x}_proj", f"{path}/attn/{x}")
    ]
    mlp = [
        row
        for x in ("gate", "up", "down")
        for row in _linear(f"{foreign}.mlp.{x}_proj", f"{path}/mlp/{x}", bias=False)
    ]
    rows = (
        _row("model.embed_tokens.weight", "llm/embed"),
        *attention,
        *_linear(f"{foreign}.self_attn.o_proj", f"{path}/attn/o", bias=False),
        *mlp,
        _row(f"{foreign}.input_layernorm.weight", f"{path}/ln1/scale"),
        _row(f"{foreign}.post_attention_layernorm.weight", f"{path}/ln2/scale"),
        _row("model.norm.weight", "llm/ln_f/scale"),
        _row("lm_head.weight", "llm/head/kernel", LINEAR),
    )
    drop = {
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies",
        r"lm_head\.weight": "tied",
    }
    return Family("llama", "llm", "model.layers.0.self_attn.q_proj.weight", rows, drop=drop)


def _llama_gguf() -> Family:
    """llama.cpp's names. It keeps the rows of q and k in pairs for interleaved rotary positions;
    ours (and Hugging Face's) are halves.
    """
    foreign, path = "blk.{}", "llm/layers/{}"
    plain = {
        "attn_v": "attn/v",
        "attn_output": "attn/o",
        "ffn_gate": "mlp/gate",
        "ffn_up": "mlp/up",
        "ffn_down": "mlp/down",
    }
    rows = (
        _row("token_embd.weight", "llm/embed"),
        _row(
            f"{foreign}.attn_q.weight",
            f"{path}/attn/q/kernel",
            "(heads half two) i -> i (heads two half)",
        ),
        _row(
            f"{foreign}.attn_k.weight",
            f"{path}/attn/k/kernel",
            "(kv_heads half two) i -> i (kv_heads two half)",
        ),
        *(
            row
            for module, place in plain.items()
            for row in _linear(f"{foreign}.{module}", f"{path}/{place}", bias=False)
        ),
        _row(f"{foreign}.attn_norm.weight", f"{path}/ln1/scale"),
        _row(f"{foreign}.ffn_norm.weight", f"{path}/ln2/scale"),
        _row("output_norm.weight", "llm/ln_f/scale"),
        _row("output.weight", "llm/head/kernel", LINEAR),
    )
    return Family(
        "llama-gguf", "llm", "blk.0.attn_q.weight", rows, drop={r"rope_freqs\.weight": "ones"}
    )


def _qwen() -> Family:
    """Qwen 1.0. Its MLP is c_proj(w1(x) * silu(w2(x))): w2 is the gate."""
    foreign, path = "transformer.h.{}", "llm/layers/{}"
    plain = {
        "attn.c_proj": "attn/o",
        "mlp.w2": "mlp/gate",
        "mlp.w1": "mlp/up",
        "mlp.c_proj": "mlp/down",
    }
    rows = (
        _row("transformer.wte.weight", "llm/embed"),
        Row(
            f"{foreign}.attn.c_attn.weight",
            tuple(f"{path}/attn/{x}/kernel" for x in "qkv"),
            "(n o) i -> n i o",
        ),
        Row(
            f"{foreign}.attn.c_attn.bias",
            tuple(f"{path}/attn/{x}/bias" for x in "qkv"),
            "(n o) -> n o",
        ),
        *(
            row
            for module, place in plain.items()
            for row in _linear(f"{foreign}.{module}", f"{path}/{place}", bias=False)
        ),
        _row(f"{foreign}.ln_1.weight", f"{path}/ln1/scale"),
        _row(f"{foreign}.ln_2.weight", f"{path}/ln2/scale"),
        _row("transformer.ln_f.weight", "llm/ln_f/scale"),
        _row("lm_head.weight", "llm/head/kernel", LINEAR),
    )
    drop = {
        r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq": "frequencies",
        r"transformer\.h\.\d+\.attn\.bias": "causal",
    }
    drop |= {r"transformer\.h\.\d+\.attn\.masked_bias": "masked", r"lm_head\.weight": "tied"}
    return Family("qwen", "llm", "transformer.h.0.attn.c_attn.weight", rows, drop=drop)


def _evlm() -> Family:
    """The whole model in the names of convert/torch_model; also in those of its modules'
    parameters, where they are others.
    """
    vit, llm, cross = "vit.blocks.{}", "llm.layers.{}", "xattn.{}"
    parts = {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out": "o",
        "fc1": "ffn/fc1",
        "fc2": "ffn/fc2",
    }
    rows = (
        *(_row(f"vit.{name}", f"vit/{name}") for name in ("cls", "registers", "pos")),
        *(
            Row(f"vit.places.{name}", (f"vit/{name}",), written=False)
            for name in ("cls", "registers", "pos")
        ),
        *_patch("vit.patch"),
        *_norm("vit.embed_norm", "vit/embed_norm"),
        *(row for x in "qkvo" for row in _linear(f"{vit}.attn.{x}", f"vit/blocks/{{}}/attn/{x}")),
        *(row for i in "12" for row in _norm(f"{vit}.norm{i}", f"vit/blocks/{{}}/norm{i}")),
        *(row for i in "12" for row in _linear(f"{vit}.mlp.fc{i}", f"vit/blocks/{{}}/mlp/fc{i}")),
        *(_row(f"{vit}.scale{i}", f"vit/blocks/{{}}/scale{i}") for i in "12"),
        _row("llm.embed.weight", "llm/embed"),
        *(row for x in "qkvo" for row in _linear(f"{llm}.attn.{x}", f"llm/layers/{{}}/attn/{x}")),
        *(
            row
            for x in ("gate", "up", "down")
            for row in _linear(f"{llm}.mlp.{x}", f"llm/layers/{{}}/mlp/{x}", bias=False)
        ),
        *(_row(f"{llm}.ln{i}.weight", f"llm/layers/{{}}/ln{i}/scale") for i in "12"),
        _row("llm.ln_f.weight", "llm/ln_f/scale"),
        *_linear("llm.head", "llm/head", bias=False),
        *(
            row
            for name, path in parts.items()
            for row in _linear(f"{cross}.{name}", f"xattn/{{}}/{path}", bias=False)
        ),
        *(
            row
            for name, path in {"norm": "norm", "kv_norm": "kv_norm", "ff_norm": "ffn_norm"}.items()
            for row in _norm(f"{cross}.{name}", f"xattn/{{}}/{path}")
        ),
        _row(f"{cross}.attn_gate", "xattn/{}/attn_gate"),
        _row(f"{cross}.ff_gate", "xattn/{}/ffn_gate"),
        *_linear(f"{cross}.moe.router", "xattn/{}/ffn/router", bias=False),
        *(
            row
            for i in "12"
            for row in _linear(
                f"{cross}.moe.world.fc{i}", f"xattn/{{}}/ffn/world/fc{i}", bias=False
            )
        ),
        *(
            _row(
                f"{cross}.moe.experts.fc{i}",
                f"xattn/{{}}/ffn/experts/fc{i}/kernel",
                "e o i -> e i o",
            )
            for i in "12"
        ),
        _row("media_tokens", "media/embedding"),
        Row("media_tokens.weight", ("media/embedding",), written=False),
    )
    return Family("evlm", "evlm", "xattn.0.attn_gate", rows)


def _openflamingo() -> Family:
    """The trained part as open_flamingo keeps it, its language model being Llama or Qwen2.
    `norm_media` and `media_tokens` are EVLM's
    own: open_flamingo's perceiver ends with the norm, and it has no media tokens."""
    foreign, path = "lang_encoder.model.layers.{}.gated_cross_attn_layer", "xattn/{}"
    rows = (
        *_norm(f"{foreign}.attn.norm", f"{path}/norm"),
        *_norm(f"{foreign}.attn.norm_media", f"{path}/kv_norm"),
        *_linear(f"{foreign}.attn.to_q", f"{path}/q", bias=False),
        Row(
            f"{foreign}.attn.to_kv.weight",
            tuple(f"{path}/{x}/kernel" for x in "kv"),
            "(n o) i -> n i o",
        ),
        *_linear(f"{foreign}.attn.to_out", f"{path}/o", bias=False),
        _row(f"{foreign}.attn_gate", f"{path}/attn_gate", "1 -> "),
        *_norm(f"{foreign}.ff.0", f"{path}/ffn_norm"),
        *_linear(f"{foreign}.ff.1", f"{path}/ffn/fc1", bias=False),
        *_linear(f"{foreign}.ff.3", f"{path}/ffn/fc2", bias=False),
        _row(f"{foreign}.ff_gate", f"{path}/ffn_gate", "1 -> "),
        _row("media_tokens", "media/embedding"),
    )
    return Family(
        "openflamingo",
        "xattn",
        "lang_encoder.model.layers.0.gated_cross_attn_layer.attn_gate",
        rows,
    )


FAMILIES = (
    _dinov2(
        "dinov2",
        {
            x: f"attention.attention.{word}"
            for x, word in zip("qkv", ("query", "key", "value"), strict=True)
        },
        "attention.output.dense",
    ),
    _dinov2("dinov2-transformers5", {x: f"attention.{x}_proj" for x in "qkv"}, "attention.o_proj"),
    _clip(),
    _siglip(),
    _eva(),
    _llama(),
    _llama_gguf(),
    _qwen(),
    _evlm(),
    _openflamingo(),
)
