"""Activations beside PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax.models.layers import gelu

torch = pytest.importorskip("torch", reason="needs the extra parity")

X = np.linspace(-10, 10, 100_001, dtype=np.float32)
STEPS = {"float32": 2**-23, "bfloat16": 2**-7}  # between numbers, of their size


@pytest.mark.parametrize("dtype", STEPS)
def test_gelu_rounds_as_torch_does(dtype):
    """Values and derivatives; of negative numbers of 16 bits no digit is lost."""
    x = jnp.asarray(X, dtype)
    other = torch.tensor(np.asarray(x.astype(jnp.float32)), requires_grad=True)
    theirs = torch.nn.functional.gelu(other.to(getattr(torch, dtype)))
    theirs.float().sum().backward()
    ours = jax.jit(gelu)(x), jax.jit(jax.grad(lambda x: gelu(x).astype(jnp.float32).sum()))(x)
    for mine, its in zip(ours, (theirs.detach().float(), other.grad), strict=True):
        assert mine.dtype == x.dtype
        error = np.abs(np.asarray(mine, np.float32) - its.numpy())
        assert (error <= STEPS[dtype] * np.abs(its.numpy()) + 2e-6).all()
