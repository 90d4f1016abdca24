"""What `evlm convert families` prints: every kind of file and every model type of transformers,
with the verdict, out of the tables that decide it. docs/conversion.md has the same."""

from evlm_jax.convert.describe_vision import ALONE
from evlm_jax.convert.export import FILES as WRITTEN_FILES
from evlm_jax.convert.export import FORMATS
from evlm_jax.convert.families import GGUF, KINDS, WHOLE
from evlm_jax.convert.readers import FILES
from evlm_jax.convert.refused import LANGUAGE, VISION
from evlm_jax.convert.stock import CLASSES


def listing() -> str:
    """Tables in Markdown: files in and out, models in and out; then the names that are refused."""
    return "\n\n".join((_files(), _models(), _refused())) + "\n"


def _files() -> str:
    """Where weights may stand, and which `--format` of an export writes it."""
    said = {".gguf": f"general.architecture {', '.join(GGUF)}"}
    folders = [form for form in FORMATS if form not in WRITTEN_FILES]
    rows = [("directory", "every model_type below; what --format hf wrote", folders)]
    rows += [
        (
            suffix,
            said.get(suffix, ALONE),
            [form for form, name in WRITTEN_FILES.items() if name.endswith(suffix)],
        )
        for suffix in FILES
    ]
    return _table(
        ("weights", "read", "written by --format"),
        [(where, read, ", ".join(forms) or "never") for where, read, forms in rows],
    )


def _models() -> str:
    """Every model type that is read, and what `--format llm` writes of it: its class, Qwen2's where
    transformers has none (Qwen 1.0). Vision towers are written as parts of the whole model.
    """
    rows = [
        (
            name,
            kind.tower,
            kind.note or "every field is understood",
            CLASSES.get(name, CLASSES["qwen2"]),
        )
        for name, kind in KINDS.items()
    ]
    rows += [(name, "vit", f"its vision_config, as {part}", "") for name, part in WHOLE.items()]
    rows += [("none, with vision_cfg", "vit", "EVA02-CLIP-E", "")]
    towers = {"llm": "language", "vit": "vision", "whole": "both"}
    others = {"vit": "never", "whole": "never; all of it by --format {}"}
    return _table(
        ("model_type", "tower", "read, if", "written by --format llm"),
        [
            (name, towers[tower], said, others.get(tower, written).format(name))
            for name, tower, said, written in rows
        ],
    )


def _refused() -> str:
    every = {"Language": LANGUAGE, "Vision": VISION}
    refused = {
        tower: [name for name in names if name not in KINDS.keys() | WHOLE.keys()]
        for tower, names in every.items()
    }
    return "\n\n".join(
        f"{tower} models that are refused by name: {', '.join(names)}."
        for tower, names in refused.items()
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
