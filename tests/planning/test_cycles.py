"""A step by the TPU compiler's own cycles, of a program that it made (programs/): eight layers, two
matrices each, sharded over a v5p:2x2x2 and gathered layer by layer, forward and again backward."""

import gzip
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from evlm_jax.parallel.chips import CHIPS
from evlm_jax.parallel.compiler import uncached
from evlm_jax.planning import chips, compiled, cycles
from evlm_jax.planning.compiled import Costs, Operation, Transfer
from evlm_jax.planning.hlo import Module

LAYERS, MATRIX, DEVICES = 8, 4096 * 16384 * 2, 8  # bytes of a matrix
GATHERED = MATRIX * 7 / 8 / 600e9  # seconds, over the links of three axes
TEXT = gzip.decompress(
    Path(__file__).with_name("programs").joinpath("gathers_v5p.txt.gz").read_bytes()
)
needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason='pip install -e ".[plan]"'
)


class Device:
    """Of a 2 x 2 x 2 torus."""

    platform, slice_index = "tpu", 0

    def __init__(self, number):
        self.coords = (number % 2, number // 2 % 2, number // 4)


def by_hand(text: str) -> float:
    """Cycles of the entry and, eight times, of the two loops' bodies, line by line."""
    total = 0
    for head, body in re.findall(r"^((?:ENTRY )?%\S+) .*?\{\n(.*?)^\}", text, re.M | re.S):
        times = 1 if head.startswith("ENTRY") else LAYERS * head.startswith("%wide.region")
        if "sunk" in head or times == 1:
            found = map(int, re.findall(r'"estimated_cycles":"(\d+)"', body))
            total += times * sum(cycles for cycles in found if cycles < 1e15)
    return total


def test_a_pinned_program():
    """Half of the gathers run beside products, the others and the sums of gradients stand alone."""
    text = TEXT.decode()
    costs = compiled.costs(Module(text), DEVICES)
    found = {
        (kind, hidden): sum(
            n for t, n in costs.transfers.items() if (t.kind, t.hidden) == (kind, hidden)
        )
        for kind in ("all-gather", "all-reduce")
        for hidden in (False, True)
    }
    assert found == {
        ("all-gather", False): 2 * LAYERS,
        ("all-gather", True): 2 * LAYERS,
        ("all-reduce", False): 2 * LAYERS,
        ("all-reduce", True): 0,
    }
    step = cycles.step(CHIPS["v5p"], costs, [Device(i) for i in range(DEVICES)], lambda name: "all")
    assert step.parts["all"] == pytest.approx(by_hand(text) / 1.75e9, rel=1e-6)
    assert step.guessed < 1e-6
    assert step.hidden == pytest.approx({"ici": 2 * LAYERS * GATHERED})
    assert step.exposed == pytest.approx({"ici": 2 * LAYERS * (GATHERED + 2 * GATHERED)})
    assert step.seconds == pytest.approx(step.parts["all"] + step.exposed["ici"])
    needed = costs.flops / 459e12
    assert 1.1 < step.parts["all"] / needed < 1.3  # products at 80 to 90% of the peak


def test_what_has_no_estimate_and_what_hides():
    """A kernel's products at half the peak, other operations by the roofline; transfers beside
    operations count where they take longer than all of them."""
    chip = CHIPS["v5p"]
    devices = [Device(i) for i in range(DEVICES)]
    costs = Costs()
    costs.operations.update(
        {
            Operation(459e12, 1.0, False, 1.75e9, "cross"): 2,
            Operation(459e12, 1.0, False, None, "llm"): 1,  # a kernel
            Operation(0.0, 2765e9, False, None, "llm"): 1,  # a sort
            Operation(0.0, 2765e9, True, None, "llm"): 1,  # a copy that runs beside
        }
    )
    costs.transfers[Transfer("all-gather", tuple(range(8)), int(600e9 * 8 / 7), True)] = 3
    costs.transfers[Transfer("all-reduce", tuple(range(8)), int(300e9 * 8 / 7))] = 1
    step = cycles.step(chip, costs, devices, lambda name: name)
    assert step.parts == pytest.approx({"cross": 2, "llm": 3}) and step.guessed == pytest.approx(3)
    assert step.hidden == pytest.approx({"ici": 3}) and step.exposed == pytest.approx({"ici": 1})
    assert step.seconds == pytest.approx(6)
    costs.transfers[Transfer("all-gather", tuple(range(8)), int(600e9 * 8 / 7), True)] = 9
    assert cycles.step(chip, costs, devices, lambda name: name).seconds == pytest.approx(10)
    assert cycles.step(CHIPS["h100"], costs, devices, lambda name: name) is None


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_clock_of_a_chip(topology):
    """A large bfloat16 product takes the same share of the peak on all of them."""
    devices, chip = chips.devices(topology)
    one = jax.ShapeDtypeStruct(
        (4096, 4096), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0])
    )
    with uncached(devices[0]):
        text = jax.jit(jnp.dot).lower(one, one).compile().as_text()
    taken = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / chip.clock
    share = 2 * 4096**3 / (chip.flops / chip.cores) / taken
    assert share == pytest.approx(0.9616, abs=0.01)
