"""Prompts equal lmms-eval's `doc_to_text`, of documents as its data sets hold them."""

import importlib

import pytest
import yaml

from evlm_jax.evals import tasks
from evlm_jax.evals.tasks.mmbench import CN_LETTER
from tests.evals import layouts
from tests.evals.predicted import NEED

MC = {
    "hint": "Look.",
    "question": "Which?",
    "A": "cat",
    "B": "dog",
    "C": "nan",
    "D": "nan",
    "answer": "A",
    "category": "x",
}
MC |= {"L2-category": "x", "index": 1, "source": "x", "split": "dev"}
SQ = {"hint": "", "question": "Which?", "choices": ["cat", "dog"]}
# task -> (module, function, its settings' file, what makes its document)
TASKS = {
    "vqav2": (
        "vqav2.utils",
        "vqav2_doc_to_text",
        "_default_template_vqav2_yaml",
        {"question": "what is 0?"},
    ),
    "vizwiz": (
        "vizwiz_vqa.utils",
        "vizwiz_vqa_doc_to_text",
        "_default_template_vqa_yaml",
        {"question": "WHAT is this?"},
    ),
    "textvqa": (
        "textvqa.utils",
        "textvqa_doc_to_text",
        "_default_template_textvqa_yaml",
        {"question": "what does the SIGN say?"},
    ),
    "gqa": ("gqa.utils", "gqa_doc_to_text", "gqa.yaml", {"question": "Is it red?"}),
    "docvqa": (
        "docvqa.utils",
        "docvqa_doc_to_text",
        "_default_template_docvqa_yaml",
        {"question": "What year?"},
    ),
    "chartqa": ("chartqa.utils", "chartqa_doc_to_text", "chartqa.yaml", {"question": "How much?"}),
    "scienceqa-img": ("scienceqa.utils", "sqa_doc_to_text", "scienceqa_img.yaml", SQ),
    "ai2d": (
        "ai2d.utils",
        "ai2d_doc_to_text",
        "ai2d.yaml",
        {"question": "What is 0?", "options": ["egg", "fly", "pupa", "moth"]},
    ),
    "mme": (
        "mme.utils",
        "mme_doc_to_text",
        "mme.yaml",
        {"question": "Is it 0? Please answer yes or no."},
    ),
    "pope": ("pope.utils", "pope_doc_to_text", "pope.yaml", {"question": "Is there a cat?"}),
    "mmbench-en": (
        "mmbench.en_utils",
        "mmbench_doc_to_text",
        "_default_template_mmbench_en_yaml",
        MC,
    ),
    "mmbench-cn": (
        "mmbench.cn_utils",
        "mmbench_doc_to_text",
        "_default_template_mmbench_cn_yaml",
        MC,
    ),
}


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's files without the functions that they name."""


Loader.add_multi_constructor("!function", lambda loader, suffix, node: None)


@pytest.mark.parametrize("name", TASKS)
def test_prompt_is_theirs(name, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason=NEED)
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    module, function, settings, document = TASKS[name]
    theirs = importlib.import_module(f"lmms_eval.tasks.{module}")
    folder = layouts.Path(theirs.__file__).parent
    options = yaml.load((folder / settings).read_text("utf-8"), Loader)["lmms_eval_specific_kwargs"]
    questions = tasks.find(name).questions(layouts.write(name, tmp_path / "data"), None)
    ours = questions[2] if name.startswith("mmbench") else questions[0]
    assert ours.text == getattr(theirs, function)(document, options["default"])
    if "qwen_vl" in options:
        ours = tasks.find(name).questions(tmp_path / "data", None, "qwen-vl")[0]
        assert ours.text == getattr(theirs, function)(document, options["qwen_vl"])


def test_other_prompts_are_theirs(tmp_path):
    pytest.importorskip("lmms_eval", reason=NEED)
    theirs = importlib.import_module(
        "lmms_eval.tasks.refcoco.utils_rec"
    ).refcoco_bbox_rec_doc_to_text({"answer": "left cat"})
    assert (
        tasks.find("refcoco").questions(layouts.write("refcoco", tmp_path / "r"), None)[0].text
        == theirs
    )
    theirs = importlib.import_module("lmms_eval.tasks.coco_cap.utils").coco_doc_to_text({})
    assert (
        tasks.find("coco").questions(layouts.write("coco", tmp_path / "c"), None)[0].text == theirs
    )
    assert set(CN_LETTER) == {"lmms-eval", "llava"}
