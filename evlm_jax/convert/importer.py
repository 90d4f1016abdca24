"""Foreign towers, with what connects them or without, or an export of ours -> a checkpoint that
training, generation and export read, tensor by tensor.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from evlm_jax import assets
from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, read_all, read_json
from evlm_jax.config import EVLMConfig, from_config_dict, to_dict
from evlm_jax.convert.context import check_length
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.describe_flamingo import fields_beside
from evlm_jax.convert.engine import Tower, differences, open_tower, recognise
from evlm_jax.convert.export import describe_model, describe_processor
from evlm_jax.convert.readers import open_source
from evlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from evlm_jax.models.initializers import cross_attention_tensors, media_embedding
from evlm_jax.paths import children, place, version
from evlm_jax.runs import write_model

UNASSIGNED = "\U000c0000"  # a character that no vocabulary has


def import_towers(cfg: EVLMConfig, out: str) -> None:
    """Writes a new model of `cfg`: the towers of init.vision and init.llm, cross-attention with
    closed gates, media embeddings.

    Raises:
      FileExistsError: `out` exists.
      ValueError: the config has adapters or is of a baseline, a tower does not fit it (every field,
        every name), a tensor contains NaN, or the vocabulary is larger than the embedding; nothing
        is written.
    """
    _check_kind(cfg)
    check_length(cfg)
    vocabulary(cfg, cfg.init.llm)
    sources, towers = _open_towers(cfg)
    words, shape = towers["llm"].tensors["llm/embed"], (cfg.media.tokens, cfg.llm.hidden)
    media = Tensor(shape, np.dtype(np.float32), lambda: media_embedding(cfg, words.read()))
    _write(cfg, out, sources, towers, cross_attention_tensors(cfg) | {"media/embedding": media})


def _open_towers(cfg: EVLMConfig) -> tuple[dict[str, Source], dict[str, Tower]]:
    """init.vision and init.llm by the part that they are."""
    sources = {
        tower: open_source(assets.locate(where))
        for tower, where in (("vit", cfg.init.vision), ("llm", cfg.init.llm))
    }
    return sources, {tower: open_tower(cfg, source, tower) for tower, source in sources.items()}


def import_model(cfg: EVLMConfig, model: str, out: str) -> None:
    """Writes all of a model that `evlm convert export --format hf` wrote, or of a published one; of
    open_flamingo's checkpoint with the towers of init.vision and init.llm. What the checkpoint
    holds counts as trained, so a run that begins from it keeps its bits.

    Raises as `import_towers`.
    """
    model = str(place(model))
    source = open_source(assets.locate(model))
    part = recognise(source)[0].tower
    if part != "xattn":
        cfg = replace(cfg, init=replace(cfg.init, vision=model, llm=model))
    if part in ("xattn", "whole"):
        return _import_published(cfg, source, part, out)
    _check_kind(cfg)
    vocabulary(cfg, model)
    tower = open_tower(cfg, source, "evlm")
    _write(cfg, out, {"evlm": source}, {"evlm": tower}, {}, trained=tower.tensors)


def _import_published(cfg: EVLMConfig, source: Source, part: str, out: str) -> None:
    """The word that stands for an image is the media embedding as well.

    Args:
      part: of PARTS, that the source holds.
    """
    found = open_tower(cfg, source, part)
    beside = fields_beside(cfg) if part == "xattn" else {}
    if wrong := differences(cfg, beside, "open_flamingo"):
        raise ValueError(f"{source.path} does not fit the config:\n  " + "\n  ".join(wrong))
    check_length(cfg)
    word = vocabulary(cfg, cfg.init.llm).id(cfg.media.placeholder)
    sources, towers = _open_towers(cfg) if part == "xattn" else ({}, {})
    words = found.tensors["llm/embed"]
    media = Tensor((1, cfg.llm.hidden), words.dtype, lambda: words.read()[word][None])
    trained = {**found.tensors, "media/embedding": media}
    towers |= {part: found._replace(tensors=trained)}
    _write(cfg, out, sources | {part: source}, towers, {}, trained)


def read_export(cfg: EVLMConfig, model: str) -> tuple[dict[str, np.ndarray], EVLMConfig]:
    """All parameters of an export by canonical name, in memory; and `cfg` with the export's values:
    its sections of the model, how prompts and pictures are prepared, where its vocabulary is, and
    the dtype of its weights to compute in.

    Raises:
      FileNotFoundError: there is no export.
      ValueError: it is another model, or damaged.
    """
    where = place(model)
    if not (where / "config.json").exists():
        raise FileNotFoundError(
            f"{model}: neither a run (steps/) nor an export (config.json): give one of these"
            " folders"
        )
    source = open_source(where)
    family, prefix = recognise(source)
    if family.name != "evlm":
        raise ValueError(
            f"{model} holds {family.name}, not a whole EVLM: give a run, or what `evlm convert"
            " export --format hf` wrote"
        )
    processor = read_json(where / "processor_config.json")
    if lacks := [name for name in ("template", "resize") if name not in processor]:
        raise ValueError(
            f"{model}: processor_config.json lacks {', '.join(lacks)}; export the model again"
        )
    dtype = (
        "bfloat16"
        if all(tensor.dtype == ml_dtypes.bfloat16 for tensor in source.tensors.values())
        else "float32"
    )
    sections = to_dict(cfg) | describe_source(source, family.name, prefix)
    sections["name"] = where.name
    sections["data"] |= {name: processor[name] for name in ("template", "resize")}
    sections["data"] |= {"tiles": processor.get("tiles", 0)}  # exports before tiles have none
    sections["train"] |= {"dtype": dtype, "matmul_precision": dtype}
    sections["init"] |= {"vision": str(where), "llm": str(where)}
    cfg = from_config_dict(sections)
    _check_twice(cfg, where, source, processor)
    return read_all(open_tower(cfg, source, "evlm").tensors), cfg


def _check_twice(
    cfg: EVLMConfig, where: epath.Path, source: Source, processor: dict[str, Any]
) -> None:
    """Raises ValueError for what two files of an export say differently: transformers and this
    package would compute with different ones. Earlier exports lack some.
    """
    tokenizer = vocabulary(cfg, str(where))
    ours = describe_model(cfg, tokenizer, "") | describe_processor(cfg, tokenizer)
    ours = json.loads(json.dumps(ours))  # lists in place of tuples
    drawn = "generation_config.json"
    theirs = {"processor_config.json": processor, "config.json": source.metadata}
    theirs[drawn] = read_json(where / drawn) if (where / drawn).is_file() else {}
    names = {"config.json": {"image_token_id"}, drawn: {"eos_token_id", "suppress_tokens"}}
    names["processor_config.json"] = ours["processor_config.json"].keys() - {"auto_map"}
    if wrong := [
        f"{file} has {name} {value!r}, not {expected!r}"
        for file, said in theirs.items()
        for name in sorted(names[file] & said.keys())
        for value, expected in [(said[name], ours[file].get(name))]
        if (_ids(value) != _ids(expected) if file == drawn else value != expected)
    ]:
        raise ValueError(
            f"{where}: {', '.join(wrong)}, as the vit and media sections of config.json and the"
            " tokenizer have it; export the model again"
        )


def _ids(value: Any) -> list:
    """Ids of a field, which may hold one, several in any order, or none."""
    return sorted(value, key=str) if isinstance(value, list) else [] if value is None else [value]


def _check_kind(cfg: EVLMConfig) -> None:
    """Raises ValueError for a baseline."""
    if cfg.baseline:
        raise ValueError(
            f"the config is of a baseline ({cfg.baseline}), import makes EVLM alone: let evlm train"
            " read init.vision and init.llm"
        )


def vocabulary(cfg: EVLMConfig, where: str) -> Tokenizer:
    """The tokenizer of a model.

    Raises ValueError if it has more ids than the embedding rows, or none for media.placeholder
    alone.
    """
    tokenizer = load_tokenizer(where)
    if tokenizer.vocab_size > cfg.llm.words:
        mend = "the tokenizer is of another model"
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, llm.vocab is {cfg.llm.vocab}:"
            f" {mend}"
        )
    if cfg.uses_images:
        _check_spare(cfg, tokenizer)
    return tokenizer


def _check_spare(cfg: EVLMConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError where media.placeholder has another meaning: it is never drawn, and exports
    take each for an image.
    """
    marks = [tokenizer.specials.get("<|im_start|>")] * (cfg.data.template == "chatml")
    uses = {
        "is what unknown characters become": tokenizer.encode(UNASSIGNED),
        "begins or ends a text or a turn": [*tokenizer.bos, *tokenizer.eos, *marks],
    }
    for use, ids in uses.items():
        if tokenizer.id(cfg.media.placeholder) in ids:
            raise ValueError(
                f"config: media.placeholder {cfg.media.placeholder!r} {use}: choose a spare token"
                " of the vocabulary"
            )


def _write(
    cfg: EVLMConfig,
    out: str,
    sources: dict[str, Source],
    towers: dict[str, Tower],
    new: dict[str, Tensor],
    trained: Iterable[str] = (),
) -> None:
    """The checkpoint: one store and a step 0. Raises ValueError where the config has adapters or
    quantises matrices.
    """
    if cfg.lora.patterns or cfg.quant.patterns:
        raise ValueError(
            "the config has adapters or quantised matrices, which begin in training: import with"
            " --config.lora.patterns=() --config.quant.patterns=(), and train with --init"
        )
    tensors = {
        name: tensor for tower in towers.values() for name, tensor in tower.tensors.items()
    } | new
    origin = {tower: _origin(cfg, tower, sources[tower], found) for tower, found in towers.items()}
    for tower, about in origin.items():
        prefix = f", prefix {about['prefix']} taken off" if about["prefix"] else ""
        dropped = f"{len(about['dropped'])} tensors dropped"
        print(
            f"{tower}: {about['family']} from {about['path']}{prefix}, positions"
            f" {about['positions']}, {dropped}"
        )
        print(
            "".join(f"  dropped on purpose: {name}\n" for name in about["dropped"]),
            end="",
            flush=True,
        )
    plan = {
        "config": to_dict(cfg),
        "files": {str(p): version(p) for s in sources.values() for p in _files(s)},
    }
    write_model(cfg, tensors, out, plan, cfg.init.llm, origin, trained)


def _origin(cfg: EVLMConfig, tower: str, source: Source, found: Tower) -> dict:
    """What the checkpoint says of where a part of it comes from."""
    stored = cfg.vit.pretrained_size // cfg.vit.patch
    down, across = cfg.vit.table_grid
    resized = f"{stored}x{stored} -> {down}x{across} by {cfg.vit.interpolation}"
    changed = tower == "vit" and (stored, stored) != cfg.vit.table_grid
    about = {
        "path": str(source.path),
        "family": found.family,
        "prefix": found.prefix,
        "dropped": found.dropped,
    }
    return about | {"positions": resized if changed else "as stored"}


def _files(source: Source) -> list[epath.Path]:
    """The files of a source."""
    return [path for path in children(place(source.path)) if path.is_file()] or [place(source.path)]
