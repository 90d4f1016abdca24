"""What `import evlm_jax` offers (its docstring has examples): a model to ask, look into and
differentiate.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from PIL import Image

from evlm_jax.batch import Batch
from evlm_jax.checkpoint import store
from evlm_jax.cli import load_config
from evlm_jax.config import EVLMConfig, from_config_dict, ranges
from evlm_jax.convert.importer import read_export, vocabulary
from evlm_jax.data import image, pipeline, text
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal
from evlm_jax.data.stream import pieces
from evlm_jax.data.tokenizer import Tokenizer, load_tokenizer, source_of_run
from evlm_jax.generate import Generator, Room, encode_images
from evlm_jax.loss import loss_sums
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.report import figures
from evlm_jax.runs import model_of

Picture = str | os.PathLike | Image.Image | np.ndarray | ImageRef
Images = (
    Picture | Sequence[Picture | Sequence[Picture]] | None
)  # a list in the list is a video: its frames are seen together
BASE = (
    Path(__file__).parents[1] / "experiments" / "base.py"
)  # what an export does not say: sizes of rows, the optimizer
DTYPES = ("float32", "bfloat16")


def load(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    dtype: str | None = None,
    device: jax.Device | None = None,
) -> "Model":
    """A model from a folder: of a run, of `evlm convert import`, or of
    `evlm convert export --format hf`.

    Args:
      step: of a run; the newest where left out.
      dtype: "float32" or "bfloat16", of all parameters and of what is computed. Where left out
        parameters have the dtype in which they are stored, and a run computes as it was trained, an
        export in the dtype of its weights.
      device: that holds the model; the first where left out.
    Raises:
      FileNotFoundError: there is no model in `path`, or no such step.
      ValueError: what is there is damaged, or another kind of model.
    """
    path = os.fspath(path)
    if step is not None or store.steps(path):
        params, cfg = store.load_params(path, step)
        cfg = replace(cfg, init=replace(cfg.init, llm=source_of_run(path, cfg.init.llm)))
    else:
        base = load_config(str(BASE))
        params, cfg = read_export(
            _pixels(replace(base, data=replace(base.data, images=8, slots=8 * base.data.pool))),
            path,
        )
    return _placed(cfg, params, dtype, device)


def random(
    config: EVLMConfig | ml_collections.ConfigDict,
    seed: int = 0,
    *,
    dtype: str | None = None,
    device: jax.Device | None = None,
) -> "Model":
    """A model with new weights, towers included, as a function of `seed`; the gates of its
    cross-attention are closed.

    Args:
      config: as an experiment's get_config() returns it. Its init.llm says where the vocabulary is.
      dtype, device: as of `load`.
    """
    cfg = from_config_dict(config) if isinstance(config, ml_collections.ConfigDict) else config
    if not isinstance(cfg, EVLMConfig):
        raise ValueError(
            f"config is a {type(config).__name__}: give what an experiment's get_config() returns,"
            " or an EVLMConfig"
        )
    ranges.check(ranges.Seed, seed, "seed")
    state = _new(cfg, np.uint32(seed))
    return _placed(
        cfg,
        {name: np.asarray(array) for name, array in param_names.flatten(cfg, state).items()},
        dtype,
        device,
    )


def make_sample(*texts: str, images: Images = None) -> Sample:
    """A dialog about images to learn from, for `make_batch` and `Model.loss`.

    Args:
      texts: what user and assistant say, by turns, the assistant last; a single text is a caption,
        which the assistant says alone.
      images: one or several; they stand at the <image> marks of the texts, or where there is none
        in front of the first text.
    Raises:
      ValueError: marks and images differ in number, or the user has the last word.
    """
    if not texts or (len(texts) % 2 and len(texts) > 1):
        raise ValueError(
            f"a dialog of {len(texts)} texts: give a caption, or texts of user and assistant by"
            " turns, the assistant's last"
        )
    visuals = _visuals(images)
    first, *others = _marked(texts, visuals)
    roles = ("user", "assistant") if others else ("assistant",)
    turns = tuple(Turn(roles[i % 2], said) for i, said in enumerate((first, *others)))
    return Sample(first[:40], "library", visuals, (turns,))


def make_batch(
    samples: Sequence[Sample],
    config: EVLMConfig,
    tokenizer: Tokenizer | None = None,
    rows: int | None = None,
) -> Batch:
    """Samples in the form that the model and its loss read: tokenised, packed into rows of
    config.data, with their pictures.

    Each row has its own image slots, and pictures are pixels, also where training reads the taps of
    a frozen tower from a cache.

    Args:
      samples: of `make_sample`, or evlm_jax.data.samples.Sample with several dialogs about the same
        images.
      tokenizer: `Model.tokenizer`; read from config.init.llm where left out.
      rows: of the batch, the last of them empty if need be; as many as are needed where left out.
    Raises:
      ValueError: a sample fits no row, has no text to learn, or there are more than `rows`; a
        picture that cannot be read.
    """
    samples = [samples] if isinstance(samples, Sample) else list(samples)
    if not samples or not all(isinstance(sample, Sample) for sample in samples):
        kinds = ", ".join(sorted({type(sample).__name__ for sample in samples})) or "nothing"
        raise ValueError(f"samples are what evlm_jax.make_sample returns, got {kinds}")
    cfg, tokenizer = _pixels(config), tokenizer or load_tokenizer(config.init.llm)
    documents = [text.encode(sample, tokenizer, cfg) for sample in samples]
    made = [batch for batch, _, _ in pipeline.rows_in_order(documents, cfg, 1)]
    if rows is not None and len(made) > ranges.check(ranges.Positive, rows, "rows"):
        raise ValueError(
            f"{len(samples)} samples need {len(made)} rows of data.length = {cfg.data.length}, more"
            f" than rows = {rows}"
        )
    made += [pipeline.collate([[]], cfg, iter(()))[0]] * ((rows or 0) - len(made))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *made)


class Model:
    """A model with its tokenizer; `load` and `random` make them.

    Attributes:
      config: EVLMConfig, dataclasses.
      tokenizer: of the language model: encode, decode, and ids of special tokens by name.
    """

    def __init__(self, module: EVLM, tokenizer: Tokenizer):
        self.config, self.tokenizer = module.cfg, tokenizer
        self._graphdef, self._params = nnx.split(module)

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"evlm_jax.Model({self.config.name!r}, {count:,} parameters, {self.config.train.dtype})"
        )

    @property
    def params(self) -> nnx.State:
        """All parameters, a pytree of arrays, with the layers of a stack along a leading axis: for
        jax.grad, optax, your own shardings.
        """
        return self._params

    @property
    def module(self) -> EVLM:
        """The Flax module with the model's parameters."""
        return nnx.merge(
            self._graphdef, self.params
        )  # a new one: what is changed in it changes nothing here

    def with_params(self, params: nnx.State) -> "Model":
        """The same model with other parameters, in the structure of `params`: after an update,
        say.
        """
        return Model(nnx.merge(self._graphdef, params), self.tokenizer)

    def generate(
        self,
        prompt: str | Sequence[str],
        images: Images | Sequence[Images] = None,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        answers: int = 1,
        stream: bool = False,
    ) -> str | list[str] | list[list[str]] | Iterator[str]:
        """An answer to a prompt; or a list of them, to a list of prompts, in their order.
        `evlm generate` has the same options.

        Args:
          prompt: what the user says, without a template.
          images: of the prompt, one or several: paths, Pillow images, uint8 arrays; a list in the
            list is a video, whose frames are seen together. For a list of prompts, one entry a
            prompt.
          max_new_tokens: most tokens of an answer.
          temperature: 0 is greedy; the next three need more.
          top_k: draw from so many best tokens; 0: from all.
          top_p: draw from the smallest set of best tokens with this probability.
          min_p: draw from tokens with at least this share of the best one's probability.
          repetition_penalty: above 1, tokens that were there become less likely.
          stop: texts that end an answer and are no part of it.
          seed: of the draws; that of answer j to prompt i depends on (seed, i, j).
          answers: to each prompt; above 1, each prompt gets a list of them.
          stream: return an iterator over pieces of the one answer to one prompt, each as soon as it
            is known.
        Raises:
          ValueError: an option of another type or out of range; marks and images differ in number;
            a picture that cannot be read.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"a prompt is a text or a list of texts, got {type(prompt).__name__}")
        several = not isinstance(prompt, str)
        prompts = list(prompt) if several else [prompt]
        shown = images if several and images is not None else [images] * len(prompts)
        if several and (
            not isinstance(shown, Sequence) or isinstance(shown, str) or len(shown) != len(prompts)
        ):
            raise ValueError(
                f"images of {len(prompts)} prompts: give a list with one entry for each, its"
                " pictures or None"
            )
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"stop must be texts of at least one letter, got {stop!r}")
        options = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        options |= {
            "seed": seed,
            "stop_strings": stop,
            "num_return_sequences": answers,
            "max_new_tokens": max_new_tokens,
        }
        documents = [self._prompt(said, _visuals(those)) for said, those in zip(prompts, shown)]
        if stream:
            if several or answers != 1:
                raise ValueError(
                    "stream=True gives the pieces of one answer to one prompt: ask for one, or"
                    " leave it out"
                )
            return pieces(functools.partial(self._generator.generate, documents, **options))
        found = [answer.text for answer in self._generator.generate(documents, **options)]
        each = (
            found
            if answers == 1
            else [found[i : i + answers] for i in range(0, len(found), answers)]
        )
        return each if several else each[0]

    def logits(self, given: str | Sequence[int], images: Images = None) -> jax.Array:
        """float32 [T, vocab]: what follows each token of a text that stands alone, without a
        template, as captions are trained.

        Args:
          given: text, in front of which the vocabulary's BOS is put where it has one; or ids, as
            they are.
          images: they stand at the <image> marks of the text, or come first.
        """
        document = self._text(given, _visuals(images))
        if not len(document.tokens):
            raise ValueError("logits of no token: give a text of at least one letter")
        rows, cfg = [[document]], _sized(self.config, document)
        batch, damaged = pipeline.collate(rows, cfg, pipeline.load_pictures(rows, cfg, None))
        if damaged:
            raise image.ImageError(damaged[0].message)
        return _logits(self._graphdef, self.params, batch)[: len(document.tokens)]

    def features(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """The taps of the vision tower, float32: [G, S, V] of one picture, [n, G, S, V] of a list
        (vit.taps, tokens, width).
        """
        one = not isinstance(pictures, (list, tuple))
        refs = [_ref(picture) for picture in ([pictures] if one else pictures)]
        if not refs:
            raise ValueError("features of no picture: give at least one")
        taps = encode_images(
            self.module, lambda _, pixels: _encode(self._graphdef, self.params, pixels), 1, refs
        )
        return taps[0] if one else taps

    def loss(self, samples: Batch | Sequence[Sample], params: nnx.State | None = None) -> jax.Array:
        """What training minimises, in nats: the mean cross-entropy of all targets, with the
        experts' auxiliary loss where there are any.

        Args:
          samples: or the batch that `make_batch` makes of them, to use it several times.
          params: to differentiate by: jax.grad(lambda params: model.loss(batch,
            params))(model.params).
        """
        batch = (
            samples
            if isinstance(samples, Batch)
            else make_batch(samples, self.config, self.tokenizer)
        )
        return _loss(
            self._graphdef,
            max(1, len(self.config.data.sources)),
            self.params if params is None else params,
            batch,
        )

    def attention(self, prompt: str, images: Images, answer: str | None = None) -> list[dict]:
        """Where the model looks in the first image for each word of a question and its answer:
        [{"word", "grid", "predicted"}].

        grid: weights over the patches [g, g], the mean over layers and heads. Words of the question
          are looked up where they are read, words of the answer where they are predicted.
          evlm_jax.report.figures.overlay paints them over a picture.

        Args:
          answer: the model's own where left out.
        Raises:
          ValueError: no image, or a model whose cross-attention does not look at patches.
        """
        if not (visuals := _visuals(images)):
            raise ValueError("attention over no image: give at least one")
        if not figures.looks_at_patches(self.config):
            raise ValueError(
                "attention over the patches of a picture cannot be shown: the model has"
                f" {self.config.baseline}"
            )
        answer = self.generate(prompt, visuals) if answer is None else answer
        sample = make_sample(prompt, literal(answer), images=visuals)
        module = self.module
        module.cfg = _sized(self.config, text.encode(sample, self.tokenizer, self.config))
        return figures.word_maps(module, self.tokenizer, sample)

    def _prompt(self, said: str, visuals: tuple[tuple[ImageRef, ...], ...]) -> text.Document:
        return self._generator.prompt([Turn("user", *_marked([said], visuals))], visuals)

    def _text(
        self, given: str | Sequence[int], visuals: tuple[tuple[ImageRef, ...], ...]
    ) -> text.Document:
        """A document without targets."""
        stops = list(accumulate(map(len, visuals)))
        spans = [(stop - len(visual), stop) for stop, visual in zip(stops, visuals)]
        cfg, about = self.config, Sample("text", "library", visuals, ())
        if isinstance(given, str):
            template = text.Template(cfg.data.template, self.tokenizer)
            *parts, _ = template.dialog(
                [Turn("assistant", *_marked([given], visuals))], spans
            )  # without the token that ends it
            return text.lay_out(
                [text.whole_steps(parts, self.tokenizer, cfg.media)[0]], [()], about, cfg
            )
        front = [
            text.Media(frame, start, stop) for start, stop in spans for frame in range(start, stop)
        ]
        ids = [text.Token(token, False) for token in _ids(given, cfg.llm.vocab)]
        return text.lay_out(
            [text.steps(front + ids, self.tokenizer, cfg.media)[0]], [()], about, cfg
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.module, self.tokenizer)


# ----------------------------------------------------------------------------------------- compiled


@functools.partial(jax.jit, static_argnums=0)
def _new(cfg: EVLMConfig, seed: jax.Array) -> nnx.State:
    return nnx.state(EVLM(cfg, nnx.Rngs(jax.random.key(seed))))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    """Of the first row, [T, vocab]."""
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden(batch)[0])


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: nnx.State, pixels: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).encode(pixels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(graphdef: nnx.GraphDef, sources: int, params: nnx.State, batch: Batch) -> jax.Array:
    total, sums = loss_sums(nnx.merge(graphdef, params), batch, sources)
    return total / jnp.maximum(sums["count"].sum(), 1)


# ----------------------------------------------------------------------------------- from arguments


def _placed(
    cfg: EVLMConfig, params: store.Arrays, dtype: str | None, device: jax.Device | None
) -> Model:
    """Parameters on a device, in a dtype; what the config says of cached taps does not count
    here.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}, or None for what is stored"
            )
        cfg = replace(cfg, train=replace(cfg.train, dtype=dtype, matmul_precision=dtype))
        params = {name: array.astype(dtype, copy=False) for name, array in params.items()}
    tokenizer = vocabulary(cfg, cfg.init.llm)
    return Model(model_of(cfg, params, devices=[device] if device else ())[0], tokenizer)


def _pixels(cfg: EVLMConfig) -> EVLMConfig:
    """Rows with their own image slots, whose pictures are pixels."""
    cfg = cfg.apart
    return replace(cfg, data=replace(cfg.data, cache_features=False))


def _sized(cfg: EVLMConfig, document: text.Document) -> EVLMConfig:
    """A row just for this document, in one of a few sizes, so that few programs are compiled."""
    room = Room.of([document])
    pairs = room.pairs(cfg.tile, document.pairs) if cfg.tile else room.images
    sizes = {
        "length": room.length,
        "targets": room.length,
        "images": room.images,
        "slots": room.images,
        "pairs": max(pairs, room.images),
    }
    return replace(cfg, data=replace(cfg.data, pool=1, cache_features=False, **sizes))


def _visuals(images: Images) -> tuple[tuple[ImageRef, ...], ...]:
    """Of an argument `images`: the frames of each visual."""
    if images is None:
        return ()
    if not isinstance(images, (list, tuple)):
        return ((_ref(images),),)
    visuals = tuple(
        tuple(map(_ref, one)) if isinstance(one, (list, tuple)) else (_ref(one),) for one in images
    )
    if () in visuals:
        raise ValueError(
            "images has a video without frames: give at least one picture in each list"
        )
    return visuals


def _ref(picture: Picture) -> ImageRef:
    if isinstance(picture, (str, os.PathLike)):
        return ImageRef(os.fspath(picture))
    return picture if isinstance(picture, ImageRef) else image.in_memory(picture)


def _marked(texts: Sequence[str], visuals: Sequence[tuple[ImageRef, ...]]) -> list[str]:
    """Texts with a mark for each visual.

    Raises ValueError where that is not so, or something is no text.
    """
    for said in texts:
        if not isinstance(said, str):
            raise ValueError(f"a text is a str, got {type(said).__name__}")
        said.encode()  # UnicodeEncodeError, a ValueError, says which letter is none
    if (marks := sum(said.count(MARKER) for said in texts)) not in (0, len(visuals)):
        raise ValueError(
            f"the text has {marks} {MARKER} marks for {len(visuals)} images and videos: write one"
            " for each, or none"
        )
    return list(texts) if marks else [MARKER * len(visuals) + texts[0], *texts[1:]]


def _ids(given: Sequence[int], vocab: int) -> list[int]:
    ids = np.asarray(given)
    if (
        ids.ndim != 1
        or not ids.size
        or ids.dtype.kind not in "iu"
        or ids.min() < 0
        or ids.max() >= vocab
    ):
        raise ValueError(
            f"give a text, or a list of ids from 0 to {vocab - 1}, got {type(given).__name__} of"
            f" shape {list(ids.shape)}"
        )
    return ids.tolist()
