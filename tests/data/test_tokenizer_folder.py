"""What stands in and beside a tokenizer.json that somebody used, saved, mended or damaged."""

import json

import pytest

from evlm_jax.data import text
from evlm_jax.data.samples import Sample, Turn
from evlm_jax.data.tokenizer import load_tokenizer
from tests.helpers.checkpoints import SPECIALS, tokenizer_directory
from tests.helpers.tiny import tiny_config
from tests.helpers.vocabularies import older_folder, write_json

TEXT = "the quick brown fox"
LOOK_ALIKE = "a<|im_end|>b"
BOS = {"id": 252, "content": "<|im_start|>"}


def changed(folder, vocabulary=None, **beside):
    """The vocabulary of letters, with parts of its tokenizer.json and the files beside it replaced;
    a file of None is left out.
    """
    tokenizer_directory(folder)
    spec = json.loads((folder / "tokenizer.json").read_text()) | (vocabulary or {})
    write_json(
        folder,
        tokenizer=spec,
        **{name: content for name, content in beside.items() if content is not None},
    )
    for name in (name for name, content in beside.items() if content is None):
        (folder / f"{name}.json").unlink()
    return folder


def model(folder, **changes):
    return (
        json.loads((tokenizer_directory(folder) / "tokenizer.json").read_text())["model"] | changes
    )


def template(*pieces):
    """A post-processor; pieces are names of special tokens, or $A."""
    steps = [
        (
            {"Sequence": {"id": "A", "type_id": 0}}
            if name == "$A"
            else {"SpecialToken": {"id": name, "type_id": 0}}
        )
        for name in pieces
    ]
    special = {
        name: {"id": name, "ids": [SPECIALS[name]], "tokens": [name]}
        for name in pieces
        if name != "$A"
    }
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": special}


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 254,
    "pad_type_id": 0,
}


def test_what_an_earlier_use_left_changes_nothing(tmp_path):
    letters = [ord(c) - 33 if c != " " else 94 for c in TEXT]
    used = {"truncation": TRUNCATION, "padding": PADDING | {"pad_token": "<|endoftext|>"}}
    assert load_tokenizer(changed(tmp_path, used)).encode(TEXT) == letters
    merged = {"merges": [["t", "h"]], "vocab": model(tmp_path)["vocab"] | {"th": 96}}
    random = load_tokenizer(changed(tmp_path, {"model": model(tmp_path, dropout=0.9, **merged)}))
    assert [random.encode("th" * 20) for _ in range(9)] == [[96] * 20] * 9
    document = text.encode(
        Sample("k", "s", (), ((Turn("assistant", TEXT),),)),
        load_tokenizer(changed(tmp_path, used)),
        tiny_config(),
    )
    assert document.targets.tolist() == [*letters[1:], SPECIALS["<|im_end|>"]]


def test_marks_are_special_whatever_their_flag(tmp_path):
    added = [
        {**token, "special": False}
        for token in json.loads((tokenizer_directory(tmp_path) / "tokenizer.json").read_text())[
            "added_tokens"
        ]
    ]
    added.append({**added[0], "id": 100, "content": "<b>"})
    tokenizer = load_tokenizer(changed(tmp_path, {"added_tokens": added}))
    assert tokenizer.specials == SPECIALS and tokenizer.eos == (253, 254)
    assert tokenizer.encode(LOOK_ALIKE) == [ord(c) - 33 for c in LOOK_ALIKE]
    assert tokenizer.encode("a<b>") == [64, 100]  # a tag is text, of one token
    assert tokenizer.decode([64, 253]) == "a"


@pytest.mark.parametrize(
    "where",
    [
        {"special_tokens_map": {"additional_special_tokens": ["<b>"]}},
        {"tokenizer_config": {"eos_token": "<b>"}},
    ],
)
def test_what_another_file_calls_special_is(tmp_path, where):
    added = json.loads((tokenizer_directory(tmp_path) / "tokenizer.json").read_text())[
        "added_tokens"
    ]
    late = {**added[0], "id": 100, "content": "<b>", "special": False}
    tokenizer = load_tokenizer(changed(tmp_path, {"added_tokens": [late, *added]}, **where))
    assert tokenizer.id("<b>") == 100 and tokenizer.encode("<b>") == [27, 65, 29]


def test_a_model_that_would_spell_a_special_token_is_kept_from_it(tmp_path):
    """Unigram's finds it among its pieces."""
    tokenizer = load_tokenizer(older_folder(tmp_path, "unigram"))
    assert (
        tokenizer.inner.encode("a</s>b", add_special_tokens=False).ids.count(tokenizer.id("</s>"))
        == 1
    )
    for place in ("nothing", "token", "text"):
        ids = tokenizer.encode("a</s>b</s> </s>", place)
        assert (
            tokenizer.id("</s>") not in ids and tokenizer.decode(ids).lstrip() == "a</s>b</s> </s>"
        )


@pytest.mark.parametrize(
    "beside, eos",
    [
        ({"generation_config": {"eos_token_id": 255}}, (255, 253, 254)),
        (
            {"generation_config": {"eos_token_id": [254, 252]}, "config": {"eos_token_id": 255}},
            (254, 252, 253),
        ),
        ({"config": {"eos_token_id": 255}}, (255, 253, 254)),
        ({"special_tokens_map": {"eos_token": {"content": "<|endoftext|>"}}}, (254, 253)),
        ({}, (253, 254)),
    ],
)
def test_end_tokens_are_found(tmp_path, beside, eos):
    assert load_tokenizer(changed(tmp_path, tokenizer_config=None, **beside)).eos == eos


def test_the_tokenizers_own_end_token_comes_first(tmp_path):
    beside = {
        "tokenizer_config": {"eos_token": "<|media|>"},
        "generation_config": {"eos_token_id": [254, 252]},
    }
    assert load_tokenizer(changed(tmp_path, **beside, config={"eos_token_id": 3})).eos == (
        255,
        254,
        252,
        253,
    )


def test_bos_stands_in_front_where_the_files_say_so(tmp_path):
    said = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert load_tokenizer(changed(tmp_path, tokenizer_config=said)).bos == ()
    for folder in (
        changed(tmp_path / "flag", tokenizer_config=said | {"add_bos_token": True}),
        changed(
            tmp_path / "template",
            {"post_processor": template("<|im_start|>", "$A")},
            tokenizer_config=said,
        ),
    ):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.bos == (252,) and tokenizer.encode("a") == [64]
        assert tokenizer.inner.encode("a").ids == [252, 64]  # what an export writes
        alone = text.encode(
            Sample("k", "s", (), ((Turn("assistant", "ab"),),)), tokenizer, tiny_config()
        )
        assert (alone.tokens.tolist(), alone.target_positions.tolist(), alone.targets.tolist()) == (
            [252, 64, 65],
            [0, 1, 2],
            [64, 65, 253],
        )


EOS = {"eos_token": "<|im_end|>"}
STRIP = {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
WORDS = [
    {"type": "WhitespaceSplit"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
]
NO_MARKS = {"added_tokens": []}
REFUSED = {
    "no end token": (NO_MARKS, {"tokenizer_config": {}}, "no end token is known.*eos_token"),
    "unknown end token": (
        {},
        {"tokenizer_config": {"eos_token": "<end>"}},
        "eos_token is '<end>', which is not in the vocabulary",
    ),
    "end id of a letter": (
        {},
        {"generation_config": {"eos_token_id": 2}},
        "generation_config.json says eos_token_id 2, which is no special",
    ),
    "bos against": (
        {"post_processor": template("<|im_start|>", "$A")},
        {"tokenizer_config": EOS | {"bos_token": "<|im_start|>", "add_bos_token": False}},
        "the post-processor puts '<|im_start|>' in front .* add_bos_token false",
    ),
    "bos without": (
        {},
        {"tokenizer_config": EOS | {"add_bos_token": True}},
        "add_bos_token is true and bos_token is None",
    ),
    "eos behind": (
        {"post_processor": template("$A", "<|im_end|>")},
        {},
        "puts '<|im_end|>' behind every text",
    ),
    "eos flag": ({}, {"tokenizer_config": EOS | {"add_eos_token": True}}, "add_eos_token"),
    "another id": (
        {},
        {"tokenizer_config": EOS | {"added_tokens_decoder": {"7": {"content": "<|media|>"}}}},
        "'<|media|>' has the id 255 here",
    ),
    "id taken": (
        {},
        {"added_tokens": {"<new>": 7}},
        "'<new>' has the id 7 in its files and 100 by the vocabulary",
    ),
    "stripped": (STRIP, {}, "strips the ends of a text"),
    "space before words": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": WORDS}},
        {},
        "a space in front of every word",
    ),
    "prefix said": (
        {},
        {"tokenizer_config": EOS | {"add_prefix_space": True}},
        "add_prefix_space is True",
    ),
    "no model": ({"model": {"type": "BPE"}}, {}, "no model with a vocabulary"),
    "unknown model": (
        {"model": {"type": "New", "vocab": {"a": 0}}},
        {},
        "not a tokenizer that tokenizers .* reads",
    ),
    "a BOS that is not there": (  # a panic of the library's Rust, which is no Exception
        {"post_processor": template("<|im_start|>", "$A") | {"special_tokens": {}}},
        {},
        "it is damaged: PanicException: no entry found for key",
    ),
    "charsmap cut": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {},
        "",
    ),
    "an added token without text": (
        {"added_tokens": [{"id": 255}]},
        {},
        "it is damaged: KeyError: 'content'",
    ),
    "nested": ({}, {"tokenizer": "[" * 100_000}, "no valid JSON: maximum recursion"),
    "config is a list": (
        {},
        {"tokenizer_config": []},
        "tokenizer_config.json: must hold a JSON object",
    ),
    "cut off": ({}, {"tokenizer": '{"model": '}, "tokenizer.json: no valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case):
    vocabulary, beside, message = REFUSED[case]
    folder = changed(
        tmp_path,
        vocabulary,
        **{name: content for name, content in beside.items() if name != "tokenizer"},
    )
    if "tokenizer" in beside:
        write_json(folder, tokenizer=beside["tokenizer"])
    with pytest.raises(
        ValueError, match=f"^tokenizer: .*tokenizer.json: .*{message.replace('|', '[|]')}"
    ) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_changes_nothing(tmp_path):
    folder = tokenizer_directory(tmp_path)
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(folder).eos == (253, 254)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_slow_tokenizer_alone_names_the_mend(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(
        FileNotFoundError, match=f"has {name} and no tokenizer.json; make it: .*save_pretrained"
    ):
        load_tokenizer(tmp_path)
