"""The run that is talked to."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from evlm_jax.runs import Trained, load_trained

GOLDEN = Path(__file__).parents[1] / "golden" / "format1_dense"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run with open gates, so that pictures count."""
    place = tmp_path_factory.mktemp("chat") / "golden"
    shutil.copytree(GOLDEN, place)
    found = load_trained(str(place / "run"))

    def gate(path, leaf):
        return jnp.full_like(leaf, 0.5) if "gate" in jax.tree_util.keystr(path) else leaf

    graphdef, params = nnx.split(found.model)
    model = nnx.merge(graphdef, jax.tree.map_with_path(gate, params))
    return Trained(model, found.tokenizer, found.params)
