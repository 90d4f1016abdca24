"""Where samples come from, by the names used in `data.sources`: KIND:PATH, with options as in
KIND:PATH?images=FOLDER&keep=NUMBERS.npy.

PATH is a file, a pattern with *, or a folder; local, or a URL that fsspec opens (gs://, s3://).
docs/data.md shows every kind with its files and its samples. Besides there are the assets of the
demo:

easy-vqa  easy-vqa-test            the published splits; one sample an image with all its questions
emoji-en  emoji-zh  emoji-en-test  drawings and their names; the splits share no code point
emoji-hands-en  emoji-hands-zh     two other hands' drawings of the same code points
emoji-style-en                     a third's, for evaluation
photographs-en  photographs-zh     twenty photographs of what scenes have names for, for evaluation
photos  photos-test                a few real photographs with captions; every third for evaluation
clips                              three real videos with captions, four frames each
albums                             documents of two to four of the photographs, each in front of its
                                   caption
scenes-en  scenes-zh               6,000 scenes of pasted drawings on photographs, with questions of
                                   five families; as scenes-en-validation, -test, -known (drawings
                                   of train, the rest of test) and -style (a hand that train has
                                   not) 1,000 others
signs-en  signs-zh                 pages with a few large words, legible at 112 pixels: ocr-en: and
                                   ocr-zh: of the emoji's names
"""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import parse_qsl

import numpy as np

from evlm_jax import assets
from evlm_jax.data import video
from evlm_jax.data.formats import built, captions, chat, grounding, interleaved, plain, vqa
from evlm_jax.data.ocr import book, scans
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, question
from evlm_jax.data.scenes.compose import Scene
from evlm_jax.data.scenes.dialogs import LANGUAGES
from evlm_jax.data.scenes.material import HANDS, NEW_HAND
from evlm_jax.data.scenes.names import NAMES, PHOTOGRAPHS
from evlm_jax.data.scenes.source import SceneSource, open_scenes
from evlm_jax.data.source import Source, Subset, by_row

NAME = {"en": "Name this emoji.", "zh": "说出这个表情的名字。"}
TEST_PHOTOS = 3  # every third is for evaluation
ALBUMS, COUNTED = 300, ("Two", "Three", "Four")
SIGNS = {"layouts": "sign", "pages": "128"}  # so few that their features are kept


def open_source(name: str) -> Sequence[Sample]:
    """The source of this name: random access, and `dialog_counts()`.

    Raises:
      ValueError: an unknown kind or option, or nothing in it.
      FileNotFoundError: no such file.
      AssetError: the demo's files were not fetched.
    """
    kind, colon, place = name.partition(":")
    if colon and kind in FORMATS:
        path, _, query = place.partition("?")
        if not path:
            raise ValueError(f"config: data.sources: {name!r} has no path; give {kind}:PATH")
        pairs = parse_qsl(query, keep_blank_values=True)
        options = dict(pairs)
        if len(options) != len(pairs):
            raise ValueError(f"config: data.sources: {name!r} has an option twice")
        if unknown := [option for option in options if option not in options_of(kind)]:
            known = ", ".join(options_of(kind))
            raise ValueError(
                f"config: data.sources: {name!r} has the unknown option {unknown[0]!r}; {kind} has"
                f" {known}"
            )
        if "frames" in options:
            _check_frames(name, options["frames"])
        keep = options.pop("keep", None)
        try:
            source = FORMATS[kind](name, path, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data source {name!r}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"data source {name!r} has not the fields of {kind}: {type(error).__name__}:"
                f" {error}"
            ) from error
        source = source if keep is None else Subset(name, source, keep)
    elif name in BUILT_IN:
        source = BUILT_IN[name](name)
    else:
        known = [*BUILT_IN, *(f"{kind}:PATH" for kind in FORMATS)]
        raise ValueError(
            f"config: data.sources: unknown source {name!r}; use one of {', '.join(known)}"
        )
    if not len(source):
        raise ValueError(f"data source {name!r} has no samples")
    return source


def _check_frames(name: str, frames: str) -> None:
    """Before a first video is met."""
    try:
        video.spread(frames, 1.0)
    except ValueError as error:
        raise ValueError(f"config: data.sources: {name!r}: {error}") from error


def read(number: str, name: str, *_) -> bytes:
    """The picture of a page or a scene: what `page://NUMBER::NAME` refers to."""
    return _drawing(name).picture(int(number))


@functools.lru_cache(16)
def _drawing(name: str) -> book.Book | SceneSource:
    return open_source(name)


def scene_of(ref: ImageRef) -> Scene | None:
    """The truth of a picture that scenes made; None for others, for tiles, and for bare scenes."""
    kind, mark, rest = ref.path.partition("://")
    number, _, name = rest.partition("::")
    scenes = _drawing(name).scenes if mark and kind == "scene" and not ref.tile else None
    return None if scenes is None or scenes.bare else scenes.scene(int(number))


def options_of(kind: str) -> tuple[str, ...]:
    """Options of a kind: `keep`, and the keyword-only parameters of its opener or row mapper, or
    the options of its set.
    """
    if kind in vqa.SETS:
        return ("images", *vqa.SETS[kind].options, "keep")
    parameters = inspect.signature(ROW_FORMATS.get(kind, FORMATS[kind])).parameters.values()
    return (
        *(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY),
        "keep",
    )


def easy_vqa(name: str, split: str) -> Source:
    """easy-VQA in the layout of its package: {split}/questions.json =
    [[question, answer, image number], ...], {split}/images/N.png.
    """
    folder = assets.path("easy-vqa") / split
    by_image: dict[int, list[tuple[Turn, Turn]]] = {}
    for text, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        by_image.setdefault(number, []).append(question(MARKER + text, answer))

    def sample(row) -> Sample:
        number, dialogs = row
        return Sample(
            str(number),
            name,
            ((ImageRef(str(folder / "images" / f"{number}.png")),),),
            tuple(dialogs),
        )

    return Source(name, sorted(by_image.items()), sample, dialogs=lambda row: len(row[1]))


def emoji(name: str, language: str, split: str, hands: Sequence[str] = ("openmoji",)) -> Source:
    """Drawings CODE.png in one hand after the other, those that it has, and OpenMoji's names.json =
    {code: {language: name, "split": ...}}.
    """
    facts = json.loads((assets.path("openmoji") / "names.json").read_text("utf-8"))
    rows = [
        (code if len(hands) == 1 else f"{hand}/{code}", str(file), [fact[language]])
        for hand in hands
        for code, fact in sorted(facts.items())
        if fact["split"] == split and (file := assets.path(hand) / f"{code}.png").is_file()
    ]
    return Source(name, rows, lambda row: captions.captioned(name, *row, NAME[language]))


def photographs(name: str, language: str) -> Source:
    """GCompris's photographs of what scenes have names for."""
    folder, asked = assets.path("gcompris") / "photos", LANGUAGES[language].name[0]
    rows = [
        (file, known.en if language == "en" else known.zh)
        for known in NAMES
        for file in PHOTOGRAPHS.get(known.en, "").split()
    ]

    def sample(row) -> Sample:
        file, called = row
        reference = ImageRef(str(folder / f"{file}.jpg"))
        dialog = question(MARKER + asked, called)
        return Sample(file, name, ((reference,),), (dialog,), labels=("name",))

    return Source(name, rows, sample)


def photos(name: str, test: bool) -> Source:
    """Every third photograph (`test`), or the others."""
    rows = [row for i, row in enumerate(captioned("photos")) if (i % TEST_PHOTOS == 0) == test]
    return Source(name, rows, lambda row: captions.captioned(name, *row, captions.DESCRIBE))


def clips(name: str) -> Source:
    """Each clip as four uniform frames: a short row has room for no more."""
    return Source(
        name,
        captioned("clips"),
        lambda row: captions.captioned(name, *row, captions.DESCRIBE, frames="4"),
    )


def captioned(asset: str) -> list[tuple[str, str, list[str]]]:
    """(key, file, captions) of every picture of an asset with captions.json = {file: caption}."""
    folder = assets.path(asset)
    rows = json.loads((folder / "captions.json").read_text("utf-8"))
    return [(file, str(folder / file), [caption]) for file, caption in sorted(rows.items())]


def albums(name: str) -> Source:
    """Documents of two to four photographs, drawn by number: a line that counts them, then each in
    front of its caption.
    """
    pictures, rng = photos("photos", test=False).rows, np.random.default_rng(0)
    rows = [
        (str(number), rng.permutation(len(pictures))[: 2 + number % len(COUNTED)])
        for number in range(ALBUMS)
    ]

    def sample(row) -> Sample:
        key, chosen = row
        parts: list[str | ImageRef] = [f"{COUNTED[len(chosen) - 2]} photographs."]
        for _, file, (caption,) in (pictures[i] for i in chosen):
            parts += [ImageRef(file), caption]
        return interleaved.document(name, key, parts, " ")

    return Source(name, rows, sample)


BUILT_IN: dict[str, Callable[[str], Source]] = {
    "easy-vqa": partial(easy_vqa, split="train"),
    "easy-vqa-test": partial(easy_vqa, split="test"),
    "emoji-en": partial(emoji, language="en", split="train"),
    "emoji-zh": partial(emoji, language="zh", split="train"),
    "emoji-en-test": partial(emoji, language="en", split="test"),
    "emoji-hands-en": partial(emoji, language="en", split="train", hands=HANDS[1:]),
    "emoji-hands-zh": partial(emoji, language="zh", split="train", hands=HANDS[1:]),
    "emoji-style-en": partial(emoji, language="en", split="train", hands=(NEW_HAND,)),
    "photographs-en": partial(photographs, language="en"),
    "photographs-zh": partial(photographs, language="zh"),
    "photos": partial(photos, test=False),
    "photos-test": partial(photos, test=True),
    "clips": clips,
    "albums": albums,
    **{
        f"scenes-{language}{suffix}": partial(
            open_scenes, path="assets", language=language, split=split, scenes=scenes
        )
        for language in ("en", "zh")
        for suffix, split, scenes in (
            ("", "train", "6000"),
            *((f"-{split}", split, "1000") for split in ("validation", "test", "known", "style")),
        )
    },
    "signs-en": lambda name: book.open_book(
        "en", open_source, name, "emoji-en", size="160", characters="24", **SIGNS
    ),
    "signs-zh": lambda name: book.open_book(
        "zh", open_source, name, "emoji-zh", size="160", characters="8", **SIGNS
    ),
}
ROW_FORMATS: dict[str, Callable[..., Sample]] = {  # over rows of any container
    "img2dataset": captions.img2dataset,
    "llava": chat.llava,
    "qwen-vl": chat.qwen_vl,
    "mmc4": interleaved.mmc4,
    "grit": grounding.grit,
    "synthdog": plain.synthdog,
    "text": plain.text,
    "built": built.built,
}


def downloaded(file: str) -> Sequence[int] | None:
    """The rows of img2dataset's table whose pictures it got; None for another file."""
    from evlm_jax.data.containers import parquet  # imported where a parquet file is read

    return parquet.downloaded(file) if file.endswith(".parquet") else None


FORMATS: dict[str, Callable[..., Sequence[Sample]]] = {
    **{kind: by_row(mapper) for kind, mapper in ROW_FORMATS.items()},
    "llava": by_row(chat.llava, counter=chat.dialog_counter),
    **{kind: by_row(ROW_FORMATS[kind], downloaded) for kind in ("img2dataset", "grit")},
    "folder": captions.folder,
    "coco-captions": captions.coco,
    "karpathy": captions.karpathy,
    "obelics": interleaved.obelics,
    "refcoco": grounding.refcoco,
    "detected": scans.detected,
    "ocr-en": partial(book.open_book, "en", open_source),
    "ocr-zh": partial(book.open_book, "zh", open_source),
    "scenes": open_scenes,
    **{kind: partial(vqa.open_set, fields) for kind, fields in vqa.SETS.items()},
}
