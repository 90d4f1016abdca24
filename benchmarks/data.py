"""Images a second from tar to batch, against webdataset + Pillow + torch's DataLoader, in one run:
`python -m benchmarks.data`.

Photographs as JPEGs of 640 x 480 with captions, in four tars; the batch has their pixels and their
packed tokens (ours), or their pixels and texts (webdataset). Both use every core; rounds alternate
and the best counts. Other programs share the machine: read the ratios.

`--memory 100000` reads so many samples instead, and prints the process's memory ten times on the
way."""

import importlib.util
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import parser
from evlm_jax import assets
from evlm_jax.asset_pictures import PHOTOS
from evlm_jax.config import EVLMConfig, from_config_dict
from evlm_jax.data.image import load
from evlm_jax.data.pipeline import batches
from evlm_jax.data.sources import open_source
from evlm_jax.data.tokenizer import load_tokenizer
from experiments import demo

SHARDS, IMAGES = 4, 400  # a shard
SECONDS, ROUNDS, BATCH = 4.0, 4, 32
PEERS = ("torch", "webdataset")
CORES = os.cpu_count() or 1


def write_tars(folder: Path, shards: int, images: int) -> None:
    """The photographs again and again, each time cut out a little differently."""
    rng, photos = np.random.default_rng(0), []
    for name in PHOTOS:
        with Image.open(assets.path("photos") / name) as photo:
            photos.append(photo.convert("RGB").resize((720, 540), Image.Resampling.LANCZOS))
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(images):
                x, y = rng.integers(0, (81, 61))
                jpeg = io.BytesIO()
                photos[i % len(photos)].crop((x, y, x + 640, y + 480)).save(
                    jpeg, "JPEG", quality=90
                )
                for kind, content in (
                    ("jpg", jpeg.getvalue()),
                    ("txt", b"A photograph of something."),
                ):
                    member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def config(folder: Path, size: int, scaled: bool) -> EVLMConfig:
    """The demo's towers over the tars."""
    chosen = demo.get_config()
    chosen.vit.image_size = size
    data = dict(
        sources=(f"img2dataset:{folder}",),
        weights=(1.0,),
        scaled_decoding=scaled,
        cache_features=False,
    )
    chosen.data.update(
        data,
        length=16 * BATCH,
        images=BATCH,
        targets=16 * BATCH,
        slots=BATCH,
        block_pairs=4 * BATCH,
    )
    chosen.train.batch = 1
    return from_config_dict(chosen)


def ours(folder: Path, size: int, scaled: bool) -> Iterator[int]:
    """Images of each batch."""
    iterator = batches(config(folder, size, scaled), load_tokenizer("smollm2-135m-instruct"))
    try:
        for _, info in iterator:
            yield sum(map(len, info["keys"]))
    finally:
        iterator.close()


def theirs(folder: Path, size: int) -> Iterator[int]:
    """webdataset's usual pipeline, a worker a core."""
    import webdataset
    from torch.utils.data import DataLoader

    def prepare(sample):
        picture = (
            Image.open(io.BytesIO(sample["jpg"]))
            .convert("RGB")
            .resize((size, size), Image.Resampling.BICUBIC)
        )
        return np.asarray(picture), sample["txt"].decode()

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    source = (
        webdataset.WebDataset(tars, resampled=True, shardshuffle=False)
        .shuffle(256)
        .map(prepare)
        .batched(BATCH)
    )
    for pixels, _ in DataLoader(source, batch_size=None, num_workers=CORES):
        yield len(pixels)


def bare(folder: Path, size: int, scaled: bool) -> Iterator[int]:
    """Decoding and resizing alone, in threads."""
    source = open_source(f"img2dataset:{folder}")
    refs = [source[i].refs[0] for i in range(min(IMAGES, len(source)))]
    with ThreadPoolExecutor(CORES) as pool:
        while True:
            for first in range(0, len(refs), BATCH):
                chunk = refs[first : first + BATCH]
                yield len(
                    list(pool.map(lambda ref: load(ref, size, "squash", scaled=scaled), chunk))
                )


def speed(made: Iterator[int], seconds: float) -> float:
    """Images a second, once running."""
    next(made)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not count:
        count += next(made)
    taken = time.perf_counter() - begin
    made.close()
    return count / taken


def memory(folder: Path, samples: int) -> None:
    """Prints the resident memory, in MB, after each tenth of the samples."""
    count, told, resident = (
        0,
        0,
        lambda: (
            int(Path("/proc/self/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        ),
    )
    for images in ours(folder, 224, True):
        count += images
        if count >= (told + 1) * samples / 10:
            told += 1
            print(f"{count:8,} samples  {resident():6.0f} MB", flush=True)
        if told == 10:
            return


def main() -> None:
    """Prints one line a way and size, or memory."""
    asked = parser(__doc__)
    asked.add_argument("--memory", type=int, metavar="SAMPLES")
    args = asked.parse_args()
    seconds, rounds = (0.1, 1) if args.smoke else (SECONDS, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(folder, *((1, 2 * BATCH) if args.smoke else (SHARDS, IMAGES)))
        if args.memory:
            return memory(folder, args.memory)
        for size in (224,) if args.smoke else (224, 448):
            ways: dict[str, Callable[[], Iterator[int]]] = {
                "ours, equal pixels": lambda size=size: ours(folder, size, False),
                "ours, scaled decoding": lambda size=size: ours(folder, size, True),
                "decoding alone, equal pixels": lambda size=size: bare(folder, size, False),
                "decoding alone, scaled": lambda size=size: bare(folder, size, True),
            }
            if not args.smoke and all(map(importlib.util.find_spec, PEERS)):
                ways = {
                    "webdataset + Pillow + DataLoader": lambda size=size: theirs(folder, size)
                } | ways
            best = dict.fromkeys(ways, 0.0)
            for _ in range(rounds):
                for way, made in ways.items():
                    best[way] = max(best[way], speed(made(), seconds))
            reference = next(iter(best.values()))
            for way, rate in best.items():
                print(
                    f"{size} px  {way:34s} {rate:6.0f} images/s  {rate / reference:4.2f} times",
                    flush=True,
                )


if __name__ == "__main__":
    main()
