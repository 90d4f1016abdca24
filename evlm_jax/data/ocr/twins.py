"""Texts that are much like an earlier one: MinHash (Broder 1997) with bands."""

import hashlib

import numpy as np

SHINGLE = 5  # characters that are compared as one
BANDS, ROWS = (
    20,
    5,
)  # of 100 hashes: a pair of similarity 0.8 meets in some band with 0.9996, one of 0.6 with 0.80


class Twins:
    """Remembers texts, about 3 kB each. Similarity is the share of common shingles among those of
    both, estimated with an error of 0.04.

    Args:
      similarity: from which on a text is a twin; near 1 only what differs in nothing but case,
        spaces and marks, above 1 nothing.
    """

    def __init__(self, similarity: float):
        self.similarity = similarity
        factors = np.random.default_rng(0).integers(1, 1 << 63, (2, BANDS * ROWS, 1), np.uint64)
        self._factors, self._shifts = factors[0] | np.uint64(1), factors[1]
        self._signatures: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def seen(self, text: str) -> bool:
        """Whether an earlier text is like this one; if not, this one is remembered."""
        signature = self._signature(text)
        keys = [(band, part.tobytes()) for band, part in enumerate(signature.reshape(BANDS, ROWS))]
        met = {number for key in keys for number in self._bands.get(key, ())}
        if any((self._signatures[number] == signature).mean() >= self.similarity for number in met):
            return True
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return False

    def _signature(self, text: str) -> np.ndarray:
        """uint32 [100]: the least of each hash over all shingles."""
        hashed = np.array(
            [
                int.from_bytes(hashlib.blake2b(s.encode(), digest_size=4).digest(), "little")
                for s in shingles(text)
            ],
            np.uint64,
        )
        return ((self._factors * hashed + self._shifts) >> np.uint64(32)).min(1).astype(np.uint32)


def shingles(text: str) -> set[str]:
    """All runs of five letters and digits, in lower case; the whole text if it has fewer."""
    solid = "".join(filter(str.isalnum, text.lower()))
    return {solid[i : i + SHINGLE] for i in range(max(1, len(solid) - SHINGLE + 1))}
