"""Damaged containers: whatever the damage, an error of ours or the row itself; never a crash, a
hang, or an error of another kind.
"""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from array_record.python.array_record_module import ArrayRecordWriter

from evlm_jax.data.image import ImageError, load
from evlm_jax.data.samples import SampleError
from evlm_jax.data.sources import open_source
from tests.data.made import png


def facts(i):
    return {"key": f"k{i}", "caption": f"caption {i} ü", "similarity": 0.3}


def write_tar(path):
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(6):
            writer.write({"__key__": f"k{i}", "png": png(i), "json": facts(i)})
    return "img2dataset"


def write_parquet(path):
    columns = {"png": pa.array([png(i) for i in range(6)], pa.binary())} | {
        name: [facts(i)[name] for i in range(6)] for name in facts(0)
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return "img2dataset"


def write_records(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(6):
        writer.write(json.dumps({"id": f"k{i}", "text": f"text {i} ü"}).encode())
    writer.close()
    return "text"


def write_lines(path):
    def turns(i):
        return [{"from": "human", "value": f"<image>{i}?"}, {"from": "gpt", "value": "ü"}]

    rows = [{"id": f"k{i}", "image": f"{i}.png", "conversations": turns(i)} for i in range(6)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return "llava"


def write_json(path):
    def entry(i):
        return {
            "questionId": i,
            "question": f"q{i}?",
            "image": f"documents/{i}.png",
            "answers": ["a", "b"],
        }

    path.write_text(json.dumps({"data": [entry(i) for i in range(6)]}), "utf-8")
    return "docvqa"


WRITERS = {
    "tar": write_tar,
    "parquet": write_parquet,
    "array_record": write_records,
    "jsonl": write_lines,
    "json": write_json,
}


def damage(content, rng):
    """Cut off, or some bits turned, or a piece overwritten."""
    content = bytearray(content)
    how = rng.random()
    if how < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    if how < 0.4:
        at = rng.randrange(len(content))
        content[at : at + 16] = rng.randbytes(min(16, len(content) - at))
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def read(kind, path):
    """What became of the file: counts of rows, and of errors."""
    found = Counter()
    try:
        source = open_source(f"{kind}:{path}")
    except (ValueError, OSError) as error:
        assert path.name in str(error)
        return Counter({"file": 1})
    for number in range(len(source)):
        try:
            sample = source[number]
        except SampleError as error:
            assert path.name in str(error) and (
                f"row {number + 1}" in str(error) or f"{path.name}/entry " in str(error)
            )
            found["row"] += 1
            continue
        try:
            for ref in sample.refs:
                load(ref, 8, "squash")
            found["whole"] += 1
        except ImageError as error:
            assert path.name in str(error) or ref.path in str(error)
            found["image"] += 1
    return found


def fuzz(folder, kind, count, first=0):
    """What became of the damages `first` to `count`."""
    whole = folder / f"whole.{kind}"
    mapper = WRITERS[kind](whole)
    shutil.copy(whole, folder / f"damaged.{kind}")
    if kind != "array_record":
        assert set(read(mapper, whole)) <= {"whole", "image"}
    rng, found, content = random.Random(kind), Counter(), whole.read_bytes()
    live = (
        content.rindex(b"k5") + 100 if kind == "array_record" else len(content)
    )  # the rest of its block is empty
    for number in range(count):
        damaged = damage(content[:live], rng)
        if number < first:
            continue
        path = folder / f"{number}.{kind}"
        path.write_bytes(damaged + content[live:] if len(damaged) == live else damaged)
        found += read(mapper, path)
        path.unlink()
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_containers(tmp_path, kind):
    found = fuzz(tmp_path, kind, 150)
    assert found["file"] + found["row"] > 10 and found.total() > 150


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_thousands_of_damaged_containers(tmp_path, kind):
    assert fuzz(tmp_path, kind, 2000).total() > 2000


@pytest.mark.slow
def test_a_footer_at_which_pyarrow_ends_the_process(tmp_path):
    """Damage 969: a histogram of its statistics is too long. In a process of its own, as pyarrow
    ends the one that asks it for these statistics."""
    code = f"""
from pathlib import Path
from tests.data.test_fuzz import fuzz
print(fuzz(Path({str(tmp_path)!r}), "parquet", 971, first=968).total())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-500:]
    assert int(done.stdout) > 3
