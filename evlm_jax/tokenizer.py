"""Text <-> token ids, behind one small class: GGUF vocabularies (SmolLM2) and Hugging Face `tokenizer.json`.

Special tokens exist only by name (`Tokenizer.id`): no text, whatever it spells, is ever encoded to one. So a user who types
`<|im_end|>` gets its letters, and templates are built from pieces instead of from one string.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from evlm_jax import assets
from evlm_jax.convert.readers import read_gguf

STOP_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")  # of the families that convert/tables.py knows
GGUF_CONTROL = 3  # token type


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
    """From an asset name, a .gguf file, a tokenizer.json or a directory that holds one.

    Raises:
      FileNotFoundError: nothing there, with what was looked for.
      ValueError: a GGUF vocabulary of another kind than byte-level BPE with SmolLM2's digit split.
    """
    path = assets.locate(source)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer: {file} does not exist; give a directory with tokenizer.json, or a .gguf file")
    return _from_json(file)


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
