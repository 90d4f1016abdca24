"""What the TPU compiler makes of the meshes: which collectives there are, read from the compiled
step (XLA on CPU forms no reduce-scatter).

Layers come in numbers that no other dimension has: 7 of the language model and below the trained
blocks of the ViT, 5 of those."""

import functools
import importlib.util
import math

import pytest

from evlm_jax.parallel.compiler import uncached
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.phase import TrainPhase
from evlm_jax.planning import chips
from evlm_jax.planning.compiled import COLLECTIVES, costs
from evlm_jax.planning.hlo import Instruction, Module
from tests.helpers.tiny import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"),
        reason='needs the TPU compiler: pip install -e ".[plan]"',
    ),
]
LAYERS, TRAINED = 7, 5
RULES = (
    {"pattern": r"^vit/blocks/([7-9]|1[01])/|^xattn/|^media/", "lr": 1.0},
    {"pattern": "^(vit|llm)/", "lr": None},
)


@functools.cache
def program(
    zero: int,
    frozen: str,
    mesh: tuple,
    experts: bool = False,
    topology: str = "v5e:2x4",
    wide: int = 1,
) -> Module:
    """The compiled step of a small model, its matrices `wide` times as large to both sides, in two
    micro-batches.
    """
    axes = dict(zip(("data", "fsdp", "expert", "tensor"), mesh))
    cfg = tiny_config(
        vit={
            "depth": LAYERS + TRAINED,
            "width": 256 * wide,
            "heads": 4 * wide,
            "mlp": 1024 * wide,
            "taps": (7, 12),
        },
        llm={
            "vocab": 1024,
            "hidden": 512 * wide,
            "layers": LAYERS,
            "heads": 4 * wide,
            "kv_heads": 4 * wide,
            "head_dim": 128,
            "mlp": 2048 * wide,
        },
        xattn={"heads": 4 * wide, "kv_heads": 2 * wide, "head_dim": 128, "ffn": 1024 * wide},
        moe={"copies": 4 if experts else 0, "slices": 4, "top_k": 4, "expert_block": 64},
        data={"length": 256, "images": 8, "targets": 128, "block_pairs": 32},
        optim={"phases": ({"start": 0.0, "warmup": 0, "rules": RULES},)},
        train=dict.fromkeys(("dtype", "matmul_precision", "frozen_dtype"), "bfloat16")
        | {
            "batch": max(16, 2 * math.prod(mesh[:3])),
            "accumulate": 2,
            "remat": "dots",
            "loss_chunk": 64,
        },
        mesh=axes | {"zero": zero, "frozen": frozen},
    )
    devices, _ = chips.devices(topology)
    with uncached(devices[0]):
        return Module(TrainPhase(cfg, 0, make_layout(cfg, devices)).lower().compile().as_text())


def collectives(module: Module) -> list[tuple[str, str, Instruction]]:
    """(computation, kind, instruction)."""
    found = [
        (name, i.opcode.removesuffix("-start"), i)
        for name, c in module.computations.items()
        for i in c.instructions
    ]
    return [entry for entry in found if entry[1] in COLLECTIVES]


def matrices(instruction: Instruction) -> list[tuple[int, ...]]:
    """Dimensions of its results that are a matrix, or a stack of matrices."""
    return [leaf.dims for leaf in instruction.leaves if sum(size >= 128 for size in leaf.dims) >= 2]


def reduced(module: Module) -> list[tuple[int, ...]]:
    """Dimensions of sums that are scattered: libtpu writes them as an all-reduce in a computation
    of that name.
    """
    return [
        dims
        for name, kind, i in collectives(module)
        if "all-reduce-scatter" in name or kind == "reduce-scatter"
        for dims in matrices(i)
    ]


def test_zero_3_gathers_layer_by_layer():
    module = program(3, "sharded", (1, 4, 1, 2))
    for name, kind, instruction in collectives(module):
        assert not any(dims[0] in (LAYERS, TRAINED) for dims in matrices(instruction)), (
            name,
            kind,
            instruction.shape,
        )
    gathered = {
        dims[-2:]
        for _, kind, i in collectives(module)
        if kind == "all-gather"
        for dims in matrices(i)
    }
    assert gathered >= {
        (512, 1024),
        (1024, 512),
        (256, 1024),
        (1024, 256),
        (256, 256),
        (256, 512),
    }  # LLM and cross-attention, ViT, keys
    assert {dims[-2:] for dims in reduced(module)} >= {
        (512, 256),
        (256, 512),
        (512, 512),
        (256, 256),
        (256, 1024),
        (1024, 256),
    }


def test_sums_of_activations_over_tensor_travel_in_16_bits():
    """Of the language model's layers, two rows of 256 tokens, and once for what projections of one
    input give it: 4 forward, 4 backward.
    """
    sums = [
        leaf.dtype
        for _, kind, i in collectives(program(3, "sharded", (1, 4, 1, 2)))
        if kind == "all-reduce"
        for leaf in i.leaves
        if leaf.dims == (2, 256, 512)
    ]
    assert sums == ["bf16"] * 8


def test_gathers_run_beside_products():
    """Most of them: 488 of 574 are started in front of products and waited for behind them."""
    transfers = costs(program(3, "sharded", (1, 4, 1, 2)), 8).transfers

    def gathers(hidden):
        return sum(n for t, n in transfers.items() if (t.kind, t.hidden) == ("all-gather", hidden))

    assert gathers(True) > 4 * gathers(False)


def test_gathers_run_beside_products_on_64_chips():
    """Of each matrix of a layer but the ViT's squares of 2 MB some do."""
    module = program(3, "sharded", (1, 32, 1, 2), topology="v5p:4x4x4", wide=4)
    transfers = costs(module, 64).transfers
    gathered = {t.bytes for t in transfers if (t.kind, t.hidden) == ("all-gather", True)}
    for rows, columns in ((2048, 1024), (2048, 4096), (1024, 4096)):
        assert 2 * rows * columns in gathered, (rows, columns)


def test_zero_2_gathers_what_trains_once_a_step():
    module = program(2, "replicated", (1, 4, 1, 2))
    once, inside = [], []
    for name, kind, instruction in collectives(module):
        if kind == "all-gather":
            (
                once
                if any(dims[0] in (LAYERS, TRAINED) for dims in matrices(instruction))
                else inside
            ).append((name, instruction))
    assert all(name.startswith("main") or "fusion" in name or "fused" in name for name, _ in once)
    stacks = {(dims[0], *dims[-2:]) for _, instruction in once for dims in matrices(instruction)}
    wanted = {
        (LAYERS, 512, 256),
        (LAYERS, 256, 512),
        (LAYERS, 512, 512),
        (TRAINED, 256, 256),
        (TRAINED, 256, 1024),
        (TRAINED, 1024, 256),
    }
    assert stacks >= wanted
    assert not [
        i.shape for _, i in inside for leaf in i.leaves if leaf.dtype != "s32" and matrices(i)
    ], "a frozen matrix is gathered"
    assert {dims[-2:] for dims in reduced(module)} >= {dims[1:] for dims in wanted}


def test_no_device_holds_all_experts():
    """16 experts over 4 devices; tokens go there and back, and gradients of experts are summed over
    the other axis alone.
    """
    module = program(3, "sharded", (1, 2, 4, 1), experts=True)
    shapes = [
        (kind, dims)
        for _, kind, instruction in collectives(module)
        for dims in matrices(instruction)
    ]
    assert not [entry for entry in shapes if 16 in entry[1] and {256, 512} <= set(entry[1])]
    assert [
        dims
        for kind, dims in shapes
        if kind == "all-gather" and 4 in dims and {256, 512} <= set(dims)
    ]
    assert any(kind == "ragged-all-to-all" for _, kind, _ in collectives(module))
    for name, kind, instruction in collectives(module):
        assert not any(dims[0] in (LAYERS, TRAINED) for dims in matrices(instruction)), (
            name,
            kind,
            instruction.shape,
        )
