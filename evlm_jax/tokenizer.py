"""Text <-> token ids, behind one small class: GGUF vocabularies (SmolLM2), Hugging Face `tokenizer.json`, Qwen 1.0's tiktoken file.

Special tokens exist only by name (`Tokenizer.id`): no text, whatever it spells, is ever encoded to one. So a user who types
`<|im_end|>` gets its letters, and templates are built from pieces instead of from one string.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from evlm_jax import assets
from evlm_jax.gguf_file import read_gguf

STOP_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")  # of the families that convert/tables.py knows
GGUF_CONTROL = 3  # token type
QWEN_SPLIT = (  # of Qwen 1.0, and of Qwen2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))  # behind the ranks, in this order


class Tokenizer:
    """`eos`: ids that end an answer, the vocabulary's own end token first."""

    def __init__(self, inner: tokenizers.Tokenizer, specials: dict[str, int], eos: str | None):
        inner.encode_special_tokens = True  # i.e. special tokens in the text are ordinary letters
        self.inner, self.specials = inner, specials
        self.eos = tuple(dict.fromkeys(specials[name] for name in (eos, *STOP_NAMES) if name in specials))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any special token. Bytes that the vocabulary lacks (SmolLM2: of no assigned character) are left out."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def id(self, special: str) -> int:
        """Id of a special token. Raises ValueError if the vocabulary has no special token of that name."""
        if special not in self.specials:
            raise ValueError(f"tokenizer: {special!r} is not a special token; there are {', '.join(sorted(self.specials))}")
        return self.specials[special]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids; special tokens are left out or spelled."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """From an asset name, a .gguf file, a tokenizer.json, a .tiktoken file of Qwen 1.0, or a directory that holds one of the latter two.

    Raises:
      FileNotFoundError: nothing there, with what was looked for.
      ValueError: a GGUF vocabulary of another kind than byte-level BPE with SmolLM2's digit split.
    """
    path = assets.locate(source)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    places = [path / "tokenizer.json", *sorted(path.glob("*.tiktoken"))] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file()), places[0])
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer: {file} does not exist; give a directory with tokenizer.json or qwen.tiktoken, or a .gguf file")
    return _from_tiktoken(file) if file.suffix == ".tiktoken" else _from_json(file)


def _from_gguf(path: Path) -> Tokenizer:
    """SmolLM2's rule splits digits before the byte-level split; transformers' own GGUF reader forgets that."""
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(path).metadata.items()}
    kind = facts.get("model"), facts.get("pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer: {path} has a vocabulary of kind {kind}, read here is ('gpt2', 'smollm'); give the model's tokenizer.json"
        )
    tokens, merges = facts["tokens"], [tuple(merge.split(" ")) for merge in facts["merges"]]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    inner.decoder = decoders.ByteLevel()
    specials = {token: i for i, (token, kind) in enumerate(zip(tokens, facts["token_type"], strict=True)) if kind == GGUF_CONTROL}
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return Tokenizer(inner, specials, tokens[facts["eos_token_id"]])


def _from_json(file: Path) -> Tokenizer:
    """The end token is named in tokenizer_config.json, if there is one beside the file."""
    inner = tokenizers.Tokenizer.from_file(str(file))
    specials = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    config = file.with_name("tokenizer_config.json")
    eos = json.loads(config.read_text("utf-8")).get("eos_token") if config.is_file() else None
    return Tokenizer(inner, specials, eos["content"] if isinstance(eos, dict) else eos)


def _from_tiktoken(file: Path) -> Tokenizer:
    """Lines of `base64-of-bytes rank`. tiktoken always joins the pair whose union ranks lowest, so a token's rule is its last such pair."""
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file.read_bytes().splitlines() if line)}
    except ValueError as error:
        raise ValueError(f"tokenizer: {file} is not a tiktoken file: {error}") from error
    letters = _byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)
    merges = [tuple(map(spell, _last_pair(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    inner = tokenizers.Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    inner.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte_level])
    inner.decoder = decoders.ByteLevel()
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return Tokenizer(inner, specials, "<|endoftext|>")


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that are joined last when `token` is built from its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
