"""Chat templates: from the turns of a dialog to pieces, each supervised or not."""

from collections.abc import Sequence
from typing import NamedTuple

from evlm_jax.convert.torch_model.templates_evlm import lay_out_own
from evlm_jax.data.samples import MARKER, SampleError, Turn


class Text(NamedTuple):
    """Plain text; never yields special tokens, whatever it spells."""

    text: str
    supervised: bool


class Token(NamedTuple):
    """A special token of the template, by id."""

    id: int
    supervised: bool


class Media(NamedTuple):
    """An image or a frame. It sees itself; its tag in front of it, and text after it, see the
    frames [start, stop) of its visual.
    """

    frame: int
    start: int
    stop: int
    tag: str = ""


Piece = Text | Token | Media


class Template:
    """A chat template over a tokenizer.

    chatml (Qwen, SmolLM2):
    `<|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>`, a newline
    between turns.
    plain: `{text} Answer:` ` {answer}` end-of-text.
    own: the tokenizer's own (chat_template.py).
    An assistant alone (a caption, a web document) is just its text and end-of-text, in all.
    Supervised: what the assistant says and the token that ends it.
    """

    def __init__(self, name: str, tokenizer):
        self._turn = {"chatml": self._chatml, "plain": self._plain}.get(name)
        self.name, self.tokenizer = name, tokenizer
        if name == "own" and tokenizer.chat is None:
            raise ValueError(
                "config: data.template is own, and the tokenizer has no chat template of its own:"
                " use chatml or plain"
            )

    def dialog(
        self,
        turns: Sequence[Turn],
        visuals: Sequence[tuple[int, int]],
        answer_only: bool = False,
        end: bool = True,
    ) -> list[Piece]:
        """Pieces of a dialog.

        Args:
          turns: the dialog.
          visuals: (start, stop) frame numbers of each visual, consumed in order by the markers.
          answer_only: supervise the last turn only.
          end: supervise the token that ends a turn.
        Raises:
          SampleError: an unknown role, or other than one marker for each visual; turns that the
            tokenizer's own template refuses.
        """
        marks, pieces = iter(visuals), []
        found = sum(turn.text.count(MARKER) for turn in turns)
        if found != len(visuals):
            raise SampleError(f"{found} {MARKER} markers for {len(visuals)} images or videos")
        wanted = []
        for i, turn in enumerate(turns):
            if turn.role not in ("user", "assistant"):
                raise SampleError(f"unknown role {turn.role!r}; use user or assistant")
            wanted += [turn.role == "assistant" and (i == len(turns) - 1 or not answer_only)]
        said = self._plain if [turn.role for turn in turns] == ["assistant"] else self._turn
        if said is None:
            return self._own(turns, wanted, end, marks)
        for i, (turn, supervised) in enumerate(zip(turns, wanted, strict=True)):
            pieces += said(turn, i, supervised, supervised and end, marks)
        return pieces

    def prompt(self, turns: Sequence[Turn], visuals: Sequence[tuple[int, int]]) -> list[Piece]:
        """Pieces up to where the assistant's answer begins."""
        if self.name == "own":
            return self._own(turns, [False] * len(turns), False, iter(visuals), True)
        pieces = self.dialog(turns, visuals)
        if self.name == "plain":
            return pieces
        return [
            *pieces,
            Text("\n", False),
            Token(self.tokenizer.id("<|im_start|>"), False),
            Text("assistant\n", False),
        ]

    def _chatml(self, turn: Turn, index: int, supervised: bool, end: bool, marks) -> list[Piece]:
        header, start, stop = (
            turn.role + "\n",
            self.tokenizer.id("<|im_start|>"),
            self.tokenizer.id("<|im_end|>"),
        )
        if turn.role == "user":
            said = _split(header + turn.text, False, marks)
        else:
            said = [Text(header, False), *_split(turn.text, supervised, marks)]
        return [Text("\n", False)] * (index > 0) + [Token(start, False), *said, Token(stop, end)]

    def _plain(self, turn: Turn, index: int, supervised: bool, end: bool, marks) -> list[Piece]:
        if turn.role == "user":
            return _split(turn.text + " Answer:", False, marks)
        return [
            *_split(" " * (index > 0) + turn.text, supervised, marks),
            Token(self.tokenizer.eos[0], end),
        ]

    def _own(
        self, turns: Sequence[Turn], wanted: Sequence[bool], end: bool, marks, answer_begins=False
    ) -> list[Piece]:
        """By the tokenizer's own template; `wanted`: which turns are supervised."""
        tokenizer, pieces = self.tokenizer, []
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            parts = lay_out_own(
                tokenizer.chat.render, messages, tokenizer.specials, tokenizer.takes, answer_begins
            )
        except ValueError as error:
            raise SampleError(str(error)) from error
        for part in parts:
            learnt = part.message is not None and wanted[part.message] and (end or not part.end)
            if isinstance(part.what, int):
                pieces.append(Token(part.what, learnt))
                if part.end:
                    self._check_end(part.what)
            else:
                said = _split(part.what, learnt, marks) if part.said else [Text(part.what, learnt)]
                pieces += said
        return _without_bos(_joined(pieces), tokenizer)

    def _check_end(self, token: int) -> None:
        """Raises ValueError where generation would not stop at what ends an answer."""
        if token not in self.tokenizer.eos:
            name = self.tokenizer.inner.id_to_token(token)
            raise ValueError(
                f"chat template: it ends an answer with {name!r}, which is no end token: add"
                f" {token} to eos_token_id of generation_config.json"
            )


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring texts as one where both are supervised or neither is."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Text) and isinstance(last, Text) and last[1:] == piece[1:]:
            joined[-1] = last._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def _without_bos(pieces: list[Piece], tokenizer) -> list[Piece]:
    """The pieces behind the ids that every document begins with anyway.

    Raises ValueError where the template begins otherwise than the vocabulary.
    """
    front = [piece.id for piece in pieces[: len(tokenizer.bos)] if isinstance(piece, Token)]
    if front == list(tokenizer.bos):
        return pieces[len(front) :]
    names = " and ".join(repr(tokenizer.inner.id_to_token(i)) for i in tokenizer.bos)
    raise ValueError(
        f"the tokenizer puts {names} in front of every text, its chat template does not: mend one"
        " of the two"
    )


def _split(text: str, supervised: bool, marks) -> list[Piece]:
    """Cuts text at the markers and puts the next visual, frame by frame, in place of each."""
    first, *others = text.split(MARKER)
    pieces: list[Piece] = [Text(first, supervised)]
    for other in others:
        start, stop = next(marks)
        pieces += [Media(frame, start, stop) for frame in range(start, stop)] + [
            Text(other, supervised)
        ]
    return [piece for piece in pieces if piece != Text("", supervised)]
