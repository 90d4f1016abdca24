"""The baselines against open_flamingo's resampler and transformers' Llava."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax.checkpoint.lazy_tensors import read_all
from evlm_jax.convert import engine
from evlm_jax.convert.readers import open_source
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from tests.helpers.parity import needs_transformers, open_flamingo_helpers, relative
from tests.helpers.tiny import BASELINES, tiny_config
from tests.models.test_evlm import row


def resampler_as_ours(theirs, value):
    """{canonical name: `value` of a parameter of open_flamingo's resampler, laid out as ours}."""

    def array(p):
        return value(p).detach().numpy()

    def norm(name, module):
        return {
            f"{name}/scale": array(module.weight),
            f"{name}/bias": array(module.bias),
        }

    out = {"latents": array(theirs.latents)} | norm("norm", theirs.norm)
    for i, (attention, ffn) in enumerate(theirs.layers):
        k, v = np.split(array(attention.to_kv.weight), 2)
        kernels = {
            "q": array(attention.to_q.weight),
            "k": k,
            "v": v,
            "o": array(attention.to_out.weight),
        }
        kernels |= {"ffn/fc1": array(ffn[1].weight), "ffn/fc2": array(ffn[3].weight)}
        out |= {f"layers/{i}/{name}/kernel": kernel.T for name, kernel in kernels.items()}
        for name, module in (
            ("norm_media", attention.norm_media),
            ("norm_latents", attention.norm_latents),
            ("ffn_norm", ffn[0]),
        ):
            out |= norm(f"layers/{i}/{name}", module)
    return {f"bridge/{name}": a for name, a in out.items()}


def projector_as_ours(theirs, value):
    """{canonical name: `value` of a parameter of Llava's projector, laid out as ours}."""
    out = {}
    for name, layer in (("fc1", theirs.linear_1), ("fc2", theirs.linear_2)):
        out[f"bridge/{name}/kernel"] = value(layer.weight).detach().numpy().T
        out[f"bridge/{name}/bias"] = value(layer.bias).detach().numpy()
    return out


def assert_equal(wanted, found):
    assert wanted.keys() == found.keys()
    assert {
        name: error
        for name, a in wanted.items()
        if (error := relative(np.asarray(found[name]), a)) > 1e-5
    } == {}


def random_llava(folder):
    """transformers' Llava with random weights, whose towers are saved in `folder`."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3}
    vision = transformers.CLIPVisionConfig(hidden_size=32, image_size=8, patch_size=4, **sizes)
    text = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, num_key_value_heads=1, tie_word_embeddings=False, **sizes
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=255,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    alone = transformers.LlamaForCausalLM(text)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.save_pretrained(folder / "llm")
    model.model.vision_tower.save_pretrained(folder / "vit")
    return model


@pytest.mark.parity
def test_resampler_equals_open_flamingo():
    """Outputs, and gradients of every parameter and of the picture."""
    import torch

    helpers = open_flamingo_helpers()
    cfg = tiny_config(**BASELINES["flamingo"])
    b, v = cfg.bridge, cfg.vit.width
    sizes = {
        "depth": b.depth,
        "dim_head": b.head_dim,
        "heads": b.heads,
        "num_latents": b.latents,
        "ff_mult": b.ffn,
    }
    torch.manual_seed(0)
    theirs = helpers.PerceiverResampler(dim=v, **sizes)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.normal_(1, 0.2)
                module.bias.normal_(0, 0.2)
    rng = np.random.default_rng(0)
    taps = rng.standard_normal((2, 1, 3, 5, v)).astype(
        np.float32
    )  # two taps, of which the last is read
    weight = rng.standard_normal((1, 3, b.latents, v)).astype(np.float32)
    picture = torch.tensor(taps[-1][:, :, None], requires_grad=True)
    expected = theirs(picture)
    (expected * torch.tensor(weight)).sum().backward()

    model = nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0)))
    graphdef, state = nnx.split(model.bridge)
    whole = nnx.from_flat_state(
        [(("bridge", *path), leaf) for path, leaf in nnx.to_flat_state(state)]
    )
    params = param_names.unflatten(cfg, resampler_as_ours(theirs, lambda p: p), whole)

    def run(params, taps):
        return nnx.merge(graphdef, params["bridge"])(taps)

    with jax.default_matmul_precision("highest"):
        got, pull = jax.vjp(run, params, jnp.asarray(taps))
        grads, of_taps = pull(jnp.asarray(weight)[None])
    assert relative(np.asarray(got[0]), expected.detach().numpy()) <= 1e-5
    assert relative(np.asarray(of_taps[-1]), picture.grad[:, :, 0].numpy()) <= 1e-5 and not np.any(
        of_taps[0]
    )
    assert_equal(resampler_as_ours(theirs, lambda p: p.grad), param_names.flatten(cfg, grads))


@needs_transformers
def test_llava_equals_transformers(tmp_path):
    """The whole model with two pictures: logits, and gradients of the projector.

    Their feature layer -2 is our tap depth - 1.
    """
    import torch

    theirs = random_llava(tmp_path)
    found = {tower: engine.describe(str(tmp_path / tower)) for tower in ("vit", "llm")}
    cfg = tiny_config(
        **BASELINES["llava"]
        | {
            "vit": found["vit"] | {"image_size": 8, "taps": (1, 2)},
            "llm": found["llm"],
        }
    )
    arrays = {}
    for tower in found:
        arrays |= read_all(engine.open_tower(cfg, open_source(tmp_path / tower), tower).tensors)
    projector = theirs.model.multi_modal_projector
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    state = param_names.unflatten(cfg, arrays | projector_as_ours(projector, lambda p: p), shapes)
    batch, length = row(cfg, [[3, "i", 4, "i", 5]]), 3 + 4 + 4 + 4 + 5
    tokens = np.where(batch.media_slot >= 0, 255, batch.tokens)[:, :length]
    pixels = (batch.pixels[0, :2] / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    expected = theirs(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
    ).logits[0]
    weight = np.random.default_rng(0).standard_normal(expected.shape).astype(np.float32)
    (expected * torch.tensor(weight)).sum().backward()

    def logits(trained, frozen, batch):
        model = nnx.merge(graphdef, trained, frozen)
        return model.logits(model.hidden(batch))[0, :length]

    trained, frozen = nnx.split_state(state, lambda path, _: path[0] == "bridge", ...)
    with jax.default_matmul_precision("highest"):
        got, pull = jax.vjp(lambda trained: jax.jit(logits)(trained, frozen, batch), trained)
        (grads,) = pull(jnp.asarray(weight))
    assert relative(np.asarray(got), expected.detach().numpy()) <= 1e-5
    assert_equal(projector_as_ours(projector, lambda p: p.grad), param_names.flatten(cfg, grads))
