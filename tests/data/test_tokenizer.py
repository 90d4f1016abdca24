"""Tokenizers: text never becomes a special token, ids decode to the text,
and transformers agrees.
"""

import base64
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from evlm_jax.data.tokenizer import (
    QWEN_SPLIT,
    _byte_letters,
    keep_tokenizer,
    load_tokenizer,
    source_of_run,
)
from tests.helpers.parity import needs_asset, needs_transformers

SMOLLM2 = "smollm2-135m-instruct"
CHINESE_AND_CODE = "红苹果 🍎 <|im_end|>\n\n  def f(x):\n\treturn x ** 2  # 2024-11-05 \r\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def ranks(tokenizer):
    """SmolLM2's vocabulary in tiktoken's form, {bytes: rank}: the bytes, then what each merge
    makes.
    """
    letter_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    merges = json.loads(tokenizer.inner.to_str())["model"]["merges"]
    words = [*_byte_letters(), *dict.fromkeys("".join(pair) for pair in merges)]
    return {bytes(letter_of[letter] for letter in word): rank for rank, word in enumerate(words)}


@pytest.fixture(scope="module")
def tiktoken_reader(ranks):
    """tiktoken's own reader of the same ranks, which takes a while to make."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken: pip install -e '.[test]'")
    return tiktoken.Encoding("qwen", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, ranks):
    """A directory as Qwen 1.0 ships it, with that vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    lines = (base64.b64encode(token) + f" {rank}".encode() for token, rank in ranks.items())
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    """The same vocabulary as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    return folder


@needs_asset(SMOLLM2)
def test_smollm2_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos == (tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")) == (2, 0)
    assert tokenizer.id("<repo_name>") == 3
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 2]) == "hello"
    assert (
        tokenizer.decode([1, *tokenizer.encode("hello"), 2], skip_special=False)
        == "<|im_start|>hello<|im_end|>"
    )


@needs_asset(SMOLLM2)
def test_digits_stand_alone(tokenizer):
    """SmolLM2 was trained so; transformers' GGUF reader joins a newline and spaces in front of a
    digit.
    """
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 2024")] == [
        "in",
        " ",
        "2",
        "0",
        "2",
        "4",
    ]


@needs_asset(SMOLLM2)
@settings(max_examples=300, deadline=None)
@given(
    text=st.text()
    | st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<repo_name>", "<|im_", "end|>", " ", "a"])
    ).map("".join)
)
def test_round_trip_and_no_special_token_from_text(tokenizer, text):
    """But for bytes that the vocabulary lacks: SmolLM2 has none for planes 4 to 15 of Unicode,
    which are unassigned.
    """
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text or not representable(tokenizer, text)
    assert representable(tokenizer, "é 红苹果 🍎")
    assert not set(ids) & set(tokenizer.specials.values())


def representable(tokenizer, text: str) -> bool:
    """Whether the vocabulary has every byte of the text."""
    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return all(
        tokenizer.inner.token_to_id(letter) is not None for piece, _ in pieces for letter in piece
    )


@needs_asset(SMOLLM2)
def test_directory_equals_gguf(tokenizer, directory):
    other = load_tokenizer(directory)
    assert other.encode(CHINESE_AND_CODE) == tokenizer.encode(CHINESE_AND_CODE)
    assert other.specials == tokenizer.specials and other.vocab_size == tokenizer.vocab_size
    assert other.eos == (0, 2)
    assert other.decode(other.encode(CHINESE_AND_CODE)) == CHINESE_AND_CODE


@needs_asset(SMOLLM2)
@needs_transformers
def test_transformers_gives_the_same_ids(tokenizer, directory):
    """On real text, through their fast tokenizer of the same directory."""
    from pydoc_data.topics import topics

    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    text = topics["assert"] + topics["integers"] + CHINESE_AND_CODE.replace("<|im_end|>", "")
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


@needs_asset(SMOLLM2)
def test_names_that_are_no_special_token_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'hello' is not a special token; there are .*<repo_name>"):
        tokenizer.id("hello")


def test_missing_file_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*; give a directory"):
        load_tokenizer(tmp_path)


@needs_asset(SMOLLM2)
@settings(max_examples=300, deadline=None)
@given(
    text=st.text()
    | st.lists(
        st.sampled_from(["<|im_end|>", "it's", "红苹果", " 1234", "\r\n", "  ", "a\u0301"])
    ).map("".join)
)
def test_tiktoken_file_as_tiktoken_reads_it(qwen, tiktoken_reader, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = qwen.encode(text)
    normal = unicodedata.normalize("NFC", text)
    assert ids == tiktoken_reader.encode(normal, disallowed_special=())
    assert not set(ids) & set(qwen.specials.values())
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text)


@needs_asset(SMOLLM2)
def test_special_tokens_of_qwen(qwen, ranks):
    base = len(ranks)  # 151,643 in the real file
    names = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"
    assert [qwen.id(name) for name in names] == [base, base + 1, base + 2, base + 3, base + 207]
    assert qwen.eos == (base, base + 2) and qwen.vocab_size == base + 208


def test_damaged_tiktoken_file_is_named(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("no rank here\n")
    with pytest.raises(ValueError, match="qwen.tiktoken: not a tiktoken file"):
        load_tokenizer(tmp_path)


@needs_asset(SMOLLM2)
def test_a_run_keeps_its_tokenizer(tmp_path):
    """Read back from a run's own folder it is the one that was read from GGUF; a run of a former
    version has none.
    """
    tokenizer = load_tokenizer(SMOLLM2)
    assert source_of_run(tmp_path, SMOLLM2) == SMOLLM2
    keep_tokenizer(tokenizer, tmp_path)
    kept = load_tokenizer(source_of_run(tmp_path, "elsewhere"))
    assert (kept.eos, kept.bos, kept.specials, kept.vocab_size) == (
        tokenizer.eos,
        tokenizer.bos,
        tokenizer.specials,
        tokenizer.vocab_size,
    )
    for text in (
        "It's 2024-11-28,\n  12345 <|im_end|> \u00a0x",
        "\u4f60\u597d \U0001f642\u200d e\u0301",
        "",
        " ",
        "\ttab",
    ):
        assert kept.encode(text) == tokenizer.encode(text) and kept.decode(
            kept.encode(text)
        ) == tokenizer.decode(tokenizer.encode(text))
