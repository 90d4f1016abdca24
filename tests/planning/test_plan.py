"""The planner: what it counts of real steps, what it says of what cannot be or does not fit."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks import pods, pods_page
from evlm_jax import flops
from evlm_jax.cli import main
from evlm_jax.config.load import load_config
from evlm_jax.metrics import work
from evlm_jax.parallel.chips import CHIPS
from evlm_jax.parallel.compiler import step_options
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from evlm_jax.planning import chips, roofline, search
from evlm_jax.planning.compiled import Costs, Operation, Transfer
from evlm_jax.planning.plan import OTHER, cube, plan
from evlm_jax.planning.programs import phase_steps
from evlm_jax.planning.text import show
from tests.helpers.tiny import BASELINES, CROSS_ONLY, UPPER_VIT, tiny_batch, tiny_config

tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"')
TWO_PHASES = {
    "phases": (
        {"start": 0.0, "warmup": 0, "rules": CROSS_ONLY},
        {"start": 0.25, "warmup": 0, "rules": UPPER_VIT},
    )
}


def config(**sections):
    """Bfloat16 as on TPUs; the upper half of the ViT is trained in phase 1."""
    dtypes = {"dtype": "bfloat16", "matmul_precision": "bfloat16", "frozen_dtype": "bfloat16"}
    sections["train"] = {"batch": 8, "steps": 100, **dtypes, **sections.get("train", {})}
    return tiny_config(vit={"cuts": (2,)}, optim=TWO_PHASES, **sections)


def ratios(report: dict) -> dict[str, float]:
    """{part: executed, without what is computed again, / needed}."""
    done = {
        part: (passes["forward"] + passes["backward"]) * report["devices"]
        for part, passes in report["executed"].items()
    }
    return {
        part: done.get(part, 0.0) / sum(cost.values()) for part, cost in report["needed"].items()
    }


@pytest.mark.parametrize(
    ("phase", "remat"), [(0, "full"), pytest.param(1, "none", marks=pytest.mark.slow)]
)
@pytest.mark.pinned
def test_a_step_executes_what_is_needed_and_known_extras(phase, remat):
    cfg = config(train={"batch": 2, "remat": remat})
    cfg = replace(cfg, vit=replace(cfg.vit, image_size=(8, 12)))
    report = plan(cfg, "cpu:1", phase=phase)
    t, pairs = cfg.data.length, cfg.data.block_pairs * cfg.xattn.query_block
    known = {
        flops.LLM_SCORES: 2 * t / (t + 1),
        flops.CROSS_SCORES: pairs / t,
    }  # masked halves; query blocks that may be empty
    # The norm's gradient is a product more; of a trained ViT, taps 2 of 3 need a gradient, in 2 of
    # 4 layers, and all get one.
    known[flops.KEYS] = 3 / 2 if phase == 0 else 3 / (2 + 2 / 4)
    found = ratios(report)
    if phase == 1:
        assert (
            1 <= found.pop(flops.TRAINED_VIT) < 1.1
        )  # norms in front of the lowest trained kernels as well
    assert found == pytest.approx({part: known.get(part, 1.0) for part in found}, rel=1e-6)
    assert OTHER not in report["executed"]
    assert_scores(report, known)
    assert_logged(cfg, phase, report)
    again = {
        part: passes["again"] for part, passes in report["executed"].items() if passes["again"]
    }
    trained = {flops.KEYS, flops.CROSS, flops.CROSS_SCORES, flops.FFN, flops.LLM, flops.LLM_SCORES}
    assert again.keys() == (trained if remat == "full" else set())
    assert not again or again[flops.FFN] <= report["executed"][flops.FFN]["forward"]


@pytest.mark.slow
def test_a_step_with_parallel_cross_attention_executes_what_is_needed():
    cfg = config(train={"batch": 2, "remat": "none"}, **BASELINES["mplug_owl3"])
    found, t, seen = ratios(plan(cfg, "cpu:1")), cfg.data.length, (cfg.data.images + 1) / 2
    known = {
        flops.LLM_SCORES: 2 * t / (t + 1),
        flops.CROSS_SCORES: cfg.data.block_pairs * cfg.xattn.query_block / (t * seen),
    }
    assert found == pytest.approx({part: known.get(part, 1.0) for part in found}, rel=1e-6)


def assert_scores(report, known):
    """A pass visits all pairs of positions, and all room for block pairs; of what is visible."""
    assert report["scores"].keys() == {flops.LLM_SCORES, flops.CROSS_SCORES}
    for part, visited in report["scores"].items():
        ratios = [visited[name] / visited["visible"] for name in ("forward", "backward")]
        assert ratios == pytest.approx([known[part]] * 2)
    assert f"{known[flops.LLM_SCORES]:.2f} (forward)" in show(report)


def assert_logged(cfg, phase, report):
    """A full batch's FLOPs in the log are the plan's."""
    rows, t = cfg.train.batch, cfg.data.length
    places = np.arange(t)
    image = places * cfg.data.images // t
    full = {
        "positions": places,
        "visible_until": np.full(t, t),
        "visible_start": image,
        "visible_stop": image + 1,
        "targets": np.where(places < cfg.data.targets, 1, -1),
    }
    batch = tiny_batch(cfg, seed=0)
    batch = batch._replace(**{name: np.tile(row, (rows, 1)) for name, row in full.items()})
    trained = TrainPhase(cfg, phase, make_layout(cfg, jax.devices()[:1])).trained
    logged = work(cfg, batch, {"fill": {}, "cut": 0, "drops": []}, trained)
    needed = {part: sum(cost.values()) for part, cost in report["needed"].items()}
    vision = sum(needed.get(part, 0) for part in (flops.FROZEN_VIT, flops.TRAINED_VIT))
    assert logged["flops"] == pytest.approx(sum(needed.values()), rel=1e-9)
    assert logged["flops/vision"] == pytest.approx(vision, rel=1e-9)


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "expert"), [(2, 2), (1, 4)])  # two experts a device, and one
def test_a_tpu_slice(fsdp, expert, tmp_path):
    """All axes; the parts add up over devices as on one, and the state lies in pieces."""
    cfg = config(
        moe={"copies": 2},
        mesh={
            "fsdp": fsdp,
            "expert": expert,
            "tensor": 2,
            "data": 1,
            "zero": 3,
            "frozen": "sharded",
        },
    )
    report = plan(cfg, "v5p:2x2x2", hlo=str(tmp_path / "step.txt"))
    assert ratios(report)[flops.LLM] == ratios(report)[flops.ROUTED] == pytest.approx(1, rel=1e-6)
    assert report["fits"] and report["time"]["seconds"] > 0 and report["memory"]["peak"] > 0
    assert (
        report["arguments"]["optimizer"]["bytes"]
        < report["arguments"]["optimizer"]["count"] * 4 / 2
    )
    assert {"all-gather", "ragged-all-to-all"} <= {c["kind"] for c in report["collectives"]}
    assert all("by its average" in note for note in report["notes"])
    assert "routed experts" in show(report) and "binds" in show(report)
    assert "HloModule" in (tmp_path / "step.txt").read_text()[:20]


@tpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["eval", "prefill", "read", "decode", "encode"])
def test_other_programs(what):
    report = plan(config(mesh={"data": 2, "fsdp": 1, "tensor": 2}), "v5e:2x2", what)
    parts = {flops.FROZEN_VIT} if what == "encode" else {flops.LLM, flops.HEAD}
    assert {part: ratios(report)[part] for part in parts} == pytest.approx(dict.fromkeys(parts, 1))
    assert "days" not in report["time"]
    assert json.loads(json.dumps(report))["what"] == what


@tpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_mend():
    cfg = config(data={"length": 1024}, train={"batch": 2048}, mesh={"data": 1, "fsdp": 4})
    report = plan(cfg, "v5e:2x2")
    report["tried"] = search.mend(cfg, "v5e:2x2", "train", 0)
    assert not report["fits"] and report["largest"]["buffers"][0]["bytes"] > 2**30
    assert report["tried"][-1]["fits"] and report["tried"][-1]["change"].startswith("train.")
    text = show(report)
    assert "does not fit" in text and "scores" in text and "accumulate" in text


@tpu
@pytest.mark.slow
def test_several_slices():
    """Gradients are summed over the data-centre network, once a step; all else stays within a
    slice.
    """
    cfg = config(mesh={"data": 2, "fsdp": 4, "slices": 2}, train={"batch": 24, "accumulate": 3})
    report = plan(cfg, "v5e:2x2")
    assert report["fits"] and report["devices"] == 8
    between = {
        c["kind"]: c["bytes"] for c in report["collectives"] if "between slices" in c["kind"]
    }
    gradients = report["arguments"]["trainable"]["bytes"]
    assert (
        gradients * 0.9 < between["all-reduce between slices"] < gradients * 1.5
    )  # with embeddings, norms and the loss, in float32
    assert report["time"]["dcn"] == pytest.approx(sum(between.values()) / CHIPS["v5e"].dcn)


@tpu
def test_the_sweep_offers_possible_meshes_only():
    cfg = config(mesh={"data": 1, "fsdp": -1})
    found = {(c.mesh.fsdp, c.mesh.tensor) for c in search.meshes(cfg, "v5e:2x2")}
    assert found == {(-1, 1), (-1, 2)}  # 2 key heads


def test_the_sweep_ranks_by_cycles_where_there_are_some(monkeypatch, capsys):
    """By the roofline all of them are equal; what does not fit comes last."""
    seconds = {"none": None, "dots": 3.0, "full": 2.0}

    def planned(cfg, *_, **__):
        remat = cfg.train.remat
        report = {"mesh": {}, "policies": {"remat": remat}, "memory": {"peak": 0}}
        time = {"seconds": 1.0, "binds": "hbm", "cycles": {"seconds": seconds[remat]}}
        return report | {"fits": remat != "none", "time": time}

    monkeypatch.setattr(search, "plan", planned)
    monkeypatch.setattr(search, "meshes", lambda *_: [config()])
    reports = search.sweep(config(), "v5e:2x2", "train", 0)
    assert [report["policies"]["remat"] for report in reports] == ["full", "dots", "none"]
    assert "2.000 s by cycles" in capsys.readouterr().out


@pytest.mark.pinned
def test_the_command_on_cpu_devices(tmp_path):
    experiment = tmp_path / "tiny.py"
    experiment.write_text(
        "from ml_collections import ConfigDict\nfrom tests.helpers.tiny import _TINY\n\n\ndef"
        " get_config():\n    return ConfigDict(_TINY)\n"
    )
    out = tmp_path / "plan.json"
    words = [
        "--config",
        str(experiment),
        "--topology",
        "cpu:4",
        "--mesh",
        "data=2,fsdp=2",
        "--global-batch",
        "4",
        "--json",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "evlm_jax", "plan", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert (report["devices"], report["rows"], report["mesh"]["fsdp"]) == (4, 4, 2)
    assert "language model, linear" in done.stdout and "all-reduce" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9:2x2"], "unknown; use cpu:8, h100:8"),
        (["--topology", "cpu:two"], "give a number of devices"),
        (["--topology", "cpu:1", "--mesh", "data=3"], "product must be that"),
        (["--topology", "cpu:1", "--mesh", "rows=3"], "unknown key mesh.rows"),
        (["--topology", "cpu:1", "--mesh", "fsdp:4"], "--mesh fsdp:4: fields are set as"),
        (["--topology", "cpu:1", "--mesh", "data=1,data=1"], "mesh.data is given twice"),
        (["--topology", "cpu:1", "--phase", "7"], "the config has phases 0 to 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(words, message, capsys, monkeypatch):
    monkeypatch.setattr("jax.stages.Lowered.compile", None)
    assert main(["plan", "--config", "experiments/demo.py:fast", *words]) == 1
    assert message in capsys.readouterr().err


@tpu
@pytest.mark.parametrize("kind", [k for k in CHIPS if CHIPS[k].kind.startswith("TPU")])
def test_the_compiler_takes_the_options_of_every_chip(kind):
    """Those that it refuses are left out: libtpu differs from version to version."""
    devices, _ = chips.devices(f"{kind}:1")
    assert step_options(devices)


@tpu
@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("v5e:3x3", {}, "v5e:3x3"),
        ("v5e:2x4", {"data": 8, "tensor": 1}, "rows cannot be split over 8"),
        ("v5e:2x4", {"tensor": 8}, "multiple"),
    ],
)
def test_what_a_slice_cannot_do_is_said_as_well(topology, mesh, message, monkeypatch):
    monkeypatch.setattr("jax.stages.Lowered.compile", None)
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(mesh={"data": 1, "fsdp": 1, **mesh}), topology)


@tpu
@pytest.mark.parametrize(
    ("kind", "count"), [("v4", 1), ("v5e", 1), ("v5p", 1), ("v6e", 1), ("tpu7x", 2)]
)
def test_one_chip(kind, count):
    assert len(chips.devices(f"{kind}:1")[0]) == count


@tpu
def test_links_of_a_torus():
    devices, chip = chips.devices("v5p:2x2x2")

    def along(axis):
        return tuple(
            i for i, d in enumerate(devices) if all(d.coords[a] == 0 for a in range(3) if a != axis)
        )

    assert roofline.link(chip, devices, along(2)) == ("ici", 200e9)
    assert roofline.link(chip, devices, tuple(range(8))) == ("ici", 600e9)
    two, _ = chips.devices("v5p:2x2x1", slices=2)
    assert roofline.link(chip, two, tuple(range(8))) == ("dcn", 6.25e9)
    with pytest.raises(ValueError, match="no rate of its data-centre network"):
        roofline.link(chip._replace(dcn=None), two, tuple(range(8)))


def test_seconds_of_a_step():
    """Two operations, one held up by each unit; a hidden copy; a sum over 4 of 8 GPUs."""
    devices, chip = (
        [type("Device", (), {"platform": "gpu", "id": i}) for i in range(8)],
        CHIPS["h100"],
    )
    costs = Costs()
    costs.operations.update(
        {
            Operation(989e12, 1.0, False): 2,
            Operation(1.0, 3350e9, False): 3,
            Operation(0.0, 3350e9, True): 1,
        }
    )
    costs.products["x"] = 2 * 989e12
    costs.transfers[Transfer("all-reduce", (0, 1, 2, 3), 450 * 10**9)] = 2
    step = roofline.step(chip, costs, devices)
    assert (step.products, step.hbm, step.ici, step.dcn) == pytest.approx((2, 3, 3, 0))
    assert (step.seconds, step.bound, step.binds) == (pytest.approx(5), pytest.approx(4), "HBM")


def planned(words):
    """The config of a plan's arguments."""
    mesh = words[words.index("--mesh") + 1].split(",")
    return load_config(
        words[1],
        [
            *(f"--config.mesh.{field}" for field in mesh),
            *(word for word in words if word.startswith("--config.")),
        ],
    )


@pytest.mark.parametrize("run", pods_page.RUNS)
def test_the_pods_page_plans_what_can_be(run):
    """Every slice that the batch allows has a valid config, and there is one of each size up to 16
    chips.
    """
    for kind, shapes in pods.SLICES.items():
        for shape in shapes[:3]:
            words = pods.arguments(run, f"{kind}:{shape}", tensor=1)
            cfg = planned(words)
            assert (
                cfg.train.batch == cfg.train.accumulate * cfg.mesh.fsdp * cfg.mesh.expert
                and cfg.data.image_group == 1
            )
    assert pods.arguments(run, "v5e:16x16", tensor=1) is None  # more chips than rows
    for entry in pods.PODS:
        cfg = planned(pods.pod(*entry))
        assert (
            cfg.image_groups % (cfg.train.accumulate * cfg.mesh.fsdp * cfg.mesh.expert)
            == 0
            == cfg.data.slots % cfg.mesh.tensor
        )


def test_slices_and_phases():
    assert [cube(n) for n in (4, 8, 16, 32, 64, 256)] == [
        "2x2x1",
        "2x2x2",
        "2x2x4",
        "2x4x4",
        "4x4x4",
        "4x8x8",
    ]
    assert [phase_steps(config(), phase) for phase in (0, 1)] == [25, 75]
