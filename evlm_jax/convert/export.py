"""A checkpoint of ours -> a directory that transformers loads, with the PyTorch model of convert/torch_model as its remote code."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evlm_jax import checkpoint
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.engine import unplan, unread
from evlm_jax.convert.tables import FAMILIES
from evlm_jax.convert.writers import Entry, write_shards
from evlm_jax.tokenizer import Tokenizer, load_tokenizer

CODE = Path(__file__).parent / "torch_model"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message['content'] + (' Answer:' if message['role'] == 'user' else eos_token) }}{% endfor %}"


def export_hf(source: str, out: str, step: int | None = None) -> None:
    """Writes the newest (or given) step of a run as a Hugging Face directory: weights, tokenizer, processor, configuration and code.

    Raises:
      FileExistsError: `out` is there already.
      FileNotFoundError: no such checkpoint.
    """
    params, cfg = checkpoint.load_params(source, step)
    tokenizer = load_tokenizer(cfg.init.llm)
    with complete_or_nothing(Path(out)) as folder:
        write_code(folder)
        dtype = np.result_type(*{array.dtype for array in params.values()}).name
        for name, content in (describe_model(cfg, tokenizer, dtype) | describe_processor(cfg, tokenizer)).items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        tokenizer.inner.save(str(folder / "tokenizer.json"))
        write_weights(folder, params)


@contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and is removed if anything fails."""
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new directory, or remove it")
    folder = out.with_name(out.name + ".incomplete")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    folder.rename(out)


def write_weights(folder: Path, params: dict[str, np.ndarray]) -> None:
    """All parameters, in the names of convert/torch_model."""
    family = next(family for family in FAMILIES if family.name == "evlm")
    entries = []
    for step in unplan(family, params):
        arrays = [params[name] for name in step.names]
        make = partial(unread, step, arrays, {})
        entries.append(Entry(step.foreign, make().shape, arrays[0].dtype, make))
    with tqdm(total=sum(entry.size for entry in entries), unit="B", unit_scale=True, desc=folder.name) as bar:
        write_shards(folder, entries, bar.update)


def write_code(folder: Path) -> None:
    """The PyTorch model, copied."""
    for file in sorted(CODE.glob("*_evlm.py")):
        shutil.copyfile(file, folder / file.name)


def describe_model(cfg: EVLMConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, dict]:
    """config.json and generation_config.json."""
    auto = {"AutoConfig": "configuration_evlm.EVLMConfig", "AutoModelForCausalLM": "modeling_evlm.EVLMForCausalLM"}
    auto |= {"AutoProcessor": "processing_evlm.EVLMProcessor"}
    sections = {name: asdict(getattr(cfg, name)) for name in ("vit", "llm", "xattn", "media")}
    model = {"model_type": "evlm", "architectures": ["EVLMForCausalLM"], "auto_map": auto, "dtype": dtype}
    model |= sections | {"image_token_id": tokenizer.id(cfg.media.placeholder)}
    return {
        "config.json": model,
        "generation_config.json": {"eos_token_id": list(tokenizer.eos), "pad_token_id": tokenizer.eos[0]},
    }


def describe_processor(cfg: EVLMConfig, tokenizer: Tokenizer) -> dict[str, dict]:
    """processor_config.json and tokenizer_config.json."""
    eos = tokenizer.decode([tokenizer.eos[0]], skip_special=False)
    processor = {
        "processor_class": "EVLMProcessor",
        "auto_map": {"AutoProcessor": "processing_evlm.EVLMProcessor"},
        "image_size": cfg.vit.image_size,
        "mean": cfg.vit.mean,
        "std": cfg.vit.std,
        "resize": cfg.data.resize,
        "media_tokens": cfg.media.tokens,
        "image_token_id": tokenizer.id(cfg.media.placeholder),
    }
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos, "padding_side": "left"}
    text |= {"clean_up_tokenization_spaces": False, "chat_template": {"chatml": CHATML, "plain": PLAIN}[cfg.data.template]}
    return {"processor_config.json": processor, "tokenizer_config.json": text}
