"""How many positions a language model was trained on, by its own files."""

from contextlib import suppress
from pathlib import Path

from evlm_jax import assets
from evlm_jax.checkpoint.lazy_tensors import read_json
from evlm_jax.config import EVLMConfig
from evlm_jax.convert.gguf_file import read_gguf

# of config.json; Qwen 1.0's base is trained to seq_length alone
FIELDS = ("max_position_embeddings", "seq_length")


def trained_positions(where: str | Path) -> tuple[int, str] | None:
    """(positions, the file's field with that number), the least of several; None where no field has
    one.
    """
    path = assets.locate(where)
    if path.suffix == ".gguf":
        facts = read_gguf(path).metadata
        fields = [f"{facts.get('general.architecture')}.context_length"]
    else:
        file = path / "config.json" if path.is_dir() else path.with_name("config.json")
        facts, fields = read_json(file) if file.is_file() else {}, FIELDS
        facts = facts.get("text_config") or facts  # of a whole Llama 3.2 Vision
    found = [
        (facts[name], name)
        for name in fields
        if isinstance(facts.get(name), int) and facts[name] > 0
    ]
    return min(found, default=None)


def check_length(cfg: EVLMConfig) -> None:
    """Raises ValueError where a row, and so a document, may be longer than what init.llm was
    trained on.
    """
    found = trained_positions(cfg.init.llm)
    if found and cfg.data.length > found[0] and not cfg.init.beyond_context:
        mend = (
            f"set data.length to at most {found[0]}, or init.beyond_context to True to train"
            " positions that are new to the model"
        )
        raise ValueError(
            f"config: data.length is {cfg.data.length}, {found[1]} of {cfg.init.llm} is {found[0]}:"
            f" {mend}"
        )


def position_field(cfg: EVLMConfig) -> dict[str, int]:
    """What transformers' tools take for the longest prompt, as the tower's own files say it;
    nothing where they are gone, and the number of the class holds.
    """
    with suppress(OSError, assets.AssetError):
        if found := trained_positions(cfg.init.llm):
            return {FIELDS[0]: max(found[0], cfg.data.length)}  # init.beyond_context
    return {}
