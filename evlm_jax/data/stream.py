"""An answer as it grows: from tokens to the text that people see, up to a stop token or a stop
string.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from evlm_jax.data.tokenizer import Tokenizer


class Answer(NamedTuple):
    """What was generated.

    text: without white space in front (templates that end in a colon let the answer begin with a
    space), up to a stop string. tokens: without the stop token, but with those that complete a stop
    string.
    """

    text: str
    tokens: tuple[int, ...]


class Stream:
    """One growing answer.

    Args:
      stop: ids that end it.
      stop_strings: texts that end it; they may begin and end inside tokens.
      callback: called with (index, next piece of the text), never with a part of a stop string or
        half a character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[int],
        stop_strings: Sequence[str] = (),
        index: int = 0,
        callback: Callable[[int, str], None] | None = None,
    ):
        self.tokenizer, self.stop, self.stop_strings, self.index, self.callback = (
            tokenizer,
            stop,
            stop_strings,
            index,
            callback,
        )
        self.tokens, self.ended, self._shown = [], False, ""

    def push(self, tokens: np.ndarray) -> None:
        """Takes new tokens up to the one that ends the answer."""
        for token in tokens.tolist():
            if not self.ended and token not in self.stop:
                self.tokens.append(token)
                self.ended = bool(self.stop_strings) and self._cut() is not None
            else:
                self.ended = True
        if self.callback:
            self._show()

    def answer(self) -> Answer:
        """The whole answer; shows text that was held back because a stop string might have
        followed.
        """
        if self.callback and not self.ended:
            self.ended = True
            self._show()
        return Answer(self._whole().lstrip(), tuple(self.tokens))

    def _cut(self) -> str | None:
        """The text in front of the first stop string; None where there is none."""
        whole = self.tokenizer.decode(self.tokens)
        places = [at for string in self.stop_strings if (at := whole.find(string)) >= 0]
        return whole[: min(places)] if places else None

    def _whole(self) -> str:
        cut = self._cut()
        return self.tokenizer.decode(self.tokens) if cut is None else cut

    def _show(self) -> None:
        """Hands on what is new, but no half of a character or of a stop string whose rest is still
        to come.
        """
        ready = self._whole()
        if not self.ended:
            ready = ready.rstrip("\ufffd")
            begun = [
                size
                for string in self.stop_strings
                for size in range(1, len(string))
                if ready.endswith(string[:size])
            ]
            ready = ready[: len(ready) - max(begun, default=0)]
        ready = ready.lstrip()
        if len(ready) > len(self._shown):
            piece, self._shown = ready[len(self._shown) :], ready
            self.callback(self.index, piece)


class Unwanted(Exception):
    """The consumer of an answer has stopped iterating."""


def pieces(generate: Callable) -> Iterator[str]:
    """Pieces of text that `generate(callback=...)` calls back with.

    It runs in a thread, which ends when the iterator is closed.
    """
    queue, wanted = SimpleQueue(), True

    def push(_: int, piece: str) -> None:
        queue.put(piece)
        if not wanted:
            raise Unwanted

    def work() -> None:
        try:
            generate(callback=push)
        finally:
            queue.put(None)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield from iter(queue.get, None)
        except GeneratorExit:
            wanted = False
            raise
        done.result()
