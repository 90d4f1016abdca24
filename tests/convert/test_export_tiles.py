"""A model that cuts large pictures into tiles, exported: its processor cuts them likewise."""

import numpy as np
import pytest
from PIL import Image

import evlm_jax
from evlm_jax.convert import export
from evlm_jax.data import image, text
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

SIZES = (30, 50, 3), (12, 20, 3)


def test_tiles_are_those_of_training(tmp_path):
    """Tokens, pixels and logits of a picture in four tiles beside one that is small."""
    cfg = tiny_config(data={"template": "plain", "tiles": 4}, vit={"image_size": (16, 24)})
    cfg = run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "hf")
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in SIZES]
    said = "<image>Left,<image> or right?"
    processor, model = (
        kind.from_pretrained(tmp_path / "out", trust_remote_code=True)
        for kind in (transformers.AutoProcessor, transformers.AutoModelForCausalLM)
    )
    inputs = processor(said, images=shown)
    assert inputs["image_groups"][0].tolist() == [0, 0, 0, 0, 0, 2]
    with torch.no_grad():
        theirs = model(**inputs).logits[0].numpy()
    for place in ("run", "out"):
        ours = evlm_jax.load(tmp_path / place)
        assert ours.config.data.tiles == 4
        document = text.alone(said, image.visuals_of(shown), ours.tokenizer, ours.config)
        assert inputs["input_ids"][0].tolist() == document.tokens.tolist()
        found = np.asarray(ours.logits(said, shown))
        assert np.abs(found - theirs).max() <= 2e-3 * np.abs(theirs).max()
