"""Images a second from tar to batch, against webdataset + Pillow + torch's DataLoader, in one run: `python -m benchmarks.data`.

Photographs as JPEGs of 640 x 480 with captions, in four tars; the batch has their pixels and their packed tokens (ours), or their pixels
and texts (webdataset). Both use every core; rounds alternate and the best counts. Other programs share the machine: read the ratios.

`--memory 100000` reads so many samples instead, and prints the process's memory ten times on the way.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from evlm_jax import assets
from evlm_jax.config import EVLMConfig, from_config_dict
from evlm_jax.data.image import load
from evlm_jax.data.pipeline import batches
from evlm_jax.data.sources import open_source
from evlm_jax.tokenizer import load_tokenizer
from experiments import demo

SHARDS, IMAGES = 4, 400  # a shard
SECONDS, ROUNDS, BATCH = 4.0, 4, 32
CORES = os.cpu_count() or 1


def write_tars(folder: Path) -> None:
    """The photographs again and again, each time cut out a little differently."""
    rng, photos = np.random.default_rng(0), []
    for name in assets.PHOTOS:
        with Image.open(assets.path("photos") / name) as photo:
            photos.append(photo.convert("RGB").resize((720, 540), Image.Resampling.LANCZOS))
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(IMAGES):
                x, y = rng.integers(0, (81, 61))
                jpeg = io.BytesIO()
                photos[i % len(photos)].crop((x, y, x + 640, y + 480)).save(jpeg, "JPEG", quality=90)
                writer.write({"__key__": f"{shard:05d}{i:04d}", "jpg": jpeg.getvalue(), "txt": "A photograph of something."})


def config(folder: Path, size: int, scaled: bool) -> EVLMConfig:
    """The demo's towers over the tars."""
    chosen = demo.get_config()
    chosen.vit.image_size = size
    data = dict(sources=(f"img2dataset:{folder}",), weights=(1.0,), scaled_decoding=scaled, cache_features=False)
    chosen.data.update(data, length=16 * BATCH, images=BATCH, targets=16 * BATCH, slots=BATCH, pairs=4 * BATCH)
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

    def prepare(sample):
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture), sample["txt"].decode()

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    source = webdataset.WebDataset(tars, resampled=True, shardshuffle=False).shuffle(256).map(prepare).batched(BATCH)
    for pixels, _ in DataLoader(source, batch_size=None, num_workers=CORES):
        yield len(pixels)


def bare(folder: Path, size: int, scaled: bool) -> Iterator[int]:
    """Decoding and resizing alone, in threads."""
    refs = [open_source(f"img2dataset:{folder}")[i].refs[0] for i in range(IMAGES)]
    with ThreadPoolExecutor(CORES) as pool:
        while True:
            for first in range(0, IMAGES, BATCH):
                chunk = refs[first : first + BATCH]
                yield len(list(pool.map(lambda ref: load(ref, size, "squash", scaled=scaled), chunk)))


def speed(made: Iterator[int]) -> float:
    """Images a second, once running."""
    next(made)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        count += next(made)
    seconds = time.perf_counter() - begin
    made.close()
    return count / seconds


def memory(folder: Path, samples: int) -> None:
    """Prints the resident memory, in MB, after each tenth of the samples."""
    count, told, resident = 0, 0, lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    for images in ours(folder, 224, True):
        count += images
        if count >= (told + 1) * samples / 10:
            told += 1
            print(f"{count:8,} samples  {resident():6.0f} MB", flush=True)
        if told == 10:
            return


def main() -> None:
    """Prints one line a way and size, or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, metavar="SAMPLES")
    samples = parser.parse_args().memory
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(folder)
        if samples:
            return memory(folder, samples)
        for size in (224, 448):
            ways: dict[str, Callable[[], Iterator[int]]] = {
                "webdataset + Pillow + DataLoader": lambda size=size: theirs(folder, size),
                "ours, equal pixels": lambda size=size: ours(folder, size, False),
                "ours, scaled decoding": lambda size=size: ours(folder, size, True),
                "decoding alone, equal pixels": lambda size=size: bare(folder, size, False),
                "decoding alone, scaled": lambda size=size: bare(folder, size, True),
            }
            best = dict.fromkeys(ways, 0.0)
            for _ in range(ROUNDS):
                for way, made in ways.items():
                    best[way] = max(best[way], speed(made()))
            reference = best["webdataset + Pillow + DataLoader"]
            for way, rate in best.items():
                print(f"{size} px  {way:34s} {rate:6.0f} images/s  {rate / reference:4.2f} times", flush=True)


if __name__ == "__main__":
    main()
