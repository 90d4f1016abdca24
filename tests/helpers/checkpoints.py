"""Directories for the conversion tests: a run of ours, a tokenizer, foreign towers of the tiny
config.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.checkpoint.safetensors_file import write_folder
from evlm_jax.checkpoint.store import Checkpoints
from evlm_jax.config import EVLMConfig, to_dict
from evlm_jax.convert import engine
from evlm_jax.convert.tables import FAMILIES
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import flatten

IMAGE = 255  # id of the placeholder
SPECIALS = {"<|im_start|>": 252, "<|im_end|>": 253, "<|endoftext|>": 254, "<|media|>": IMAGE}


def tokenizer_directory(folder: Path) -> Path:
    """A vocabulary of the printable letters, and of SPECIALS at the end of the tiny config's 256
    ids.
    """
    letters = {chr(33 + i): i for i in range(94)} | {"Ġ": 94, "Ċ": 95}  # of space and newline
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(letters | SPECIALS, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    )
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


def run_directory(
    folder: Path, cfg: EVLMConfig, model: EVLM, frozen_dtype: str = "float32"
) -> EVLMConfig:
    """What training `model` would leave in `folder` at step 3; returns its config."""
    cfg = replace(cfg, init=replace(cfg.init, llm=str(tokenizer_directory(folder / "tokenizer"))))
    state = jax.device_get(nnx.state(model))  # its layers are cut by NumPy, which compiles nothing
    arrays = {name: np.asarray(array) for name, array in flatten(cfg, state).items()}
    trained = {
        name: array
        for name, array in arrays.items()
        if name.startswith(("xattn/", "media/", "bridge/"))
    }
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.freeze(
        {
            name: Tensor.of(array).astype(frozen_dtype)
            for name, array in arrays.items()
            if name not in trained
        }
    )
    groups = {"0/count": jnp.int32(3)} | {
        f"0/{moment}/{name}": array for moment in ("mu", "nu") for name, array in trained.items()
    }
    checkpoints.save(
        3,
        trained,
        groups,
        {"phase": 0, "data": {}, "config": to_dict(cfg), "trained": sorted(trained)},
    )
    checkpoints.close()
    return cfg


def family(name: str):
    """A table of FAMILIES."""
    return next(f for f in FAMILIES if f.name == name)


def random_tensors(
    cfg: EVLMConfig, tower: str, dtype: str = "float32", seed: int = 0
) -> dict[str, Tensor]:
    """Random values for a part of the model, as of engine.PARTS, by canonical name."""
    rng = np.random.default_rng(seed)
    shapes = {
        name: shape
        for name, shape in engine.parameter_shapes(cfg).items()
        if name.startswith(engine.PARTS[tower])
    }
    return {
        name: Tensor.of(np.asarray(rng.standard_normal(shape)).astype(dtype))
        for name, shape in shapes.items()
    }


def dinov2_directory(folder: Path, cfg: EVLMConfig, dtype: str = "float32") -> Path:
    """The tiny config's vision tower as Hugging Face has it, of all `depth` blocks."""
    whole = replace(
        cfg, vit=replace(cfg.vit, taps=(cfg.vit.depth,), image_size=cfg.vit.pretrained_size)
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = engine.to_foreign(family("dinov2"), random_tensors(whole, "vit", dtype), {})
    write_folder(
        folder, tensors | {"layernorm.weight": Tensor.of(np.ones(cfg.vit.width, np.float32))}
    )
    vit = cfg.vit
    config = {
        "model_type": "dinov2_with_registers" if vit.registers else "dinov2",
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
    }
    config |= {
        "num_attention_heads": vit.heads,
        "mlp_ratio": vit.mlp / vit.width,
        "patch_size": vit.patch,
        "image_size": vit.pretrained_size,
    }
    config |= {"num_register_tokens": vit.registers} if vit.registers else {}
    (folder / "config.json").write_text(
        json.dumps(config | {"layer_norm_eps": vit.eps, "hidden_act": vit.activation})
    )
    return folder


def llama_directory(folder: Path, cfg: EVLMConfig, dtype: str = "float32", **changes) -> Path:
    """The tiny config's language model, with a tokenizer; keys of config.json as changed."""
    tokenizer_directory(folder)
    write_folder(
        folder,
        engine.to_foreign(
            family("llama"), random_tensors(cfg, "llm", dtype), engine.sizes(cfg, "llm")
        ),
    )
    llm = cfg.llm
    config = {
        "vocab_size": llm.vocab,
        "hidden_size": llm.hidden,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
    }
    config |= {
        "num_key_value_heads": llm.kv_heads,
        "intermediate_size": llm.mlp,
        "rope_theta": llm.rope_theta,
        "rms_norm_eps": llm.eps,
    }
    config |= {
        "model_type": "qwen2" if llm.qkv_bias else "llama",
        "tie_word_embeddings": llm.tied,
        "head_dim": llm.head_dim,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
