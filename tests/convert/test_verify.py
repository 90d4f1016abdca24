"""`evlm convert verify`: equal models pass, one perturbed tensor is found at its own layer."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evlm_jax import cli
from evlm_jax.checkpoint.lazy_tensors import Tensor, read_all
from evlm_jax.checkpoint.safetensors_file import read_folder, write_folder
from evlm_jax.convert import export, verify
from evlm_jax.convert.activations import Trace
from tests.helpers.checkpoints import dinov2_directory, run_directory
from tests.helpers.parity import needs_transformers
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with bfloat16 towers and a shorter last group, its export, and its language model
    alone.
    """
    root = tmp_path_factory.mktemp("verify")
    cfg = tiny_config(
        xattn={"every": 3}, train={"dtype": "bfloat16", "matmul_precision": "bfloat16"}
    )
    run_directory(root / "run", cfg, random_model(cfg, seed=0), "bfloat16")
    for form in ("hf", "llm"):
        export.export(str(root / "run"), str(root / form), form)
    return root


def run(capsys, *arguments) -> tuple[int, list[str]]:
    """Exit status and lines of the command."""
    status = cli.main(["convert", "verify", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


@needs_transformers
@pytest.mark.parametrize(
    "towers",
    [
        {},
        {
            "vit": {"registers": 2, "class_token": False},
            "llm": {"qk_norm": "all", "norms": "post", "window": (9, 0), "tied": False},
        },
    ],
)
def test_a_run_and_its_export(tmp_path, capsys, towers):
    cfg = tiny_config(**towers)
    run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    export.export(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    status, lines = run(capsys, tmp_path / "run", tmp_path / "hf", "--tolerance", "1e-4")
    assert status == 0
    assert lines[-1] == "PASS: 5 prompts; logits and 13 intermediates agree within 0.0001"
    assert len(lines) == 7 and all(" 100.0%  -" in line for line in lines[1:-1])


@needs_transformers
@pytest.mark.pinned
def test_pairs_of_one_model(folders, capsys):
    for a, b in (("hf", "run"), ("run", "llm"), ("llm", "hf")):
        status, lines = run(capsys, folders / a, folders / b)
        assert status == 0, (a, b, lines)


@needs_transformers
@pytest.mark.parametrize(
    "name, found",
    [
        ("vit.blocks.1.mlp.fc1.weight", "vit/tap 2"),
        ("media_tokens", "embed"),
        ("xattn.3.to_k.weight", "xattn/3"),
        ("llm.layers.2.mlp.up.weight", "llm/layers/2"),
        ("llm.ln_f.weight", "llm/ln_f"),
    ],
)
def test_a_perturbed_tensor_is_found(folders, tmp_path, capsys, name, found):
    perturbed(folders / "hf", tmp_path / "hf", name)
    status, lines = run(capsys, folders / "run", tmp_path / "hf")
    assert status == 1
    assert lines[-1].startswith("FAIL: ") and f"first at {found}: " in lines[-1]


@needs_transformers
def test_a_perturbed_language_model_is_found(folders, tmp_path, capsys):
    perturbed(folders / "llm", tmp_path / "llm", "model.layers.1.self_attn.k_proj.weight")
    status, lines = run(capsys, tmp_path / "llm", folders / "run")
    assert status == 1 and "first at llm/layers/1: " in lines[-1]


@pytest.mark.parity
@pytest.mark.parametrize("form", ["hf", "llm"])
def test_code_in_a_directory_does_not_run(folders, tmp_path, capsys, form):
    """Not of an export, nor of a Llama that names a class of its own; only when it is asked for."""
    shutil.copytree(folders / form, tmp_path / form)
    ran, config = tmp_path / "ran", json.loads((tmp_path / form / "config.json").read_text())
    names = {
        "AutoConfig": "harm.Config",
        "AutoModelForCausalLM": "harm.Model",
        "AutoModelForImageTextToText": "harm.Model",
    }
    (tmp_path / form / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    for file in {"harm.py", *(path.name for path in (tmp_path / form).glob("*.py"))}:
        (tmp_path / form / file).write_text(
            f"open({str(ran)!r}, 'w').close()\nraise SystemExit('it ran')\n"
        )
    status, lines = run(capsys, folders / "run", tmp_path / form)
    assert status == 0 and lines[-1].startswith("PASS") and not ran.exists()
    with pytest.raises(SystemExit, match="it ran"):
        run(capsys, folders / "run", tmp_path / form, "--folder-code")
    assert ran.exists()


def perturbed(source, out, name):
    """A copy with one tensor changed by a tenth of its deviation or more."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    arrays = read_all(read_folder(source))
    noise = np.random.default_rng(0).standard_normal(arrays[name].shape)
    arrays[name] = (arrays[name] + 0.1 * noise).astype(arrays[name].dtype)
    write_folder(out, {key: Tensor.of(array) for key, array in arrays.items()})


@needs_transformers
def test_given_images_and_prompts(folders, tmp_path, capsys):
    Image.fromarray((np.arange(300) % 256).astype(np.uint8).reshape(10, 10, 3)).save(
        tmp_path / "disc.png"
    )
    picture = ["--image", tmp_path / "disc.png"]
    status, lines = run(
        capsys,
        folders / "run",
        folders / "hf",
        *picture,
        "--prompt",
        "before<image>after",
        "--prompt",
        "red?",
    )
    assert status == 0
    assert [line.split()[0] for line in lines[1:-1]] == ["before<image>after", "<image>red?"]
    assert (
        cli.main(
            ["convert", "verify", str(folders / "run"), str(folders / "llm"), *map(str, picture)]
        )
        == 1
    )
    assert "leave --image out" in capsys.readouterr().err


@pytest.mark.pinned
def test_two_checkpoints_of_one_model_are_the_same_to_the_bit(folders, capsys):
    status, lines = run(capsys, folders / "run", folders / "run", "--tolerance", "0")
    assert status == 0 and "PASS" in lines[-1]


def test_other_architectures_are_errors(folders, tmp_path, capsys):
    cfg = tiny_config(xattn={"every": 3, "sinks": 2}, llm={"rope_theta": 1e5}, vit={"cuts": (1,)})
    run_directory(tmp_path / "other", cfg, random_model(cfg, seed=0))
    assert cli.main(["convert", "verify", str(folders / "run"), str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert (
        "xattn.sinks: 1 in A, 2 in B" in error
        and "llm.rope_theta: 10000.0 in A, 100000.0 in B" in error
        and "cuts" not in error
    )


def test_other_vocabularies_are_errors(folders, tmp_path, capsys):
    perturbed(folders / "hf", tmp_path / "hf", "llm.ln_f.weight")
    words = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    words["model"]["vocab"] |= {"!": 1, '"': 0}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(words))
    assert cli.main(["convert", "verify", str(folders / "run"), str(tmp_path / "hf")]) == 1
    assert "different vocabularies: '!' is 0 in A, 1 in B, and 1 more" in capsys.readouterr().err


def test_what_has_no_logits_is_an_error(folders, tmp_path, capsys):
    dinov2_directory(tmp_path / "vit", tiny_config())
    for where, message in (
        (tmp_path / "vit", "holds dinov2"),
        (tmp_path, "neither a run (steps/) nor a Hugging Face directory"),
    ):
        assert cli.main(["convert", "verify", str(folders / "run"), str(where)]) == 1
        assert message in capsys.readouterr().err


@needs_transformers
def test_a_directory_that_lacks_a_tensor_is_an_error(folders, tmp_path, capsys):
    perturbed(folders / "llm", tmp_path / "llm", "model.norm.weight")
    arrays = read_folder(tmp_path / "llm")
    arrays["model.extra.weight"] = arrays.pop("model.layers.0.mlp.up_proj.weight")
    arrays = {name: Tensor.of(tensor.read()) for name, tensor in arrays.items()}
    write_folder(tmp_path / "llm", arrays)
    assert cli.main(["convert", "verify", str(tmp_path / "llm"), str(folders / "run")]) == 1
    error = capsys.readouterr().err
    assert (
        "missing model.layers.0.mlp.up_proj.weight" in error
        and "unexpected model.extra.weight" in error
    )


@pytest.mark.ci
def test_without_torch_the_message_says_so(folders):
    script = (
        "import sys; sys.modules['torch'] = None; from evlm_jax import cli;"
        " sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["convert", "verify", str(folders / "hf"), str(folders / "run")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert 'running it needs PyTorch: pip install "evlm-jax[parity]"' in done.stderr


def trace(*embed, **others):
    """Of two positions."""
    seen = {"embed": embed} | {name.replace("_", "/"): rows for name, rows in others.items()}
    return Trace(
        {name: np.array(rows, np.float32) for name, rows in seen.items()},
        np.zeros((2, 3), np.float32),
    )


def test_nan_is_a_difference():
    assert verify.compare(trace([1, 2], [3, 4]), trace([1, 2], [3, 4]), 1e-3).parted is None
    assert (
        verify.compare(trace([1, 2], [3, np.nan]), trace([1, 2], [3, np.nan]), 1e-3).parted[0]
        == "embed"
    )


def test_a_huge_position_hides_no_difference_at_another():
    assert (
        verify.compare(trace([1e5, 2], [3, 4]), trace([1e5, 2], [3, 4.1]), 1e-3).parted[0]
        == "embed"
    )
    assert verify.compare(trace([1e5, 2], [3, 4]), trace([1e5, 2.1], [3, 4]), 1e-3).parted is None


def test_divergence():
    a, b = (
        Trace({}, np.log(np.array([[0.5, 0.25, 0.25], p])))
        for p in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    )
    found = verify.compare(a, b, 1e-3)
    assert found.kl == pytest.approx(0.25 * np.log(2) / 2) and found.agreement == 0.5
    assert (
        found.largest == pytest.approx(np.log(2))
        and found.relative == pytest.approx(0.5)
        and found.mean == pytest.approx(np.log(2) / 3)
    )
    assert found.parted == ("logits", found.relative)


def test_closed_gates_are_named(capsys):
    one = trace(
        [1, 2],
        [3, 4],
        xattn_0=[[1, 2], [3, 4]],
        llm_layers_0=[[1, 3], [3, 4]],
        xattn_1=[[1, 3], [3, 5]],
    )
    example = verify.Example(
        "text",
        *[np.zeros(2, np.int32)] * 4,
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros(0, np.int32),
    )
    assert verify.report([example], [one], [one], 1e-3)
    assert "because their gates are closed: xattn/0\n" in capsys.readouterr().out
