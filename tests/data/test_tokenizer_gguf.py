"""Vocabularies of GGUF files: ids and texts are SentencePiece's own, of pieces that its trainer
found, of random ones, and of Gemma's.
"""

import io
import random
from pydoc_data.topics import topics

import pytest

from evlm_jax import assets
from evlm_jax.convert.gguf_file import read_gguf
from evlm_jax.data.tokenizer import load_tokenizer, save_tokenizer
from tests.helpers.parity import needs_asset
from tests.helpers.sentencepieces import BYTES, SPECIAL, facts_of, gguf, processor
from tests.helpers.vocabularies import WORDS, texts

GEMMA = "gemma3-270m"
USER = ("<tag>", "▁▁", "▁▁▁", "\n", "\n\n")
SMOLLM2 = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(*map(chr, range(33, 127)), "ab"),
        *("<think>", "<|spare|>"),
    ],
    "token_type": [3] * 3 + [1] * 95 + [4] * 2,
    "merges": ["a b"],
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA = facts_of([*SPECIAL, *BYTES, ("ab", -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1)], True)


def random_texts(count: int, seed: int = 0):
    """Any letters, runs of one, and words with tags and white space between them."""
    draw = random.Random(seed)
    letters = (range(0x20), range(0x20, 0x7F), range(0x4E00, 0x9FFF), range(0xE000, 0x110000))
    between = ("<tag>", "<table>", "<start_of_image>", " ", "\n", "\t")
    for _ in range(count):
        yield "".join(chr(draw.choice(draw.choice(letters))) for _ in range(draw.randrange(20)))
        yield "".join(draw.choice(("a", "ha", " ", "=", "\n")) * draw.randrange(40) for _ in "1234")
        yield "".join(
            draw.choice((*WORDS, draw.choice(between) * draw.randrange(1, 70)))
            for _ in range(draw.randrange(12))
        )


def same(ours, theirs, given, spelled: bool = True) -> None:
    for one in given:
        ids = theirs.EncodeAsIds(one)
        assert ours.encode(one) == ids, repr(one)
        assert not spelled or ours.decode(ids) == theirs.DecodeIds(ids), repr(one)


@pytest.mark.parametrize(
    "front, byte_fallback, user",
    [
        (True, True, ()),
        (True, False, ()),
        (False, True, ()),
        (False, True, USER),
        (False, False, USER),
    ],
)
def test_trained_pieces_are_read_as_by_sentencepiece(tmp_path, front, byte_fallback, user):
    """Without bytes the two spell what is unknown otherwise, and join it alike."""
    library = pytest.importorskip(
        "sentencepiece", reason="needs sentencepiece: pip install -e '.[test]'"
    )
    made = io.BytesIO()
    lines = [line for line in (topics["class"] + topics["with"]).splitlines() if line.strip()]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *(word for word in WORDS if word.strip())]),
        model_writer=made,
        model_type="bpe",
        vocab_size=600 + 256 * byte_fallback,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=front,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(user),
        character_coverage=0.98,
        minloglevel=2,
    )
    theirs = library.SentencePieceProcessor(model_proto=made.getvalue())
    pieces = []
    for i in range(len(theirs)):
        is_one = (theirs.IsUnknown(i), theirs.IsControl(i), theirs.IdToPiece(i) in user)
        kind = next((k for k, is_so in zip((2, 3, 4), is_one) if is_so), 6 * theirs.IsByte(i) or 1)
        pieces.append((theirs.IdToPiece(i), theirs.GetScore(i), kind))
    ours = load_tokenizer(gguf(tmp_path / "a.gguf", facts_of(pieces, front)))
    same(ours, theirs, [*texts(700), *random_texts(300)], byte_fallback)
    assert ours.bos == (1,) and ours.eos == (2,)


def test_random_pieces_are_read_as_by_sentencepiece(tmp_path):
    """Whose scores say another order than a trainer would, so that pieces are made of pieces that
    are worse, and whose user-defined ones overlap.
    """
    for seed in range(40):
        draw = random.Random(seed)
        letters = draw.choice(("ab▁", "a", "a▁", "abc=▁"))
        words, front = list(letters), draw.random() < 0.5
        for _ in range(20):
            word = draw.choice(words) + draw.choice(words)
            words += [word] * (word not in words and len(word) < 12)
        draw.shuffle(words)
        user = [] if front else draw.sample(["▁▁", "ab▁", "<t>", "aaa", "▁a"], draw.randrange(3))
        words = [word for word in words if word not in user]
        pieces = [*SPECIAL, *BYTES, *((word, 0.0, 4) for word in user)]
        pieces += [(word, -float(i), 1) for i, word in enumerate(words)]
        theirs = processor(pieces, front)
        ours = load_tokenizer(gguf(tmp_path / f"{seed}.gguf", facts_of(pieces, front)))
        given = letters.replace("▁", " ") + "  ▁é"
        same(ours, theirs, ("".join(draw.choices(given, k=draw.randrange(30))) for _ in range(80)))
        same(ours, theirs, (draw.choice(given) * n for n in range(40)))


def test_what_llama_cpp_does_where_the_file_says_nothing(tmp_path):
    """A BOS, and a space in front; behind a user-defined piece, too, as behind a special token."""
    said = ("pre", "bos_token_id", "eos_token_id", "unknown_token_id")
    pieces = [*SPECIAL, *BYTES, ("<tag>", 0.0, 4), *((c, -float(i), 1) for i, c in enumerate("▁a"))]
    facts = facts_of(pieces, None) | dict.fromkeys((*said, "add_bos_token"))
    ours = load_tokenizer(gguf(tmp_path / "a.gguf", facts))
    tag, space, a = 259, 260, 261
    assert (ours.bos, ours.eos, ours.id("<unk>")) == ((1,), (2,), 0)
    assert ours.encode("a<tag>a") == [space, a, tag, space, a] == ours.encode("a<tag>a", "token")
    assert ours.encode("a a", "text") == [a, space, a] and ours.decode([space, a, a]) == "aa"
    assert ours.encode("é") == [space, 3 + 0xC3, 3 + 0xA9] and ours.decode([3 + 0xC3, 199]) == "��"


def test_a_saved_vocabulary_is_the_one_that_was_read(tmp_path):
    ours = load_tokenizer(gguf(tmp_path / "a.gguf", LLAMA))
    save_tokenizer(ours, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.bos, saved.eos, saved.specials) == (ours.bos, ours.eos, ours.specials)
    for one in texts(300):
        assert saved.encode(one) == ours.encode(one) and saved.encode(one, "text") == ours.encode(
            one, "text"
        )


def test_gguf_says_what_stands_in_front(tmp_path):
    tokenizer = load_tokenizer(gguf(tmp_path / "a.gguf", SMOLLM2 | {"add_bos_token": True}))
    assert tokenizer.bos == (1,) and tokenizer.eos == (2, 0)
    assert tokenizer.encode("ab<think>") == [97, 98]
    assert tokenizer.id("<|spare|>") == 99 and 99 not in tokenizer.encode("<|spare|>")
    assert load_tokenizer(gguf(tmp_path / "b.gguf", SMOLLM2 | {"add_bos_token": False})).bos == ()


def of_types(*kinds: int) -> dict:
    return {"token_type": [*LLAMA["token_type"][:259], *kinds]}


def of_scores(*scores: float) -> dict:
    return {"scores": [*LLAMA["scores"][:259], *scores]}


@pytest.mark.parametrize(
    "facts, message",
    [
        (SMOLLM2 | {"pre": "llama-bpe"}, r"\('gpt2', 'llama-bpe'\).*the model's tokenizer.json"),
        (SMOLLM2 | {"add_eos_token": True}, "add_eos_token is True"),
        (SMOLLM2 | {"eos_token_id": None}, "eos_token_id is None"),
        (SMOLLM2 | {"tokens": ["a"] * 100}, "the token 'a' stands there twice"),
        (LLAMA | {"model": "t5"}, r"\('t5', 'default'\)"),
        (LLAMA | {"pre": "llama-bpe"}, r"\('llama', 'llama-bpe'\)"),
        (LLAMA | {"scores": None}, "scores is None"),
        (LLAMA | {"scores": [0.0]}, "scores has 1 entries for 262 tokens"),
        (LLAMA | {"add_eos_token": True}, "add_eos_token is True"),
        (LLAMA | {"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        (LLAMA | {"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap is \[1 2\]"),
        (LLAMA | {"unknown_token_id": 262}, "unknown_token_id is 262, of 262 tokens"),
        (SMOLLM2 | {"eos_token_id": 2**32 - 1}, "eos_token_id is 4294967295, of 100 tokens"),
        (LLAMA | of_types(1, 1, 7), "'b' is of type 7"),
        (LLAMA | of_types(5, 1, 1), "the unused piece 'ab' can be made of others"),
        (LLAMA | of_types(1, 1, 6), "257 pieces for bytes"),
        (
            LLAMA | {"tokens": ["<unk>", "<s>", "</s>", *"▁b", *LLAMA["tokens"][5:]]},
            "its 256 pieces for bytes",
        ),
        (
            LLAMA | of_types(1, 1, 4) | {"tokens": [*LLAMA["tokens"][:261], "▁▁"]},
            "the user-defined piece '▁▁' has a space",
        ),
    ],
)
def test_gguf_of_another_kind_is_refused(tmp_path, facts, message):
    with pytest.raises(ValueError, match=f"^tokenizer: .*a.gguf: .*{message}"):
        load_tokenizer(gguf(tmp_path / "a.gguf", facts))


@pytest.mark.parametrize("score", [-1.0, float("nan")])
def test_two_pieces_of_one_score_are_refused_where_both_can_be_made(tmp_path, score):
    pieces = [*SPECIAL, *BYTES, *((c, -7.0, 1) for c in "abc"), ("ab", -1.0, 1), ("bc", score, 1)]
    with pytest.raises(ValueError, match="'ab' and 'bc' have one score, .*which comes first"):
        load_tokenizer(gguf(tmp_path / "a.gguf", facts_of(pieces, True)))


@needs_asset(GEMMA)
@pytest.mark.ci
def test_gemmas_vocabulary_as_sentencepiece_reads_it():
    """llama.cpp's converter has spelled spaces of user-defined pieces, and calls <unk> a control
    token.
    """
    facts = read_gguf(assets.path(GEMMA)).metadata
    tokens, scores, kinds = (
        facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")
    )
    pieces = [
        (text.replace(" ", "▁"), float(score), int(kind))
        for text, score, kind in zip(tokens, scores, kinds)
    ]
    pieces[3] = ("<unk>", 0.0, 2)
    ours = load_tokenizer(GEMMA)
    same(ours, processor(pieces, False), [*texts(400), *random_texts(300), topics["class"]])
    assert (ours.bos, ours.eos) == ((2,), (1, ours.id("<end_of_turn>")))
    assert ours.vocab_size == 262144 and ours.id("<unused0>") == 6
    assert ours.encode("<bos>红苹果") == [*ours.encode("<bos>"), *ours.encode("红苹果")]
    assert not set(ours.specials.values()) & set(ours.encode("<bos><unused0><eos>"))
