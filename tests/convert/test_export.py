"""The exported directory, loaded by a process that has no jax and no evlm_jax, against the model it
was made from.
"""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.convert import export
from evlm_jax.models.decode_weights import Weights
from evlm_jax.models.decoding import Prompt, read_images, read_prompts
from evlm_jax.ops.attention_plan import attention_plan
from evlm_jax.ops.grouped_attention import AttentionPlan
from tests.helpers.checkpoints import IMAGE, run_directory
from tests.helpers.parity import needs_transformers, relative
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

TOWERS = {
    "internvit, tied Llama": {"vit": {"bias": "out", "qk_norm": "all"}},
    "eva, Qwen": {
        "vit": {"norm": "res_post", "bias": "qv", "layer_scale": False},
        "llm": {"qkv_bias": True, "tied": False, "kv_heads": 4},
        "xattn": {"schedule": "cyclic", "every": 3, "first": 1},
    },
    "clip, no zero key": {
        "vit": {
            "layer_scale": False,
            "patch_bias": False,
            "embed_norm": True,
            "activation": "quick_gelu",
            "taps": (1, 3),
        },
        "xattn": {"sinks": 0, "norm_kind": "rms", "qk_norm": "head", "gated": True},
    },
    "aimv2, shared keys": {
        "vit": {
            "layer_scale": False,
            "class_token": False,
            "activation": "gelu_tanh",
            "norm_kind": "rms",
            "patch_norm": True,
            "bias": "none",
            "image_size": (12, 8),
        },
        "xattn": {"every": 2, "first": 1, "sinks": 2, "heads": 4, "kv_heads": 2, "kv_norm": False},
    },
    "dinov2 giant, with registers": {
        "vit": {
            "registers": 3,
            "gated": True,
            "activation": "silu",
            "rotary": 9.0,
            "image_size": (8, 12),
        }
    },
    "dinov2, experts": {
        "moe": {"copies": 2, "slices": 4, "top_k": 3, "gates": "softmax"},
        "xattn": {"every": 2},
    },
    "clip, Gemma, experts": {
        "vit": {
            "layer_scale": False,
            "patch_bias": False,
            "embed_norm": True,
            "activation": "quick_gelu",
            "taps": (1, 3),
        },
        "llm": {
            "tied": False,
            "qk_norm": "head",
            "norms": "both+1",
            "window": (7, 7, 0),
            "rope": (1e4, 1e4, 0.0, 1e3),
            "rope_scaling": {"kind": "yarn", "factor": 4.0, "original": 8, "query": 0.4},
            "rotary_share": 0.5,
            "scales": {
                "embedding": 3.0,
                "residual": 0.7,
                "query": 0.3,
                "logits": 2.0,
                "score_cap": 5.0,
                "logit_cap": 9.0,
            },
            "activation": "gelu_tanh",
        },
        "moe": {"copies": 4, "slices": 4, "top_k": 4},
    },
    "eva, Qwen 1.0 beyond its context": {
        "vit": {"norm": "res_post", "bias": "qv", "layer_scale": False},
        "llm": {
            "qkv_bias": True,
            "tied": False,
            "kv_heads": 4,
            "dynamic_ntk": 16,
            "logn": 16,
            "qk_norm": "all",
        },
    },
}
# A number of words, or the frames of a visual.
ROWS = {
    "text alone": [7],
    "text, image, text": [3, (0,), 5],
    "several images": [(0,), 2, (1,), (2,), 6],
    "video": [2, (0, 1, 2), 4],
    "video, then an image": [(0, 1), 3, (2,), 4],
}
LONG = {
    "long text": [36],
    "long text, video": [2, (0, 1, 2), 30],
}  # with their answers in 2 to 4 contexts of the Qwen 1.0 above
SCRIPT = """
import sys
# as if they were not installed
sys.modules |= dict.fromkeys(("jax", "flax", "evlm_jax", "torchvision", "einops"))
import numpy as np, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "evlm"
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(folder + "/again", max_shard_size="200KB")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    eager = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager"
    ).eval()
    assert model.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    data, out = np.load(folder + "/inputs.npz"), {}
    new = int(data["new"])
    for name in sorted({key.split("/")[0] for key in data if "/" in key}):
        parts = ("input_ids", "pixel_values", "image_groups")
        inputs = {part: torch.tensor(data[f"{name}/{part}"]) for part in parts}
        with torch.no_grad():
            out[f"{name}/logits"] = eager(**inputs).logits[0].numpy()
            logits = model(**inputs).logits[0].numpy()
            assert np.abs(logits - out[f"{name}/logits"]).max() < 1e-4, name
            sizes = dict(max_new_tokens=new, do_sample=False)
            sizes |= dict(eos_token_id=None, pad_token_id=0, suppress_tokens=None)
            cached = model.generate(**inputs, **sizes)
            assert torch.equal(cached, model.generate(**inputs, use_cache=False, **sizes)), name
            assert cached.shape[1] == inputs["input_ids"].shape[1] + new
            if "video" in name:
                sizes |= {"max_new_tokens": 6, "num_beams": 3}
                beams = model.generate(**inputs, **sizes)
                assert torch.equal(beams, model.generate(**inputs, use_cache=False, **sizes)), name
            out[f"{name}/generated"] = cached[0].numpy()
    np.savez(folder + "/outputs.npz", **out)
"""


def row(cfg, parts, pixels, answer=(), length=0):
    """(Batch of one row, inputs of the PyTorch model) of a row of ROWS and an answer; its words are
    a function of their place.

    Args:
      length: up to which words stand behind the answer, so that all rows are of one program.
    """
    fields = {name: [] for name in ("tokens", "media_slot", "visible_start", "visible_stop")}
    frames, groups, seen = 0, [], (0, 0)

    def add(*values):
        for field, value in zip(fields.values(), values, strict=True):
            field.append(value)

    for number, part in enumerate(parts):
        if isinstance(part, int):
            for _ in range(part):
                add((7 * len(fields["tokens"]) + 3) % 250, -1, *seen)
            continue
        for frame in range(frames, frames + len(part)):
            for slot in range(cfg.media.tokens):
                add(IMAGE, slot, frame, frame + 1)
        seen, groups = (frames, frames + len(part)), groups + [number] * len(part)
        frames += len(part)
    for token in (*answer, *(0 for _ in range(length - len(answer) - len(fields["tokens"])))):
        add(token, -1, *seen)
    arrays = {name: np.array(values, np.int32) for name, values in fields.items()}
    length = len(arrays["tokens"])
    arrays |= {"positions": np.arange(length), "visible_until": np.full(length, length)}
    arrays |= {
        "target_positions": np.zeros(1),
        "targets": np.full(1, -1),
        "target_source": np.zeros(1),
    }
    arrays |= attention_plan(
        arrays["visible_start"], arrays["visible_stop"], cfg.xattn.query_block, 32
    )
    batch = Batch(
        **{name: jnp.asarray(array, jnp.int32)[None] for name, array in arrays.items()},
        pixels=pixels[None],
        taps=None,
    )
    normal = (pixels[:frames] / 255.0 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    inputs = {
        "input_ids": arrays["tokens"][None].astype(np.int64),
        "image_groups": np.array([groups], np.int64).reshape(1, -1),
    }
    return batch, inputs | {"pixel_values": normal.transpose(0, 3, 1, 2)[None].astype(np.float32)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name of TOWERS: (model, its rows, outputs of the exported directory)}; one process loads all
    of them.
    """
    place, made = tmp_path_factory.mktemp("exports"), {}
    for number, (name, sections) in enumerate(TOWERS.items()):
        cfg = tiny_config(**sections)
        model, folder = random_model(cfg, seed=0), place / str(number) / "out"
        run_directory(folder.parent / "run", cfg, model)
        export.export(str(folder.parent / "run"), str(folder), "hf")
        pixels = np.random.default_rng(0).integers(0, 256, (3, *cfg.vit.size, 3)).astype(np.uint8)
        rows = {
            name: row(cfg, parts, pixels)
            for name, parts in (LONG if cfg.llm.dynamic_ntk else ROWS).items()
        }
        arrays = {
            f"{name}/{part}": array
            for name, (_, inputs) in rows.items()
            for part, array in inputs.items()
        }
        np.savez(folder / "inputs.npz", new=24 if cfg.llm.dynamic_ntk else 10, **arrays)
        made[name] = model, pixels, rows, folder
    environment = os.environ | {
        "HF_HOME": str(place / "empty"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-c", SCRIPT, *(str(folder) for *_, folder in made.values())]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (*parts, np.load(folder / "outputs.npz")) for name, (*parts, folder) in made.items()
    }


@needs_transformers
@pytest.mark.ci
@pytest.mark.parametrize("towers", TOWERS)
def test_loaded_without_jax(exported, towers):
    model, pixels, rows, found = exported[towers]
    cfg = model.cfg
    for name, (batch, _) in rows.items():
        answer, theirs = (
            found[f"{name}/generated"][batch.tokens.shape[1] :],
            found[f"{name}/logits"],
        )
        assert IMAGE not in answer
        if not cfg.llm.dynamic_ntk:
            batch, _ = row(cfg, ROWS[name], pixels, answer, length=48)
        with jax.default_matmul_precision("highest"):
            ours = np.asarray(logits(*nnx.split(model), batch))[0]
        if cfg.llm.dynamic_ntk:  # of the last token alone: generation differs from training
            assert relative(theirs[-1:], ours) <= 1e-4, name
        else:
            assert relative(theirs, ours[: len(theirs)]) <= 1e-4, name
            assert_greedy(ours[len(theirs) - 1 :, :IMAGE], answer)


def assert_greedy(logits, answer):
    """`answer` is the best token at each place, up to the first where the best two are closer than
    1e-3.
    """
    second, best = np.sort(logits[: len(answer)])[:, -2:].T
    sure = np.cumprod(best - second >= 1e-3).astype(bool)
    assert (logits[: len(answer)].argmax(-1) == answer)[sure].all() and sure[:5].all()


@partial(jax.jit, static_argnums=0)
def logits(graphdef, state, batch: Batch) -> jax.Array:
    """[1, T, vocab]; [1, 1, vocab] behind the last token where generation differs from training."""
    model = nnx.merge(graphdef, state)
    if not model.cfg.llm.dynamic_ntk:
        return model.logits(model.hidden(batch))
    length = jnp.array(batch.tokens.shape[1:])
    grouped = AttentionPlan(
        batch.block_tokens, batch.token_place, batch.pair_block, batch.pair_image
    )
    first, last = batch.visible_start[:, -1], batch.visible_stop[:, -1]
    prompt = Prompt(
        batch.tokens,
        batch.media_slot,
        length,
        batch.visible_start,
        grouped,
        first,
        last - first,
    )
    weights, taps = Weights.of(model, "float32"), model.encode(batch.pixels)[0]
    image = jnp.arange(3)[None]
    return read_prompts(
        model.cfg,
        weights,
        prompt,
        read_images(model.cfg, weights, taps, image, image, length),
        jax.random.split(jax.random.key(0), 1),
        len(batch.tokens[0]),
        3,
    )[0][:, None]


@pytest.mark.parametrize(
    "form",
    [
        "hf",
        pytest.param("torch", marks=[pytest.mark.parity, pytest.mark.ci]),
        pytest.param("openflamingo", marks=[pytest.mark.parity, pytest.mark.ci]),
    ],
)
def test_a_failed_export_leaves_nothing(tmp_path, form):
    cfg = tiny_config()
    model = random_model(cfg, seed=0)
    model.xattn.attn_gate.scalar[...] = model.xattn.attn_gate.scalar[...].at[2].set(jnp.nan)
    run_directory(tmp_path / "run", cfg, model)
    with pytest.raises(ValueError, match="attn_gate holds NaN"):
        export.export(str(tmp_path / "run"), str(tmp_path / "out"), form)
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="give a new directory"):
        export.export(str(tmp_path / "run"), str(tmp_path / "out"), "llm")
