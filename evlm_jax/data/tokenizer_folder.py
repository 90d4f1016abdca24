"""A Hugging Face tokenizer: tokenizer.json, and what the files beside it say about its special
tokens.

What decides ids is taken as transformers takes it: tokenizer.json is the vocabulary; tokens that
only `added_tokens_decoder` of tokenizer_config.json or the older added_tokens.json have are added;
a BOS stands in front where the post-processor or `add_bos_token` says so. Where the files
contradict each other they are refused."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import processors

from evlm_jax.checkpoint.lazy_tensors import distinct, read_json
from evlm_jax.convert.torch_model.spelling_evlm import puts_space
from evlm_jax.data.chat_template import ChatTemplate

MARK = re.compile(  # names that are no text, whatever their flag says: of chats, and spare ones
    r"<\|.+\|>|<(start|end)_of_turn>|[<\[](unused|reserved|extra)[^<>\[\]]*[>\]]"
)
FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
LISTS = ("additional_special_tokens", "extra_special_tokens")
MEND = "save it again with save_pretrained of transformers"
SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def read_folder(file: Path) -> tuple[tokenizers.Tokenizer, list[int], ChatTemplate | None]:
    """The vocabulary, in which special tokens have their flag and the post-processor inserts a BOS
    where one belongs; the ids that end an answer; and the chat template, if there is one.

    Raises:
      ValueError: a file with another content than its name promises, or files that contradict each
        other.
    """
    spec, config = read_json(file), _beside(file, "tokenizer_config.json")
    model = spec.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError(f"not a tokenizer of Hugging Face's: no model with a vocabulary; {MEND}")
    names, special = _named(config, _beside(file, "special_tokens_map.json"))
    added = _added(spec, config, _beside(file, "added_tokens.json"), special)
    words = (
        model["vocab"]
        if isinstance(model["vocab"], dict)
        else {piece[0]: i for i, piece in enumerate(model["vocab"])}
    )
    ids = words | {content: token["id"] for content, token in added.items()}
    eos = _ends(file, names, ids, added)
    for content in (names.get(key) for key in ("eos_token", "bos_token")):
        if content in ids:
            added.setdefault(content, FLAGS | {"id": ids[content], "content": content})
    for content, token in added.items():
        token["special"] = bool(
            token["special"] or content in special or MARK.fullmatch(content) or token["id"] in eos
        )
    inner = _build(
        spec
        | {
            "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
            "truncation": None,
            "padding": None,
        }
    )
    if wrong := [
        content for content, token in added.items() if inner.token_to_id(content) != token["id"]
    ]:
        got, said = inner.token_to_id(wrong[0]), added[wrong[0]]["id"]
        raise ValueError(
            f"{wrong[0]!r} has the id {said} in its files and {got} by the vocabulary; {MEND}"
        )
    _put_bos(inner, config, names)
    said, is_so = config.get("add_prefix_space"), puts_space(inner)
    if isinstance(said, bool) and said != is_so:
        raise ValueError(
            f"tokenizer_config.json says add_prefix_space is {said}, the vocabulary does"
            f" {'' if is_so else 'not '}add one; {MEND}"
        )
    return inner, eos, _chat(file, config, names)


def _chat(file: Path, config: dict, names: dict[str, str]) -> ChatTemplate | None:
    """The template of chat_template.jinja, or of tokenizer_config.json; the default of several."""
    place, source = file.with_name("chat_template.jinja"), config.get("chat_template")
    if place.is_file():
        source = place.read_text("utf-8")
    elif isinstance(source, list):
        source = {one.get("name"): one.get("template") for one in source}.get("default")
    if not source:
        return None
    if not isinstance(source, str):
        raise ValueError(f"chat_template is a {type(source).__name__}, not a text; {MEND}")
    return ChatTemplate(source, names)


def _beside(file: Path, name: str) -> dict:
    place = file.with_name(name)
    return read_json(place) if place.is_file() else {}


def _content(token) -> str:
    return token["content"] if isinstance(token, dict) else token


def _named(config: dict, special_map: dict) -> tuple[dict[str, str], set[str]]:
    """Special tokens by key (eos_token, ..), and all that are called special."""
    # special_tokens_map.json is older than added_tokens_decoder, and counts where that is missing.
    said = special_map | config if "added_tokens_decoder" in config else config | special_map
    names = {
        key: _content(value)
        for key, value in said.items()
        if key.endswith("_token") and isinstance(value, dict | str)
    }
    more = [said.get(key) or [] for key in LISTS]
    listed = {
        _content(token)
        for tokens in more
        for token in (tokens.values() if isinstance(tokens, dict) else tokens)
    }
    return names, listed | set(names.values())


def _added(spec: dict, config: dict, older: dict, special: set[str]) -> dict[str, dict]:
    """Added tokens with their flags, by content.

    Raises ValueError where two files give different ids.
    """
    own = [(token["content"], dict(token)) for token in spec.get("added_tokens") or []]
    added = distinct(own, "added token")
    more = [
        FLAGS | flags | {"id": int(i)}
        for i, flags in config.get("added_tokens_decoder", {}).items()
    ]
    if "added_tokens_decoder" not in config:
        flags = {
            content: {"normalized": content not in special, "special": content in special}
            for content in older
        }
        more = [
            FLAGS | flags[content] | {"id": i, "content": content}
            for content, i in older.items()
            if content not in added
        ]
    for token in more:
        before = added.get(token["content"], token)["id"]
        if before != token["id"]:
            raise ValueError(
                f"{token['content']!r} has the id {before} here and {token['id']} in"
                f" tokenizer_config.json; {MEND}"
            )
        added[token["content"]] = token
    return added


def _ends(
    file: Path, names: dict[str, str], ids: dict[str, int], added: dict[str, dict]
) -> list[int]:
    """Ids that end an answer: the tokenizer's own, then those of generation_config.json; of
    config.json where nothing else is known.
    """
    ends, known = [], {token["id"] for token in added.values()}
    if own := names.get("eos_token"):
        if own not in ids:
            raise ValueError(
                f"eos_token is {own!r}, which is not in the vocabulary; mend tokenizer_config.json"
            )
        ends.append(ids[own])
    for name in ("generation_config.json", "config.json"):
        said = _beside(file, name).get("eos_token_id")
        if said is None or (name == "config.json" and ends):
            continue
        for i in said if isinstance(said, list) else [said]:
            if i not in known and i not in ends:
                raise ValueError(
                    f"{name} says eos_token_id {i}, which is no special token of the vocabulary;"
                    " mend one of the two"
                )
            ends.append(i)
    return ends


def _build(spec: dict) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # all that the library raises
        raise ValueError(
            f"not a tokenizer that tokenizers {tokenizers.__version__} reads ({error}); {MEND}"
        ) from error


def _put_bos(inner: tokenizers.Tokenizer, config: dict, names: dict[str, str]) -> None:
    """The post-processor decides, or else `add_bos_token`.

    Raises ValueError where the two contradict each other.
    """
    front, bos, wanted = in_front(inner), names.get("bos_token"), config.get("add_bos_token")
    if wanted is False and front and inner.id_to_token(front[0]) == bos:
        raise ValueError(
            f"the post-processor puts {bos!r} in front of a text, tokenizer_config.json says"
            " add_bos_token false; mend one"
        )
    if config.get("add_eos_token"):
        raise ValueError(
            "tokenizer_config.json says add_eos_token: the template ends what is said, nothing ends"
            " a prompt; set it to false"
        )
    if wanted and not front:
        put_in_front(inner, bos)


def put_in_front(inner: tokenizers.Tokenizer, bos: str | None) -> None:
    """Makes the post-processor put `bos` in front of every text.

    Raises ValueError if there is no such token.
    """
    if bos is None or inner.token_to_id(bos) is None:
        raise ValueError(
            f"add_bos_token is true and bos_token is {bos!r}, which is not in the vocabulary; mend"
            " tokenizer_config.json"
        )
    pieces = {"single": [bos, "$A"], "pair": [bos, "$A", f"{bos}:1", "$B:1"]}
    inner.post_processor = processors.TemplateProcessing(
        **pieces, special_tokens=[(bos, inner.token_to_id(bos))]
    )


def in_front(inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Ids that the post-processor puts in front of a text.

    Raises ValueError if it puts some behind it.
    """
    bare, whole = inner.encode("a", add_special_tokens=False).ids, inner.encode("a").ids
    at = next((k for k in range(len(whole) + 1) if whole[k : k + len(bare)] == bare), 0)
    if behind := whole[at + len(bare) :]:
        names = ", ".join(repr(inner.id_to_token(i)) for i in behind)
        raise ValueError(
            f"its post-processor puts {names} behind every text, but the template ends what is"
            " said; take it out"
        )
    return tuple(whole[:at])


def no_file(folder: Path, places: Iterable[Path]) -> FileNotFoundError:
    """The error that lists the files looked for, and how to convert those of a slow tokenizer."""
    looked = ", ".join(place.name for place in places)
    if slow := [name for name in SLOW if (folder / name).is_file()]:
        call = (
            "from transformers import AutoTokenizer as A;"
            f" A.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
        return FileNotFoundError(
            f'tokenizer: {folder} has {slow[0]} and no tokenizer.json; make it: python -c "{call}"'
        )
    return FileNotFoundError(
        f"tokenizer: no {looked} in {folder}; give a directory with tokenizer.json or"
        " qwen.tiktoken, or a .gguf file"
    )
