"""`evlm data build`: a source, cleaned and with smaller pictures, as shards that are read fast:
`built:FOLDER` in `data.sources`.

A shard is made of so many neighbouring samples of the source, by one process. Its receipt is
renamed to its name last of all, so after a kill shards without one are made again, and the others
stay. Shards do not depend on the number of processes."""

import functools
import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from evlm_jax.config import EVLMConfig, to_dict
from evlm_jax.data import image
from evlm_jax.data.clean import Captions, Documents, Receipt, clean
from evlm_jax.data.containers.rows import open_ref
from evlm_jax.data.formats.built import row_of
from evlm_jax.data.samples import ImageRef, Sample, SampleError, part, part_count
from evlm_jax.data.sources import open_source
from evlm_jax.paths import local

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # pictures that may stay as they are
QUALITY = 95
AGAIN = "remove the folder and build it again"
CLEANERS = {"captions": Captions, "documents": Documents}


class Job(NamedTuple):
    """Arguments of a build. All but `out` decide the contents of shards."""

    cfg: EVLMConfig
    source: str
    out: str
    rules: Literal["captions", "documents", "none"]  # of data/clean.py
    container: Literal["tar", "array_record"]
    side: int  # greatest shorter side of a picture, in pixels
    size: int  # samples of the source that a shard is made of


@dataclass
class Outcome:
    """What became of samples: seen = written + dropped, as is each unit of `rules`."""

    seen: int = 0
    written: int = 0
    rows: int = 0  # a sample is several where data.dialogs splits it
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(
        default_factory=dict
    )  # cause -> the first sample that it dropped
    rules: Receipt = field(default_factory=Receipt)

    def drop(self, cause: str, message: str) -> None:
        """One sample."""
        self.dropped[cause] += 1
        self.examples.setdefault(cause, message)

    def add(self, other: "Outcome") -> None:
        """Samples that come after these."""
        self.seen, self.written, self.rows = (
            self.seen + other.seen,
            self.written + other.written,
            self.rows + other.rows,
        )
        self.dropped.update(other.dropped)
        self.examples = other.examples | self.examples
        self.rules.update(other.rules)

    def __str__(self) -> str:
        lines = [f"sample: {self.seen} seen, {self.written} written in {self.rows} rows"]
        lines += [
            f"  {cause}: {count} dropped, the first {self.examples[cause]}"
            for cause, count in self.dropped.most_common()
        ]
        return "\n".join([*lines, *filter(None, [str(self.rules)])])


class Block(Sequence[Sample]):
    """Neighbouring samples of a source."""

    def __init__(self, source: Sequence[Sample], numbers: range):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.numbers[index]]


def build(job: Job, workers: int) -> Outcome:
    """Builds the shards that do not exist yet, in `workers` processes; returns the receipt of all
    shards, which is also in receipt.json and receipt.txt.

    Raises:
      ValueError: the folder is of another build, or the source has changed.
      OSError: a process was killed.
    """
    out, source = local(job.out, "--out of a build"), open_source(job.source)
    out.mkdir(parents=True, exist_ok=True)
    _same_job(job, source.state(), out)
    shards = range(-(-len(source) // job.size))
    todo = [shard for shard in shards if not _receipt(job, shard).exists()]
    with tqdm(
        total=len(shards), initial=len(shards) - len(todo), desc=job.source, unit="shard"
    ) as bar:
        for _ in _run(functools.partial(build_shard, job), todo, workers):
            bar.update()
    _same_job(job, open_source(job.source).state(), out)  # it may have changed while it was read
    total = Outcome()
    for shard in shards:
        total.add(_read(_receipt(job, shard)))
    _write(out / "receipt.json", _json(total, indent=1))
    _write(out / "receipt.txt", f"{total}\n".encode())
    return total


def _run(work: Callable[[int], None], todo: Sequence[int], workers: int) -> Iterator[None]:
    """Does it, one after the other or in processes."""
    if workers == 1:
        yield from map(work, todo)
        return
    context = multiprocessing.get_context("spawn")  # of a process with threads a copy may hang
    try:
        with ProcessPoolExecutor(workers, context) as pool:
            yield from pool.map(work, todo)
    except BrokenProcessPool as error:
        raise OSError(
            "a process was killed (out of memory?): start again, finished shards stay"
        ) from error


def build_shard(job: Job, shard: int) -> None:
    """Writes one shard, then its receipt."""
    source = _source(job.source)
    numbers = range(shard * job.size, min(len(source), (shard + 1) * job.size))
    outcome = Outcome(seen=len(numbers))
    rows = list(_rows(job, Block(source, numbers), outcome))
    path = Path(job.out) / f"{shard:05d}.{job.container}"
    if rows:  # a tar may be empty, an ArrayRecord file may not
        part_file = path.with_name(path.name + ".part")
        {"tar": _write_tar, "array_record": _write_records}[job.container](part_file, rows, shard)
        os.replace(part_file, path)
    _write(_receipt(job, shard), _json(outcome))


def _rows(job: Job, block: Block, outcome: Outcome) -> Iterator[dict]:
    """Rows of what is left of the samples; what becomes of each goes to `outcome`."""
    for sample in _kept(job, block, outcome):
        try:
            pictures = [
                picture for visual in sample.visuals for picture in _pictures(visual, job.side)
            ]
        except image.ImageError as error:
            outcome.drop("unreadable image", f"{sample.source}/{sample.key}: {error}")
            continue
        count = part_count(len(sample.dialogs), job.cfg.data.dialogs)
        outcome.written, outcome.rows = outcome.written + 1, outcome.rows + count
        for i in range(count):
            key = f"{sample.key}[{i + 1}/{count}]" if count > 1 else sample.key
            yield row_of(replace(part(sample, i, job.cfg.data.dialogs), key=key), pictures)


def _kept(job: Job, block: Block, outcome: Outcome) -> Iterator[Sample]:
    """Samples by the rules.

    Those of which nothing is left, and rows that are no samples, go to `outcome`.
    """
    if job.rules == "none":
        for number in range(len(block)):
            try:
                yield block[number]
            except SampleError as error:
                outcome.drop("bad row", str(error))
        return
    cleaner, kept = CLEANERS[job.rules](job.cfg, receipt=outcome.rules), 0
    for _, sample in clean(block, cleaner, workers=1):
        kept += 1
        yield sample
    bad = outcome.rules.seen["row"]
    for cause, count in (("bad row", bad), ("cleaned away", len(block) - kept - bad)):
        if count:
            outcome.dropped[cause] += count
            outcome.examples[cause] = (
                outcome.rules.examples["bad row"]
                if cause == "bad row"
                else "is told by the rules below"
            )


def _pictures(visual: Sequence[ImageRef], side: int) -> Iterator[tuple[str, bytes]]:
    """Suffix and bytes of each frame.

    A small picture in a common format stays as it is; others become JPEG.
    """
    for ref, picture in zip(visual, image.decode_all(visual)):
        shorter = min(picture.size)
        if ref.frame is None and shorter <= side:
            with open_ref(ref.path) as file:
                content = file.read()
            suffix = ""
            with (
                suppress(Exception),
                Image.open(io.BytesIO(content), formats=image.FORMATS) as opened,
            ):  # one that was mended becomes JPEG
                suffix = SUFFIXES.get(opened.format)
            if suffix:
                yield suffix, content
                continue
        if shorter > side:
            scaled = tuple(max(1, round(length * side / shorter)) for length in picture.size)
            picture = image.bicubic(picture, scaled)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        yield "jpg", buffer.getvalue()


def _write_tar(path: Path, rows: Sequence[dict], shard: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for name, value in row.items():
                content = (
                    value
                    if isinstance(value, bytes)
                    else json.dumps(value, ensure_ascii=False).encode()
                )
                member = tarfile.TarInfo(f"{shard:05d}{number:06d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_records(path: Path, rows: Sequence[dict], _shard: int) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")  # so that single records are read fast
    for row in rows:
        writer.write(msgpack.packb(row))
    writer.close()


@functools.lru_cache(1)
def _source(name: str) -> Sequence[Sample]:
    """Opened once a process, not for each shard."""
    return open_source(name)


def _same_job(job: Job, state: str, out: Path) -> None:
    """Raises ValueError if the folder holds shards of another job, or of files that have changed
    since.
    """
    facts = job._asdict() | {
        "cfg": {"clean": to_dict(job.cfg)["clean"], "dialogs": job.cfg.data.dialogs},
        "state of the source": state,
    }
    facts = json.loads(json.dumps({name: value for name, value in facts.items() if name != "out"}))
    if (out / "build.json").exists():
        before = _json_of(out / "build.json")
        before = {"state of the source": state} | before  # builds of former versions do not tell it
        if other := [name for name in facts if before.get(name) != facts[name]]:
            raise ValueError(
                f"{out} was begun with another {', '.join(other)} (build.json): give a new --out,"
                " or delete it"
            )
    _write(out / "build.json", _json(facts, indent=1))


def _receipt(job: Job, shard: int) -> Path:
    return Path(job.out) / "receipts" / f"{shard:05d}.txt"


def _read(path: Path) -> Outcome:
    facts = _json_of(path)
    try:
        rules = facts.pop("rules")
        counters = {name: Counter(rules[name]) for name in ("seen", "kept")}
        dropped = {unit: Counter(causes) for unit, causes in rules["dropped"].items()}
        return Outcome(
            **facts | {"dropped": Counter(facts["dropped"])},
            rules=Receipt(**rules | counters | {"dropped": dropped}),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a build wrote: {error}; {AGAIN}") from error


def _json_of(path: Path) -> dict:
    """Raises ValueError naming the file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not what a build wrote: {error}; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not what a build wrote; {AGAIN}")
    return found


def _json(value, indent: int | None = None) -> bytes:
    return json.dumps(value, default=vars, ensure_ascii=False, indent=indent).encode()


def _write(path: Path, content: bytes) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_name(path.name + ".part")
    part_file.write_bytes(content)
    os.replace(part_file, path)
