"""One compilation cache for the session: runs of the same tiny model, in this process or another, compile once."""

import os

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))  # for processes that tests start
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
