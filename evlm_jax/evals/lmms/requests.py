"""Requests of lmms-eval, as questions: what a model of ours, in JAX or in PyTorch, is asked."""

import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from evlm_jax.convert.torch_model.values_evlm import eight_bits
from evlm_jax.data import video
from evlm_jax.data.containers import files
from evlm_jax.data.samples import ImageRef
from evlm_jax.evals.answer import similar
from evlm_jax.evals.runner import chunks
from evlm_jax.evals.task import Question
from evlm_jax.evals.tasks.official import SUFFIXES

TOKENS = 1024  # most new ones of an answer whose task does not say
Visuals = tuple[tuple[ImageRef, ...], ...]


class Requests(lmms):
    """Answers requests of lmms-eval. Images are PIL images or paths, videos are paths.

    They precede the text, or replace its <image> markers.
    """

    order = staticmethod(similar)

    def __init__(self, frames: int, chunk: int):
        """`frames`: of a video, uniformly sampled; `chunk`: questions answered together."""
        super().__init__()
        self.frames, self.chunk = int(frames), int(chunk)

    @abstractmethod
    def answer(
        self, questions: Sequence[Question], tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        """Generates; temperature 0 is greedy."""

    @abstractmethod
    def losses(self, asked: Sequence[tuple[Question, str]]) -> list[tuple[float, bool]]:
        """Loss of each answer in nats, without the token that ends it, and whether greedy
        generation would begin with it.
        """

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut where a text of `until` begins."""
        asked = []
        for text, how, visuals, *place in (request.args for request in requests):
            asked.append(
                (text, how, lambda visuals=visuals, place=place: visuals(self._doc(*place)))
            )
        return self._generate(asked)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[tuple[str, ...]]:
        """The answers of all rounds.

        The task makes the next round's text and images from the answers so far, or ends the rounds.
        """
        rounds = [
            Rounds(self._doc(*place), *rest)
            for *rest, place in ((*args[:4], args[4:]) for args in (r.args for r in requests))
        ]
        while active := [each for each in rounds if not each.over]:
            answers = self._generate(
                [(each.text, each.how, lambda each=each: each.visuals) for each in active]
            )
            for each, answer in zip(active, answers, strict=True):
                each.said(answer)
        return [tuple(each.answers) for each in rounds]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation as the answer, whether greedy generation would begin
        with it).
        """
        found, asked = [(0.0, True)] * len(requests), {}  # as an empty continuation is
        with tempfile.TemporaryDirectory() as folder:
            for i, (text, target, visuals, *place) in enumerate(
                request.args for request in requests
            ):
                doc = self._doc(*place)
                if answer := (target if isinstance(target, str) else target(doc)).removeprefix(
                    " "
                ):  # the template has the space
                    seen = stored(visuals(doc), Path(folder), self.frames)
                    asked[i] = (Question(str(i), text, seen, None, str(i)), answer)
            for i, (loss, greedy) in zip(asked, self.losses(list(asked.values())), strict=True):
                found[i] = (-loss, greedy)
        return found

    def _doc(self, number: int, task: str, split: str):
        return self.task_dict[task][split][number]

    def _generate(self, asked: Sequence[tuple[str, dict, Callable[[], Sequence]]]) -> list[str]:
        """Answers of (text, generation options, function that gives images or videos)."""
        answers, groups = [""] * len(asked), {}
        for i, (_, how, _) in enumerate(asked):
            groups.setdefault(options(how), []).append(i)
        bar = tqdm(total=len(asked), desc=type(self).__name__, unit="answer")
        for (tokens, temperature, top_p, until), places in groups.items():
            bare = [Question(str(i), asked[i][0], (), None, f"{i:09}") for i in places]
            for chunk in chunks(bare, self):
                with tempfile.TemporaryDirectory() as folder:  # images of one chunk at a time
                    whole = [
                        replace(
                            bare[k],
                            visuals=stored(asked[places[k]][2](), Path(folder), self.frames),
                        )
                        for k in chunk
                    ]
                    for k, answer in zip(
                        chunk, self.answer(whole, tokens, temperature, top_p), strict=True
                    ):
                        answers[places[k]] = cut(answer, until)
                bar.update(len(chunk))
        bar.close()
        return answers


class Rounds:
    """One document's conversation with its task: `args` of a request of several rounds."""

    def __init__(self, doc, text: str, how: dict, visuals: Callable, following: Callable):
        self.doc, self.text, self.how, self.visuals, self.following = (
            doc,
            text,
            how,
            visuals(doc),
            following,
        )
        self.answers, self.info, self.over, self.number = [], None, False, 0

    def said(self, answer: str) -> None:
        """Adds an answer, and requests the next round from the task."""
        self.answers, self.number = [*self.answers, answer], self.number + 1
        last = {
            "previous_output": self.answers,
            "round_idx": self.number,
            "previous_round_info": self.info,
        }
        self.visuals, self.text, self.over, answers, self.info = self.following(self.doc, **last)
        self.answers = list(answers)


def options(how: dict) -> tuple[int, float, float, tuple[str, ...]]:
    """(most new tokens, temperature, top_p, texts that end an answer) of lmms-eval's generation
    options.

    Raises ValueError for beam search.
    """
    if how.get("num_beams", 1) not in (None, 1):
        raise ValueError(
            f"num_beams = {how['num_beams']}: there is no beam search; set num_beams=1 with"
            " --gen_kwargs"
        )
    temperature = float(how.get("temperature") or 0.0) if how.get("do_sample", True) else 0.0
    until = how.get("until") or ()
    ends = (until,) if isinstance(until, str) else tuple(until)
    return (
        int(how.get("max_new_tokens") or TOKENS),
        temperature,
        float(how.get("top_p") or 1.0) if temperature else 1.0,
        ends,
    )


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the ends."""
    return text[
        : min((at for end in until if end and (at := text.find(end)) >= 0), default=len(text))
    ]


def stored(given: Sequence, folder: Path, frames: int) -> Visuals:
    """Images as files of the folder, named by content; paths of images and videos as they are.

    Raises ValueError for anything else.
    """
    found = []
    for visual in given or ():
        if isinstance(visual, Image.Image):
            image = eight_bits(visual).convert("RGB")
            file = (
                folder
                / f"{hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()}.png"
            )
            if not file.exists():
                image.save(file, compress_level=1)
            found.append((ImageRef(str(file)),))
        elif isinstance(visual, str | Path) and not files.remote(
            str(visual)
        ):  # a data set names no host to be asked
            suffix = Path(visual).suffix.lower()
            found.append(
                (ImageRef(str(visual)),) if suffix in SUFFIXES else video.sample(visual, frames)
            )
        else:
            told = repr(visual) if isinstance(visual, str) else type(visual).__name__
            raise ValueError(
                f"a visual is {told}; images are PIL images or paths, videos are paths of this disk"
            )
    return tuple(found)
