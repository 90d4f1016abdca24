"""Small vocabularies in the form of the families that people bring, trained here, and texts on
which tokenizers differ.
"""

import json
import random
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from evlm_jax.data.tokenizer import QWEN_SPLIT

LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
CHAT = ("<|im_start|>", "<|im_end|>", "<|media|>")
WORDS = (
    *(
        "the quick brown fox",
        "Hello",
        "it's",
        "naïve café",
        "e\u0301 a\u0323\u0302",
        "ﬁﬂ ½ Ⅷ",
        "红苹果",
        "日本語のテキスト",
        "한국어",
    ),
    *(
        "Привет, мир",
        "مرحبا بالعالم",
        "שָׁלוֹם",
        "हिन्दी",
        "ไทย",
        "🍎",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
        "1234567890",
        "3.14",
        "٣٤",
        "x = y**2",
    ),
    *(
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\u202eabc\u202c",
        "\x00",
        "\x7f",
        "▁",
        "▁▁x",
        "Ġ",
    ),
    *(
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
        "<bos>",
        "<eos>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "end|>",
        "<|endoftext|>",
        "<|media|>",
    ),
    *(
        "<late>",
        "<think>",
        "<tool_call>",
        "[INST]",
        "<image>",
        "user",
        "assistant\n",
        " Answer:",
        "'LL",
        "\U0001d400",
        "\U00040000",
    ),
)


@cache
def texts(count: int) -> tuple[str, ...]:
    """Every word alone, with spaces around, and random sequences."""
    draw, found = random.Random(0), ["", *WORDS, *(f" {word} " for word in WORDS)]
    while len(found) < count:
        found.append("".join(draw.choice((*WORDS, " ")) for _ in range(draw.randint(2, 12))))
    return tuple(found[:count])


@cache
def _corpus() -> tuple[str, ...]:
    lines = "\n".join(
        topics[name] for name in ("class", "with", "assert", "integers", "function")
    ).splitlines()
    return (*lines, *(word for word in WORDS if "<" not in word for _ in range(3)))


def _bytes_bpe(split, normalizer=None, **how) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = split, decoders.ByteLevel()
    if normalizer:
        inner.normalizer = normalizer
    inner.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    spec = json.loads(inner.to_str())
    spec["model"] |= how
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _pieces_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) as SentencePiece's BPE has them: specials, bytes, pieces."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *_BYTES]),
    )
    model = json.loads(inner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_JOIN = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_SPACE = normalizers.Replace(" ", "▁")


def _sentencepiece(normalizer, split, strip: bool) -> tokenizers.Tokenizer:
    vocab, merges = _pieces_bpe()
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(_JOIN + [decoders.Strip(" ", 1, 0)] * strip)
    if normalizer:
        inner.normalizer = normalizer
    if split:
        inner.pre_tokenizer = split
    return inner


def _unigram() -> tokenizers.Tokenizer:
    """Its model, unlike BPE's, would make a special token of a text that spells it."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer, inner.pre_tokenizer = (
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
    )
    inner.decoder = decoders.Sequence(_JOIN + [decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *_BYTES]
    inner.train_from_iterator(
        _corpus(),
        trainers.UnigramTrainer(vocab_size=800, special_tokens=special, unk_token="<unk>"),
    )
    spec = json.loads(inner.to_str())
    spec["model"]["byte_fallback"], spec["added_tokens"] = True, []
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


FAMILIES = {  # how it is made, its BOS and EOS, whether a BOS belongs in front
    "gpt2": (
        lambda: _bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "<|endoftext|>",
        "<|endoftext|>",
        False,
    ),
    "gpt2-prefix": (
        lambda: _bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "<|endoftext|>",
        "<|endoftext|>",
        False,
    ),
    "qwen2": (lambda: _bytes_bpe(_split(QWEN_SPLIT), normalizers.NFC()), None, "<|im_end|>", False),
    "llama3": (
        lambda: _bytes_bpe(_split(LLAMA3_SPLIT), ignore_merges=True),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        True,
    ),
    "llama2": (
        lambda: _sentencepiece(
            normalizers.Sequence([normalizers.Prepend("▁"), _SPACE]), None, True
        ),
        "<s>",
        "</s>",
        True,
    ),
    "mistral": (
        lambda: _sentencepiece(
            None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True
        ),
        "<s>",
        "</s>",
        True,
    ),
    "gemma": (
        lambda: _sentencepiece(_SPACE, pre_tokenizers.Split(" ", "merged_with_previous"), False),
        "<s>",
        "</s>",
        True,
    ),
    "unigram": (_unigram, "<s>", "</s>", True),
}


@cache
def vocabulary(family: str) -> str:
    """tokenizer.json of a family, with the marks of a chat and of HTML, and its BOS."""
    make, bos, eos, front = FAMILIES[family]
    inner = make()
    names = dict.fromkeys(
        name
        for name in ("<unk>", bos, eos)
        if name and (name != "<unk>" or inner.token_to_id(name) is not None)
    )
    inner.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (*names, *CHAT)]
    )
    inner.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("<late>", normalized=True)]
    )
    if front:
        template = {"single": [bos, "$A"], "pair": [bos, "$A", f"{bos}:1", "$B:1"]}
        inner.post_processor = processors.TemplateProcessing(
            **template, special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return inner.to_str()


def write_json(place: Path, **contents) -> Path:
    """Files NAME.json of a folder."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (place / f"{name}.json").write_text(
            content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
            "utf-8",
        )
    return place


def older_folder(place: Path, family: str) -> Path:
    """As transformers of long ago left it: the last token stands in added_tokens.json alone,
    special ones are named in another file.
    """
    _, bos, eos, _ = FAMILIES[family]
    spec = json.loads(vocabulary(family))
    late = spec["added_tokens"].pop()
    named = {
        "eos_token": {
            "content": eos,
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
        }
    }
    named |= {"bos_token": bos} if bos else {}
    return write_json(
        place,
        tokenizer=spec,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1000},
        special_tokens_map=named,
        added_tokens={late["content"]: late["id"]},
    )
