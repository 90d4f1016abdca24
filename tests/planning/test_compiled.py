"""Costs read from optimised programs, of XLA:CPU and of the TPU compiler,
against counts by hand.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evlm_jax.parallel.compiler import uncached
from evlm_jax.planning import chips
from evlm_jax.planning.compiled import Costs, Transfer, costs
from evlm_jax.planning.hlo import Instruction, Leaf, Module, replica_group
from evlm_jax.planning.live import fullest
from evlm_jax.planning.products import meetings
from tests.helpers.hand_programs import DEVICES, HIDDEN, KEPT, LAYERS, ROWS, WIDTH, build, memory

TPU = pytest.param(
    "tpu",
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"'
    ),
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict:
    """{platform: {name: (text, XLA's account of its memory)}}; CPU devices are in a process of
    their own: this one may have begun with fewer.
    """
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run([sys.executable, "-m", "tests.helpers.hand_programs", str(folder)], check=True)
    found = {
        "cpu": {
            path.stem: (path.read_text(), json.loads(path.with_suffix(".json").read_text()))
            for path in folder.glob("*.txt")
        }
    }
    if importlib.util.find_spec("libtpu"):
        devices, _ = chips.devices("v5e:2x4")
        with uncached(devices[0]):
            compiled = {name: lowered.compile() for name, lowered in build(devices).items()}
        found["tpu"] = {name: (done.as_text(), memory(done)) for name, done in compiled.items()}
    return found


@pytest.fixture(params=["cpu", TPU])
def program(request, texts):
    """name -> Module."""
    return lambda name: Module(texts[request.param][name][0])


def of(module: Module, **options) -> Costs:
    return costs(module, DEVICES, **options)


def moved(counted: Costs) -> Counter:
    """Transfers, whether they hide behind products or not: the TPU's compiler starts some early."""
    found = Counter()
    for transfer, count in counted.transfers.items():
        found[transfer._replace(hidden=False)] += count
    return found


def test_loops_count_as_often_as_they_run(program):
    counted = of(program("layers"))
    assert counted.flops == LAYERS * 6 * 2 * ROWS * WIDTH * HIDDEN / DEVICES
    assert all("stack" in name for name in counted.products)
    backward = sum(flops for name, flops in counted.products.items() if "transpose(" in name)
    assert backward == counted.flops * 4 / 6
    assert of(program("nested")).flops == 3 * 4 * 2 * 64**3
    assert not counted.notes


def test_gradients_are_summed_over_the_rows(program):
    """The first kernels are gathered for each layer, forward and backward; all gradients are
    summed, a layer at a time.
    """
    transfers = moved(of(program("layers")))
    assert {transfer.group for transfer in transfers} == {tuple(range(DEVICES))}
    gathers = {t.bytes: count for t, count in transfers.items() if t.kind == "all-gather"}
    assert list(gathers.values()) == [2 * LAYERS] and gathers.keys() <= {
        WIDTH * HIDDEN * size for size in (2, 4)
    }
    summed = sum(
        t.bytes * count
        for t, count in transfers.items()
        if t.kind in ("all-reduce", "reduce-scatter")
    )
    assert summed == LAYERS * 2 * WIDTH * HIDDEN * 4 + 4  # and the loss


def test_batched_products(program):
    assert of(program("attention")).flops == 2 * 16 * 24 * 4 * 32  # one row a device


def test_padding_of_a_convolution_is_not_counted(program):
    taps = sum(0 <= out + tap - 1 < 9 for out, tap in itertools.product(range(9), range(3)))
    assert of(program("convolution")).flops == 2 * 2 * taps * 3 * 4


@given(*(st.integers(1, 9),) * 3, st.integers(-3, 6), *(st.integers(1, 5),) * 3)
def test_meetings_of_dilated_convolutions(inputs, kernel, outputs, low, stride, base, dilation):
    at = [out * stride + tap * dilation - low for out in range(outputs) for tap in range(kernel)]
    meet = sum(a % base == 0 and 0 <= a // base < inputs for a in at)
    assert meetings(inputs, kernel, outputs, low, stride, base, dilation) == meet


def test_a_loop_of_unknown_length_is_named_or_told(program):
    module = program("open")
    once = of(module)
    assert once.flops == 2 * 64**3
    (note,) = once.notes
    assert "counted once" in note and "endless" in note
    asked = {}
    told = of(module, trips=lambda name, flops: asked.update({name: list(flops)}) or [2.5])
    assert told.flops == 2.5 * 2 * 64**3
    assert [*asked.values()] == [[2 * 64**3]]
    assert all("by its average" in note for note in told.notes)


def test_the_dearest_branch_counts(program):
    assert of(program("branches")).flops == 2 * 2 * 64**3


def test_collectives(program):
    """Groups along a are 4 devices apart by 2, along b 2 neighbours."""
    found = moved(of(program("exchange")))
    size = 16 * 128 * 4
    along_a, along_b = (0, 2, 4, 6), (0, 1)
    expected = {
        Transfer("all-reduce", along_a, size): 1,
        Transfer("all-gather", along_b, 2 * size): 1,
        Transfer("all-to-all", along_a, 2 * size): 1,
        Transfer("collective-permute", along_b, 2 * size): 1,
    }
    assert dict(found) == expected


def test_a_stack_is_read_and_written_slice_by_slice(program):
    stack = 32 * 256 * 512 * 4
    assert (
        stack <= of(program("slices")).bytes < 5 * stack
    )  # 32 times as much if each step touched all of it


LAID_OUT = """HloModule stack, is_scheduled=true, entry_computation_layout={()->()}

%lays_out (p: u8[8,32,128]) -> u8[8,32,128] {
  %p = u8[8,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = u8[8,32,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%sliced (a: u8[8,32,128], i: s32[]) -> u8[1,32,128] {
  %a = u8[8,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  %f = u8[8,32,128]{2,1,0:T(8,128)(4,1)} fusion(%a), kind=kLoop, calls=%lays_out
  ROOT %s = u8[1,32,128]{2,1,0} dynamic-slice(%f, %i, %z, %z), dynamic_slice_sizes={1,32,128}
}

ENTRY %main (a: u8[8,32,128], i: s32[]) -> u8[1,32,128] {
  %a = u8[8,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %r = u8[1,32,128]{2,1,0:T(8,128)(4,1)} fusion(%a, %i), kind=kLoop, calls=%sliced
}
"""


def test_a_slice_of_what_is_laid_out_anew_within_a_fusion_is_a_slice():
    assert of(Module(LAID_OUT)).bytes == 2 * 32 * 128 + 4  # and its number
    whole = LAID_OUT.replace("1,32,128", "8,32,128").replace("calls=%sliced", "calls=%lays_out")
    whole = whole.replace("fusion(%a, %i)", "fusion(%a)")
    assert of(Module(whole)).bytes == 2 * 8 * 32 * 128


@pytest.mark.parametrize("platform", ["cpu", TPU])
def test_what_is_kept_for_the_backward_pass_fills_the_memory(platform, texts):
    text, account = texts[platform]["residuals"]
    total, buffers = fullest(Module(text))
    # x and tanh of every layer, of which a TPU compiler may keep in bfloat16 what only products
    # read
    kept = f"[20,{KEPT},256]"
    assert [buffer.shape for buffer in buffers[:2]] in (
        ["f32" + kept] * 2,
        ["f32" + kept, "bf16" + kept],
    )
    assert total == pytest.approx(account["temporaries"], rel=0.1)


@pytest.mark.parametrize("platform", ["cpu", TPU])
def test_arguments_take_what_xla_says(platform, texts):
    """With the padding of their layouts: 3 of 9 x 3 numbers fill a tile of 8 x 128."""
    padded = 0
    for name, (text, account) in texts[platform].items():
        module = Module(text)
        leaves = [leaf for i in module[module.entry].parameters.values() for leaf in i.leaves]
        assert sum(leaf.padded for leaf in leaves) == account["arguments"], name
        padded += sum(leaf.padded - leaf.bytes for leaf in leaves)
    assert bool(padded) == (platform == "tpu")


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "size"),
    [
        ("f32", (3, 9), "1,0:T(8,128)", 8 * 128 * 4),
        ("f32", (3, 9), "0,1:T(8,128)", 16 * 128 * 4),
        ("bf16", (5, 257, 112), "2,1,0:T(8,128)(2,1)", 5 * 264 * 128 * 2),
        ("bf16", (5, 257, 112), "2,0,1:T(8,128)(2,1)S(1)", 257 * 8 * 128 * 2),
        ("f32", (2, 300), "1,0:T(2,128)", 2 * 384 * 4),
        ("s32", (), ":T(128)", 128 * 4),
        ("f32", (3, 9), "1,0", 3 * 9 * 4),
        ("f32", (3, 9), "", 3 * 9 * 4),
    ],
)
def test_tiles_of_a_layout(dtype, dims, layout, size):
    assert Leaf(dtype, dims, layout).padded == size


def test_tiles_of_another_form_are_refused():
    with pytest.raises(ValueError, match="tiles of an unknown form"):
        _ = Leaf("f32", (3, 9), "1,0:T(8,*)").padded


@pytest.mark.parametrize(
    ("rest", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", (0, 2)),
        ("replica_groups=[2,4]<=[8], x=1", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}, y=1", (0, 4)),
        ("replica_groups=mesh['x'=1,'y'=4,'z'=2], device_ids=([2,4]T(1,0)) {'z'}, y=1", (0, 4)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}, y=1", (0, 2)),
        ("replica_groups={}, x=1", tuple(range(8))),
    ],
)
def test_forms_of_replica_groups(rest, group):
    instruction = Instruction("a", "f32[]", "all-reduce", (), "", rest, False)
    assert replica_group(instruction, 8) == group


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Module("hello")
    with pytest.raises(ValueError, match="unknown form"):
        replica_group(Instruction("a", "f32[]", "all-reduce", (), "", "replica_groups=?", False), 8)
