"""Quick compilation, and one cache for all sessions and for the processes that tests start; few
collections of garbage; what needs torch is marked; strict pictures.
"""

import gc
import importlib.util
import os
from importlib import metadata

import pytest
from PIL import ImageFile

from evlm_jax import assets

# Before jax is imported, which reads them; of every version its own, so that an old one's can be
# deleted.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(assets.cache_root() / "tests" / f"jax-{metadata.version('jax')}"),
)
# Small programs too: reading one takes half of the time of compiling it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tiny programs run once: LLVM's optimisations, and XLA's newer way of emitting loops (the only one
# of jax 0.12), take more than half of the tests' time (docs/decisions.md, D-TEST-1). XLA's own
# passes stay.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if metadata.version("jax").startswith("0.10."):
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")]).strip()


# Files that take longest. They begin, so that no core waits for one of them at the end.
LONG = {
    f"test_{name}.py"
    for name in (
        "eight_devices mesh train benchmarks golden tutorials wheel parity_llm export moe generate"
        " generate_sizes library pipeline run bad_updates long_video quant lora import verify"
        " command_line resume upcycle restore export_model pack package"
    ).split()
}


def pytest_configure(config):
    """With `-n` pytest-xdist would begin with the files of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_finish():
    """Tracing makes small objects by the million, most of which stay in JAX's caches: Python looks
    through them seldom, and no more through what was imported.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Long files first; what bears `parity` is skipped where torch or transformers is missing."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        skip = pytest.mark.skip(
            reason='needs torch and transformers: pip install -e ".[test,parity]"'
        )
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch):
    """Where lmms_eval is imported, it lets Pillow load cut-off pictures from then on."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
