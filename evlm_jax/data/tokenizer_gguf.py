"""The vocabulary of a GGUF file of llama.cpp: of kind "gpt2" SmolLM2's, of kind "llama" any
(SentencePiece's BPE: Llama 2, Mistral, Gemma)."""

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from evlm_jax.checkpoint.lazy_tensors import distinct
from evlm_jax.convert.gguf_file import read_gguf
from evlm_jax.data.chat_template import ChatTemplate
from evlm_jax.data.tokenizer_folder import MARK, put_in_front

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"
MEND = "give the model's tokenizer.json"
DEFAULTS = {  # llama.cpp's, of what a file leaves out
    "gpt2": {},
    "llama": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": True,
    },
}
NEEDED = {"gpt2": ("merges", "eos_token_id"), "llama": ("scores",)}
REFUSED = {
    "gpt2": ("add_space_prefix", "add_eos_token"),
    "llama": ("add_eos_token", "remove_extra_whitespaces", "precompiled_charsmap"),
}


def from_gguf(path: Path) -> tuple[tokenizers.Tokenizer, list[int], ChatTemplate | None]:
    """As `read_folder` of tokenizer_folder.py.

    Raises ValueError for a vocabulary of another kind, one that lacks something, or one that
    `tokenizers` cannot compute.
    """
    metadata = read_gguf(path).metadata
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = facts.get("model"), facts.get("pre")
    builds = {("gpt2", "smollm"): _byte_level, ("llama", "default"): _pieces}
    builds["llama", None] = _pieces
    if kind not in builds:
        raise ValueError(
            f"a vocabulary of kind {kind}, read here are ('gpt2', 'smollm') and ('llama',"
            f" 'default'); {MEND}"
        )
    facts = DEFAULTS[kind[0]] | facts
    wrong = [key for key in REFUSED[kind[0]] if np.any(facts.get(key))]
    wrong += [key for key in ("tokens", "token_type", *NEEDED[kind[0]]) if key not in facts]
    if wrong:
        raise ValueError(
            f"tokenizer.ggml.{wrong[0]} is {facts.get(wrong[0])}, which is not read here; {MEND}"
        )
    tokens = facts["tokens"]
    for key in ("token_type", "scores"):
        if len(facts.get(key, tokens)) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} has {len(facts[key])} entries for {len(tokens)} tokens"
            )
    for key in (f"{name}_token_id" for name in ("bos", "eos", "eot", "unknown")):
        if facts.get(key, 0) >= len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} is {facts[key]}, of {len(tokens)} tokens; {MEND}"
            )
    inner = builds[kind](facts)
    if facts.get("add_bos_token"):
        put_in_front(inner, tokens[facts["bos_token_id"]] if "bos_token_id" in facts else None)
    source, chat = metadata.get("tokenizer.chat_template"), None
    if source:
        names = {f"{key}_token": facts.get(f"{key}_token_id") for key in ("bos", "eos")}
        chat = ChatTemplate(source, {key: tokens[i] for key, i in names.items() if i is not None})
    return inner, [facts[key] for key in ("eos_token_id", "eot_token_id") if key in facts], chat


def _byte_level(facts: dict) -> tokenizers.Tokenizer:
    """SmolLM2's rule splits digits before the byte-level split; transformers' own GGUF reader
    forgets that.
    """
    inner = tokenizers.Tokenizer(
        models.BPE(_ids(facts["tokens"]), [tuple(merge.split(" ")) for merge in facts["merges"]])
    )
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    inner.decoder = decoders.ByteLevel()
    _add(inner, facts, normalized=False)
    return inner


def _pieces(facts: dict) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with bytes for letters that have no piece, or else the unknown token.

    User-defined pieces are cut out first. Where a space is put in front of a text, one is put
    behind each of them as well, as in llama.cpp (D-TOKEN-4).
    """
    tokens, types, front = facts["tokens"], facts["token_type"], facts["add_space_prefix"]
    _check_types(tokens, types.tolist(), front)
    found = [token for token, kind in zip(tokens, types) if kind == BYTE]
    if found and sorted(found) != BYTES:
        raise ValueError(f"its {len(found)} pieces for bytes are not <0x00> to <0xFF>; {MEND}")
    inner = tokenizers.Tokenizer(
        models.BPE(
            _ids(tokens),
            _merges(tokens, np.asarray(facts["scores"], np.float64), types),
            unk_token=tokens[facts["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=bool(found),
        )
    )
    spelled = normalizers.Replace(" ", SPACE)
    inner.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spelled]) if front else spelled
    )
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*joined, *[decoders.Strip(" ", 1, 0)] * bool(front)])
    _add(inner, facts, normalized=not front)
    return inner


def _check_types(tokens: list[str], types: list[int], front: bool) -> None:
    """Raises ValueError for a type that is not known, and for pieces whose place in a text would
    not be SentencePiece's.
    """
    for token, kind in zip(tokens, types, strict=True):
        if not NORMAL <= kind <= BYTE:
            raise ValueError(f"the token {token!r} is of type {kind}, which is not known; {MEND}")
        if kind == USER and front and SPACE in token:
            raise ValueError(
                f"the user-defined piece {token!r} has a space, and add_space_prefix puts another"
                f" in front; {MEND}"
            )


def _merges(tokens: list[str], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first; which pair of one piece is first
    says nothing, for two such never overlap in a text (D-TOKEN-4).

    Raises:
      ValueError: two pieces that can be made have one score, or a piece that is not to be used.
    """
    made = {token for token, kind in zip(tokens, types) if kind in (NORMAL, UNUSED)}
    order = np.argsort(-scores, kind="stable")
    pairs, last = [], None
    for i in order[np.isin(types[order], (NORMAL, UNUSED))].tolist():
        token, before = tokens[i], len(pairs)
        pairs += [
            (token[:at], token[at:])
            for at in range(len(token) - 1, 0, -1)
            if token[:at] in made and token[at:] in made
        ]
        if len(pairs) == before:
            continue
        if types[i] == UNUSED:
            raise ValueError(f"the unused piece {token!r} can be made of others; {MEND}")
        if last is not None and not scores[i] < scores[last]:
            raise ValueError(
                f"the pieces {tokens[last]!r} and {token!r} have one score, {scores[i]:g}: which"
                f" comes first is not said; {MEND}"
            )
        last = i
    return pairs


def _ids(tokens: list[str]) -> dict[str, int]:
    return distinct([(token, i) for i, token in enumerate(tokens)], "token")


def _add(inner: tokenizers.Tokenizer, facts: dict, normalized: bool) -> None:
    """Special tokens, and those that are cut out of a text, in one call: each call takes as long
    as all tokens do.
    """
    added = [
        AddedToken(
            token,
            special=kind != USER or MARK.fullmatch(token) is not None,
            normalized=normalized and kind == USER,
        )
        for token, kind in zip(facts["tokens"], facts["token_type"])
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    inner.add_tokens(added)
