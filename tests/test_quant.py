"""Matrices in 8 and 4 bits: their values, what a model of them computes, what a run beside them
trains and keeps, and the commands that make them and make them whole.
"""

import dataclasses
import json
import os
import signal
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evlm_jax import cli
from evlm_jax.checkpoint import by_shard, store
from evlm_jax.checkpoint.initialize import begin_with, initialize
from evlm_jax.checkpoint.lazy_tensors import Tensor, opened, read_all
from evlm_jax.config import QuantConfig
from evlm_jax.config.load import load_config
from evlm_jax.config.model import TOWER_MATRICES
from evlm_jax.convert.engine import parameter_shapes
from evlm_jax.convert.merge import merge_run, merged
from evlm_jax.data.samples import Turn
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.generate import Generator
from evlm_jax.launch import next_stage
from evlm_jax.loss import loss_sums
from evlm_jax.models import quant
from evlm_jax.models.llm import LLM
from evlm_jax.models.lora import is_adapter
from evlm_jax.models.param_names import flatten
from evlm_jax.ops.platform import compile_for
from evlm_jax.ops.quantised import NF4, Quantised, dequantise, quantise, shapes
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.parallel.status import Stopped
from evlm_jax.phase import TrainPhase
from evlm_jax.runs import model_of
from evlm_jax.train import train
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import TinyData, tiny_batch, tiny_config

qwix = pytest.importorskip("qwix", reason="needs the extra quant")

KINDS = ("int8", "int4", "nf4")
WIDER = ("^llm/embed$", "^llm/.*/down/")  # in int8
QUANT = {"patterns": TOWER_MATRICES, "kind": "nf4", "tile": 16, "int8": WIDER}
RULES = ({"pattern": "/lora_|^(xattn|media)/", "lr": 1.0}, {"pattern": "", "lr": None})
CFG = tiny_config(
    lora={"patterns": (r"^llm/layers/\d+/attn/[qv]/",), "rank": 3, "alpha": 6.0},
    quant=QUANT,
    optim={"phases": ({"rules": RULES},), "lr": 1e-2},
    train={"steps": 8, "save_every": 4, "keep": 9},
)
STEP = 4  # where a run is cut


def scales(names):
    return {name for name in names if name.endswith(quant.NAMES)}


def table(kind):
    """(numbers that a value may be before its scale, what the largest of a tile becomes)."""
    if kind == "nf4":
        return np.float32(NF4), 1.0
    most = {"int8": 127, "int4": 7}[kind]
    return np.arange(-most - 1, most + 1, dtype=np.float32), most + 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_values_are_those_of_qwix_and_the_nearest_there_are(kind, axis):
    matrix = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)
    matrix[:16, :16] = 0
    bits, scale = quantise(matrix, kind, 16, axis)
    assert (bits.shape, scale.shape) == shapes(matrix.shape, kind, 16, axis)
    found = dequantise(bits, scale, kind, axis)
    dtype = {"int8": jnp.int8, "int4": jnp.int4}.get(kind, kind)
    made = qwix.quantize(
        jnp.asarray(matrix), dtype, channelwise_axes=[-1 - axis], tiled_axes={axis % 2: 16}
    )
    assert found.tobytes() == np.asarray(qwix.dequantize(made)).tobytes()
    with compile_for("tpu"):  # whose program is another one
        other = Quantised(jnp.asarray(bits), jnp.asarray(scale), kind, axis).astype(jnp.float32)
    assert found.tobytes() == np.asarray(other).tobytes()
    tiles = np.moveaxis(matrix, axis, -1).reshape(-1, 16)
    numbers, most = table(kind)
    unit = np.abs(tiles).max(-1, keepdims=True) / most
    unit[unit == 0] = 1
    nearest = numbers[np.abs(tiles[..., None] / unit[..., None] - numbers).argmin(-1)] * unit
    found = np.moveaxis(found, axis, -1).reshape(-1, 16)
    bound = np.abs(nearest - tiles).max() * (1 + 1e-5)
    assert np.abs(found - tiles).max() <= bound <= 0.5 * np.diff(numbers).max() * unit.max()
    assert (np.abs(found - tiles) <= np.abs(nearest - tiles) + 1e-6).all()


def test_they_stand_beside_the_matrices_that_patterns_choose():
    sizes, plain = parameter_shapes(CFG), parameter_shapes(CFG.merged)
    chosen = {n for n in plain if n.endswith("/kernel") and n.startswith(("vit/blocks", "llm"))}
    chosen.add("llm/embed")
    assert scales(sizes) == {f"{name}_scale" for name in chosen}
    assert sizes.keys() == plain.keys() | scales(sizes) | set(filter(is_adapter, sizes))
    for name in chosen:
        axis = -1 if name == "llm/embed" else -2
        kind = "int8" if name == "llm/embed" or "/down/" in name and "llm" in name else "nf4"
        assert (sizes[name], sizes[f"{name}_scale"]) == shapes(plain[name], kind, 16, axis)
    layout = make_layout(CFG)
    phase, other = (TrainPhase(cfg, 0, layout) for cfg in (CFG, CFG.merged))
    count = {
        sum(quant.parameters(of.cfg, *leaf) for leaf in nnx.to_flat_state(of.frozen_spec()))
        for of in (phase, other)
    }
    assert len(count) == 1


@pytest.mark.parametrize(
    "changes, sections, error",
    [
        (
            {"patterns": ("attn/x/",)},
            {},
            "patterns has 'attn/x/', which is found in the name of no",
        ),
        (
            {"patterns": ("^vit/",)},
            {},
            "patterns choose vit/patch/kernel, which is no projection and no tab",
        ),
        ({"patterns": ("^media",)}, {}, "patterns choose media/embedding, which is no projection"),
        (
            {"patterns": ("experts/",)},
            {"moe": {"copies": 2}},
            "patterns choose xattn/0/ffn/experts",
        ),
        ({"patterns": ("layers/1/attn/q",)}, {}, "its layers are one stack: choose all or none"),
        ({"tile": 48}, {}, "tile = 48 does not divide the 64 of llm/embed: give another"),
        ({"int8": ("ln_f",)}, {}, "int8 has 'ln_f', which is found in the name of no matrix"),
        ({"int8": ("1/attn/q",)}, {}, "int8 choose llm/layers/1/attn/q/kernel and not llm/layers/"),
        ({"int8": ("^media",)}, {}, "'^media', which is found in the name of no matrix that qu"),
        ({"tile": 5}, {}, "tile must be even"),
        ({"kind": "int3"}, {}, "kind is 'int3'; use one of int8, int4, nf4"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(changes, sections, error):
    with pytest.raises(ValueError, match="config: quant.") as raised:
        parameter_shapes(tiny_config(quant=QUANT | changes, **sections))
    assert error in str(raised.value)


def test_what_is_quantised_is_not_trained():
    quant_ = dataclasses.replace(CFG.quant, patterns=("^xattn/.*/k/",), int8=())
    cfg = dataclasses.replace(CFG, quant=quant_)
    with pytest.raises(ValueError, match="trains xattn/0/k/kernel, which is quantised: freeze it"):
        TrainPhase(cfg, 0, make_layout(cfg))
    with pytest.raises(ValueError, match="choose xattn/0/k/kernel, which begins anew"):
        quant.quantised(cfg, parameter_shapes(cfg), {})


def test_a_start_reads_each_matrix_once(monkeypatch):
    monkeypatch.setattr(by_shard, "THREADS", 1)
    reads, sizes = Counter(), parameter_shapes(CFG.merged)

    def counted(name, shape):
        def read():
            reads[name] += 1
            return np.zeros(shape, np.float32)

        return Tensor(shape, np.dtype(np.float32), read)

    phase = TrainPhase(CFG, 0, make_layout(CFG))
    tensors = {name: counted(name, shape) for name, shape in sizes.items()}
    begun = begin_with(CFG, phase.shapes, tensors, frozenset())
    initialize(CFG, phase.shapes, phase.layout.frozen, begun)
    assert reads == dict.fromkeys(sizes, 1)


def test_the_language_model_of_the_14b_in_4_bits_has_less_than_8_5_gb():
    llm = load_config("evlm_14b:pretrain").llm

    def model():
        made = nnx.Dict(llm=LLM(llm, nnx.Rngs(0)))
        quant.hold(made, cfg)
        return nnx.state(made)

    cfg = dataclasses.replace(CFG, llm=llm, quant=QuantConfig(("^llm/.*(kernel|embed)$",), "nf4"))
    leaves = jax.tree.leaves(jax.eval_shape(model))
    assert 7.5e9 < sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= 8.5e9


# ------------------------------------------------------------------------------------- computation


@pytest.fixture(
    scope="module",
    params=["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4"))],
)
def models(request):
    """(a random model with quantised towers and open gates, the same in float32), by name."""
    cfg = dataclasses.replace(CFG, quant=dataclasses.replace(CFG.quant, kind=request.param))
    base = dataclasses.replace(cfg, quant=QuantConfig())
    params = opened(jax.device_get(flatten(base, nnx.state(random_model(base, 1)))))
    held = quant.quantised(cfg, parameter_shapes(cfg), params)
    return (cfg, read_all(held)), (base, read_all(quant.whole(cfg, held)))


@pytest.mark.ci
def test_the_model_computes_what_its_float32_form_does(models):
    """Losses, and the gradients of all that trains, adapters among them."""

    def found(cfg, params):
        phase = TrainPhase(cfg, 0, make_layout(cfg))
        model = nnx.state(model_of(cfg, params)[0])
        trainable, frozen = nnx.split_state(model, phase.plan.trains, ...)

        @jax.jit
        def run(trainable, frozen, batch):
            def loss(trainable):
                return loss_sums(nnx.merge(phase.graphdef, trainable, frozen), batch, 2)[0]

            with jax.default_matmul_precision("highest"):
                return jax.value_and_grad(loss)(trainable)

        return run(trainable, frozen, tiny_batch(CFG, 0))

    (loss, grads), (other, wanted) = (found(*model) for model in models)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    for mine, its in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(mine - its).max() <= 1e-4 * np.abs(its).max()
    assert np.abs(jax.tree.leaves(wanted)[0]).max() > 0


# ---------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run in float32, of a model with open gates, and its parameters."""
    folder, cfg = tmp_path_factory.mktemp("base"), CFG.merged
    run_directory(folder, cfg, random_model(cfg, 0))
    return folder, store.load_params(folder)[0]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs from `base` with quantised towers: one that nothing interrupts, one that was cut at STEP
    and went on.
    """
    params, trained = next_stage(CFG, str(base[0]))
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "cut")]
    batch = tiny_batch(CFG, 5)

    def data():
        return TinyData(CFG, change=lambda *_: batch)

    def stop(step, _):
        if step == STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    train(CFG, folders[0], data(), params, trained)
    with pytest.raises(Stopped):
        train(CFG, folders[1], data(), params, trained, on_step=stop)
    train(CFG, folders[1], data(), {})
    return folders


@pytest.mark.ci
def test_a_run_learns_and_keeps_the_bits_of_its_base(base, runs):
    whole, resumed = map(store.read, runs)
    held = scales(whole.frozen)
    assert held == scales(parameter_shapes(CFG)) and not scales(whole.params)
    for name in held:
        matrix, axis = name.removesuffix("_scale"), -1 if name == "llm/embed_scale" else -2
        parts = quantise(base[1][matrix], CFG.quant.kind_of(matrix), 16, axis)
        for found, made in zip((whole.frozen[matrix], whole.frozen[name]), parts):
            assert made.dtype == found.dtype and made.tobytes() == found.tobytes()
    for part in ("frozen", "params", "groups"):
        mine, other = getattr(resumed, part), getattr(whole, part)
        assert mine.keys() == other.keys()
        assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.ci
def test_a_stage_takes_up_what_is_quantised_or_refuses(runs, base):
    params, _ = next_stage(CFG, str(runs[0]))
    begun = quant.quantised(CFG, parameter_shapes(CFG), params)
    assert all(begun[name] is params[name] for name in params)
    for changes in (
        {"kind": "int4"},
        {"tile": 8},
        {"patterns": ("^vit/blocks/.*/kernel",), "int8": ()},
        {"int8": WIDER[:1]},
    ):
        other = dataclasses.replace(CFG, quant=dataclasses.replace(CFG.quant, **changes))
        with pytest.raises(ValueError, match="holds .* in (nf4|int8) by 16: give its quant"):
            next_stage(other, str(runs[0]))


@pytest.mark.ci
def test_merged_by_the_command(runs, tmp_path):
    out = str(tmp_path / "merged")
    assert not cli.main(["convert", "merge", "--checkpoint", str(runs[0]), "--out", out])
    params, before = store.load_params(runs[0])
    found, cfg = store.load_params(out)
    assert cfg == before.merged and found.keys() == parameter_shapes(cfg).keys()
    name = "llm/layers/2/attn/q"
    kernel = params[f"{name}/kernel"], params[f"{name}/kernel_scale"]
    want = qwix.dequantize(
        qwix.QArray(*(jnp.asarray(part) for part in _indices(*kernel)), qtype="nf4")
    )
    want = want + 2 * params[f"{name}/lora_a"] @ params[f"{name}/lora_b"]
    np.testing.assert_allclose(found[f"{name}/kernel"], want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="there is nothing to merge"):
        merge_run(out, str(tmp_path / "again"))


def _indices(bits, scale):
    """Bytes of a kernel as the numbers of NF4 that they stand for, and their scales."""
    return np.stack([bits & 15, bits >> 4], 1).reshape(-1, bits.shape[1]), scale


# ----------------------------------------------------------------------------------------- command


@pytest.mark.ci
def test_the_command_writes_a_model_that_answers_and_its_receipt(base, tmp_path, capsys):
    out = tmp_path / "int8"
    command = f"convert quantize --checkpoint {base[0]} --out {out} --tile 16"
    assert not cli.main(command.split())
    said = json.loads((out / "quantised.json").read_text())
    assert (said["kind"], said["tile"]) == ("int8", 16)
    assert len(said["kl"]) == 5 and all(0 < kl < 1e-3 for kl in said["kl"].values())
    assert {"vit/tap 2", "xattn/3", "llm/layers/0", "llm/ln_f"} < said["layers"].keys()
    assert all(0 < error < 0.05 for error in said["layers"].values())
    params, cfg = store.load_params(out)
    layers = {f"llm/layers/{i}" for i in range(cfg.llm.layers)}
    layers |= {f"vit/blocks/{i}" for i in range(cfg.vit.depth)} | {"llm/embed"}
    assert said["alone"].keys() == layers and all(0 < kl < 1e-3 for kl in said["alone"].values())
    assert said["errors"].keys() == {name.removesuffix("_scale") for name in scales(params)}
    assert all(0 < error < 0.01 for error in said["errors"].values())
    for key, arrays in (("before", base[1]), ("after", params)):
        assert said["bytes"][key] == sum(array.nbytes for array in arrays.values())
    assert said["bytes"]["after"] < 0.7 * said["bytes"]["before"]
    assert "matrices in int8: relative error 0." in capsys.readouterr().out
    words = f"{command[: command.index(' --out')]} --tile 16 --pattern ^llm/embed$"
    assert not cli.main(f"{words} --out {tmp_path / 'words'}".split())
    kl = json.loads((tmp_path / "words" / "quantised.json").read_text())["kl"].values()
    assert said["alone"]["llm/embed"] == pytest.approx(np.mean([*kl]), rel=1e-3)
    capsys.readouterr()
    again = f"convert quantize --checkpoint {out} --out {tmp_path / 'again'} --tile 16"
    assert cli.main(again.split()) == 1
    assert "is quantised: make it whole first" in capsys.readouterr().err


def test_answers_are_those_of_the_float32_form(base):
    cfg = store.open_params(base[0])[1]
    cfg = dataclasses.replace(cfg, quant=QuantConfig(TOWER_MATRICES, "int4", 16))
    held = quant.quantised(cfg, parameter_shapes(cfg), opened(base[1]))
    tokenizer, answers = load_tokenizer(str(base[0] / "tokenizer")), []
    for config, tensors in ((cfg, held), (cfg.merged, merged(held, cfg))):
        generator = Generator(model_of(config, read_all(tensors))[0], tokenizer)
        weights = jax.tree.leaves(generator.weights, is_leaf=lambda x: isinstance(x, Quantised))
        assert any(isinstance(x, Quantised) for x in weights) == (config is cfg)
        prompts = [generator.prompt([Turn("user", text)]) for text in ("ab c", "what")]
        answers.append(generator.generate(prompts, 12))
    assert answers[0] == answers[1] and all(answer.tokens for answer in answers[0])
