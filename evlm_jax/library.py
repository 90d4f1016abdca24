"""What `import evlm_jax` offers, which has examples: a model to ask, look into, differentiate."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.checkpoint import store
from evlm_jax.config import EVLMConfig, MeshConfig, from_config_dict, ranges
from evlm_jax.config.load import load_config
from evlm_jax.convert.importer import read_export, vocabulary
from evlm_jax.data import image, pipeline, text
from evlm_jax.data.features import encode_images
from evlm_jax.data.image import Images, Picture, visuals_of
from evlm_jax.data.samples import Sample, Turn, literal, marked
from evlm_jax.data.stream import pieces
from evlm_jax.data.tokenizer import Tokenizer, load_tokenizer, source_of_run
from evlm_jax.generate import Generator
from evlm_jax.loss import loss_sums
from evlm_jax.models import param_names, quant
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.distributed import fetch_to_host
from evlm_jax.parallel.mesh import Layout, jit
from evlm_jax.prompts import Room
from evlm_jax.report import attention_maps
from evlm_jax.runs import model_of, random_params, save_model

# What an export does not say: sizes of rows, the optimizer.
BASE = Path(__file__).parents[1] / "experiments" / "base.py"
DTYPES = ("float32", "bfloat16")
Devices = jax.Device | Sequence[jax.Device] | None


def load(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    dtype: str | None = None,
    devices: Devices = None,
) -> "Model":
    """A model from a folder: of a run, of `evlm convert import`, or of `evlm convert export
    --format hf`.

    Args:
      step: of a run; by default the newest.
      dtype: "float32" or "bfloat16", of all parameters and activations. By default parameters have
        the dtype in which they are stored, and a run computes as it was trained, an export in the
        dtype of its weights.
      devices: one device for the whole model, by default the first; or several, over which its
        parameters and the rows of a batch are sharded.
    Raises:
      FileNotFoundError: there is no model in `path`, or no such step.
      ValueError: the model is damaged, or of another kind; several devices do not divide its
        layers.
    """
    if not isinstance(path, (str, os.PathLike)) or not (path := os.fspath(path)):
        raise ValueError(f"path is {path!r}: give the folder of a run, an import or an export")
    step = step if step is None else ranges.check(ranges.Count, step, "step")
    if step is not None or store.steps(path):
        params, cfg = store.load_params(path, step)
        cfg = replace(cfg, init=replace(cfg.init, llm=source_of_run(path, cfg.init.llm)))
    else:
        base = load_config(str(BASE))
        data = replace(base.data, images=8, slots=8 * base.data.image_group)
        params, cfg = read_export(_pixels(replace(base, data=data)), path)
    return _placed(cfg, params, dtype, devices)


def random(
    config: EVLMConfig | ml_collections.ConfigDict,
    seed: int = 0,
    *,
    dtype: str | None = None,
    devices: Devices = None,
) -> "Model":
    """A model with new weights, towers included, as a function of `seed`; the gates of its
    cross-attention are closed.

    Args:
      config: the result of an experiment's get_config(). Its init.llm is where the vocabulary is.
      dtype: as of `load`.
      devices: as of `load`.
    """
    cfg = from_config_dict(config) if isinstance(config, ml_collections.ConfigDict) else config
    ranges.check_type("config", cfg, EVLMConfig, "give what an experiment's get_config() returns")
    ranges.check(ranges.Seed, seed, "seed")
    return _placed(cfg, random_params(cfg, seed), dtype, devices)


def make_sample(*texts: str, images: Images = None) -> Sample:
    """A dialog about images to learn from, for `make_batch` and `Model.loss`.

    Args:
      texts: turns of user and assistant, alternating, the assistant's last; a single text is a
        caption, the assistant's alone.
      images: one or several; they replace the `<image>` marks of the texts, or where there are none
        precede the first text.
    Raises:
      ValueError: marks and images differ in number, or the user has the last turn.
    """
    if not texts or (len(texts) % 2 and len(texts) > 1):
        raise ValueError(
            f"a dialog of {len(texts)} texts: give a caption, or user and assistant by turns"
        )
    visuals = visuals_of(images)
    first, *others = marked(texts, len(visuals))
    roles = ("user", "assistant") if others else ("assistant",)
    turns = tuple(Turn(roles[i % 2], said) for i, said in enumerate((first, *others)))
    return Sample(first[:40], "library", visuals, (turns,))


def make_batch(
    samples: Sequence[Sample], config: EVLMConfig, tokenizer: Tokenizer | None = None, rows: int = 1
) -> Batch:
    """Samples in the form that the model and its loss read: tokenised, packed into rows of
    config.data, with their pictures.

    Each row has its own image slots, and pictures are pixels, also where training reads the taps of
    a frozen tower from a cache.

    Args:
      samples: of `make_sample`, or evlm_jax.data.samples.Sample with several dialogs about the same
        images.
      tokenizer: `Model.tokenizer`; read from config.init.llm where left out.
      rows: the batch has a multiple of so many, the last ones empty if need be.
    Raises:
      ValueError: a sample fits no row, or has no text to learn; a picture that cannot be read.
    """
    samples = list(samples) if isinstance(samples, Iterable) else [samples]
    if not samples or not all(isinstance(sample, Sample) for sample in samples):
        kinds = ", ".join(sorted({type(sample).__name__ for sample in samples})) or "nothing"
        raise ValueError(f"samples are what evlm_jax.make_sample returns, got {kinds}")
    cfg = _pixels(config)
    tokenizer = load_tokenizer(config.init.llm) if tokenizer is None else tokenizer
    ranges.check_type("tokenizer", tokenizer, Tokenizer, "give Model.tokenizer, or leave it out")
    documents = [text.encode(sample, tokenizer, cfg) for sample in samples]
    made = [batch for batch, _, _ in pipeline.rows_in_order(documents, cfg, 1)]
    lacking = -len(made) % ranges.check(ranges.Positive, rows, "rows")
    made += [pipeline.collate([[]], cfg, iter(()))[0]] * lacking
    return jax.tree.map(lambda *parts: np.concatenate(parts), *made)


class Model:
    """A model with its tokenizer; `load` and `random` make them.

    Attributes:
      config: EVLMConfig, dataclasses.
      tokenizer: of the language model: encode, decode, and ids of special tokens by name.
    """

    def __init__(self, module: EVLM, tokenizer: Tokenizer, layout: Layout | None = None):
        self.config, self.tokenizer, self._layout = module.cfg, tokenizer, layout
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
        """A Flax module with the model's parameters. What is changed in it changes nothing here."""
        return nnx.merge(self._graphdef, self.params)

    def with_params(self, params: nnx.State) -> "Model":
        """The same model with other parameters, in the structure of `params`, else ValueError."""
        params = param_names.fitting(self.params, params)
        return Model(nnx.merge(self._graphdef, params), self.tokenizer, self._layout)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `load` reads and every command of `evlm` accepts as a run: to export
        it, to evaluate it, or to train from it (`evlm train --init`).

        Raises FileExistsError where `folder` exists.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"folder is {folder!r}: give the path of a new one")
        params = jax.device_get(param_names.flatten(self.config, self.params))
        save_model(self.config, params, self.tokenizer, os.fspath(folder))

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
          stream: return an iterator over pieces of the one answer to one prompt, as they come.
        Raises:
          ValueError: an option of another type or out of range; marks and images differ in number;
            a picture that cannot be read.
        """
        documents, several = self._documents(prompt, images), not isinstance(prompt, str)
        ask = functools.partial(
            self._generator.generate,
            documents,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_strings=stop,
            num_return_sequences=answers,
        )
        if stream:
            if several or answers != 1:
                raise ValueError("stream=True gives pieces of one answer: ask for one only")
            return pieces(ask)
        found = [answer.text for answer in ask()]
        if answers > 1:
            found = [found[first : first + answers] for first in range(0, len(found), answers)]
        return found if several else found[0]

    def logits(self, given: str | Sequence[int], images: Images = None) -> jax.Array:
        """Logits, float32 [T, vocab], of the token that follows each token of a text alone, without
        a template, as captions are trained.

        Args:
          given: text, to which the vocabulary's BOS is prepended where it has one; or ids,
            unchanged.
          images: they replace the `<image>` marks of the text, or precede it.
        """
        document = text.alone(given, visuals_of(images), self.tokenizer, self.config)
        rows = [[document], *[[]] * (self._rows - 1)]
        cfg = Room.of([document]).row(self.config, document)
        batch, damaged = pipeline.collate(rows, cfg, pipeline.load_pictures(rows, cfg, None))
        if damaged:
            raise image.ImageError(damaged[0].message)
        found = _on(self._layout, _logits)(self.module, batch)
        return found[: len(document.tokens)]

    def features(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """The taps of the vision tower, float32: [G, S, V] of one picture, [n, G, S, V] of a list
        (vit.taps, tokens, width).
        """
        one = not isinstance(pictures, (list, tuple))
        refs = [ref for (ref,) in visuals_of([pictures] if one else pictures)]
        if not refs:
            raise ValueError("features of no picture: give at least one")
        together = self._layout.parts("pictures") if self._layout else 1
        encode = functools.partial(_on(self._layout, EVLM.encode), self.module)
        taps = encode_images(self.config, lambda p: fetch_to_host(encode(p)), together, refs)
        return taps[0] if one else taps

    def loss(self, samples: Batch | Sequence[Sample], params: nnx.State | None = None) -> jax.Array:
        """The training loss in nats: mean cross-entropy of all targets, plus the experts' auxiliary
        loss where there are any.

        Args:
          samples: or a batch that `make_batch` made of them, to use it several times.
          params: to differentiate by, in place of the model's own.
        """
        if not isinstance(samples, Batch):
            samples = make_batch(samples, self.config, self.tokenizer, self._rows)
        params = self.params if params is None else param_names.fitting(self.params, params)
        return _on(self._layout, _loss)(nnx.merge(self._graphdef, params), samples)

    def attention(self, prompt: str, images: Images, answer: str | None = None) -> list[dict]:
        """Cross-attention to the first image of each word of a question and its answer: [{"word",
        "grid", "predicted"}].

        A grid has weights over the patches [g, g], the mean over layers and heads. Weights of the
        question's words are those of the position that reads them, of the answer's words of the one
        that predicts them. evlm_jax.report.figures.overlay paints a grid over a picture.

        Args:
          answer: by default the model's own.
        Raises:
          ValueError: no image, or a model whose cross-attention does not attend to patches.
        """
        if not (visuals := visuals_of(images)):
            raise ValueError("attention over no image: give at least one")
        if not attention_maps.looks_at_patches(self.config):
            raise ValueError(
                f"attention over a picture cannot be shown: the model has {self.config.baseline}"
            )
        answer = self.generate(prompt, visuals) if answer is None else answer
        sample = make_sample(prompt, literal(answer), images=visuals)
        module = self.module
        document = text.encode(sample, self.tokenizer, self.config)
        module.cfg = Room.of([document]).row(self.config, document)
        return attention_maps.word_maps(module, self.tokenizer, sample)

    def _documents(self, prompt: str | Sequence[str], images: Images | Sequence[Images]) -> list:
        """Documents of one prompt, or of several with an entry of `images` each."""
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"a prompt is a text or a list of texts, got {type(prompt).__name__}")
        prompts, shown = prompt, images
        if isinstance(prompt, str):
            prompts, shown = [prompt], [images]
        elif images is None:
            shown = [None] * len(prompts)
        if not isinstance(shown, (list, tuple)) or len(shown) != len(prompts):
            raise ValueError(f"images of {len(prompts)} prompts: give a list, one entry for each")
        documents = []
        for said, visuals in zip(prompts, map(visuals_of, shown)):
            turn = Turn("user", *marked([said], len(visuals)))
            documents.append(self._generator.prompt([turn], visuals))
        return documents

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.module, self.tokenizer, layout=self._layout)

    @property
    def _rows(self) -> int:
        """Least number of rows of a batch."""
        return self._layout.parts("rows") if self._layout else 1


# ----------------------------------------------------------------------------------------- compiled


@functools.cache
def _on(layout: Layout | None, f: Callable) -> Callable:
    """One of the next two, or EVLM.encode, compiled."""
    return jit(layout, f)


def _logits(model: EVLM, batch: Batch) -> jax.Array:
    """Logits of the first row, [T, vocab]."""
    return model.logits(model.hidden(batch)[0])


def _loss(model: EVLM, batch: Batch) -> jax.Array:
    total, sums = loss_sums(model, batch, max(1, len(model.cfg.data.sources)))
    return total / jnp.maximum(sums["count"].sum(), 1)


# ----------------------------------------------------------------------------------- from arguments


def _placed(cfg: EVLMConfig, params: store.Arrays, dtype: str | None, devices: Devices) -> Model:
    """Parameters on devices, in a dtype."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}, or leave it out")
        cfg = replace(cfg, train=replace(cfg.train, dtype=dtype, matmul_precision=dtype))
        plain = quant.plain(params)
        params = params | {name: params[name].astype(dtype, copy=False) for name in plain}
    devices = [devices] if isinstance(devices, jax.Device) else devices or []
    if not isinstance(devices, Sequence) or not all(isinstance(d, jax.Device) for d in devices):
        raise ValueError(f"devices are some of jax.devices(), got {devices!r}")
    mesh = MeshConfig(1, len(devices), 1, 1, 1, 2, "sharded", "all") if len(devices) > 1 else None
    tokenizer = vocabulary(cfg, cfg.init.llm)
    module, layout = model_of(cfg, params, mesh, len(devices) * cfg.data.image_group, devices)
    return Model(module, tokenizer, layout)


def _pixels(cfg: EVLMConfig) -> EVLMConfig:
    """Rows with their own image slots, whose pictures are pixels."""
    ranges.check_type("config", cfg, EVLMConfig, "give Model.config")
    cfg = cfg.ungrouped
    return replace(cfg, data=replace(cfg.data, cache_features=False))
