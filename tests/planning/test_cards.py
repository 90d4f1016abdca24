"""Plans for GPUs, by XLA's compiler for them and without one."""

import json

import pytest

from evlm_jax import flops
from evlm_jax.cli import main
from evlm_jax.parallel.chips import CHIPS
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.planning import cards, compiled, search
from evlm_jax.planning import plan as module
from evlm_jax.planning.hlo import Module
from evlm_jax.planning.plan import plan
from evlm_jax.planning.text import show
from tests.helpers.tiny import UPPER_VIT, tiny_config

needs_compiler = pytest.mark.skipif(not cards.has_compiler(), reason='pip install -e ".[plan-gpu]"')
DTYPES = {"dtype": "bfloat16", "matmul_precision": "bfloat16", "frozen_dtype": "bfloat16"}


def config(**mesh):
    """In bfloat16, with the upper half of the ViT trained."""
    return tiny_config(
        train={"batch": 8, "remat": "full", **DTYPES},
        optim={"phases": ({"start": 0.0, "warmup": 0, "rules": UPPER_VIT},)},
        mesh=mesh,
    )


def executed(report):
    """{part: FLOPs of all devices}."""
    return {
        part: sum(passes.values()) * report["devices"]
        for part, passes in report["executed"].items()
    }


@needs_compiler
@pytest.mark.ci
@pytest.mark.pinned
@pytest.mark.parametrize("kind", [pytest.param("a100", marks=pytest.mark.slow), "h100"])
def test_a_step_has_the_products_of_other_compilers(kind):
    """As many as XLA:CPU's program, but for some of the ViT's, which are so small that they are
    filled up or written as sums; and it lies in memory as it is split.
    """
    mesh = {"data": 1, "fsdp": 4, "tensor": 2, "zero": 3, "frozen": "sharded"}
    report = plan(config(**mesh), f"{kind}:8")
    assert report["fits"] and report["devices"] == 8
    found, wanted = executed(report), executed(plan(config(), "cpu:1"))
    for part in (flops.FROZEN_VIT, flops.TRAINED_VIT):
        assert found.pop(part) == pytest.approx(wanted.pop(part), rel=0.15)
    assert found == pytest.approx(wanted, rel=1e-6)
    memory, arguments = report["memory"], report["arguments"].values()
    held = sum(share["bytes"] for share in arguments)
    assert memory["arguments"] == pytest.approx(held, rel=0.01)
    assert memory["arguments"] < memory["peak"] <= memory["arguments"] + memory["temporaries"]
    kinds = {(c["kind"], c["group"]) for c in report["collectives"]}
    assert {("all-gather", 4), ("all-reduce", 2)} <= kinds
    assert "a step takes at least" in show(report) and "cycles" not in report["time"]


@needs_compiler
@pytest.mark.ci
def test_what_is_larger_than_the_card_does_not_fit(monkeypatch):
    """The compiler of GPUs refuses nothing: the plan does, and says what is large."""
    chip = CHIPS["h100"]._replace(hbm=2.0**20)
    monkeypatch.setattr(module.chips, "CHIPS", {**CHIPS, "h100": chip})
    report = plan(config(), "h100:1", what="encode")
    json.dumps(report)
    assert report["fits"] is False
    assert "of 0.00 GiB a device" in report["says"]
    assert "compiled for h100:1 it takes" in show(report)


@needs_compiler
@pytest.mark.parametrize("count", [1, 8, 32])
def test_hosts_of_eight(count):
    found = cards.devices("h200", count)
    assert len(found) == count and {d.device_kind for d in found} == {CHIPS["h200"].kind}
    assert len({d.process_index for d in found}) == max(1, count // 8)


@needs_compiler
def test_a_sweep_tries_a_copy_a_host():
    found = {
        (cfg.mesh.data, make_layout(cfg, cards.devices("h100", 16)).sizes["fsdp"])
        for cfg in search.meshes(config(), "h100:16")
        if cfg.mesh.tensor == 2
    }
    assert found == {(1, 8), (2, 4)}


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:12", "--topology h100:12: hosts have 8 GPUs: give a multiple"),
        ("h100:0", "give a number of devices, such as h100:8"),
        ("h100:2x4", "give a number of devices, such as h100:8"),
    ],
)
def test_what_no_cluster_has(topology, message, capsys):
    assert main(["plan", "--config", "experiments/demo.py:fast", "--topology", topology]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cards, "COMPILERS", ("no_such_compiler",))
    assert main(["plan", "--config", "experiments/demo.py:fast", "--topology", "h100:1"]) == 1
    assert 'pip install "evlm-jax[plan-gpu]"' in capsys.readouterr().err


FUSED = """HloModule m
ENTRY %main () -> f32[] {
  %q = bf16[3,40,4,16]{3,2,1,0} parameter(0)
  %k = bf16[3,24,2,16]{3,2,1,0} parameter(1)
  %v = bf16[3,24,2,16]{3,2,1,0} parameter(2)
  ROOT %call = (bf16[3,40,4,16]{3,1,2,0}, f32[3,4,40]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmaxNAME", metadata={op_name="jit(f)/llm/scores/call"}
}"""  # noqa: E501


@pytest.mark.parametrize(("name", "products"), [("", 2), ("Backward", 5)])
def test_attention_of_cudnn_is_charged_by_its_shapes(name, products):
    costs = compiled.costs(Module(FUSED.replace("NAME", name)), 1)
    assert costs.flops == 2 * products * 3 * 4 * 40 * 24 * 16
    (operation,) = costs.operations
    assert operation.bytes == 2 * (2 * 3 * 40 * 4 * 16 + 2 * 3 * 24 * 2 * 16) + 4 * 3 * 4 * 40
    (note,) = costs.notes
    assert f"charged {products} products of 40 x 24 scores" in note


def test_products_of_cublas_are_counted():
    """Of the shapes that it is given, here of three batches."""
    numbers = '{"lhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}'
    text = (
        "HloModule m\nENTRY %main () -> f32[] {\n  %a = bf16[3,8,16]{2,1,0} parameter(0)\n  %b ="
        " bf16[3,16,24]{2,1,0} parameter(1)\n  ROOT %c = (bf16[3,8,24]{2,1,0}, s8[64]{0})"
        ' custom-call(%a, %b), custom_call_target="__cublas$lt$matmul",'
        f' backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{numbers}}}}}\n}}'
    )
    costs = compiled.costs(Module(text), 1)
    assert costs.flops == 2 * 3 * 8 * 16 * 24 and not costs.notes


@pytest.mark.parametrize(("sync", "hidden"), [("true", False), ("false", True)])
def test_a_gather_that_is_waited_for_at_once_hides_nowhere(sync, hidden):
    text = (
        "HloModule m\nENTRY %main () -> f32[] {\n  %p = bf16[8]{0} parameter(0)\n  ROOT %g ="
        " (bf16[8]{0}, bf16[16]{0}) all-gather-start(%p), replica_groups={{0,1}},"
        f' dimensions={{0}}, backend_config={{"is_sync":{sync}}}\n}}'
    )
    (transfer,) = compiled.costs(Module(text), 2).transfers
    assert (transfer.bytes, transfer.hidden) == (32, hidden)
