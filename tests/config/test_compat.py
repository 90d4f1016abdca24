"""Saved configs of former formats mean what they meant; later formats are refused by number;
additive fields have defaults.
"""

import dataclasses

import pytest

from evlm_jax.config import compat, from_config_dict, from_saved, to_dict, to_saved
from evlm_jax.config.load import load_config, set_field
from evlm_jax.config.schema import build
from experiments import demo
from tests.helpers.tiny import tiny_config

CFG = tiny_config(xattn={"heads": 4, "kv_heads": 4})


def test_a_saved_config_carries_its_format_and_comes_back():
    assert to_saved(CFG)["format"] == compat.FORMAT
    assert from_saved(to_saved(CFG)) == CFG


def test_a_former_format_means_what_it_meant():
    """Shared keys came after the first saved runs: those have a key for every head."""
    saved = to_dict(CFG)
    del saved["xattn"]["kv_heads"]
    assert from_saved(saved) == CFG
    with pytest.raises(ValueError, match="missing key xattn.kv_heads"):
        from_saved(saved | {"format": compat.FORMAT})


@pytest.mark.parametrize("number", [compat.FORMAT + 1, -1, "1", True, 1.5, None])
def test_an_unknown_format_is_refused_by_number(number):
    with pytest.raises(
        ValueError, match=f"is of format {number}, this version reads 0 to {compat.FORMAT}"
    ):
        from_saved(to_dict(CFG) | {"format": number})


def test_a_renamed_key_loads_in_saved_configs_and_in_experiments(monkeypatch):
    monkeypatch.setattr(compat, "RENAMED", {"llm.blocks": "llm.layers", "data.width": "llm.hidden"})
    old = to_dict(CFG)
    old["llm"]["blocks"], old["data"]["width"] = old["llm"].pop("layers"), old["llm"].pop("hidden")
    assert from_saved(old) == from_config_dict(old) == CFG
    with pytest.raises(ValueError, match="llm.blocks is called llm.layers now, and both are given"):
        from_config_dict(old | {"llm": old["llm"] | {"layers": 5}})


def former(config: dict) -> dict:
    """`config` with today's former names in place of the new ones."""
    for old, new in compat.RENAMED.items():
        (section, name), (_, field) = old.split("."), new.split(".")
        config[section][name] = config[section].pop(field)
    return config


def test_a_saved_config_with_former_names_means_the_same():
    assert from_saved({"format": 1} | former(to_dict(CFG))) == CFG


EXPERIMENT = """
from experiments import demo

def get_config():
    config = demo.get_config("fast")
    config.train.batch = 4
    config.data.pool = 2
    config.data.slots = config.data.pool * config.data.images
    config.data.update(pairs=40)
    config.xattn.tile //= 2
    config.moe.tile = config.xattn.tile
    config.lock()
    return config
"""


def test_an_experiment_sets_and_reads_former_names(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    (tmp_path / "new.py").write_text(
        EXPERIMENT.replace("data.pool", "data.image_group")
        .replace("pairs=", "block_pairs=")
        .replace("xattn.tile", "xattn.query_block")
        .replace("moe.tile", "moe.expert_block")
    )
    cfg = load_config(str(tmp_path / "mine.py"))
    assert cfg == load_config(str(tmp_path / "new.py"))
    assert (cfg.data.image_group, cfg.data.slots, cfg.data.block_pairs) == (2, 12, 40)
    assert (cfg.xattn.query_block, cfg.moe.expert_block) == (16, 16)


@pytest.mark.parametrize("names", [dict, former], ids=["new", "former"])
@pytest.mark.parametrize("chosen", [compat.RENAMED.values(), compat.RENAMED], ids=["new", "former"])
def test_an_override_by_either_name_wins_over_a_file_with_either(tmp_path, names, chosen):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({names(to_dict(CFG))!r})\n"
    )
    overrides = [f"--config.{name}={n}" for name, n in zip(chosen, (2, 16, 4, 2), strict=True)]
    cfg = load_config(str(tmp_path / "mine.py"), overrides)
    assert (cfg.data.image_group, cfg.data.block_pairs) == (2, 16)
    assert (cfg.xattn.query_block, cfg.moe.expert_block) == (4, 2)


def test_an_additive_field_may_be_left_out():
    @dataclasses.dataclass(frozen=True)
    class Section:
        old: int
        new: float = 0.5

    assert build(Section, {"old": 1}, "s") == Section(1, 0.5) and build(
        Section, {"old": 1, "new": 2}, "s"
    ) == Section(1, 2.0)
    with pytest.raises(ValueError, match="missing key s.old"):
        build(Section, {"new": 1.0}, "s")
    with pytest.raises(ValueError, match="s.new must be float, got 'x'"):
        build(Section, {"old": 1, "new": "x"}, "s")


def test_an_override_may_name_a_field_that_the_experiment_leaves_out():
    made = demo.get_config()
    del made.train.keep
    set_field(made, "train.keep", "7")
    assert from_config_dict(made).train.keep == 7
