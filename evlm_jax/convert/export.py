"""A checkpoint of ours -> files for PyTorch, tensor by tensor: `evlm convert export --checkpoint
DIR --out DIR --format hf`.

hf            a directory for transformers, with the PyTorch model of convert/torch_model as its
              remote code
torch         evlm.pt, one state dict, beside the same model without transformers
openflamingo  openflamingo.pt, the trained part in open_flamingo's names; of a model that is
              open_flamingo's, what its own code loads
idefics       a directory that transformers' IdeficsForVisionText2Text reads
mllama        a directory that transformers' MllamaForConditionalGeneration reads
llm           the language model alone, as a class of transformers (convert/stock.py)
peft          adapters alone, for what `hf` writes without them (convert/peft.py)
peft-llm      adapters alone, for what `llm` writes without them

Adapters are merged into their matrices in all other forms, or left out; quantised matrices are
float32 there."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.atomic_dir import new_folder
from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, Tensors
from evlm_jax.checkpoint.safetensors_file import write_folder
from evlm_jax.config import EVLMConfig, xattn
from evlm_jax.convert import idefics, mllama
from evlm_jax.convert.context import position_field
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.describe_flamingo import fields_beside
from evlm_jax.convert.engine import PARTS, differences, sizes, to_foreign
from evlm_jax.convert.families import KINDS
from evlm_jax.convert.merge import merged
from evlm_jax.convert.naming import Family
from evlm_jax.convert.peft import export_adapters
from evlm_jax.convert.stock import stock_config
from evlm_jax.convert.tables import FAMILIES
from evlm_jax.convert.torch_file import write_torch
from evlm_jax.data.tokenizer import Tokenizer, load_tokenizer, source_of_run
from evlm_jax.models.lora import is_adapter
from evlm_jax.paths import write

CODE = Path(__file__).parent / "torch_model"
FILES = {"torch": "evlm.pt", "openflamingo": "openflamingo.pt"}  # of the forms that are one file
PLAIN_CODE = ("towers_evlm.py", "xattn_evlm.py", "plain_evlm.py")  # needs torch alone
CONTENT = (  # of a message: a string, or a list of parts
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in"
    " content %}{{ part['text'] if part['type'] == 'text' else '<video>' if part['type'] == 'video'"
    " else '<image>' }}{% endfor %}{% endif %}{% endmacro %}"
)
CHATML = (
    CONTENT + "{% if messages|length == 1 and messages[0]['role'] == 'assistant' %}{{"
    " said(messages[0]['content']) + eos_token }}{% else %}{% for message in messages %}{{"
    " '<|im_start|>' + message['role'] + '\n' + said(message['content']) + '<|im_end|>' + ('' if"
    " loop.last else '\n') }}{% endfor %}{% endif %}{% if add_generation_prompt %}{{"
    " '\n<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    CONTENT
    + "{% for message in messages %}{{ said(message['content']) + ' Answer:' if message['role'] =="
    " 'user' else ('' if loop.first else ' ') + said(message['content']) + eos_token }}{%"
    " endfor %}"
)


def export(
    source: str, out: str, form: str, step: int | None = None, adapters: bool = True
) -> None:
    """Writes the newest (or given) step of a run in a form of FORMATS.

    Args:
      adapters: are merged into their matrices; False leaves them out.
    Raises:
      FileExistsError: `out` exists.
      FileNotFoundError: no such checkpoint.
      ValueError: a baseline in another form than "llm"; adapters where the form has no place for
        them, or what was trained besides; a tensor that contains NaN or infinity, or has no name in
        that form; nothing is written.
    """
    tensors, cfg = store.open_params(source, step)
    if adapters:
        tensors = _with_adapters(tensors, cfg, form)
    elif form.startswith("peft"):
        raise ValueError(f"export: --format {form} is adapters alone: leave out --without-adapters")
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
        tensors = merged(tensors, cfg)
    cfg = replace(cfg, init=replace(cfg.init, llm=source_of_run(source, cfg.init.llm)))
    known = ("llm", "idefics", "mllama", "peft-llm")
    known += ("openflamingo",) * (cfg.bridge.kind == "flamingo")
    if cfg.baseline and form not in known:
        raise ValueError(
            f"{source} is a baseline ({cfg.baseline}): --format {form} knows EVLM alone; use evlm"
            " eval or evlm generate"
        )
    if form == "openflamingo":
        tensors = flamingo_part(source, tensors, cfg, store.trained(source, step))
    plan = {"source": store.identity(source, step), "form": form, "adapters": adapters}
    with new_folder(out, plan) as folder:
        FORMATS[form](folder, tensors, cfg)


def _with_adapters(tensors: Tensors, cfg: EVLMConfig, form: str) -> Tensors:
    """The tensors that a form of FORMATS is made of."""
    if form.startswith("peft"):
        return tensors
    homeless = [n for n in sorted(tensors) if is_adapter(n) and n.startswith(("vit/", "llm/"))]
    if form == "openflamingo" and homeless:
        raise ValueError(
            f"export: open_flamingo's checkpoints hold no towers, and {homeless[0]} changes one:"
            " use --format hf or torch, or leave adapters out with --without-adapters"
        )
    return merged(tensors, cfg)


def export_hf(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """Weights, tokenizer, processor, configuration and code."""
    tokenizer = load_tokenizer(cfg.init.llm)
    for file in sorted(CODE.glob("*_evlm.py")):
        write(folder / file.name, file.read_bytes())
    write_json(
        folder,
        describe_model(cfg, tokenizer, common_dtype(tensors)) | describe_processor(cfg, tokenizer),
    )
    write_tokenizer(folder, tokenizer, cfg)
    _write(write_folder, folder, in_names_of("evlm", tensors, cfg))


def export_torch(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """One state dict and the plain module."""
    for name in PLAIN_CODE:
        write(folder / name, (CODE / name).read_bytes())
    model = describe_model(cfg, load_tokenizer(cfg.init.llm), common_dtype(tensors))["config.json"]
    write_json(
        folder,
        {
            "config.json": {
                name: value
                for name, value in model.items()
                if name not in ("auto_map", "architectures")
            }
        },
    )
    _write(write_torch, folder / FILES["torch"], in_names_of("evlm", tensors, cfg))


def export_openflamingo(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """The file of `flamingo_part`.

    Raises ValueError for shared keys, which its `to_kv` has no place for.
    """
    if cfg.xattn.kv_heads != cfg.xattn.heads:
        shared = f"xattn.kv_heads = {cfg.xattn.kv_heads} of xattn.heads = {cfg.xattn.heads}"
        raise ValueError(
            f"export: open_flamingo's cross-attention has keys for every head, not {shared}: use"
            " --format hf or torch"
        )
    _write(write_torch, folder / FILES["openflamingo"], in_names_of("openflamingo", tensors, cfg))


def flamingo_part(
    source: str, tensors: Tensors, cfg: EVLMConfig, trained: Collection[str]
) -> Tensors:
    """What open_flamingo's checkpoints hold: gated blocks and media tokens; of a model that is its
    own also the resampler, and words, among them the media embedding.

    Raises ValueError naming fields that are not open_flamingo's, or what was trained besides:
    beside the towers as they were, it would be lost.
    """
    own = cfg.bridge.kind == "flamingo"
    fixed = fields_beside(cfg) if own else {"xattn": xattn.PLAIN}
    if wrong := differences(cfg, fixed, "open_flamingo"):
        raise ValueError(f"{source} is not open_flamingo's model:\n  " + "\n  ".join(wrong))
    held = PARTS["xattn"] if own else ("xattn/", "media/")
    part = {name: tensor for name, tensor in tensors.items() if name.startswith(held)}
    besides = (n for n in trained - part.keys() if not n.startswith("media/") and not is_adapter(n))
    if lost := sorted(besides):
        raise ValueError(
            f"{source}: open_flamingo's checkpoints have no place for what was trained of the"
            f" towers ({len(lost)} parameters, as {lost[0]}): use --format hf or torch"
        )
    return part | ({"llm/embed": _words(tensors, cfg)} if own else {})


def _words(tensors: Tensors, cfg: EVLMConfig) -> Tensor:
    """The word embeddings, that of the placeholder being the media embedding."""
    words, media = tensors["llm/embed"], tensors["media/embedding"]
    word = load_tokenizer(cfg.init.llm).id(cfg.media.placeholder)
    dtype = np.result_type(words.dtype, media.dtype)

    def read() -> np.ndarray:
        array = words.read().astype(dtype)
        array[word] = media.read()[0]
        return array

    return Tensor(words.shape, dtype, read)


def export_published(
    model: ModuleType, family: str, folder: epath.Path, tensors: Tensors, cfg: EVLMConfig
) -> None:
    """The whole of a published model, with tokenizer and normalisation.

    Args:
      model: the module that says its config.json.
    Raises:
      ValueError: naming what it cannot have.
    """
    other = ", ".join(cfg.xattn.unlike(xattn.PLAIN))
    if other or cfg.bridge.kind not in model.BRIDGES or not cfg.cross_layers:
        raise ValueError(
            f"export: {model.NAME} does not have {cfg.baseline or other or 'routed taps'}"
        )
    pixels = {"image_mean": cfg.vit.mean, "image_std": cfg.vit.std} | model.pixels(cfg)
    write_json(folder, {"preprocessor_config.json": pixels})
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith("media/")}
    foreign = in_names_of(family, whole | {"llm/embed": _words(tensors, cfg)}, cfg)
    tokenizer = load_tokenizer(cfg.init.llm)
    config = model.stock(cfg, _special_ids(tokenizer))
    said = describe_source(Source(folder, config, foreign), family, "")
    if wrong := differences(cfg, said, model.NAME):
        raise ValueError(f"export: the model is not {model.NAME}'s:\n  " + "\n  ".join(wrong))
    beside = {"generation_config.json": _generation(tokenizer, cfg.llm.vocab)}
    write_json(folder, beside | {"config.json": config | {"dtype": common_dtype(whole)}})
    write_tokenizer(folder, tokenizer, cfg)
    _write(write_folder, folder, model.written(foreign, cfg))


def export_llm(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """A directory that AutoModelForCausalLM loads without remote code."""
    llm = {name: tensor for name, tensor in tensors.items() if name.startswith("llm/")}
    tokenizer = load_tokenizer(cfg.init.llm)
    about = describe_llm(cfg, tokenizer, common_dtype(llm))
    write_json(folder, about)
    write_tokenizer(folder, tokenizer, cfg)
    family = KINDS[about["config.json"]["model_type"]].family
    _write(write_folder, folder, in_names_of(family, llm, cfg))


def export_peft(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """Adapters of any part of the model."""
    export_adapters(folder, tensors, cfg, family_of("evlm"))


def export_peft_llm(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig) -> None:
    """Adapters of the language model, which are all that there are."""
    family = KINDS[stock_config(cfg.llm)["model_type"]].family
    export_adapters(folder, tensors, cfg, family_of(family))


FORMATS = {
    "hf": export_hf,
    "torch": export_torch,
    "openflamingo": export_openflamingo,
    "idefics": partial(export_published, idefics, "idefics"),
    "mllama": partial(export_published, mllama, "mllama"),
    "llm": export_llm,
    "peft": export_peft,
    "peft-llm": export_peft_llm,
}


def family_of(name: str) -> Family:
    """A family of tables.py by its name."""
    return next(family for family in FAMILIES if family.name == name)


def in_names_of(family: str, tensors: Tensors, cfg: EVLMConfig) -> Tensors:
    """All of `tensors`, in the names and layouts of a family of tables.py.

    Raises ValueError naming those that the family lacks.
    """
    found = family_of(family)
    return to_foreign(found, tensors, sizes(cfg, found.tower))


def common_dtype(tensors: Tensors) -> str:
    """The smallest dtype that represents all values of the others."""
    return np.result_type(*{tensor.dtype for tensor in tensors.values()}).name


def _write(writer, place: epath.Path, tensors: Tensors) -> None:
    with tqdm(
        total=sum(tensor.size for tensor in tensors.values()),
        unit="B",
        unit_scale=True,
        desc=place.name,
    ) as bar:
        writer(place, tensors, bar.update)


# ------------------------------------------------------------------------------- what stands beside


def write_json(folder: epath.Path, contents: dict[str, dict]) -> None:
    """{file name: content}."""
    for name, content in contents.items():
        write(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(folder: epath.Path, tokenizer: Tokenizer, cfg: EVLMConfig) -> None:
    """tokenizer.json and tokenizer_config.json."""
    eos, bos = (
        tokenizer.inner.id_to_token(tokenizer.eos[0]),
        [tokenizer.inner.id_to_token(i) for i in tokenizer.bos],
    )
    text = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "left",
    }
    text |= {"bos_token": bos[0]} if bos else {}
    if cfg.data.template == "own":
        text |= tokenizer.chat.names
        chat = tokenizer.chat.source
    else:
        start = "{{ " + json.dumps("".join(bos), ensure_ascii=False) + " }}" if bos else ""
        chat = start + {"chatml": CHATML, "plain": PLAIN}[cfg.data.template]
    text |= {"clean_up_tokenization_spaces": False, "chat_template": chat}
    write_json(folder, {"tokenizer_config.json": text})
    write(folder / "tokenizer.json", tokenizer.inner.to_str(pretty=True))


def describe_model(cfg: EVLMConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, dict]:
    """config.json and generation_config.json."""
    auto = {"AutoConfig": "configuration_evlm.EVLMConfig"}
    auto |= dict.fromkeys(
        ("AutoModelForCausalLM", "AutoModelForImageTextToText"), "modeling_evlm.EVLMForCausalLM"
    )
    auto |= {"AutoProcessor": "processing_evlm.EVLMProcessor"}
    sections = {
        name: asdict(getattr(cfg, name)) for name in ("vit", "llm", "xattn", "moe", "media")
    }
    model = {
        "model_type": "evlm",
        "architectures": ["EVLMForCausalLM"],
        "auto_map": auto,
        "dtype": dtype,
    }
    model |= sections | {"image_token_id": tokenizer.id(cfg.media.placeholder)}
    return {"config.json": model, "generation_config.json": _generation(tokenizer, cfg.llm.vocab)}


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a language model's config.json."""
    return {
        "bos_token_id": next(iter(tokenizer.bos), None),
        "eos_token_id": list(tokenizer.eos),
        "pad_token_id": tokenizer.eos[0],
    }


def describe_llm(cfg: EVLMConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, dict]:
    """config.json and generation_config.json of a stock language model."""
    model = position_field(cfg) | stock_config(cfg.llm) | {"dtype": dtype} | _special_ids(tokenizer)
    return {"config.json": model, "generation_config.json": _generation(tokenizer, cfg.llm.vocab)}


def _generation(tokenizer: Tokenizer, rows: int) -> dict:
    """Rows of the embedding without a token are never drawn, as in generation here."""
    start = {"bos_token_id": tokenizer.bos[0]} if tokenizer.bos else {}
    nothing = sorted(set(range(rows)) - set(tokenizer.ids))
    never = {"suppress_tokens": nothing} if nothing else {}
    return start | {"eos_token_id": list(tokenizer.eos), "pad_token_id": tokenizer.eos[0]} | never


def describe_processor(cfg: EVLMConfig, tokenizer: Tokenizer) -> dict[str, dict]:
    """processor_config.json."""
    chatml = cfg.data.template == "chatml"
    processor = {
        "processor_class": "EVLMProcessor",
        "auto_map": {"AutoProcessor": "processing_evlm.EVLMProcessor"},
        "image_size": cfg.vit.image_size,
        "mean": cfg.vit.mean,
        "std": cfg.vit.std,
        "resize": cfg.data.resize,
        "media_tokens": cfg.media.tokens,
        "image_token_id": tokenizer.id(cfg.media.placeholder),
        "template": cfg.data.template,
        "turn_start": tokenizer.id("<|im_start|>") if chatml else None,
        "turn_end": tokenizer.id("<|im_end|>") if chatml else tokenizer.eos[0],
        "text_start": list(tokenizer.bos),
        "tiles": cfg.data.tiles,
    }
    return {"processor_config.json": processor}
