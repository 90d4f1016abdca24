"""The package as its users see it: a light import, docstrings, the README's lines, which run."""

import inspect
import re
import shutil
import subprocess
import sys

import pytest

import evlm_jax
from tests.test_library import GOLDEN, ROOT, picture


def test_the_import_is_light_and_its_help_reads():
    code = (
        "import evlm_jax, sys; assert not {'jax', 'numpy', 'flax'} & sys.modules.keys();"
        " print(evlm_jax.__version__); help(evlm_jax)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    version, *_ = said.splitlines()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert all(
        f"{name}(" in said
        for name in (
            "load",
            "random",
            "make_sample",
            "make_batch",
            "generate",
            "logits",
            "attention",
        )
    )


def test_all_that_is_public_has_a_docstring():
    made = [getattr(evlm_jax, name) for name in evlm_jax.__all__]
    made += [value for name, value in vars(evlm_jax.Model).items() if not name.startswith("_")]
    assert len(made) > 10 and all(inspect.getdoc(one) for one in made)
    assert (
        set(evlm_jax.__all__) <= set(dir(evlm_jax)) and (ROOT / "evlm_jax" / "py.typed").is_file()
    )
    modules = {path.stem for path in (ROOT / "evlm_jax").iterdir()}
    assert not modules & set(
        evlm_jax.__all__
    )  # importing a module would put it in place of what has its name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        evlm_jax.lod  # noqa: B018


@pytest.mark.pinned
def test_the_lines_of_the_readme_run(tmp_path):
    """As they stand, in a folder that has the run and the picture that they name."""
    (lines,) = re.findall(
        r"^## From Python\n+```python\n(.*?)^```",
        (ROOT / "README.md").read_text("utf-8"),
        re.M | re.S,
    )
    (tmp_path / "runs").mkdir()
    shutil.copytree(GOLDEN / "run", tmp_path / "runs" / "demo")
    picture(3).convert("RGB").save(tmp_path / "cat.jpg")
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") >= 5 and "'word': 'What'" in done.stdout
