"""What a foreign checkpoint says about its architecture,
in the words of ViTConfig and LLMConfig.
"""

import dataclasses

from evlm_jax.checkpoint.lazy_tensors import Source
from evlm_jax.config import LLMConfig, MediaConfig, MoEConfig, ViTConfig, XAttnConfig
from evlm_jax.config.schema import build
from evlm_jax.convert import idefics, mllama
from evlm_jax.convert.describe_decoder import describe_decoder
from evlm_jax.convert.describe_flamingo import describe_flamingo
from evlm_jax.convert.describe_gguf import describe_gguf
from evlm_jax.convert.describe_vision import TOWERS, config_fields, shapes_of
from evlm_jax.convert.families import GGUF

EVLM = {
    "vit": ViTConfig,
    "llm": LLMConfig,
    "xattn": XAttnConfig,
    "moe": MoEConfig,
    "media": MediaConfig,
}


def describe_source(source: Source, family: str, prefix: str) -> dict:
    """Config fields that the checkpoint fixes. `family` and `prefix` as engine.recognise found
    them.

    Raises:
      ValueError: config.json is missing where it is needed, or describes something EVLM's towers do
        not cover.
    """
    facts = TOWERS | {"evlm": _evlm, "openflamingo": describe_flamingo}
    facts |= {"idefics": _idefics, "mllama": _mllama}
    facts |= dict.fromkeys(GGUF.values(), _gguf)
    return facts.get(family.removesuffix("-transformers5"), _language)(source, prefix)


def _language(source: Source, prefix: str) -> dict:
    config_fields(source)
    return describe_decoder(source.path, source.metadata)


def _gguf(source: Source, prefix: str) -> dict:
    return dataclasses.asdict(
        build(LLMConfig, describe_gguf(source, shapes_of(source, prefix)), "llm")
    )


def _idefics(source: Source, prefix: str) -> dict:
    """By section of EVLMConfig."""
    vision, text, sections = idefics.parts(source)
    vit = TOWERS["clip"](vision, idefics.TOWER)
    return sections | {
        "vit": vit | {"taps": (vit["depth"],)},
        "llm": describe_decoder(source.path, text),
    }


def _mllama(source: Source, prefix: str) -> dict:
    """By section of EVLMConfig."""
    text, sections = mllama.parts(source)
    llm = describe_decoder(source.path, text)
    return sections | {"llm": llm | {"more_words": mllama.MORE_WORDS}}


def _evlm(source: Source, prefix: str) -> dict:
    """An export of ours says it in our own words; by section of EVLMConfig."""
    sections = {name: source.metadata.get(name) for name in EVLM}
    if wrong := [name for name, section in sections.items() if not isinstance(section, dict)]:
        raise ValueError(
            f"{source.path}: config.json lacks {', '.join(wrong)}; export the model again"
        )
    known = {
        name: {field.name for field in dataclasses.fields(kind)} for name, kind in EVLM.items()
    }
    if wrong := [
        f"{name}.{key}"
        for name, section in sections.items()
        for key in section
        if key not in known[name]
    ]:
        raise ValueError(
            f"{source.path}: config.json has {', '.join(wrong)}, which this version does not know"
        )
    return {
        name: dataclasses.asdict(build(EVLM[name], section, name))
        for name, section in sections.items()
    }
