"""Scorers against lmms-eval's task functions and the package anls, on hundreds of predictions each,
awkward ones included.
"""

import json
import random
from pathlib import Path

import pytest

from evlm_jax.evals.scorers import boxes, choices, documents, vqa, yes_no
from tests.evals.predicted import COUNT, OPTIONS, grid_boxes, lmms
from tests.evals.predicted import answers as answers
from tests.evals.predicted import said as said


def test_vqa_accuracy(said, answers):
    theirs = lmms("tasks.vqav2.utils")
    documents = [
        {"question_id": 0, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(group)]}
        for group in answers
    ]
    expected = [
        theirs.vqav2_process_results(doc, [text])["exact_match"]
        for doc, text in zip(documents, said)
    ]
    assert vqa.vqa_accuracy(said, answers, "lmms-eval") == pytest.approx(expected, abs=1e-12)
    assert 0.2 < sum(expected) / COUNT < 0.8 and len(set(expected)) > 4


@pytest.mark.parametrize("task", ["textvqa", "vizwiz_vqa"])
def test_evalai_accuracy(said, answers, task):
    theirs = getattr(lmms(f"tasks.{task}.utils"), f"{task}_process_results")
    expected = [
        theirs({"question_id": 0, "answers": list(group)}, [text])["exact_match"]
        for group, text in zip(answers, said)
    ]
    assert vqa.vqa_accuracy(said, answers, "evalai") == pytest.approx(expected, abs=1e-12)
    assert vqa.vqa_accuracy(said, answers, "evalai") != vqa.vqa_accuracy(said, answers, "lmms-eval")


def test_contractions_are_the_script_s():
    theirs = lmms("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor
    changed = {key: value for key, value in theirs.CONTRACTIONS.items() if key != value}
    assert {
        key: value for key, value in vqa.MENDED.items() if key not in ("lets", "shes")
    } == changed


def test_gqa(said):
    theirs = lmms("api.metrics").exact_match_hf_evaluate
    targets = [
        random.Random(i).choice([text, text.upper(), text + ".", "yes"])
        for i, text in enumerate(said)
    ]
    expected = [
        theirs([text], [t], ignore_case=True, ignore_punctuation=True)["exact_match"]
        for text, t in zip(said, targets)
    ]
    assert vqa.gqa(said, targets, "lmms-eval") == expected and 0.3 < sum(expected) / COUNT < 1


def test_anls(said, answers):
    theirs = lmms("api.metrics").anls
    expected = [theirs(group, [text])["anls"] for group, text in zip(answers, said)]
    assert documents.anls(said, answers) == pytest.approx(expected, abs=1e-12)
    assert {0, 1} < set(expected) and any(0.5 <= score < 1 for score in expected)


def test_anls_equals_the_package_anls():
    oracle = pytest.importorskip("anls", reason="needs anls: pip install -e '.[lmms]'")
    rng = random.Random(0)

    def word():
        return "".join(rng.choices("abcdé中", k=rng.randint(1, 8)))

    for _ in range(COUNT):
        text, group = word(), [word() for _ in range(rng.randint(1, 3))]
        ours = documents.anls([text], [group])[0]
        assert (
            ours == pytest.approx(oracle.anls_score(text, group, 0.5), abs=1e-12) or ours == 0.5
        )  # which counts as 0 there


def test_relaxed_accuracy(said):
    theirs = lmms("tasks.chartqa.utils").relaxed_correctness
    rng = random.Random(2)

    def number():
        return rng.choice(["100", "104", "96%", "0.95", "1", "5%", "0.05", "0", "-3", "-3.1"])

    pairs = [(text, rng.choice([text, text.upper(), number()])) for text in said] + [
        (number(), number()) for _ in range(COUNT)
    ]
    predictions, targets = zip(*pairs)
    expected = [float(theirs(text, target)) for text, target in pairs]
    assert (
        documents.relaxed_accuracy(predictions, targets, "lmms-eval") == expected
        and 0.3 < sum(expected) / len(expected) < 0.9
    )
    # Qwen-VL's script gives (answer, annotation) to a function of (target, prediction)
    assert documents.relaxed_accuracy(predictions, targets, "qwen-vl") == [
        float(theirs(target, text)) for text, target in pairs
    ]


def test_pope(said):
    theirs = lmms("tasks.pope.utils")
    labels = [random.Random(i).choice(["yes", "no"]) for i in range(COUNT)]
    predictions = [
        random.Random(i).choice([text, "yes", "no", "No", "Yes "]) for i, text in enumerate(said)
    ]
    docs = [
        theirs.pope_process_results({"question_id": 0, "answer": label}, [text])
        for text, label in zip(predictions, labels)
    ]
    names = {
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "f1": "f1_score",
        "yes_ratio": "yes_ratio",
    }
    expected = {
        ours: getattr(theirs, f"pope_aggregate_{name}")([doc[f"pope_{name}"] for doc in docs])
        for ours, name in names.items()
    }
    assert yes_no.pope(predictions, labels, "lmms-eval") == pytest.approx(expected, abs=1e-12)
    assert yes_no.pope(predictions, labels, "llava") != expected


def test_mme(said):
    theirs = lmms("tasks.mme.utils")
    assert [yes_no.mme_answer(text) for text in said] == [
        theirs.parse_pred_ans(text) for text in said
    ]
    rng = random.Random(3)
    drawn = [rng.choice(["existence", "OCR", "code_reasoning"]) for _ in range(COUNT // 2)]
    categories = [category for category in drawn for _ in range(2)]
    images, labels = (
        [i // 2 for i in range(COUNT)],
        [rng.choice(["yes", "no"]) for _ in range(COUNT)],
    )
    predictions = [rng.choice([text, label, label]) for text, label in zip(said, labels)]
    docs = zip(predictions, labels, categories, images)
    done = [
        theirs.mme_process_results({"answer": a, "category": c, "question_id": i}, [text])
        for text, a, c, i in docs
    ]
    ours = yes_no.mme(predictions, labels, categories, images)
    for part in ("perception", "cognition"):
        rows = [row[f"mme_{part}_score"] for row in done if f"mme_{part}_score" in row]
        assert (
            ours[part] == pytest.approx(theirs.mme_aggregate_results(rows), abs=1e-9)
            and ours[part] > 50
        )
    with pytest.raises(ValueError, match="existence/7 has 1 questions"):
        yes_no.mme(["yes"], ["yes"], ["existence"], [7])


def test_boxes(said):
    theirs = lmms("tasks.refcoco.utils_rec")
    rng = random.Random(5)

    def draw():
        return [round(rng.random(), 2) for _ in range(4)]

    def shaken(box):
        return [round(x + rng.gauss(0, 0.05), 3) for x in box]

    truth = [sorted(draw()[:2]) + sorted(draw()[:2]) for _ in range(COUNT)]
    truth = [[a, c, b + 0.1, d + 0.1] for a, b, c, d in truth]
    predictions = [
        rng.choice([text, str(shaken(box)), f"It is at {shaken(box)}."])
        for text, box in zip(said, truth)
    ]
    expected = [
        theirs.compute_iou(box, theirs.parse_float_sequence_within(text))
        for text, box in zip(predictions, truth)
    ]
    ours = boxes.overlaps(predictions, truth, "lmms-eval")
    assert (
        ours == pytest.approx(expected, abs=1e-12)
        and 100 < sum(score >= 0.5 for score in ours) < 500
    )
    assert boxes.read_box("<ref>a</ref><box>(0,999),(333,0)</box>", "qwen-vl") == pytest.approx(
        (0, 1, 1 / 3, 0)
    )
    assert (
        boxes.read_box("(1,2", "qwen-vl")
        == boxes.read_box("(a,b),(c,d)", "qwen-vl")
        == (0, 0, 0, 0)
    )
    assert boxes.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.fixture(scope="module")
def reference(said):
    """What scripts that no package has say about the same predictions;
    tests/evals/reference_scores.py runs them.
    """
    saved = json.loads((Path(__file__).parent / "reference_scores.json").read_text("utf-8"))
    assert saved["predictions"] == said, (
        "the predictions changed: run tests/evals/reference_scores.py again"
    )
    return saved


def test_official_vqa_accuracy(said, answers, reference):
    ours = [1000 * score for score in vqa.vqa_accuracy(said, answers, "official")]
    differ = [i for i in range(COUNT) if ours[i] != pytest.approx(reference["vqa"][i], abs=0.5)]
    assert differ == [] and vqa.vqa_accuracy(said, answers, "lmms-eval") != vqa.vqa_accuracy(
        said, answers, "official"
    )


def test_llava_pope(said, reference):
    answered, names = (
        {"y": "yes", "n": "no"},
        {
            "Accuracy": "accuracy",
            "Precision": "precision",
            "Recall": "recall",
        },
    )
    theirs, labels = reference["pope"], [answered[letter] for letter in reference["pope"]["labels"]]
    assert [yes_no.pope_answer(text, "llava") for text in said] == [
        answered[letter] for letter in theirs["answers"]
    ]
    names |= {"F1 score": "f1", "Yes ratio": "yes_ratio"}
    figures = {names[name]: value for name, value in theirs["figures"].items()}
    assert (
        yes_no.pope(said, labels, "llava") == pytest.approx(figures, abs=1e-12)
        and len(figures) == 5
    )


def test_llava_scienceqa(said, reference):
    def inside(letter):
        return letter if letter and letter in "ABCD" else "-"

    assert (
        "".join(inside(choices.letter(text, OPTIONS, "scienceqa-llava")) for text in said)
        == reference["scienceqa"]
    )


def test_llava_gqa():
    assert vqa.gqa(
        ["Red.", "red", "red!", "12%..", "红"], ["red", "red", "red", "12%", "红"], "llava"
    ) == [1, 1, 0, 1, 1]


def test_qwen_vl_boxes(said, reference):
    predictions, truth = grid_boxes(said)
    right = "".join(
        "01"[overlap >= 0.5] for overlap in boxes.overlaps(predictions, truth, "qwen-vl")
    )
    assert right == reference["boxes"] and 100 < right.count("1") < 500
