"""Options of sampling against transformers: its processors on the same logits, and greedy answers
of an exported run.
"""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

from evlm_jax.convert import export  # noqa: E402
from evlm_jax.data.samples import ImageRef, Turn  # noqa: E402
from evlm_jax.generate import Generator  # noqa: E402
from evlm_jax.models import sampling  # noqa: E402
from evlm_jax.runs import load_trained  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "format0_dense"
OPTIONS = {
    "temperature": (0.3, 1.7),
    "top_k": (0, 1, 7, 500),
    "top_p": (0.05, 0.6, 1.0),
    "min_p": (0.0, 0.02, 0.7),
}


def reference(logits, temperature, top_k, top_p, min_p):
    """In the order of GenerationMixin._get_logits_processor."""
    made = [transformers.TemperatureLogitsWarper(temperature)]
    made += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    made += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    made += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    return transformers.LogitsProcessorList(made)(None, torch.tensor(logits)).numpy()


@pytest.mark.parametrize(
    "options", [dict(zip(OPTIONS, values)) for values in product(*OPTIONS.values())], ids=str
)
def test_warpers(options):
    """The same tokens are left, with the same logits."""
    logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
    wanted = reference(logits, **options)
    how = sampling.Sampling(
        np.float32(options["temperature"]),
        np.float32(options["top_p"]),
        None,
        options["top_k"],
        options["min_p"],
    )
    found = np.stack([sampling.warped(row, how) for row in logits])
    assert (np.isfinite(found) == np.isfinite(wanted)).all() and np.isfinite(wanted).sum() >= len(
        logits
    )
    left = np.isfinite(wanted)
    assert np.abs(found[left] - wanted[left]).max() <= 1e-5 * np.abs(wanted[left]).max()


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty):
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 3, (4, 50)).astype(np.float32), rng.integers(0, 50, (4, 30))
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(tokens), torch.tensor(logits)
    ).numpy()
    seen = np.zeros((4, 50), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    found = sampling.processed(
        logits, sampling.Sampling(0, 1, None, repetition_penalty=np.float32(penalty)), seen
    )
    assert np.abs(found - wanted).max() <= 1e-6 and np.abs(wanted - logits).max() > 0.1


@pytest.mark.ci
def test_greedy_answers_of_an_export(tmp_path, monkeypatch):
    """The golden run, exported: with and without a penalty the tokens are those of transformers'
    generate.
    """
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    export.export("run", "hf", "hf", None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained("hf", trust_remote_code=True)
    trained = load_trained("run")
    generator, tokenizer, vocab = (
        Generator(trained.model, trained.tokenizer, "float32"),
        trained.tokenizer,
        trained.model.cfg.llm.vocab,
    )
    never = sorted(
        {*range(vocab)} - {*tokenizer.ids} | {tokenizer.id(trained.model.cfg.media.placeholder)}
    )
    options = {
        "max_new_tokens": 24,
        "do_sample": False,
        "suppress_tokens": never,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    answers = []
    for penalty in (1.0, 1.5):
        for name, text in (("0.png", "which"), ("5.png", "is it a b or an a?")):
            inputs = processor(
                [{"role": "user", "content": f"<image>{text}"}],
                images=[Image.open(f"pictures/{name}")],
                return_tensors="pt",
            )
            told = theirs.generate(**inputs, **options, repetition_penalty=penalty)
            prompt = generator.prompt(
                [Turn("user", f"<image>{text}")], ((ImageRef(f"pictures/{name}"),),)
            )
            (answer,) = generator.generate([prompt], 24, repetition_penalty=penalty, stop=())
            answers.append(answer.tokens)
            assert list(answer.tokens) == told[0, inputs["input_ids"].shape[1] :].tolist()
    assert answers[0] != answers[2]
