"""Web documents: text with pictures in between, supervised from the first picture or word on."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from evlm_jax.data.containers import files
from evlm_jax.data.containers.parquet import read_columns
from evlm_jax.data.containers.rows import find
from evlm_jax.data.containers.tar import Tar
from evlm_jax.data.formats.fields import IMAGES, facts, listed, within, words
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal
from evlm_jax.data.source import Source, by_row, key_of


def document(
    name: str, key: str, parts: Iterable[str | ImageRef], between: str, scores: Sequence[float] = ()
) -> Sample:
    """A sample of texts and pictures in reading order; `between` is inserted between two texts, in
    front of pictures between them.
    """
    said, marks, visuals = "", "", []
    for part in parts:
        if isinstance(part, ImageRef):
            visuals.append((part,))
            marks += MARKER
        else:
            said += between * bool(said) + marks + literal(part)
            marks = ""
    said += marks
    return Sample(key, name, tuple(visuals), ((Turn("assistant", said),),), tuple(scores))


def assign(similarity: np.ndarray) -> np.ndarray:
    """Index of the sentence of each picture, int [images], as in MMC4: the greatest sum of
    similarities where no sentence has two pictures.

    Where there are more pictures than sentences, a sentence gets as many as are needed to place
    all.

    Args:
      similarity: [images, sentences].
    """
    from scipy.optimize import (
        linear_sum_assignment,
    )  # takes a third of the import of all data code, and few need it

    similarity = np.asarray(similarity, np.float64)
    count, sentences = similarity.shape
    _, columns = linear_sum_assignment(
        np.tile(similarity, (1, -(-count // sentences))), maximize=True
    )
    return columns % sentences


def mmc4(name: str, root: str, row: dict, *, images: str = "images") -> Sample:
    """MMC4: {"url", "text_list", "image_info": [{"image_name", "matched_text_index",
    "matched_sim"}], "similarity_matrix"}.

    A picture precedes its sentence: the published one, or where there is none the one that `assign`
    finds.
    """
    told, folder = facts(row), files.join(root, images)
    texts, infos = (
        [words(text, "text_list") for text in listed(told["text_list"], "text_list")],
        listed(told["image_info"], "image_info"),
    )
    if infos and "matched_text_index" not in infos[0]:
        matrix = np.asarray(told["similarity_matrix"], np.float64)
        if matrix.shape != (len(infos), len(texts)):
            raise ValueError(
                f"similarity_matrix is {matrix.shape}, there are {len(infos)} images and"
                f" {len(texts)} texts"
            )
        places = assign(matrix).tolist()
        scores = [matrix[i, place] for i, place in enumerate(places)]
    else:
        places, scores = (
            [info["matched_text_index"] for info in infos],
            [info["matched_sim"] for info in infos],
        )
    if bad := [place for place in places if int(place) != place or not 0 <= place < len(texts)]:
        raise ValueError(f"matched_text_index {bad[0]} of {len(texts)} texts")
    order = sorted(range(len(infos)), key=lambda i: places[i])
    pictures = [
        ImageRef(within(row, folder, info["image_name"], alone=len(infos) == 1)) for info in infos
    ]
    parts: list[str | ImageRef] = []
    for at, text in enumerate(texts):
        parts += [pictures[i] for i in order if places[i] == at]
        parts.append(text)
    return document(name, key_of(row), parts, " ", [float(scores[i]) for i in order])


def obelics(name: str, path: str, *, images: str = "images") -> Source:
    """OBELICS, parquet: "images" (URLs) and "texts", lists of one length with None where the other
    has something.

    Args:
      images: their folder, beside the file if relative: img2dataset's tars with their parquet
        tables, or files named by the sha256 of their URL in hexadecimal.
    """
    folder = files.join(files.parent(find(path)[0]), images)
    return by_row(partial(_obelics, downloads=_downloads(folder), folder=folder))(name, path)


def _obelics(name: str, root: str, row: dict, downloads: dict[str, str], folder: str) -> Sample:
    if len(listed(row["images"], "images")) != len(listed(row["texts"], "texts")):
        raise ValueError(f"{len(row['images'])} images beside {len(row['texts'])} texts")
    parts: list[str | ImageRef] = []
    for url, text in zip(row["images"], row["texts"]):
        if (url is None) == (text is None):
            raise ValueError("exactly one of an image and a text must stand at each place")
        digest = hashlib.sha256((words(url, "images") if text is None else "").encode()).hexdigest()
        parts.append(
            words(text, "texts")
            if url is None
            else ImageRef(downloads.get(url) or downloads.get(digest) or files.join(folder, digest))
        )
    key = hashlib.sha256(repr((row["images"], row["texts"])).encode()).hexdigest()[:16]
    return document(name, key, parts, "\n\n")


def _downloads(folder: str) -> dict[str, str]:
    """{URL, or stem of the file: reference} of pictures that were downloaded."""
    found = files.find(folder, (".tar", *(f".{kind}" for kind in IMAGES)))
    references = {
        os.path.splitext(os.path.basename(file))[0]: file
        for file in found
        if not file.endswith(".tar")
    }
    for tar in (file for file in found if file.endswith(".tar")):
        table = read_columns(tar.removesuffix(".tar") + ".parquet", ("url", "key"))
        urls = dict(zip(table["key"], table["url"]))
        references |= {urls[row_key]: reference for row_key, reference in Tar(tar).pictures(IMAGES)}
    return references
