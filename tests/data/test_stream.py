"""Pieces of an answer as they are told: whole characters, and never a part of a stop string."""

from random import Random

import numpy as np

from evlm_jax.data.stream import Stream
from tests.data.made import ByteTokenizer


def test_streaming_holds_back_half_a_character():
    pieces = []
    stream = Stream(ByteTokenizer(), (259,), callback=lambda _, piece: pieces.append(piece))
    for byte in "aé😀b".encode():
        stream.push(np.array([byte]))
    assert pieces == ["a", "é", "😀", "b"]


def test_streaming_never_shows_a_part_of_a_stop_string():
    """However bytes, which are tokens here, come; what was shown is the answer, without white space
    in front.
    """
    rng = Random(0)

    def letters(low, high):
        return "".join(rng.choices(" ab\né", k=rng.randint(low, high)))

    for _ in range(2000):
        whole, stops, pieces = letters(0, 9), [letters(1, 3) for _ in range(rng.randint(0, 2))], []
        read = next(
            (whole[:n] for n in range(len(whole)) if any(stop in whole[:n] for stop in stops)),
            whole,
        )
        wanted = read[
            : min([at for stop in stops if (at := read.find(stop)) >= 0], default=len(read))
        ].lstrip()
        stream = Stream(
            ByteTokenizer(),
            (259,),
            stops,
            callback=lambda _, piece, pieces=pieces: pieces.append(piece),
        )
        left = list(whole.encode())
        while left:
            count = rng.randint(1, 4)
            stream.push(np.array(left[:count]))
            left = left[count:]
            assert wanted.startswith("".join(pieces)), (whole, stops)
        assert stream.answer().text == wanted == "".join(pieces), (whole, stops)
