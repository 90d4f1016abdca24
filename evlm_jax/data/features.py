"""Taps of a frozen vision tower, computed once and kept on disk.

A store is a folder: `taps.bin` (records of bfloat16 [G, S, V], one after another) and `keys.txt`
(line n names record n). A record's bytes are on disk before its key is written, so after a crash at
any moment the complete lines say what is there, and filling goes on. The folder's name is a
fingerprint of the tower and the preprocessing; a record's key is the sha256 of the image file, with
the time of the frame for videos: moved files are found again and changed files are not mistaken.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from evlm_jax.config import EVLMConfig
from evlm_jax.data import image
from evlm_jax.data.containers import rows
from evlm_jax.data.samples import ImageRef

# most images encoded at a time; a smaller rest is padded to a multiple of STEP: few compiled shapes
CHUNK, STEP = 32, 8
FEW = 8  # pictures that nothing keeps, encoded together, unless it is one
# those decoded together, about: more of a video in one go, since behind a key frame all is decoded
DECODED = 64


def fingerprint(cfg: EVLMConfig, weights: Mapping[str, np.ndarray]) -> str:
    """Names everything that taps depend on: the tower's weights by canonical name (`vit/...`), its
    configuration, the resizing.
    """
    made = image.MAKING, cfg.data.resize, cfg.data.scaled_decoding
    digest = hashlib.sha256(
        repr((cfg.vit, made, cfg.train.dtype, cfg.train.matmul_precision)).encode()
    )
    for name in sorted(name for name in weights if name.startswith("vit/")):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()[:16]


class FeatureStore:
    """Disk cache of taps, one record an image.

    Args:
      path: the folder, usually `cache / "features" / fingerprint(cfg, weights)`.
      encode: uint8 [n, h, w, 3] -> [n, G, S, V], e.g. `jax.jit(model.encode)`.
      cfg: decides the shape of records and the preprocessing.
    """

    def __init__(
        self, path: str | Path, encode: Callable[[np.ndarray], np.ndarray], cfg: EVLMConfig
    ):
        self.path, self.encode, self.cfg = Path(path), encode, cfg
        self.shape = (len(cfg.vit.taps), cfg.vit.tokens, cfg.vit.width)
        self.path.mkdir(parents=True, exist_ok=True)
        self._bytes = 2 * int(np.prod(self.shape))
        self._records: dict[str, int] = {}
        self._broken: dict[str, image.ImageError] = {}
        self._read()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, refs: Sequence[ImageRef]) -> np.ndarray:
        """bfloat16 [n, G, S, V]; what is missing is computed.

        Raises ImageError for an image that cannot be read.
        """
        self.fill(refs, progress=False)
        keys = [content_key(ref) for ref in refs]
        if broken := [self._broken[key] for key in keys if key in self._broken]:
            raise broken[0]
        rows = [self._records[key] for key in keys]
        return (
            self._taps[rows].view(ml_dtypes.bfloat16)
            if rows
            else np.zeros((0, *self.shape), ml_dtypes.bfloat16)
        )

    def fill(self, refs: Iterable[ImageRef], progress: bool = True) -> None:
        """Computes what is missing.

        Images that cannot be read are left to `get` to complain about.
        """
        missing = {}
        for ref in refs:
            with contextlib.suppress(image.ImageError):
                key = content_key(ref)
                if key not in self._records and key not in self._broken:
                    missing[key] = ref
        if not missing:
            return
        with open(self.path / "keys.txt", "a") as keys, open(self.path / "taps.bin", "ab") as taps:
            fcntl.flock(keys, fcntl.LOCK_EX)  # another process may fill the same store
            self._read()
            todo = [(key, ref) for key, ref in missing.items() if key not in self._records]
            os.truncate(
                keys.name, sum(len(key) + 1 for key in self._records)
            )  # a half-written line, and
            os.truncate(
                taps.name, len(self._records) * self._bytes
            )  # records without a key: a crash left them
            bar = tqdm(total=len(todo), desc="vision features", unit="image", disable=not progress)
            for first in range(0, len(todo), CHUNK):
                self._append(todo[first : first + CHUNK], keys, taps)
                bar.update(min(CHUNK, len(todo) - first))
            bar.close()
            self._read()

    def _append(self, chunk: Sequence[tuple[str, ImageRef]], keys, taps) -> None:
        """Encodes one chunk, writes the records, then their keys."""
        rows = -(-len(chunk) // STEP) * STEP
        pixels, good = (
            np.zeros((rows, *self.cfg.vit.input_shape), np.uint8),
            [],
        )
        try:
            pixels[: len(chunk)] = image.pixels(
                [ref for _, ref in chunk], self.cfg
            )  # frames of one video together
            good = [key for key, _ in chunk]
        except image.ImageError:
            for key, ref in chunk:
                try:
                    pixels[len(good)] = image.pixels([ref], self.cfg)[0]
                    good.append(key)
                except image.ImageError as error:
                    self._broken[key] = error
        records = np.asarray(self.encode(pixels))[: len(good)].astype(ml_dtypes.bfloat16)
        if records.shape[1:] != self.shape:
            raise ValueError(
                f"{self.path}: encode returned {records.shape[1:]} an image, the configuration says"
                f" {self.shape}"
            )
        for file, data in ((taps, records.tobytes()), (keys, "".join(f"{key}\n" for key in good))):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        """Takes in what the files hold."""
        keys, taps = self.path / "keys.txt", self.path / "taps.bin"
        lines = keys.read_text().split("\n")[:-1] if keys.exists() else []
        count = min(len(lines), taps.stat().st_size // self._bytes) if lines else 0
        self._records = {key: i for i, key in enumerate(lines[:count])}
        self._taps = np.memmap(taps, np.uint16, "r", shape=(count, *self.shape)) if count else None


def content_key(ref: ImageRef) -> str:
    """sha256 of the file, and the frame's time or which tile it is. Raises ImageError if the file
    cannot be opened.
    """
    try:
        digest = _hash(ref.path, rows.version(ref.path))
    except Exception as error:  # containers raise errors of any kind
        raise image.ImageError(
            f"{ref.path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if ref.tile is not None:
        return f"{digest}#{'/'.join(map(str, ref.tile))}"
    return digest if ref.frame is None else f"{digest}@{ref.frame:.6f}"


@functools.lru_cache(maxsize=1 << 20)
def _hash(path: str, version: str) -> str:
    with rows.open_ref(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_images(
    cfg: EVLMConfig,
    encode: Callable[[np.ndarray], np.ndarray],
    least: int,
    refs: Sequence[ImageRef],
) -> np.ndarray:
    """Taps [n, G, S, V] of images, float32, computed now by `encode`, as a FeatureStore has it; at
    least `least` pictures together.
    """
    count = least if len(refs) <= least else -(-FEW // least) * least
    taps, decoded = [], -(-DECODED // count) * count
    for begin in range(0, len(refs), decoded):
        pictures = image.pixels(refs[begin : begin + decoded], cfg)
        for first in range(0, len(pictures), count):
            some = pictures[first : first + count]
            pixels = np.zeros((count, *cfg.vit.input_shape), np.uint8)
            pixels[: len(some)] = some
            taps.append(encode(pixels)[: len(some)].astype(np.float32))
    return np.concatenate(taps)
