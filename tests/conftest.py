"""One compilation cache for the session, so that runs of the same tiny model, in this process or another, compile once; strict pictures."""

import os

import jax
import pytest
from PIL import ImageFile


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))  # for processes that tests start
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch):
    """Where lmms_eval is imported, it lets Pillow load cut-off pictures from then on."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
