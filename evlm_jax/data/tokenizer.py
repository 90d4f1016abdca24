"""Text <-> token ids, behind one small class: GGUF vocabularies, Hugging Face
`tokenizer.json`, Qwen 1.0's tiktoken file.

Special tokens exist only by name (`Tokenizer.id`): no text, whatever it spells, is ever encoded to
one. So a user who types `<|im_end|>` gets its letters, and templates are built from pieces instead
of from one string."""

import base64
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from evlm_jax import assets, paths
from evlm_jax.checkpoint.lazy_tensors import distinct
from evlm_jax.convert.torch_model.spelling_evlm import Speller
from evlm_jax.data.chat_template import ChatTemplate
from evlm_jax.data.tokenizer_folder import in_front, no_file, read_folder
from evlm_jax.data.tokenizer_gguf import from_gguf

STOP_NAMES = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "</s>",
    "<end_of_turn>",
    "<|end|>",
)  # of the families that convert/tables.py knows
FOLDER = "tokenizer"  # of a run
QWEN_SPLIT = (  # of Qwen 1.0, and of Qwen2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)  # behind the ranks, in this order


class Tokenizer:
    """Ids of texts and special tokens.

    `bos`: ids in front of every document, mostly none. `eos`: ids that end an answer, the
    vocabulary's own end token first. `chat`: its own chat template, if it has one.

    Raises ValueError if no end token is known.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, eos: Iterable[int], chat: ChatTemplate | None = None
    ):
        self.inner, self._spell, self.chat = inner, Speller(inner), chat
        added = inner.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self._takes = {i: (token.lstrip, token.rstrip) for i, token in added.items()}
        self.bos = in_front(inner)
        self.eos = tuple(
            dict.fromkeys(
                [*eos, *(self.specials[name] for name in STOP_NAMES if name in self.specials)]
            )
        )
        if not self.eos:
            mend = 'write {"eos_token": "..."} into tokenizer_config.json beside it'
            raise ValueError(f"no end token is known, so no answer would end: {mend}")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special ones included."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    @property
    def ids(self) -> Collection[int]:
        """All ids with a token; a model may have more rows, and there may be gaps."""
        return self.inner.get_vocab(with_added_tokens=True).values()

    def encode(self, text: str, behind: str = "nothing") -> list[int]:
        """Ids of the text, without any special token. Bytes that are not in the vocabulary
        (SmolLM2: of unassigned characters) are left out.

        Args:
          behind: what precedes the text, "nothing", a special "token" or other "text": some
            vocabularies insert a space in front of it.
        """
        return self._spell(text, behind)

    def id(self, special: str) -> int:
        """Id of a special token.

        Raises ValueError if the vocabulary has no special token of that name.
        """
        if special not in self.specials:
            raise ValueError(
                f"tokenizer: {special!r} is not a special token; there are"
                f" {', '.join(sorted(self.specials))}"
            )
        return self.specials[special]

    def takes(self, special: int) -> tuple[bool, bool]:
        """Whether a special token takes away the white space in front of it, and behind it."""
        return self._takes[special]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids; special tokens are left out or spelled."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Reads a tokenizer from an asset name, a .gguf file, a tokenizer.json, a .tiktoken file of
    Qwen 1.0, or a directory with one of the latter two.

    Raises:
      FileNotFoundError: no such file, with what was looked for.
      ValueError: a vocabulary that is damaged, contradicts the files beside it, has no end token,
        or is of an unsupported kind.
    """
    path = paths.with_neighbours(assets.locate(source))
    places = (
        [path / "tokenizer.json", *sorted(path.glob("*.tiktoken"))] if path.is_dir() else [path]
    )
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise no_file(path if path.is_dir() else path.parent, places)
    read = {".gguf": from_gguf, ".tiktoken": _from_tiktoken}.get(file.suffix, read_folder)
    try:
        tokenizer = Tokenizer(*read(file))
        tokenizer.encode("a")  # a rule that names what is not there shows itself here
        return tokenizer
    except OSError:
        raise
    except BaseException as error:  # of any kind; a panic of the library's Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if isinstance(error, ValueError) else f"it is damaged: {type(error).__name__}: "
        raise ValueError(f"tokenizer: {file}: {kind}{error}") from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Files that `load_tokenizer` reads back, whatever the tokenizer came from."""
    folder = paths.place(folder)
    config = {"eos_token": tokenizer.inner.id_to_token(tokenizer.eos[0])}
    if tokenizer.chat:
        config = tokenizer.chat.names | config | {"chat_template": tokenizer.chat.source}
    facts = {"tokenizer_config.json": config}
    facts |= {"generation_config.json": {"eos_token_id": list(tokenizer.eos)}}
    for name, content in facts.items():
        paths.write(folder / name, json.dumps(content, ensure_ascii=False) + "\n")
    paths.write(
        folder / "tokenizer.json", tokenizer.inner.to_str()
    )  # last: where it stands, all do


def keep_tokenizer(tokenizer: Tokenizer, workdir: str | Path) -> None:
    """Puts it into a run or an import, which needs the language model's own files no more."""
    if source_of_run(workdir, "") == "":
        save_tokenizer(tokenizer, paths.place(workdir) / FOLDER)


def source_of_run(workdir: str | Path, source: str) -> str:
    """Where the tokenizer of a run is: in it, or at `source`, its config's init.llm, where it is of
    a version that kept none.
    """
    own = paths.place(workdir) / FOLDER
    return str(own) if (own / "tokenizer.json").exists() else source


def _from_tiktoken(file: Path) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Lines of `base64-of-bytes rank`. tiktoken always joins the pair whose union ranks lowest, so
    a token's rule is its last such pair.
    """
    try:
        lines = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = distinct([(base64.b64decode(token), int(rank)) for token, rank in lines], "token")
    except ValueError as error:
        raise ValueError(f"not a tiktoken file: {error}") from error
    letters = _byte_letters()

    def spell(token):
        return "".join(letters[byte] for byte in token)

    merges = [
        tuple(map(spell, _last_pair(token, ranks)))
        for token in sorted(ranks, key=ranks.get)
        if len(token) > 1
    ]
    inner = tokenizers.Tokenizer(
        models.BPE({spell(token): rank for token, rank in ranks.items()}, merges)
    )
    inner.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte_level]
    )
    inner.decoder = decoders.ByteLevel()
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    inner.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials]
    )
    return inner, [specials["<|endoftext|>"]]


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
