"""Data flows one way: a module imports from its own room and from those before it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "evlm_jax"
ROOMS = [  # in the order of docs/architecture.md; the longest name that fits a module is its room
    "config paths stores assets asset_packages asset_pictures asset_models qt_resources ops"
    " parallel.status convert.torch_model",
    "journal batch",
    "parallel",
    "checkpoint.lazy_tensors checkpoint.safetensors_file checkpoint.atomic_dir checkpoint.digests"
    " checkpoint.owner convert.gguf_file",
    "flops data",
    "models",
    "optim checkpoint",
    "goodput metrics loss watch",
    "phase train",
    "report planning",
    "prompts generate runs convert",
    "evals costs",
    "launch dry_run ablate demo library chat",
    "cli",
    "__main__",
]
MOST_LINES, MOST_OF_FUNCTION = 400, 60
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row.split()}


def modules() -> dict[str, Path]:
    """{name without the package: file}."""
    names = {
        path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
    }
    return {
        name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"
    }


def rank(module: str) -> int:
    """Of the longest room that it lies in."""
    rooms = [room for room in RANK if module == room or module.startswith(f"{room}.")]
    assert rooms, f"evlm_jax.{module}: give it a room here and in docs/architecture.md"
    return RANK[max(rooms, key=len)]


def imports(path: Path, known: dict[str, Path]):
    """(line, module) of everything of the package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and re.match(r"evlm_jax(\.|$)", node.module or ""):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("evlm_jax.")
                inner = node.module.removeprefix("evlm_jax").removeprefix(".")
                yield node.lineno, whole if whole in known else inner


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_is_from_a_later_room(module):
    known = modules()
    for line, other in imports(known[module], known):
        assert rank(other) <= rank(module), f"{known[module]}:{line} imports evlm_jax.{other}"


def test_kernels_know_nothing_of_the_model():
    known = modules()
    for module in known:
        if module.startswith("ops."):
            assert all(other.startswith("ops") for _, other in imports(known[module], known)), (
                module
            )


def test_architecture_names_what_is_there():
    """Every path and every `Class.method` that the page names exists."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    for link in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))`", page):
        assert (PACKAGE / name).exists(), name
    for kind, method, link in re.findall(r"`([A-Z]\w+)\.(\w+)` in \[[^]]+\]\(([^)]+)\)", page):
        source = (ROOT / "docs" / link).read_text()
        assert f"class {kind}" in source and f"def {method}" in source, (kind, method)
    for room in " ".join(ROOMS).split():
        assert room in ("__main__",) or room.split(".")[0] in page, room


def too_long(path: Path) -> str:
    """What of a file is longer than its limit; nothing where all is well."""
    text = path.read_text("utf-8")
    lines, found = text.count("\n"), []
    if lines > MOST_LINES:
        found.append(f"{lines} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MOST_OF_FUNCTION:
                found.append(f"{node.name} of {length}")
    return ", ".join(found)


def test_files_and_functions_are_short():
    """Generated experiments of the golden runs are data."""
    files = [
        path
        for folder in ("benchmarks", "evlm_jax", "experiments", "plugins", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if not path.match("tests/golden/*/experiment.py")
    ]
    assert len(files) > 200
    found = {path.relative_to(ROOT).as_posix(): too_long(path) for path in files}
    assert {name: what for name, what in found.items() if what} == {}
