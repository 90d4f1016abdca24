"""The whole language model trained, with text-only documents mixed in by weight."""

import contextlib
import json

import numpy as np
import pytest

from evlm_jax.checkpoint import store
from evlm_jax.data.pipeline import batches
from evlm_jax.train import train
from tests.data.made import TOKENIZER, row, write_images, write_jsonl
from tests.helpers.tiny import tiny_config, tiny_towers

RULES = ({"pattern": "^(llm|xattn|media)/", "lr": 1.0}, {"pattern": "^vit/", "lr": None})


@pytest.mark.ci
def test_a_run_learns_text_and_pictures_and_moves_all_of_the_language_model(tmp_path):
    write_images(tmp_path / "images", 4)
    asked = [row(f"r{i}", f"images/{i}.png", "<image>red?", f"no, {i}") for i in range(4)]
    pages = tmp_path / "pages.jsonl"
    pages.write_text("".join(json.dumps({"text": f"page {i} of six"}) + "\n" for i in range(6)))
    cfg = tiny_config(
        llm={"vocab": 260, "layers": 1},
        data={
            "sources": (write_jsonl(tmp_path / "asked.jsonl", asked), f"text:{pages}"),
            "weights": (1.0, 2.0),
            "length": 128,
            "targets": 64,
            "block_pairs": 20,
        },
        optim={"phases": ({"rules": RULES},), "lr": 1e-2},
        train={"steps": 12, "batch": 1},
    )
    towers, run = tiny_towers(cfg), tmp_path / "run"
    with contextlib.closing(batches(cfg, TOKENIZER)) as data:
        batch, info = next(data)
        of_text = {key for keys in info["keys"] for key in keys if "pages" in key}
        assert 0 < len(of_text) < sum(map(len, info["keys"]))  # in one row
        unseen = (batch.visible_stop == batch.visible_start) & (batch.positions > 0)
        assert unseen.any() and not unseen.all()
        train(cfg, run, data, towers)
    params = store.load_params(run)[0]
    for name, before in towers.items():
        assert (params[name].tobytes() == before.tobytes()) == name.startswith("vit/"), name
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for source in cfg.data.sources:
        first, last = (losses[at][f"loss/{source}"] for at in (0, -1))
        assert np.isfinite(last) and last < first - 0.5, source
