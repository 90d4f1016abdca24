"""Parameter names of language models: one table a family, used both ways."""

from evlm_jax.convert.families import GGUF
from evlm_jax.convert.naming import LINEAR, Family, NameRow, linear, row

GATED = ("gate", "up", "down")  # the three matrices of a gated MLP
NORMS = {  # of a decoder layer in Hugging Face names
    "llama": {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
    "olmo2": {"post_attention_layernorm": "ln1", "post_feedforward_layernorm": "ln2"},
    "gemma2": {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln1_out",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ln2_out",
    },
}


def _llama(name: str) -> Family:
    """Llama and those that have its names, but for their norms; the q, k and v biases are Qwen2's,
    the q and k norms Qwen3's, OLMo's and Gemma 3's.
    """
    foreign, path = "model.layers.{}", "llm/layers/{}"
    attention = [
        one for x in "qkv" for one in linear(f"{foreign}.self_attn.{x}_proj", f"{path}/attn/{x}")
    ]
    mlp = [
        one
        for x in GATED
        for one in linear(f"{foreign}.mlp.{x}_proj", f"{path}/mlp/{x}", bias=False)
    ]
    rows = (
        row("model.embed_tokens.weight", "llm/embed"),
        *attention,
        *linear(f"{foreign}.self_attn.o_proj", f"{path}/attn/o", bias=False),
        *(row(f"{foreign}.self_attn.{x}_norm.weight", f"{path}/attn/{x}_norm/scale") for x in "qk"),
        *mlp,
        *(
            row(f"{foreign}.{theirs}.weight", f"{path}/{ours}/scale")
            for theirs, ours in NORMS[name].items()
        ),
        row("model.norm.weight", "llm/ln_f/scale"),
        row("lm_head.weight", "llm/head/kernel", LINEAR),
    )
    drop = {
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies",
        r"lm_head\.weight": "tied",
    }
    signature = {
        "llama": "self_attn.q_proj",
        "olmo2": "post_feedforward_layernorm",
        "gemma2": "pre_feedforward_layernorm",
    }[name]
    return Family(name, "llm", f"model.layers.0.{signature}.weight", rows, drop=drop)


def _phi3() -> Family:
    """Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another."""
    foreign, path = "model.layers.{}", "llm/layers/{}"
    rows = (
        row("model.embed_tokens.weight", "llm/embed"),
        NameRow(
            f"{foreign}.self_attn.qkv_proj.weight",
            tuple(f"{path}/attn/{x}/kernel" for x in "qkv"),
            LINEAR,
            sizes=("q", "k", "v"),
        ),
        *linear(f"{foreign}.self_attn.o_proj", f"{path}/attn/o", bias=False),
        NameRow(
            f"{foreign}.mlp.gate_up_proj.weight",
            tuple(f"{path}/mlp/{x}/kernel" for x in ("gate", "up")),
            "(n o) i -> n i o",
        ),
        *linear(f"{foreign}.mlp.down_proj", f"{path}/mlp/down", bias=False),
        row(f"{foreign}.input_layernorm.weight", f"{path}/ln1/scale"),
        row(f"{foreign}.post_attention_layernorm.weight", f"{path}/ln2/scale"),
        row("model.norm.weight", "llm/ln_f/scale"),
        row("lm_head.weight", "llm/head/kernel", LINEAR),
    )
    drop = {r"lm_head\.weight": "tied"}
    return Family("phi3", "llm", "model.layers.0.self_attn.qkv_proj.weight", rows, drop=drop)


def _gguf(name: str) -> Family:
    """llama.cpp's names. Of its "llama" it keeps the rows of q and k in pairs for interleaved
    rotary positions; ours (and Hugging Face's) are halves. Of Gemma it keeps norms as 1 + w.
    """
    foreign, path = "blk.{}", "llm/layers/{}"
    gemma, pairs = name == "gemma3-gguf", name == "llama-gguf"
    plain = {
        "attn_v": "attn/v",
        "attn_output": "attn/o",
        "ffn_gate": "mlp/gate",
        "ffn_up": "mlp/up",
        "ffn_down": "mlp/down",
    }
    norms = {"attn_norm": "ln1", "attn_q_norm": "attn/q_norm", "attn_k_norm": "attn/k_norm"}
    norms |= {"ffn_norm": "ln2", "post_attention_norm": "ln1_out", "post_ffw_norm": "ln2_out"}
    norms = {f"{foreign}.{theirs}": f"{path}/{ours}" for theirs, ours in norms.items()}
    halves = {"q": "heads", "k": "kv_heads"}
    rows = (
        row("token_embd.weight", "llm/embed"),
        *(
            row(
                f"{foreign}.attn_{x}.weight",
                f"{path}/attn/{x}/kernel",
                f"({heads} half two) i -> i ({heads} two half)" if pairs else LINEAR,
            )
            for x, heads in halves.items()
        ),
        *(row(f"{foreign}.attn_{x}.bias", f"{path}/attn/{x}/bias") for x in "qkv" if not pairs),
        *(
            one
            for module, place in plain.items()
            for one in linear(f"{foreign}.{module}", f"{path}/{place}", bias=False)
        ),
        *(
            NameRow(f"{theirs}.weight", (f"{ours}/scale",), less=float(gemma))
            for theirs, ours in (norms | {"output_norm": "llm/ln_f"}).items()
        ),
        row("output.weight", "llm/head/kernel", LINEAR),
    )
    drop = {r"rope_freqs\.weight": "factors"}
    return Family(name, "llm", "blk.0.attn_q.weight", rows, drop=drop)


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
        row("transformer.wte.weight", "llm/embed"),
        NameRow(
            f"{foreign}.attn.c_attn.weight",
            tuple(f"{path}/attn/{x}/kernel" for x in "qkv"),
            "(n o) i -> n i o",
        ),
        NameRow(
            f"{foreign}.attn.c_attn.bias",
            tuple(f"{path}/attn/{x}/bias" for x in "qkv"),
            "(n o) -> n o",
        ),
        *(
            one
            for module, place in plain.items()
            for one in linear(f"{foreign}.{module}", f"{path}/{place}", bias=False)
        ),
        row(f"{foreign}.ln_1.weight", f"{path}/ln1/scale"),
        row(f"{foreign}.ln_2.weight", f"{path}/ln2/scale"),
        row("transformer.ln_f.weight", "llm/ln_f/scale"),
        row("lm_head.weight", "llm/head/kernel", LINEAR),
    )
    drop = {
        r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq": "frequencies",
        r"transformer\.h\.\d+\.attn\.bias": "causal",
    }
    drop |= {r"transformer\.h\.\d+\.attn\.masked_bias": "masked", r"lm_head\.weight": "tied"}
    return Family("qwen", "llm", "transformer.h.0.attn.c_attn.weight", rows, drop=drop)


DECODERS = (*map(_llama, NORMS), _phi3(), *map(_gguf, dict.fromkeys(GGUF.values())), _qwen())
