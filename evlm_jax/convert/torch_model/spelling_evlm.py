"""Text -> ids, piece by piece as if the pieces stood in one text.

Training and the exported processor share this file.
"""

import json

from tokenizers import Tokenizer, models


class Speller:
    """Tokenises plain text with a vocabulary: no special token in front, and none from text,
    whatever it spells.

    Args:
      inner: belongs to the speller from now on. Truncation, padding and dropout of an earlier use
        are removed.
    Raises:
      ValueError: the vocabulary treats the ends of a text in a way that pieces of one text cannot
        repeat.
    """

    def __init__(self, inner: Tokenizer):
        inner.encode_special_tokens = True  # i.e. special tokens in the text are ordinary letters
        inner.no_truncation()
        inner.no_padding()
        for name in ("dropout", "alpha", "nbest_size"):  # of BPE, of Unigram
            if getattr(inner.model, name, None) is not None:
                setattr(inner.model, name, None)
        going_on, anew = _going_on(inner)
        self.inner, self._at = (
            inner,
            {
                "nothing": inner,
                "token": inner if anew else going_on,
                "text": going_on,
            },
        )
        added = inner.get_added_tokens_decoder().items()
        self._never = {i for i, token in added if token.special and len(token.content) > 1} - {
            _unknown(inner)
        }
        # Behind an added token that is text, a vocabulary that puts a space in front of a text anew
        # does so.
        again = (
            {i for i, token in added if not token.special}
            if anew and going_on is not inner
            else set()
        )
        self._again = {"nothing": set(), "token": set(), "text": again}

    def __call__(self, text: str, behind: str = "nothing") -> list[int]:
        """Ids of a text that stands behind `behind`: "nothing",
        a special "token" or other "text".
        """
        encoding = self._at[behind].encode(text, add_special_tokens=False)
        ids, again = encoding.ids, self._again[behind]
        if self._never.isdisjoint(ids) and again.isdisjoint(ids):
            return ids
        first = next(n for n, i in enumerate(ids) if i in self._never or i in again)
        start, stop = encoding.offsets[first]
        if ids[first] in again:
            return ids[: first + 1] + self(text[stop:], "token")
        # The model itself has joined letters to a special token (Unigram does): it cannot where
        # they are cut.
        cut = min(start + 1, len(text) - 1)
        return (
            self(text[:cut], behind) + self(text[cut:], "text")
            if cut > 0
            else [i for i in ids if i not in self._never]
        )


def _going_on(inner: Tokenizer) -> tuple[Tokenizer, bool]:
    """`inner` without the space that it puts in front of a text, and whether it puts one behind
    special tokens too.
    """
    normal, split = (
        _parts(inner.normalizer, "normalizers"),
        _parts(inner.pre_tokenizer, "pretokenizers"),
    )
    if any(
        part["type"] == "Strip" and (part["strip_left"] or part["strip_right"]) for part in normal
    ):
        raise ValueError(
            "its normalizer strips the ends of a text, so pieces of a dialog would lose their"
            " spaces; take Strip out"
        )
    if any(part != _bare(part) for part in split[1:]):
        raise ValueError(
            "its pre-tokenizer puts a space in front of every word, not of a text; that is not read"
            " here"
        )
    kept = [part for part in normal if part["type"] != "Prepend"]
    bare = [_bare(part) for part in split]
    if (kept, bare) == (normal, split):
        return inner, True
    spec = json.loads(inner.to_str())
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": bare} if bare else None
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy, kept != normal or split[0].get("prepend_scheme") != "first"


def _parts(part, key: str) -> list[dict]:
    """A normalizer or pre-tokenizer as its steps, in JSON."""

    def flat(spec: dict) -> list[dict]:
        return (
            [one for each in spec[key] for one in flat(each)]
            if spec["type"] == "Sequence"
            else [spec]
        )

    return [] if part is None else flat(json.loads(part.__getstate__()))


def puts_space(inner: Tokenizer) -> bool:
    """Whether the vocabulary puts a space in front of a text."""
    return _going_on(inner)[0] is not inner


def _bare(part: dict) -> dict:
    """A step of a pre-tokenizer without the space that it puts in front."""
    never = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return part | never.get(part["type"], {})


def _unknown(inner: Tokenizer) -> int | None:
    """The id of what the vocabulary has no other id for."""
    if isinstance(inner.model, models.Unigram):
        return json.loads(inner.to_str())["model"]["unk_id"]
    name = getattr(inner.model, "unk_token", None)
    return None if name is None else inner.token_to_id(name)
