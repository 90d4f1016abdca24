"""What the compiler is told of a step: our options, without those that a user has set himself."""

import jax
import pytest

from evlm_jax.parallel import compiler
from evlm_jax.parallel.compiler import step_options, told

KNOWN = {"xla_cpu_multi_thread_eigen": True, "xla_cpu_enable_fast_min_max": False}


@pytest.fixture
def device(monkeypatch):
    device = jax.devices("cpu")[0]
    monkeypatch.setitem(compiler.OPTIONS, device.device_kind, KNOWN)
    for name in compiler.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return device


def test_nothing_is_told_of_a_kind_without_options():
    assert step_options(jax.devices("cpu")) == {}


def test_what_a_user_has_set_wins(device, monkeypatch):
    assert step_options([device]) == KNOWN
    for name in compiler.VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "--xla_dump_to=/nowhere --xla_cpu_enable_fast_min_max=true")
            assert step_options([device]) == {"xla_cpu_multi_thread_eigen": True}


def test_what_the_compiler_does_not_know_is_left_out_by_name(device, monkeypatch, capsys):
    options = {"xla_of_tomorrow": True, **KNOWN, "xla_of_yesterday": 3}
    monkeypatch.setitem(compiler.OPTIONS, device.device_kind, options)
    assert step_options([device]) == KNOWN
    said = capsys.readouterr().out
    assert "does not take xla_of_tomorrow" in said and "does not take xla_of_yesterday" in said


def test_the_line_has_the_form_of_the_variable():
    assert told({"xla_a": True, "xla_b": 3}).endswith(": --xla_a=true --xla_b=3")
