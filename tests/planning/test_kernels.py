"""What a plan charges for kernels of ops/, against counts by hand."""

import importlib.util

import pytest

from evlm_jax import flops
from evlm_jax.parallel.chips import CHIPS
from evlm_jax.planning import compiled, cycles
from evlm_jax.planning.hlo import Module
from evlm_jax.planning.plan import plan
from evlm_jax.planning.text import show
from tests.helpers.tiny import UPPER_VIT, tiny_config

PAIRS, BLOCKS, ROWS, IMAGES, KEYS, WIDTH, HEADS = 96, 80, 64, 70, 257, 256, 2
SHAPES = {
    "q": f"bf16[{BLOCKS},{ROWS},{WIDTH}]",
    "k": f"bf16[{IMAGES},{KEYS},{WIDTH}]",
    "rows": f"f32[{BLOCKS},1,{ROWS},{HEADS}]",
}
SIZES = {"q": BLOCKS * ROWS * WIDTH * 2, "k": IMAGES * KEYS * WIDTH * 2}
SIZES["rows"] = BLOCKS * ROWS * HEADS * 4


def program(kernel: str, steps: int, reads: list[str], writes: list[str]) -> Module:
    """One call, as the TPU compiler prints it."""
    inputs = ["s32[]", *[f"s32[{steps}]"] * 3, *(SHAPES[name] for name in reads)]
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(inputs)]
    result, operands = (
        ", ".join(SHAPES[name] for name in writes),
        ", ".join(f"%p{i}" for i in range(len(inputs))),
    )
    call = (
        f'  ROOT %call = ({result}) custom-call({operands}), custom_call_target="tpu_custom_call",'
        f' metadata={{op_name="jit(f)/cross/scores/{kernel}/pallas_call"}}, backend_config={{}}'
    )
    return Module("\n".join(["HloModule m", "ENTRY %main () -> f32[] {", *lines, call, "}"]))


@pytest.mark.parametrize(
    ("kernel", "steps", "products", "reads", "writes", "owner"),
    [
        ("forward", PAIRS, 2, "q k k", "q rows", "q rows"),
        ("queries", PAIRS, 3, "q k k q rows q", "q rows", "q rows"),
        ("keys", PAIRS + IMAGES, 4, "q k k q rows rows", "k k", "k"),
    ],
)
def test_a_kernel_is_charged_by_its_blocks(kernel, steps, products, reads, writes, owner):
    """Arrays of the owner move once, others with every pair; 257 keys are three tiles."""
    reads, writes, owner = reads.split(), writes.split(), owner.split()
    costs = compiled.costs(program(f"pair_attention_{kernel}", steps, reads, writes), 1)
    scores = PAIRS * ROWS * KEYS
    assert costs.flops == 2 * products * scores * WIDTH
    (operation,) = costs.operations
    assert operation.flops == pytest.approx(costs.flops * 384 / 257)
    of = {"q": BLOCKS, "k": IMAGES, "rows": BLOCKS}
    moved = [SIZES[name] * (1 if name in owner else PAIRS / of[name]) for name in reads + writes]
    assert operation.bytes == pytest.approx(sum(moved))
    (note,) = costs.notes
    assert f"by its {PAIRS} blocks of 64 x 257 scores: 1.49" in note
    chip = CHIPS["v5p"]
    seconds = max(2 * operation.flops / chip.flops, sum(moved) / chip.bandwidth)
    assert cycles._seconds(chip, operation) == pytest.approx(seconds)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"')
def test_a_step_with_kernels_on_a_slice():
    """Rows and heads in pieces; both passes are kernels, and the report says so."""
    dtypes = {"dtype": "bfloat16", "matmul_precision": "bfloat16", "frozen_dtype": "bfloat16"}
    cfg = tiny_config(
        train={"batch": 8, "attention": "pallas", "remat": "full", **dtypes},
        optim={"phases": ({"start": 0.0, "warmup": 0, "rules": UPPER_VIT},)},
        mesh={"fsdp": 2, "tensor": 2, "data": 2, "zero": 3, "frozen": "sharded"},
    )
    report = plan(cfg, "v5p:2x2x2")
    assert report["policies"]["attention"] == "pallas"
    for name in ("pair", "packed", "image"):
        for kernel in ("forward", "queries", "keys"):
            what = f"{name}_attention_{kernel}, charged"
            assert any(what in note for note in report["notes"])
    for part in (flops.CROSS_SCORES, flops.LLM_SCORES):
        done = report["executed"][part]
        assert done["forward"] == done["again"] > 0 and done["backward"] == 3.5 * done["forward"]
    assert "charged by its" in show(report)
