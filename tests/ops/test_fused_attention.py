"""Attention that cuDNN computes on GPUs: around it against the masked square, and its programs."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.models.attention import attention, text_mask
from evlm_jax.ops.fused_attention import fused_attention
from evlm_jax.ops.grouped_attention import attention_form
from evlm_jax.ops.platform import compile_for
from tests.helpers.attention import assert_close, compiled_text, values_and_gradients

has_cudnn = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "heads", "kv", "scale"), [(17, 4, 2, 0.3), (12, 2, 2, 0.0)])
def test_equals_the_masked_form(masked, length, heads, kv, scale):
    """Of even and odd lengths, forward and every gradient; without a GPU jax.nn's form by XLA is
    in cuDNN's place.
    """
    rng = np.random.default_rng(0)
    q, k, v = (
        2 * rng.standard_normal((2, length, count, 16)).astype(np.float32)
        for count in (heads, kv, kv)
    )
    until = jnp.asarray([[7] * 7 + [length] * (length - 7), [length] * length])
    mask = text_mask(until) if masked else None
    found = values_and_gradients(lambda *qkv: fused_attention(*qkv, mask, scale), [q, k, v])
    wanted = values_and_gradients(lambda *qkv: attention(*qkv, mask, scale), [q, k, v])
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "form"),
    [
        ("cudnn", "gpu", "bfloat16", "cudnn"),
        ("cudnn", "gpu", "float32", "xla"),
        ("cudnn", "tpu", "bfloat16", "xla"),
        ("pallas", "gpu", "bfloat16", "xla"),
        ("pallas", "tpu", "float32", "pallas"),
        ("xla", "gpu", "bfloat16", "xla"),
    ],
)
def test_a_form_is_taken_where_it_runs(wanted, platform, dtype, form):
    with compile_for(platform):
        assert attention_form(wanted, dtype) == form
        assert attention_form(wanted, jnp.dtype(dtype)) == form


@pytest.mark.skipif(has_cudnn, reason="this machine has cuDNN")
def test_where_cudnn_is_missing_it_is_said():
    arrays = [jnp.zeros((1, 4, 1, 8), jnp.bfloat16)] * 3
    with compile_for("gpu"), pytest.raises(ValueError, match="train.attention = 'cudnn': cuDNN"):
        fused_attention(*arrays)


@pytest.mark.skipif(not has_cudnn, reason="this machine has no cuDNN")
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["a100:1", "h100:1"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_for_gpus(topology, masked):
    """A call a pass, and no array of scores a head: of the text one mask for all heads."""
    length, heads = 514 if masked else 257, 4

    def attend(q, k, v, *until):
        return fused_attention(q, k, v, *map(text_mask, until))

    rest = ((2, length),) if masked else ()
    shapes = [(2, length, heads, 112)] * 3
    text = compiled_text(topology, attend, *shapes, rest=rest)
    assert len(re.findall(r'custom_call_target="__cudnn\$fmha\w*Backward"', text)) == 1
    assert len(re.findall(r'custom_call_target="__cudnn\$fmha', text)) == 2
    assert not re.search(rf"\[2,{heads},\d+,{length}\]", text)


def test_loses_no_more_than_xla_in_bfloat16():
    """Outputs and gradients of 257 and 130 tokens, against float32."""
    if jax.default_backend() != "gpu":
        pytest.skip("this machine has no GPU")
    rng = np.random.default_rng(0)
    for length, mask in ((257, None), (130, text_mask(jnp.full((2, 130), 130)))):
        wide = [rng.standard_normal((2, length, 2, 64)).astype(np.float32) for _ in range(3)]
        wanted = values_and_gradients(lambda *qkv, m=mask: attention(*qkv, m), wide)
        narrow = [jnp.asarray(x, jnp.bfloat16) for x in wide]

        def lost(form, m=mask, narrow=narrow, wanted=wanted):
            found = values_and_gradients(lambda *qkv: form(*qkv, m).astype(jnp.float32), narrow)
            pairs = zip(found, wanted, strict=True)
            return max(np.abs(a.astype(np.float32) - b).max() / np.abs(b).max() for a, b in pairs)

        assert lost(fused_attention) < 2 * lost(attention)
