"""Foreign parameter names: one table a family, used both ways. Those of language models stand in
tables_decoder.py, those of published cross-attention models in tables_published.py.
"""

from dataclasses import replace

from evlm_jax.convert.naming import UNUSED, Family, NameRow, linear, linears, norm, patch, row
from evlm_jax.convert.tables_decoder import DECODERS, GATED
from evlm_jax.convert.tables_published import idefics, mllama, open_flamingo

ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
MLP = {"fc1": "fc1", "fc2": "fc2"}
GATED_MLP = {"gate_proj": "fc1", "up_proj": "up", "down_proj": "fc2"}


def _gated(foreign: str, path: str) -> tuple[NameRow, ...]:
    """The gated MLP of DINOv2 giant, by its old names, gate and up in one, and those of
    transformers 5; read alone.
    """
    both = (f"{path}/mlp/fc1", f"{path}/mlp/up")
    old = f"{foreign}.mlp.weights_in"
    rows = (
        NameRow(f"{old}.weight", tuple(f"{one}/kernel" for one in both), "(n o) i -> n i o"),
        NameRow(f"{old}.bias", tuple(f"{one}/bias" for one in both), "(n o) -> n o"),
        *linears(f"{foreign}.mlp", f"{path}/mlp", GATED_MLP | {"weights_out": "fc2"}),
    )
    return tuple(replace(one, written=False) for one in rows)


def _dinov2(name: str, qkv: dict[str, str], out: str) -> Family:
    """Hugging Face's Dinov2Model, with and without registers; `qkv` and `out` changed names in
    transformers 5.
    """
    foreign, path = "encoder.layer.{}", "vit/blocks/{}"
    attention = [
        one
        for letter, module in qkv.items()
        for one in linear(f"{foreign}.{module}", f"{path}/attn/{letter}")
    ]
    rows = (
        row("embeddings.cls_token", "vit/cls", "1 1 v -> v"),
        row("embeddings.register_tokens", "vit/registers", "1 r v -> r v"),
        row("embeddings.position_embeddings", "vit/pos", "1 s v -> s v"),
        *patch("embeddings.patch_embeddings.projection"),
        *attention,
        *linear(f"{foreign}.{out}", f"{path}/attn/o"),
        *norm(f"{foreign}.norm1", f"{path}/norm1"),
        *norm(f"{foreign}.norm2", f"{path}/norm2"),
        *linear(f"{foreign}.mlp.fc1", f"{path}/mlp/fc1"),
        *linear(f"{foreign}.mlp.fc2", f"{path}/mlp/fc2"),
        *_gated(foreign, path),
        row(f"{foreign}.layer_scale1.lambda1", f"{path}/scale1"),
        row(f"{foreign}.layer_scale2.lambda1", f"{path}/scale2"),
    )
    signature = f"{foreign}.{qkv['q']}.weight".format(0)
    unused = r"embeddings\.mask_token", r"layernorm\.(weight|bias)", r"embeddings\.register_tokens"
    drop = dict.fromkeys(unused, UNUSED)  # registers only where there are none
    return Family(
        name,
        "vit",
        signature,
        rows,
        ("", "dinov2.", "dinov2_with_registers.", "backbone."),
        drop,
        drop_outside=True,
    )


def _dinov3() -> Family:
    """Hugging Face's DINOv3ViTModel, whose MLP is not gated."""
    foreign, path = "layer.{}", "vit/blocks/{}"
    rows = (
        row("embeddings.cls_token", "vit/cls", "1 1 v -> v"),
        row("embeddings.register_tokens", "vit/registers", "1 r v -> r v"),
        *patch("embeddings.patch_embeddings"),
        *linears(f"{foreign}.attention", f"{path}/attn", {f"{x}_proj": x for x in "qkvo"}),
        *norm(f"{foreign}.norm1", f"{path}/norm1"),
        *norm(f"{foreign}.norm2", f"{path}/norm2"),
        *linears(f"{foreign}.mlp", f"{path}/mlp", {"up_proj": "fc1", "down_proj": "fc2"}),
        row(f"{foreign}.layer_scale1.lambda1", f"{path}/scale1"),
        row(f"{foreign}.layer_scale2.lambda1", f"{path}/scale2"),
    )
    unused = r"embeddings\.mask_token", r"norm\.(weight|bias)", r"embeddings\.register_tokens"
    drop = dict.fromkeys(unused, UNUSED)  # registers only where there are none
    return Family("dinov3", "vit", "layer.0.attention.q_proj.weight", rows, drop=drop)


def _huggingface_encoder() -> tuple[NameRow, ...]:
    """The blocks of Hugging Face's CLIP and SigLIP."""
    foreign, path = "encoder.layers.{}", "vit/blocks/{}"
    return (
        *linears(f"{foreign}.self_attn", f"{path}/attn", ATTENTION),
        *norm(f"{foreign}.layer_norm1", f"{path}/norm1"),
        *norm(f"{foreign}.layer_norm2", f"{path}/norm2"),
        *linears(f"{foreign}.mlp", f"{path}/mlp", MLP),
    )


def _clip() -> Family:
    """Hugging Face's CLIPVisionModel, alone or inside CLIPModel. `pre_layrnorm` is spelled so."""
    rows = (
        row("embeddings.class_embedding", "vit/cls"),
        row("embeddings.position_embedding.weight", "vit/pos"),
        *patch("embeddings.patch_embedding"),
        *norm("pre_layrnorm", "vit/embed_norm"),
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
        row("embeddings.position_embedding.weight", "vit/pos"),
        *patch("embeddings.patch_embedding"),
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


def _aimv2() -> Family:
    """Hugging Face's Aimv2VisionModel, alone or inside Aimv2Model; the pooling head is dropped."""
    foreign, path = "encoder.layers.{}", "vit/blocks/{}"
    rows = (
        row("embeddings.position_embedding.weight", "vit/pos"),
        *patch("embeddings.patch_embed"),
        row("embeddings.rms_norm.weight", "vit/patch_norm/scale"),
        *linears(f"{foreign}.attention", f"{path}/attn", ATTENTION),
        *linears(f"{foreign}.ffn", f"{path}/mlp", GATED_MLP),
        *(row(f"{foreign}.rms_norm{i}.weight", f"{path}/norm{i}/scale") for i in "12"),
    )
    drop = dict.fromkeys((r"rms_norm\.weight", r"head\..*"), UNUSED)
    signature, prefixes = "embeddings.rms_norm.weight", ("", "vision_model.")
    return Family("aimv2", "vit", signature, rows, prefixes, drop, drop_outside=True)


def _internvit() -> Family:
    """Hugging Face's InternVLVisionModel, alone or inside InternVLForConditionalGeneration."""
    foreign, path = "encoder.layer.{}", "vit/blocks/{}"
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "projection_layer": "o"}
    rows = (
        row("embeddings.cls_token", "vit/cls", "1 1 v -> v"),
        row("embeddings.position_embeddings", "vit/pos", "1 s v -> s v"),
        *patch("embeddings.patch_embeddings.projection"),
        *linears(f"{foreign}.attention", f"{path}/attn", names),
        *(row(f"{foreign}.attention.{x}_norm.weight", f"{path}/attn/{x}_norm/scale") for x in "qk"),
        *norm(f"{foreign}.layernorm_before", f"{path}/norm1"),
        *norm(f"{foreign}.layernorm_after", f"{path}/norm2"),
        *linears(f"{foreign}.mlp", f"{path}/mlp", MLP),
        *(row(f"{foreign}.lambda_{i}", f"{path}/scale{i}") for i in "12"),
    )
    drop = dict.fromkeys((r"embeddings\.mask_token", r"layernorm\.(weight|bias)"), UNUSED)
    signature, prefixes = "encoder.layer.0.lambda_1", ("", "vision_tower.", "model.vision_tower.")
    return Family("internvit", "vit", signature, rows, prefixes, drop, drop_outside=True)


def _eva() -> Family:
    """EVA02-CLIP-E in the names of the EVA repository, of timm and of open_clip: fused qkv without
    bias, a bias for q and for v.
    """
    foreign, path = "blocks.{}", "vit/blocks/{}"
    rows = (
        row("cls_token", "vit/cls", "1 1 v -> v"),
        row("pos_embed", "vit/pos", "1 s v -> s v"),
        *patch("patch_embed.proj"),
        NameRow(
            f"{foreign}.attn.qkv.weight",
            tuple(f"{path}/attn/{x}/kernel" for x in "qkv"),
            "(n o) i -> n i o",
        ),
        row(f"{foreign}.attn.q_bias", f"{path}/attn/q/bias"),
        row(f"{foreign}.attn.v_bias", f"{path}/attn/v/bias"),
        *linear(f"{foreign}.attn.proj", f"{path}/attn/o"),
        *norm(f"{foreign}.norm1", f"{path}/norm1"),
        *norm(f"{foreign}.norm2", f"{path}/norm2"),
        *linear(f"{foreign}.mlp.fc1", f"{path}/mlp/fc1"),
        *linear(f"{foreign}.mlp.fc2", f"{path}/mlp/fc2"),
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


def _evlm_vit() -> tuple[NameRow, ...]:
    block, path = "vit.blocks.{}", "vit/blocks/{}"
    places = ("cls", "registers", "pos")
    return (
        *(row(f"vit.{name}", f"vit/{name}") for name in places),
        *(NameRow(f"vit.places.{name}", (f"vit/{name}",), written=False) for name in places),
        *patch("vit.patch"),
        *norm("vit.patch_norm", "vit/patch_norm"),
        *norm("vit.embed_norm", "vit/embed_norm"),
        *(one for x in "qkvo" for one in linear(f"{block}.attn.{x}", f"{path}/attn/{x}")),
        *(row(f"{block}.attn.{x}_norm.weight", f"{path}/attn/{x}_norm/scale") for x in "qk"),
        *(one for i in "12" for one in norm(f"{block}.norm{i}", f"{path}/norm{i}")),
        *(
            one
            for x in ("fc1", "up", "fc2")
            for one in linear(f"{block}.mlp.{x}", f"{path}/mlp/{x}")
        ),
        *(row(f"{block}.scale{i}", f"{path}/scale{i}") for i in "12"),
    )


def _evlm_llm() -> tuple[NameRow, ...]:
    layer, path = "llm.layers.{}", "llm/layers/{}"
    mlp = [linear(f"{layer}.mlp.{x}", f"{path}/mlp/{x}", bias=False) for x in GATED]
    return (
        row("llm.embed.weight", "llm/embed"),
        *(one for x in "qkvo" for one in linear(f"{layer}.attn.{x}", f"{path}/attn/{x}")),
        *(one for rows in mlp for one in rows),
        *(row(f"{layer}.attn.{x}_norm.weight", f"{path}/attn/{x}_norm/scale") for x in "qk"),
        *(
            row(f"{layer}.ln{i}{place}.weight", f"{path}/ln{i}{place}/scale")
            for i in "12"
            for place in ("", "_out")
        ),
        row("llm.ln_f.weight", "llm/ln_f/scale"),
        *linear("llm.head", "llm/head", bias=False),
    )


def _evlm_xattn() -> tuple[NameRow, ...]:
    block, path = "xattn.{}", "xattn/{}"
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}
    parts |= {"fc1": "ffn/fc1", "up": "ffn/up", "fc2": "ffn/fc2", "moe.router": "ffn/router"}
    parts |= {f"moe.world.fc{i}": f"ffn/world/fc{i}" for i in "12"}
    norms = {"norm": "norm", "kv_norm": "kv_norm", "ff_norm": "ffn_norm"}
    experts = "ffn/experts/fc{}/kernel"
    return (
        *(
            one
            for name, part in parts.items()
            for one in linear(f"{block}.{name}", f"{path}/{part}", bias=False)
        ),
        *(one for name, part in norms.items() for one in norm(f"{block}.{name}", f"{path}/{part}")),
        *(row(f"{block}.{x}_norm.weight", f"{path}/{x}_norm/scale") for x in "qk"),
        row(f"{block}.attn_gate", f"{path}/attn_gate"),
        row(f"{block}.ff_gate", f"{path}/ffn_gate"),
        *(
            row(f"{block}.moe.experts.fc{i}", f"{path}/{experts.format(i)}", "e o i -> e i o")
            for i in "12"
        ),
    )


def _evlm() -> Family:
    """The whole model in the names of convert/torch_model; also in those of its modules'
    parameters, where they are others.
    """
    rows = (
        *_evlm_vit(),
        *_evlm_llm(),
        *_evlm_xattn(),
        row("media_tokens", "media/embedding"),
        NameRow("media_tokens.weight", ("media/embedding",), written=False),
    )
    return Family("evlm", "evlm", "xattn.0.to_q.weight", rows)


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
    _dinov3(),
    _clip(),
    _siglip(),
    _aimv2(),
    _internvit(),
    _eva(),
    *DECODERS,
    _evlm(),
    open_flamingo(),
    idefics(_clip()),
    mllama(),
)
