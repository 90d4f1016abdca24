"""What the tests of published models ask: texts with images anywhere, and answers to them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig
from evlm_jax.convert import importer
from evlm_jax.convert.readers import open_source
from evlm_jax.data import text
from evlm_jax.data.samples import ImageRef, Sample
from evlm_jax.generate import Generator
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import unflatten
from tests.helpers.checkpoints import IMAGE
from tests.helpers.parity import relative
from tests.models.test_evlm import row

TEXTS = {  # "i" is an image, numbers are words
    "text alone": [9],
    "one image": ["i", 5],
    "several images": ["i", 2, "i", "i", 4],
    "text before an image": [3, "i", 3],
}
NEW = 40


def randomise(model):
    """Every parameter, gates too."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = float("norm" in name and name.endswith("weight"))
            p.normal_(scale, p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)


def imported(cfg, folder: Path) -> EVLM:
    """The model of an imported checkpoint."""
    arrays, _ = store.load_params(str(folder))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, unflatten(cfg, arrays, shapes)))


def rows_of(cfg) -> Batch:
    """A row for each of TEXTS."""
    rows = [row(cfg, [parts], seed) for seed, parts in enumerate(TEXTS.values())]
    batch = Batch(*(None if a[0] is None else np.concatenate(a) for a in zip(*rows, strict=True)))
    if cfg.vit.grid_by_picture:
        count = batch.pixels[..., 0, 0, 3].size
        numbers = 1 + np.arange(count) % len(cfg.vit.grids)
        batch.pixels[..., 3] = numbers.reshape(*batch.pixels.shape[:2], 1, 1)
    return batch._replace(tokens=np.where(batch.media_slot >= 0, IMAGE, batch.tokens))


def lengths(batch: Batch) -> list[int]:
    """Tokens of each row's one document."""
    return [int(until[0]) for until in batch.visible_until]


def answers(cfg, model: EVLM, batch: Batch) -> list[list[int]]:
    """NEW greedy tokens behind each row, by the caches."""
    documents = []
    for number, (parts, length) in enumerate(zip(TEXTS.values(), lengths(batch), strict=True)):
        refs = tuple((ImageRef(f"{number}.{i}"),) for i in range(parts.count("i")))
        names = ("tokens", "media_slot", "visible_start", "visible_stop")
        path = np.stack([getattr(batch, name)[number, :length] for name in names], 1).tolist()
        sample = Sample("prompt", "prompt", refs, ())
        documents.append(text.lay_out([[*map(tuple, path)]], [()], sample, cfg))

    def features(refs):
        places = [tuple(map(int, ref.path.split("."))) for ref in refs]
        return np.asarray(model.encode(np.stack([batch.pixels[place] for place in places])))

    tokenizer = importer.vocabulary(cfg, cfg.init.llm)
    generator = Generator(model, tokenizer, features=features)
    return [list(one.tokens) for one in generator.generate(documents, NEW, stop=())]


def compare(cfg: EVLMConfig, folder: Path, their_logits) -> None:
    """The model that was imported into `folder`: logits of TEXTS, and NEW greedy tokens behind each
    by the caches.

    Args:
      their_logits: (tokens [T], visible_start, visible_stop, pixels [I, h, w, 3] uint8) -> [T,
        vocab].
    """
    model, batch = imported(cfg, folder), rows_of(cfg)
    ids = sorted(set(importer.vocabulary(cfg, cfg.init.llm).ids) - {IMAGE})
    with jax.default_matmul_precision("highest"):
        logits = nnx.jit(lambda model, batch: model.logits(model.hidden(batch)))
        ours, found = np.asarray(logits(model, batch)), answers(cfg, model, batch)
    for number, length in enumerate(lengths(batch)):
        seen = [
            np.pad(getattr(batch, name)[number, :length], (0, NEW), mode="edge")
            for name in ("visible_start", "visible_stop")
        ]
        tokens = np.concatenate([batch.tokens[number, :length], found[number]])
        expected = their_logits(tokens, *seen, batch.pixels[number])
        assert relative(ours[number, :length], expected[:length]) <= 1e-5
        assert [ids[i] for i in expected[length - 1 : -1, ids].argmax(-1)] == found[number]


def wrapped_reads_as_before(folder: Path, front: str) -> None:
    """Asserts that names with `front` before all of them read as those without."""
    from safetensors.numpy import load_file, save_file

    before, file = open_source(folder).tensors, folder / "model.safetensors"
    before = {name: tensor.read() for name, tensor in before.items()}
    save_file({front + name: array for name, array in load_file(file).items()}, file)
    after = open_source(folder).tensors
    assert after.keys() == before.keys() and not any(name.startswith(front) for name in after)
    assert all((after[name].read() == array).all() for name, array in before.items())
