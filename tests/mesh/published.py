"""Published models on the demo's data and eight devices; tests/parallel/test_eight_devices.py
starts it in a process that has them.
"""

import json
import math
import shutil

import numpy as np
import pytest

from evlm_jax.checkpoint import store
from evlm_jax.config import from_config_dict, to_dict
from evlm_jax.convert import importer
from evlm_jax.launch import train_run
from experiments import demo
from tests.helpers.parity import needs_asset

torch = pytest.importorskip("torch", reason="needs the extra parity")
STEPS, HALF = 20, 10
SECTIONS = ("xattn", "bridge", "media")  # beside those of the towers, what is not EVLM's


def open_flamingo(folder):
    """(config, what is imported), of a random model with its checkpoint."""
    from tests.convert import test_open_flamingo as made

    theirs = made.their_model(folder, 0, "Llama", 2, num_hidden_layers=4)
    torch.save(made.checkpoint(theirs), folder / "checkpoint.pt")
    return made.config_for(folder, 2), folder / "checkpoint.pt"


def idefics(folder):
    """Likewise; transformers' folder."""
    from tests.convert import test_idefics as made

    made.their_model(folder, 0, **made.CASES["resampler, words apart"])
    return made.config_for(folder), folder


def mllama(folder):
    """Likewise; each picture has a grid of tiles of its own."""
    from tests.convert import test_mllama as made

    made.their_model(folder, 0)
    return made.config_for(folder, None), folder


@pytest.mark.slow
@needs_asset("easy-vqa")
@pytest.mark.parametrize("made", [open_flamingo, idefics, mllama])
def test_trains_on_the_demo_and_goes_on_with_the_same_bits(tmp_path, made):
    """20 steps from an import, the loss falls; what is cut off after 10 ends with the same bits."""
    cfg, model = made(tmp_path / "theirs")
    importer.import_model(cfg, str(model), str(tmp_path / "in"))
    config, own = demo.get_config(), to_dict(cfg)
    for name in ("vit", "llm", "init", *SECTIONS):
        config[name] = own[name]
    config.data.update(
        sources=("easy-vqa",), weights=(1.0,), dialogs=1, length=64, images=2, slots=2, targets=32,
        block_pairs=32, cache_features=False,
    )  # fmt: skip
    config.optim.update(lr=1e-2, warmup=2)
    config.train.update(steps=STEPS, save_every=HALF, batch=8, log_every=1)
    config.train.matmul_precision = "float32"
    tensor = math.gcd(2, cfg.llm.kv_heads, cfg.llm.vocab)
    config.mesh.update(data=1, fsdp=4 // tensor, tensor=tensor, expert=2)
    cfg = from_config_dict(config)
    assert train_run(cfg, str(tmp_path / "whole"), init=str(tmp_path / "in")) == STEPS
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    print(f"\n{made.__name__}: {np.round(losses, 3)}")
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/steps" / str(STEPS))
    assert train_run(cfg, str(tmp_path / "cut")) == STEPS
    one, other = (store.read(tmp_path / side, STEPS) for side in ("whole", "cut"))
    for mine, theirs in ((one.params, other.params), (one.groups, other.groups)):
        assert mine.keys() == theirs.keys()
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)
    started, _ = store.load_params(str(tmp_path / "in"))
    moved = {name for name in one.params if one.params[name].tobytes() != started[name].tobytes()}
    assert {name.split("/")[0] for name in moved} >= {"xattn", "media"}
