"""Headers of weight files that are damaged or meant to do harm: refused in one line, quickly, and
without memory.

What is accepted of a safetensors file the safetensors library accepts too, with the same bytes.
"""

import json
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evlm_jax.convert.readers import open_source
from tests.helpers.foreign_files import KEYS, field, gguf_file

COUNTS = [100, pytest.param(10_000, marks=pytest.mark.slow)]
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "-1",
    "-0",
    "1.0",
    "1e2",
    "NaN",
    "Infinity",
    "true",
    "null",
    '"4"',
    "[]",
    "{}",
    "[[0]]",
    "18446744073709551616",
    "01",
    "9" * 30,
)


def safetensors_file(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def spoil_entries(entries: dict, rng: np.random.Generator) -> None:
    """Changes none to two facts of the tensors of a header."""
    for _ in range(rng.integers(0, 3)):
        name = str(rng.choice(["a", "b", "c"]))
        if name not in entries or not isinstance(entries[name].get("data_offsets"), list):
            continue
        how = rng.integers(0, 6)
        if how == 0:
            entries[name]["data_offsets"] = [
                int(n) + int(rng.integers(-8, 9)) for n in entries[name]["data_offsets"]
            ]
        elif how == 1:
            entries[name]["shape"] = [NUMBERS[i] for i in rng.integers(0, 9, rng.integers(0, 4))]
        elif how == 2:
            entries[name]["dtype"] = str(
                rng.choice(["F64", "F16", "I32", "F8_E4M3", "F4", "bf16", ""])
            )
        elif how == 3:
            del entries[name][str(rng.choice(sorted(entries[name])))]
        elif how == 4:
            entries[name]["extra"] = [1]
        else:
            entries["d"] = dict(entries[name])


def spoilt_safetensors(rng: np.random.Generator) -> bytes:
    """Three tensors, of which the header's text or the file's bytes were changed in one to three
    places.
    """
    entries = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    entries |= {
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
    }
    data = bytes(range(33))
    spoil_entries(entries, rng)
    text = json.dumps(entries)
    how = rng.integers(0, 12)
    if how == 0:  # a number becomes something else
        digits = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isalnum()]
        at = int(rng.choice(digits)) if digits else 0
        text = text[:at] + str(rng.choice(TEXTS)) + text[at + 1 :]
    elif how == 1:  # a name stands twice
        text = text[:-1] + ', "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
    elif how == 2:
        text = str(rng.choice(["\ufeff", " ", "\n", "["])) + text
    elif how == 3:
        text += str(rng.choice(["   ", "\0", "{}", "\n\t", ","]))
    elif how == 4:
        text = text.replace(
            '"pt"',
            str(rng.choice(['"\\ud800"', "1", '"\x01"', "[]", '"pt", "format": "tf"', "null"])),
        )
    elif how == 5:
        text = text.replace(
            '"a"',
            str(rng.choice(['"\\ud83d"', '"b"', '""', "a", "'a'", '"\ud800"', '"__metadata__"'])),
        )
    elif how == 6:
        data = (
            data[: rng.integers(0, 33)]
            if rng.random() < 0.5
            else data + bytes(int(rng.integers(1, 9)))
        )
    elif how == 7:
        return safetensors_file(
            text,
            data,
            (
                int(NUMBERS[rng.integers(0, len(NUMBERS))])
                if rng.random() < 0.5
                else len(text) + int(rng.integers(-9, 10))
            ),
        )
    raw = bytearray(safetensors_file(text, data))
    for _ in range(rng.integers(0, 3) if how >= 8 else 0):
        raw[rng.integers(0, len(raw))] = rng.integers(0, 256)
    return bytes(raw)


@pytest.mark.parametrize("count", COUNTS)
def test_what_the_safetensors_library_refuses_is_refused(tmp_path, count):
    import safetensors

    rng, path, accepted = np.random.default_rng(count), tmp_path / "w.safetensors", 0
    for _ in range(count):
        raw = spoilt_safetensors(rng)
        path.write_bytes(raw)
        try:
            found = {name: tensor.read() for name, tensor in open_source(path).tensors.items()}
        except ValueError as error:
            assert str(path) in str(error)
            continue
        theirs = dict(safetensors.deserialize(raw))  # raises where the library refuses
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: bytes(t["data"]) for name, t in theirs.items()
        }, raw
        accepted += 1
    assert 0.03 * count < accepted < 0.9 * count


LIMIT = 64 * 2**20  # and four times the file


def onnx_bytes() -> bytes:
    """Weights in both forms, a product, and what is passed over."""
    values = np.arange(6, dtype=np.float32)

    def tensor(name, *more):
        return field(5, field(1, 2) + field(1, 3) + field(2, 1) + field(8, name) + b"".join(more))

    raw, packed = (
        tensor(b"a.bias", field(9, values.tobytes())),
        tensor(b"onnx::7", field(4, values.tobytes())),
    )
    node = field(
        1,
        field(1, b"x")
        + field(1, b"onnx::7")
        + field(3, b"/block/q/MatMul")
        + field(4, b"MatMul")
        + field(5, bytes(9)),
    )
    return (
        field(1, 8)
        + field(2, b"pytorch")
        + field(7, raw + packed + node + field(2, b"main") + 20 * field(1, field(4, b"Add")))
    )


def spoilt(rng: np.random.Generator, raw: bytes, header: int) -> bytes:
    """`raw` with numbers in its header replaced, pieces cut out or doubled, or its end cut off."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at, how = int(rng.integers(0, min(header, len(raw)))), rng.integers(0, 6)
        piece = int(rng.integers(1, 40))
        if how <= 1:
            raw[at] = rng.integers(0, 256)
        elif how == 2:
            raw[at : at + 8] = struct.pack("<Q", int(NUMBERS[rng.integers(0, len(NUMBERS))]))
        elif how == 3:
            raw[at : at + 4] = struct.pack("<I", int(NUMBERS[rng.integers(0, 12)]))
        elif how == 4:
            raw[at : at + piece] = b"" if rng.random() < 0.5 else bytes(raw[at : at + piece]) * 2
        elif rng.random() < 0.3:
            del raw[at + 1 :]
    return bytes(raw)


def hostile() -> dict[str, bytes]:
    """Files made to take memory or time, of some megabytes."""
    key = struct.pack("<Q", 1)

    def gguf(pairs, body):
        return b"GGUF" + struct.pack("<IQQ", 3, 0, pairs) + body

    def array(kind, count, body):
        return key + b"a" + struct.pack("<IIQ", 9, kind, count) + body

    n = 400_000
    empty = "{" + ",".join(f'"{i}":{{}}' for i in range(n)) + "}"
    small = (
        "{"
        + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(n))
        + "}"
    )
    return {
        "gguf: texts of two letters": gguf(
            1, array(8, n * 10, (struct.pack("<Q", 2) + b"ab") * n * 10)
        ),
        "gguf: bytes": gguf(1, array(0, n * 50, bytes(n * 50))),
        "gguf: arrays in arrays": gguf(1, array(9, 1, struct.pack("<IQ", 9, 1) * n)),
        "gguf: more pairs than bytes": gguf(2**63, b""),
        "onnx: empty nodes": field(7, field(1, b"") * n * 10),
        "onnx: empty weights": field(7, field(5, b"") * n * 10),
        "onnx: weights of nothing": field(
            7, b"".join(field(5, field(1, 0) + field(2, 1) + field(8, b"%d" % i)) for i in range(n))
        ),
        "onnx: many axes": field(
            7, field(5, field(1, bytes(n * 50)) + field(2, 1) + field(8, b"a"))
        ),
        "safetensors: empty entries": safetensors_file(empty, b""),
        "safetensors: tensors of nothing": safetensors_file(small, b""),
        "safetensors: many axes": safetensors_file(
            '{"a":{"shape":[' + "0," * n * 20 + '0],"dtype":"F32","data_offsets":[0,0]}}', b""
        ),
        "safetensors: deep": safetensors_file('{"a":' + "[" * n, b""),
        "safetensors: a long header": safetensors_file("{" + " " * 200_000_000, b""),
    }


def spoilt_files(folder: Path, count: int) -> Iterator[Path]:
    """Writes one after the other in place of the last."""
    gguf, rng = (folder / "base.gguf").read_bytes(), np.random.default_rng(count)
    bases = {
        "gguf": (gguf, gguf.index(b"output.weight") + 40),
        "onnx": (onnx_bytes(), len(onnx_bytes())),
    }
    for _ in range(count):
        for kind, base in bases.items():
            path = folder / f"w.{kind}"
            path.write_bytes(spoilt(rng, *base))
            yield path


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, the most since `forget`."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) * 1024


def child(folder: Path, count: int) -> None:
    """In a process of its own: opens spoilt files, or those of the folder; prints those that take
    too long or too much memory.
    """
    for kind in (
        "gguf",
        "onnx",
        "safetensors",
    ):  # so that imports and first calls are no part of what is measured
        (folder / f"first.{kind}").write_bytes(b"?" * 100)
        read(folder / f"first.{kind}")
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    for path in spoilt_files(folder, count) if count else sorted(folder.glob("hostile*")):
        size = path.stat().st_size
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = memory("VmRSS"), time.process_time()
        said = read(path)
        took, grown = time.process_time() - start, memory("VmHWM") - before
        if took > 2 or grown > LIMIT + 4 * size or (said and str(path) not in said):
            print(f"{path.name}: {size} bytes, {took:.1f} s, {grown} bytes more, {said}")


def read(path: Path) -> str:
    """Opens a file; the error where it is refused."""
    try:
        open_source(path)
    except ValueError as error:
        return str(error)
    return ""


def complaints(folder: Path, count: int) -> list[str]:
    code = (
        "from pathlib import Path; from tests.convert import test_hostile_files as t;"
        f" t.child(Path({str(folder)!r}), {count})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it"
)


@linux
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.pinned
def test_spoilt_headers_take_no_memory_and_no_time(tmp_path, count):
    gguf_file(
        tmp_path / "base.gguf",
        KEYS
        | {
            "tokenizer.ggml.tokens": ["a", "bc", "def"] * 9,
            "tokenizer.ggml.scores": [0.5] * 27,
        },
    )
    assert complaints(tmp_path, count) == []


@linux
@pytest.mark.slow
def test_hostile_headers_take_no_memory_and_no_time(tmp_path):
    for number, (name, raw) in enumerate(hostile().items()):
        (tmp_path / f"hostile {number}.{name.partition(':')[0]}").write_bytes(raw)
    assert complaints(tmp_path, 0) == []
