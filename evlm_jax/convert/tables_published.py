"""Names of published models with cross-attention, as tables.py has those of towers."""

from dataclasses import replace

from evlm_jax.convert.naming import LINEAR, UNUSED, Family, NameRow, linear, linears, norm, row
from evlm_jax.convert.tables_decoder import DECODERS


def _perceiver() -> tuple[NameRow, ...]:
    """The resampler of open_flamingo."""
    attention, ffn, path = "perceiver.layers.{}.0", "perceiver.layers.{}.1", "bridge/layers/{}"
    return (
        row("perceiver.latents", "bridge/latents"),
        *norm(f"{attention}.norm_media", f"{path}/norm_media"),
        *norm(f"{attention}.norm_latents", f"{path}/norm_latents"),
        *linear(f"{attention}.to_q", f"{path}/q", bias=False),
        NameRow(
            f"{attention}.to_kv.weight",
            tuple(f"{path}/{x}/kernel" for x in "kv"),
            "(n o) i -> n i o",
        ),
        *linear(f"{attention}.to_out", f"{path}/o", bias=False),
        *norm(f"{ffn}.0", f"{path}/ffn_norm"),
        *linear(f"{ffn}.1", f"{path}/ffn/fc1", bias=False),
        *linear(f"{ffn}.3", f"{path}/ffn/fc2", bias=False),
        *norm("perceiver.norm", "bridge/norm"),
    )


def open_flamingo() -> Family:
    """The trained part as open_flamingo keeps it, its language model having Llama's names.
    `norm_media` and `media_tokens` are EVLM's own: open_flamingo's perceiver ends with the norm,
    and its media token is a word."""
    foreign, path = "lang_encoder.model.layers.{}.gated_cross_attn_layer", "xattn/{}"
    rows = (
        *_perceiver(),
        row("lang_encoder.model.embed_tokens.weight", "llm/embed"),
        *norm(f"{foreign}.attn.norm", f"{path}/norm"),
        *norm(f"{foreign}.attn.norm_media", f"{path}/kv_norm"),
        *linear(f"{foreign}.attn.to_q", f"{path}/q", bias=False),
        NameRow(
            f"{foreign}.attn.to_kv.weight",
            tuple(f"{path}/{x}/kernel" for x in "kv"),
            "(n o) i -> n i o",
        ),
        *linear(f"{foreign}.attn.to_out", f"{path}/o", bias=False),
        row(f"{foreign}.attn_gate", f"{path}/attn_gate", "1 -> "),
        *norm(f"{foreign}.ff.0", f"{path}/ffn_norm"),
        *linear(f"{foreign}.ff.1", f"{path}/ffn/fc1", bias=False),
        *linear(f"{foreign}.ff.3", f"{path}/ffn/fc2", bias=False),
        row(f"{foreign}.ff_gate", f"{path}/ffn_gate", "1 -> "),
        row("media_tokens", "media/embedding"),
    )
    drop = {r"lang_encoder\.lm_head\.weight": "tied"}
    return Family("openflamingo", "xattn", "perceiver.latents", rows, drop=drop)


def mllama() -> Family:
    """Mllama, its layers numbered without the blocks, and those by the layers behind them
    (mllama.py).
    """
    vision, layer, block = (
        "model.vision_model",
        "model.vision_model.transformer.layers.{}",
        "vit/blocks/{}",
    )
    cross, path = "model.cross.{}", "xattn/{}"
    (llama,) = (family for family in DECODERS if family.name == "llama")
    places = {
        f"{x}_tile_positional_embedding": y for x, y in (("pre", "before"), ("post", "after"))
    }
    matrices = {f"{layer}.self_attn.{x}_proj": f"{block}/attn/{x}" for x in "qkvo"}
    matrices |= {f"{cross}.cross_attn.{x}_proj": f"{path}/{x}" for x in "qkvo"}
    mlp = {"gate_proj": "fc1", "up_proj": "up", "down_proj": "fc2"}
    matrices |= {f"{cross}.mlp.{theirs}": f"{path}/ffn/{name}" for theirs, name in mlp.items()}
    scales = {f"{cross}.cross_attn.{x}_norm": f"{path}/{x}_norm" for x in "qk"}
    scales |= {f"{cross}.input_layernorm": f"{path}/norm"}
    scales |= {f"{cross}.post_attention_layernorm": f"{path}/ffn_norm"}
    gates = {f"{vision}.gated_positional_embedding.gate": "vit/tiles/places/gate"}
    gates |= {f"{vision}.{theirs}.gate": f"vit/tiles/{x}/gate" for theirs, x in places.items()}
    gates |= {f"{layer}.gate_{x}": f"{block}/{x}_gate" for x in ("attn", "ffn")}
    gates |= {f"{cross}.cross_attn_attn_gate": f"{path}/attn_gate"}
    gates |= {f"{cross}.cross_attn_mlp_gate": f"{path}/ffn_gate"}
    rows = (
        row(f"{vision}.class_embedding", "vit/cls"),
        row(f"{vision}.patch_embedding.weight", "vit/patch/kernel", "v c h w -> h w c v"),
        row(f"{vision}.gated_positional_embedding.embedding", "vit/pos"),
        row(f"{vision}.gated_positional_embedding.tile_embedding.weight", "vit/tiles/places/table"),
        *(
            row(f"{vision}.{theirs}.embedding.weight", f"vit/tiles/{x}/table")
            for theirs, x in places.items()
        ),
        *norm(f"{vision}.layernorm_pre", "vit/embed_norm"),
        *norm(f"{vision}.layernorm_post", "vit/tiles/norm"),
        *norm(f"{layer}.input_layernorm", f"{block}/norm1"),
        *norm(f"{layer}.post_attention_layernorm", f"{block}/norm2"),
        *linears(f"{layer}.mlp", f"{block}/mlp", {"fc1": "fc1", "fc2": "fc2"}),
        *linear("model.multi_modal_projector", "bridge/proj"),
        *llama.rows,
        *(row(f"{theirs}.weight", f"{x}/kernel", LINEAR) for theirs, x in matrices.items()),
        *(row(f"{theirs}.weight", f"{x}/scale") for theirs, x in scales.items()),
        *(row(theirs, x, "1 -> ") for theirs, x in gates.items()),
    )
    signature = "model.multi_modal_projector.weight"
    return Family("mllama", "whole", signature, rows, drop=llama.drop)


def idefics(clip: Family) -> Family:
    """IDEFICS, its blocks numbered by layers (idefics.py); `clip` has its vision tower's names."""
    block, path = "model.gated_cross_attn_layers.{}", "xattn/{}"
    attention, ffn = (
        "model.perceiver_resampler.blocks.{}.0",
        "model.perceiver_resampler.blocks.{}.1",
    )
    ours = "bridge/layers/{}"
    (llama,) = (family for family in DECODERS if family.name == "llama")
    cross = {f"cross_attn.{x}_proj": x for x in "qkvo"}
    cross |= {"mlp.gate_proj": "ffn/fc1", "mlp.up_proj": "ffn/up", "mlp.down_proj": "ffn/fc2"}
    norms = {f"cross_attn.{x}_layer_norm": f"{x}_norm" for x in "qk"}
    norms |= {"input_layernorm": "norm", "post_attention_layernorm": "ffn_norm"}
    matrices = {f"{attention}.{x}_proj": x for x in "qkv"} | {f"{attention}.output_proj": "o"}
    matrices |= {f"{ffn}.fc": "ffn/fc1", f"{ffn}.c_proj": "ffn/fc2"}
    layers = {f"{attention}.{x}_layer_norm": f"{x}_norm" for x in "qk"} | {f"{ffn}.ln": "ffn_norm"}
    layers |= {f"{attention}.context_layer_norm": "norm_media"}
    layers |= {f"{attention}.latents_layer_norm": "norm_latents"}
    rows = (
        *(replace(one, foreign=f"model.vision_model.{one.foreign}") for one in clip.rows),
        *llama.rows,
        *(
            one
            for theirs, name in cross.items()
            for one in linear(f"{block}.{theirs}", f"{path}/{name}", bias=False)
        ),
        *(row(f"{block}.{theirs}.weight", f"{path}/{x}/scale") for theirs, x in norms.items()),
        row(f"{block}.alpha_cross_attn", f"{path}/attn_gate", "1 -> "),
        row(f"{block}.alpha_dense", f"{path}/ffn_gate", "1 -> "),
        row("model.perceiver_resampler.latents", "bridge/latents"),
        *(
            one
            for theirs, name in matrices.items()
            for one in linear(theirs, f"{ours}/{name}", bias=False)
        ),
        *(one for theirs, name in layers.items() for one in norm(theirs, f"{ours}/{name}")),
        *norm("model.perceiver_resampler.layer_norm", "bridge/norm"),
    )
    drop = {rf"model\.vision_model\.{name}": rule for name, rule in clip.drop.items()} | llama.drop
    # its blocks have rotary frequencies, and turn nothing by them
    drop[r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.rotary_emb\.inv_freq"] = UNUSED
    return Family("idefics", "whole", f"{block.format(0)}.alpha_dense", rows, drop=drop)
