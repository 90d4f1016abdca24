"""Rows are not longer than what the language model was trained on, unless the config says that they
may be.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFWriter

from evlm_jax.convert.context import check_length, position_field, trained_positions
from evlm_jax.convert.importer import import_towers
from evlm_jax.launch import train_run
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.foreign_files import finish
from tests.helpers.parity import needs_asset
from tests.helpers.tiny import tiny_config
from tests.helpers.vocabularies import older_folder

CFG = tiny_config()


def llm(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8-sig")
    return str(folder)


@pytest.mark.parametrize(
    "config, least",
    [
        ({"max_position_embeddings": 47}, (47, "max_position_embeddings")),
        (
            {"max_position_embeddings": 400, "sliding_window": 32},
            (400, "max_position_embeddings"),
        ),
        (
            {"max_position_embeddings": 400, "sliding_window": 32, "use_sliding_window": False},
            (400, "max_position_embeddings"),
        ),
        (
            {"max_position_embeddings": 400, "sliding_window": None},
            (400, "max_position_embeddings"),
        ),
        ({"max_position_embeddings": 400, "seq_length": 40}, (40, "seq_length")),
        ({}, None),
    ],
)
def test_the_shortest_of_what_the_files_say(tmp_path, config, least):
    where = llm(tmp_path / "llm", **config)
    cfg = replace(CFG, init=replace(CFG.init, llm=where))
    assert trained_positions(where) == least and cfg.data.length == 48
    if least is None or least[0] >= 48:
        return check_length(cfg)
    with pytest.raises(
        ValueError,
        match=(
            rf"^config: data.length is 48, {least[1]} of .*llm is {least[0]}: .*init.beyond_context"
        ),
    ):
        check_length(cfg)
    check_length(replace(cfg, data=replace(cfg.data, length=least[0])))
    check_length(replace(cfg, init=replace(cfg.init, beyond_context=True)))


def test_gguf_says_it_too(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(40)
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
    finish(writer)
    assert trained_positions(tmp_path / "a.gguf") == (40, "llama.context_length")


def test_an_export_says_as_many(tmp_path):
    where = llm(tmp_path / "llm", max_position_embeddings=400)
    cfg = replace(CFG, init=replace(CFG.init, llm=where))
    assert position_field(cfg) == {"max_position_embeddings": 400}
    longer = replace(cfg, data=replace(cfg.data, length=500))
    assert position_field(longer) == {"max_position_embeddings": 500}
    for gone in (str(tmp_path / "gone"), "", llm(tmp_path / "silent")):
        assert position_field(replace(cfg, init=replace(cfg.init, llm=gone))) == {}


@needs_asset("smollm2-135m-instruct")
def test_the_demos_language_model():
    assert trained_positions("smollm2-135m-instruct") == (8192, "llama.context_length")


def test_training_and_import_look(tmp_path):
    towers = (
        dinov2_directory(tmp_path / "vit", CFG),
        llama_directory(tmp_path / "llm", CFG, max_position_embeddings=47),
    )
    cfg = replace(CFG, init=replace(CFG.init, vision=str(towers[0]), llm=str(towers[1])))
    for start in (train_run, import_towers):
        with pytest.raises(ValueError, match="max_position_embeddings of .* is 47"):
            start(cfg, str(tmp_path / "out"))
        longer = replace(cfg, init=replace(cfg.init, beyond_context=True))
        with pytest.raises(ValueError, match="the tokenizer has 256 ids, llm.vocab is 250"):
            start(replace(longer, llm=replace(cfg.llm, vocab=250)), str(tmp_path / "out"))
        with pytest.raises(ValueError, match="'<none>' is not a special token"):
            start(
                replace(longer, media=replace(cfg.media, placeholder="<none>")),
                str(tmp_path / "out"),
            )
        older_folder(towers[1], "unigram")
        spec = json.loads((towers[1] / "tokenizer.json").read_text("utf-8"))
        spec["model"]["byte_fallback"] = False
        (towers[1] / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
        unknown = replace(
            longer, media=replace(cfg.media, placeholder="<unk>"), llm=replace(cfg.llm, vocab=2000)
        )
        with pytest.raises(
            ValueError, match="media.placeholder '<unk>' is what unknown characters become"
        ):
            start(unknown, str(tmp_path / "out"))
        llama_directory(tmp_path / "llm", CFG, max_position_embeddings=47)
        for left in ("special_tokens_map.json", "added_tokens.json"):
            (towers[1] / left).unlink()
