"""Matrices that GPTQ rounds: beside qwix's own form of it, and by the command on a run's data."""

import contextlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.checkpoint import store
from evlm_jax.convert import calibrate
from evlm_jax.convert.activations import in_float32, logits_of
from evlm_jax.data.pipeline import batches
from evlm_jax.ops.gptq import rounded
from evlm_jax.ops.quantised import dequantise, quantise
from evlm_jax.runs import load_trained
from tests.helpers.tiny import tiny_batch, tiny_config

gptq_core = pytest.importorskip("qwix.contrib.gptq_core", reason="needs the extra quant")
qarray = pytest.importorskip("qwix._src.core.qarray", reason="needs the extra quant")

GOLDEN = Path(__file__).parent / "golden" / "format1_dense"
INPUTS, OUTPUTS, TILE = 64, 24, 16


@pytest.fixture(scope="module")
def inputs():
    """Mostly of eight directions; one is never seen."""
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((200, 8)) @ rng.standard_normal((8, INPUTS))
    seen += 0.5 * rng.standard_normal(seen.shape)
    seen[:, 5] = 0
    return seen.astype(np.float32)


@pytest.fixture(scope="module")
def matrix():
    return np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_as_qwix_rounds(inputs, matrix, kind):
    """But for an input that was never seen, whose row qwix forgets."""
    how = qarray.HowToQuantize(
        qtype=jnp.dtype(kind),
        channelwise_axes=(0,),
        tiled_axes={1: TILE},
        calibration_method="absmax",
    )
    gram, matrix = inputs.T @ inputs, np.where(np.arange(INPUTS)[:, None] == 5, 0, matrix)
    theirs = gptq_core.quantize_weight(jnp.array(matrix.T), jnp.array(gram), how, TILE)[0]
    ours = dequantise(*rounded(matrix, gram, kind, TILE), kind, -2)
    np.testing.assert_allclose(ours, qarray.dequantize(theirs).T, 0, 1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_outputs_are_nearer_than_those_of_plain_rounding(inputs, matrix, kind):
    made = [rounded(matrix, inputs.T @ inputs, kind, TILE), quantise(matrix, kind, TILE, -2)]
    assert [a.shape for a in made[0]] == [a.shape for a in made[1]]
    ours, plain = (np.linalg.norm(inputs @ (dequantise(*a, kind, -2) - matrix)) for a in made)
    assert 0 < ours < 0.5 * plain


def test_inputs_that_are_unlike_each_other_leave_nothing_to_make_up_for(matrix):
    ours = rounded(matrix, np.diag(np.arange(INPUTS)), "nf4", TILE)
    for mine, theirs in zip(ours, quantise(matrix, "nf4", TILE, -2), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(ours[0], rounded(matrix, np.zeros((INPUTS,) * 2), "nf4", TILE)[0])
    with pytest.raises(ValueError, match="not finite"):
        rounded(matrix, np.full((INPUTS,) * 2, np.nan), "nf4", TILE)


def test_padding_is_left_out():
    """Rows of a batch whose planned pairs name the images that are seen."""
    cfg, rng = tiny_config(), np.random.default_rng(0)
    batch = tiny_batch(cfg, 3)
    text, images = calibrate._real(batch)
    pairs = batch.pair_block < batch.block_tokens.shape[1]
    for row, seen in enumerate(images):
        assert {*np.flatnonzero(seen)} == {*batch.pair_image[row][pairs[row]]}
    assert 0 < text.mean() < 1 and 0 < images.mean() < 1
    for real, shape in (
        (text, text.shape),
        (images, (*images.shape, 5)),
        (images, (images.size, 5)),
    ):
        x = rng.standard_normal((*shape, 8)).astype(np.float32)
        own = x.reshape(real.size, -1, 8)[real.ravel()].reshape(-1, 8)
        np.testing.assert_allclose(calibrate._gram(x, real), own.T @ own, 1e-4, 1e-4)


def logits(where: str) -> np.ndarray:
    """Of a run for a batch of its training data."""
    trained = load_trained(where)
    model = in_float32(trained.model)
    with contextlib.closing(batches(model.cfg, trained.tokenizer)) as found:
        return logits_of(model, next(found)[0])


@pytest.mark.ci
def test_the_command_rounds_on_rows_of_the_runs_data(tmp_path, monkeypatch, capsys):
    """A run whose paths are relative; its logits stay nearer than those of plain rounding."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    command = "convert quantize --checkpoint run --kind nf4 --tile 16 --out"
    for rows, out in ((0, "plain"), (8, "calibrated")):
        more = ["--calibrate", str(rows)] if rows else []
        assert not cli.main([*command.split(), out, *more])
    receipt = json.loads(Path("calibrated/quantised.json").read_text())
    assert (receipt["kind"], receipt["rows"], len(receipt["kl"])) == ("nf4", 8, 5)
    before, *errors = (logits(where) for where in ("run", "plain", "calibrated"))
    plain, calibrated = (np.linalg.norm(error - before) for error in errors)
    assert 0 < calibrated < 0.9 * plain
    plain, made = (store.load_params(out)[0] for out in ("plain", "calibrated"))
    assert {n: a.shape for n, a in plain.items()} == {n: a.shape for n, a in made.items()}
    bytes_ = [n for n, a in made.items() if a.dtype == np.uint8]
    assert {"llm/embed", "vit/blocks/0/attn/q/kernel"} < {*bytes_}
    assert all((made[n] != plain[n]).any() for n in bytes_)
    capsys.readouterr()
    assert cli.main([*command.split(), "plain", "--calibrate", "8"]) == 1
    assert "plain exists" in capsys.readouterr().err
    Path("rows.jsonl").unlink()
    assert cli.main([*command.split(), "again", "--calibrate", "8"]) == 1
    assert "rows.jsonl" in (said := capsys.readouterr().err) and "leave --calibrate out" in said
