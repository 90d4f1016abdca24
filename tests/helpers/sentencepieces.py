"""SentencePiece's own reader of the pieces that a GGUF file holds, and such files."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from tests.helpers.foreign_files import finish

BPE, FLOAT, SIZED = 2, 5, 2
Piece = tuple[str, float, int]  # its text, score and type, which both number alike
SPECIAL: list[Piece] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES: list[Piece] = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]


def processor(pieces: Sequence[Piece], front: bool, byte_fallback: bool = True):
    """SentencePiece with these pieces, which changes no letter; `front`: it puts a space there.

    Its model file is written here, by sentencepiece_model.proto, for its trainer would choose
    others.
    """
    library = pytest.importorskip(
        "sentencepiece", reason="needs sentencepiece: pip install -e '.[test]'"
    )
    model = b"".join(
        _sized(
            1, _sized(1, text.encode()) + _key(2, FLOAT, struct.pack("<f", score)) + _int(3, kind)
        )
        for text, score, kind in pieces
    )
    model += _sized(2, _int(3, BPE) + _int(35, byte_fallback))
    spaces = _int(3, front) + _int(4, False) + _int(5, True)  # in front, removed, spelled
    return library.SentencePieceProcessor(
        model_proto=model + _sized(3, _sized(1, b"identity") + spaces)
    )


def gguf(path: Path, facts: dict) -> Path:
    """A GGUF file with a vocabulary: keys behind `tokenizer.ggml.`; None leaves one out."""
    writer = GGUFWriter(path, "llama")
    for key, value in facts.items():
        put = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        if value is not None:
            put.get(type(value), writer.add_uint32)(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(facts["tokens"]), 4), np.float32))
    finish(writer)
    return path


def facts_of(pieces: Sequence[Piece], front: bool) -> dict:
    """The vocabulary of the pieces as llama.cpp's converter writes it."""
    texts, scores, kinds = map(list, zip(*pieces))
    return {
        "model": "llama",
        "pre": "default",
        "tokens": texts,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": front,
    }


def _varint(number: int) -> bytes:
    low = bytearray()
    while number > 127:
        low.append(number & 127 | 128)
        number >>= 7
    return bytes([*low, number])


def _key(field: int, kind: int, payload: bytes) -> bytes:
    return _varint(field << 3 | kind) + payload


def _int(field: int, number: int) -> bytes:
    return _key(field, 0, _varint(number))


def _sized(field: int, payload: bytes) -> bytes:
    return _key(field, SIZED, _varint(len(payload)) + payload)
