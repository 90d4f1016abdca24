"""lmms-eval's model interface over a checkpoint of ours: the same prompts, batches and generation as `evlm eval`."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from evlm_jax.data import video
from evlm_jax.data.samples import ImageRef, Sample, question
from evlm_jax.data.sources import SUFFIXES
from evlm_jax.evals.answer import Generated, prompt_text
from evlm_jax.evals.choice import answer_losses
from evlm_jax.evals.runner import chunks
from evlm_jax.evals.task import Question
from evlm_jax.generate import ROWS, Generator
from evlm_jax.run import features_of, load_trained

TOKENS = 1024  # most new ones of an answer whose task does not say
Visuals = tuple[tuple[ImageRef, ...], ...]


class EvlmJax(lmms):
    """The newest checkpoint of a run. `--model_args checkpoint=DIR,frames=16`.

    Images are PIL images or paths, videos are paths. They stand in front of the text, or at its <image> markers.
    """

    def __init__(self, checkpoint: str, frames: int = 16, batch_size: int | str = ROWS, device: str | None = None, max_batch_size=None):
        """`device` and `max_batch_size` are lmms-eval's; JAX takes the devices that it finds."""
        super().__init__()
        trained = load_trained(checkpoint)
        self.trained, self.features, self.frames, self.rows = trained, features_of(trained), int(frames), int(batch_size)
        look = self.features.get if self.features else None
        self.generator = Generator(trained.model, trained.tokenizer, features=look, rows=self.rows)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut where a text of `until` begins."""
        asked = []
        for text, how, visuals, *place in (request.args for request in requests):
            asked.append((text, how, lambda visuals=visuals, place=place: visuals(self._doc(*place))))
        return self._generate(asked)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[tuple[str, ...]]:
        """The answers of all rounds. From the answers so far the task makes the next round's text and images, or says that it is over."""
        rounds = [Rounds(self._doc(*place), *rest) for *rest, place in ((*args[:4], args[4:]) for args in (r.args for r in requests))]
        while active := [each for each in rounds if not each.over]:
            answers = self._generate([(each.text, each.how, lambda each=each: each.visuals) for each in active])
            for each, answer in zip(active, answers, strict=True):
                each.said(answer)
        return [tuple(each.answers) for each in rounds]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation as the answer, whether greedy generation would begin with it)."""
        samples, found, template = [], [(0.0, True)] * len(requests), self.generator.cfg.data.template  # as nothing said is
        with tempfile.TemporaryDirectory() as folder:
            for i, (text, target, visuals, *place) in enumerate(request.args for request in requests):
                doc = self._doc(*place)
                asked = Question(str(i), text, stored(visuals(doc), Path(folder), self.frames), None, str(i))
                if answer := (target if isinstance(target, str) else target(doc)).removeprefix(" "):  # the template has the space
                    samples.append(Sample(str(i), "lmms-eval", asked.visuals, (question(prompt_text(asked, template), answer),)))
            losses = answer_losses(self.trained.model, self.trained.tokenizer, samples, self.features, self.rows, end=False)
        for sample, (loss, greedy) in zip(samples, losses, strict=True):
            found[int(sample.key)] = (-float(loss[0]), bool(greedy[0]))
        return found

    def _doc(self, number: int, task: str, split: str):
        return self.task_dict[task][split][number]

    def _generate(self, asked: Sequence[tuple[str, dict, Callable[[], Sequence]]]) -> list[str]:
        """Answers of (text, generation options, function that gives images or videos)."""
        answers, groups = [""] * len(asked), {}
        for i, (_, how, _) in enumerate(asked):
            groups.setdefault(options(how), []).append(i)
        bar = tqdm(total=len(asked), desc="evlm_jax", unit="answer")
        for (tokens, temperature, top_p, until), places in groups.items():
            answer = Generated(self.generator, tokens, temperature=temperature, top_p=top_p)
            bare = [Question(str(i), asked[i][0], (), None, f"{i:09}") for i in places]
            for chunk in chunks(bare, answer):
                with tempfile.TemporaryDirectory() as folder:  # images of one chunk at a time
                    whole = [replace(bare[k], visuals=stored(asked[places[k]][2](), Path(folder), self.frames)) for k in chunk]
                    for k, row in zip(chunk, answer(whole), strict=True):
                        answers[places[k]] = cut(row["prediction"], until)
                bar.update(len(chunk))
        bar.close()
        return answers


class Rounds:
    """One document's conversation with its task: `args` of a request of several rounds."""

    def __init__(self, doc, text: str, how: dict, visuals: Callable, following: Callable):
        self.doc, self.text, self.how, self.visuals, self.following = doc, text, how, visuals(doc), following
        self.answers, self.info, self.over, self.number = [], None, False, 0

    def said(self, answer: str) -> None:
        """Takes an answer, and the next round from the task."""
        self.answers, self.number = [*self.answers, answer], self.number + 1
        last = {"previous_output": self.answers, "round_idx": self.number, "previous_round_info": self.info}
        self.visuals, self.text, self.over, answers, self.info = self.following(self.doc, **last)
        self.answers = list(answers)


def options(how: dict) -> tuple[int, float, float, tuple[str, ...]]:
    """(most new tokens, temperature, top_p, texts that end an answer) of lmms-eval's generation options.

    Raises ValueError for beam search.
    """
    if how.get("num_beams", 1) not in (None, 1):
        raise ValueError(f"evlm_jax: num_beams = {how['num_beams']}: there is no beam search; set num_beams=1 with --gen_kwargs")
    temperature = float(how.get("temperature") or 0.0) if how.get("do_sample", True) else 0.0
    until = how.get("until") or ()
    ends = (until,) if isinstance(until, str) else tuple(until)
    return int(how.get("max_new_tokens") or TOKENS), temperature, float(how.get("top_p") or 1.0), ends


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the ends."""
    return text[: min((at for end in until if end and (at := text.find(end)) >= 0), default=len(text))]


def stored(given: Sequence, folder: Path, frames: int) -> Visuals:
    """Images as files of the folder, named by content; paths of images and videos as they are.

    Raises ValueError for anything else.
    """
    found = []
    for visual in given or ():
        if isinstance(visual, Image.Image):
            image = visual.convert("RGB")
            file = folder / f"{hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()}.png"
            if not file.exists():
                image.save(file, compress_level=1)
            found.append((ImageRef(str(file)),))
        elif isinstance(visual, str | Path):
            suffix = Path(visual).suffix.lower()
            found.append((ImageRef(str(visual)),) if suffix in SUFFIXES else video.uniform(visual, frames))
        else:
            raise ValueError(f"evlm_jax: a visual is {type(visual).__name__}; images are PIL images or paths, videos are paths")
    return tuple(found)
