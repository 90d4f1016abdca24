"""Where samples come from, by the names used in `data.sources`: a container of rows, and a mapper that turns a row into a Sample.

easy-vqa  easy-vqa-test              the published splits; one sample an image with all its questions
emoji-en  emoji-zh  emoji-en-test    drawings and their names; the splits share no code point
photos  clips                        the few real photographs and videos of the demo, with captions
jsonl:PATH                           rows in LLaVA's layout (.jsonl, or .json with one list); images relative to the file
folder:PATH                          images with a caption in a .txt of the same stem
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evlm_jax import assets
from evlm_jax.data import video
from evlm_jax.data.samples import MARKER, ImageRef, Sample, SampleError, Turn, question

DESCRIBE = f"{MARKER}Describe this image."
DESCRIBE_VIDEO = f"{MARKER}Describe this video."
NAME = {"en": f"{MARKER}Name this emoji.", "zh": f"{MARKER}说出这个表情的名字。"}
FRAMES = 16  # of a video whose row does not say `frames` (the paper shows 16)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Source(Sequence[Sample]):
    """Random access to samples; rows are mapped when asked for.

    Args:
      name: as in `data.sources`.
      rows: any sequence.
      sample: mapper from a row to its Sample.
      dialogs: mapper from a row to its number of dialogs; by default every row has one.
    """

    def __init__(self, name: str, rows: Sequence, sample: Callable[[object], Sample], dialogs: Callable[[object], int] | None = None):
        if not rows:
            raise ValueError(f"data source {name!r} has no samples")
        self.name, self.rows, self._sample, self._dialogs = name, rows, sample, dialogs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self.rows[index])

    def dialog_counts(self) -> list[int]:
        """Dialogs of every sample, without building the samples."""
        return [1] * len(self) if self._dialogs is None else [self._dialogs(row) for row in self.rows]


def open_source(name: str) -> Source:
    """The source of this name. Raises ValueError for an unknown one, AssetError if its files were not fetched."""
    kind, colon, path = name.partition(":")
    if colon and kind in LOCAL:
        return LOCAL[kind](name, Path(path))
    if name in BUILT_IN:
        return BUILT_IN[name](name)
    known = [*BUILT_IN, *(f"{kind}:PATH" for kind in LOCAL)]
    raise ValueError(f"config: data.sources: unknown source {name!r}; use one of {', '.join(known)}")


def easy_vqa(name: str, split: str) -> Source:
    """easy-VQA in the layout of its package: {split}/questions.json = [[question, answer, image number], ...], {split}/images/N.png."""
    folder = assets.path("easy-vqa") / split
    by_image: dict[int, list[tuple[Turn, Turn]]] = {}
    for text, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        by_image.setdefault(number, []).append(question(MARKER + text, answer))

    def sample(row) -> Sample:
        number, dialogs = row
        return Sample(str(number), name, ((ImageRef(str(folder / "images" / f"{number}.png")),),), tuple(dialogs))

    return Source(name, sorted(by_image.items()), sample, dialogs=lambda row: len(row[1]))


def emoji(name: str, language: str, split: str) -> Source:
    """Drawings CODE.png and names.json = {code: {language: name, "split": ...}}."""
    folder = assets.path("openmoji")
    facts = json.loads((folder / "names.json").read_text("utf-8"))
    rows = [(code, fact[language]) for code, fact in sorted(facts.items()) if fact["split"] == split]
    return Source(name, rows, lambda row: _captioned(name, row[0], folder / f"{row[0]}.png", NAME[language], row[1]))


def captioned(name: str) -> Source:
    """An asset with captions.json = {file: caption}; its videos are seen as uniform frames."""
    folder = assets.path(name)
    rows = sorted(json.loads((folder / "captions.json").read_text("utf-8")).items())
    prompt = DESCRIBE_VIDEO if name == "clips" else DESCRIBE
    return Source(name, rows, lambda row: _captioned(name, row[0], folder / row[0], prompt, row[1]))


def folder(name: str, path: Path) -> Source:
    """Images anywhere below `path`, each with its caption in a .txt beside it."""
    rows = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if bare := [file for file in rows if not file.with_suffix(".txt").exists()]:
        raise ValueError(f"data source {name!r}: {len(bare)} images have no caption file, the first is {bare[0].with_suffix('.txt')}")

    def sample(file: Path) -> Sample:
        return _captioned(name, str(file.relative_to(path)), file, DESCRIBE, file.with_suffix(".txt").read_text("utf-8").strip())

    return Source(name, rows, sample)


def jsonl(name: str, path: Path) -> Source:
    """LLaVA's layout: {"id", "image": str or list, "conversations": [{"from": "human" or "gpt", "value": text with <image>}]}.

    A row may instead name a "video" (marker `<video>` or `<image>`), with its number of "frames"; one with neither is text.
    """
    return Source(name, Lines(path) if path.suffix != ".json" else json.loads(path.read_text("utf-8")), partial(llava, name, path.parent))


def llava(name: str, root: Path, row: dict) -> Sample:
    """One row of LLaVA's layout. Raises SampleError naming the row's id for what it lacks."""
    key = str(row.get("id", row.get("image", row.get("video", "?"))))
    roles = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
    try:
        images = row.get("image", [])
        visuals = [(ImageRef(str(root / image)),) for image in ([images] if isinstance(images, str) else images)]
        if "video" in row:
            visuals.append(video.uniform(root / row["video"], row.get("frames", FRAMES)))
        turns = tuple(Turn(roles[turn["from"]], turn["value"].replace("<video>", MARKER)) for turn in row["conversations"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SampleError(f"sample {name}/{key}: {type(error).__name__}: {error}") from error
    return Sample(key, name, tuple(visuals), (turns,))


class Lines(Sequence):
    """The rows of a .jsonl file: read one by one, by their places in the file."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            starts = [0]
            for line in file:
                starts.append(starts[-1] + len(line))
                if not line.strip():
                    starts.pop(-2)
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise SampleError(f"{self.path}: row {index + 1}: {error}") from error


def _captioned(name: str, key: str, file: Path, prompt: str, caption: str) -> Sample:
    frames = video.uniform(file, FRAMES) if file.suffix == ".mp4" else (ImageRef(str(file)),)
    return Sample(key, name, (frames,), (question(prompt, caption),))


BUILT_IN: dict[str, Callable[[str], Source]] = {
    "easy-vqa": partial(easy_vqa, split="train"),
    "easy-vqa-test": partial(easy_vqa, split="test"),
    "emoji-en": partial(emoji, language="en", split="train"),
    "emoji-zh": partial(emoji, language="zh", split="train"),
    "emoji-en-test": partial(emoji, language="en", split="test"),
    "photos": captioned,
    "clips": captioned,
}
LOCAL: dict[str, Callable[[str, Path], Source]] = {"jsonl": jsonl, "folder": folder}
