"""The whole model agrees: a trie in a packed row gives each dialog the losses it has alone."""

import jax
import numpy as np
from flax import nnx

from evlm_jax.data.pipeline import rows_in_order
from evlm_jax.data.samples import ImageRef, Sample, Turn, part, question
from evlm_jax.data.text import encode
from evlm_jax.loss import losses
from evlm_jax.models.evlm import EVLM
from tests.data.made import TOKENIZER, write_images
from tests.helpers.tiny import tiny_config


def test_losses_of_a_packed_trie_equal_each_dialog_alone(tmp_path):
    data = dict(sources=("made",), weights=(1.0,), length=192, targets=96, images=6, block_pairs=60)
    near = dict(window=(5, 0), rope=(1e4, 0.0))  # by position, whatever stands between
    cfg = tiny_config(llm=dict(vocab=320, **near), data=data)
    write_images(tmp_path, 6, size=11)

    def image(*numbers):
        return tuple(ImageRef(str(tmp_path / f"{i}.png")) for i in numbers)

    samples = [
        Sample(
            "a",
            "made",
            (image(0),),
            tuple(question(f"<image>is it {c}?", "yes" if c == "a" else "no") for c in "aba"),
        ),
        Sample(
            "b",
            "made",
            (image(1), image(2, 3, 4)),
            (question("x<image>y<image>z", "one"), question("<image><image>x", "two")),
        ),
        Sample(
            "c",
            "made",
            (),
            (
                (
                    Turn("user", "hi"),
                    Turn("assistant", "ho"),
                    Turn("user", "hi"),
                    Turn("assistant", "hu"),
                ),
            ),
        ),
    ]
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(0)  # numbers everywhere, so that gates are open and pictures matter
    model = nnx.merge(
        graphdef,
        jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape).astype(np.float32), shapes),
    )
    run = jax.jit(losses)

    def by_dialog(documents):
        """{(document, dialog): losses of its targets}"""
        found, rows = {}, 0
        for batch, owner, dialog in rows_in_order(documents, cfg, rows=1):
            rows += 1
            values = np.asarray(run(model, batch))
            for b, m in zip(*np.nonzero(owner >= 0), strict=True):
                found.setdefault((int(owner[b, m]), int(dialog[b, m])), []).append(values[b, m])
        return found, rows

    packed, rows = by_dialog([encode(sample, TOKENIZER, cfg) for sample in samples])
    assert rows < len(samples)  # some of them share a row
    for i, sample in enumerate(samples):
        for d in range(len(sample.dialogs)):
            alone, _ = by_dialog([encode(part(sample, d, 1), TOKENIZER, cfg)])
            np.testing.assert_allclose(packed[i, d], alone[0, 0], rtol=1e-5, atol=1e-5)
