"""Scorers against lmms-eval's task functions and the package anls, on hundreds of predictions each,
awkward ones included.
"""

import importlib
import json
import random
from pathlib import Path

import pytest

from evlm_jax.evals.scorers import boxes, choices, documents, vqa, yes_no
from evlm_jax.evals.tasks import mmbench

NEED = "needs lmms-eval: pip install -e '.[lmms]' and pip install --no-deps lmms-eval==0.7.3"
COUNT = 600
AWKWARD = [
    "", " ", "Yes.", "yes", "No, it is not.", "not", "12%", "12.0", "0", "0.0", "-3", "1,000",
    "1,,000", "$5.00", "nan", "inf", "五", "红色的猫", "红苹果。", "a cat", "The  Cat\n", "it's",
    "its", "dont", "Couldn'tve", "somebody'd", "ow's'at", "ten", "None", "a.b.c.", "...", "?",
    "U.S.A.", "yes/no", "t-shirt", "\"red\" ", "(B)", "B", "b", "B.", "B. dog", "A: cat",
    "The answer is B.", "The answer is C", "D)", "A B", "A big dog runs", "答案是B", "y", "N.",
    "yesterday", "nothing", "[0.1, 0.2, 0.5, 0.75]", "[0, 0, 1, 1] [1, 1, 2, 2]",
    "[0.5,0.5,0.2,0.1]", "(10,20),(500,600)", "ß", "straße", "I choose A, not B", "C: is it", "E",
    "e.", " A.", "option B) or C)", "A, B, C", "naïve café!", "3 dogs, 2 cats", "one o'clock",
]  # fmt: skip
WORDS = (
    "yes no a the two 2 red cat cats dog 5 5.0 12% it's its dont left, right. unanswerable".split()
)
OPTIONS = {"A": "cat", "B": "dog", "C": "red cat", "D": "it"}


def lmms(module):
    """A module of lmms-eval's tasks."""
    pytest.importorskip("lmms_eval", reason=NEED)
    return importlib.import_module(f"lmms_eval.{module}")


def predictions():
    """COUNT predictions: all awkward ones, alone and joined, and short texts of common words."""
    rng = random.Random(0)
    made = AWKWARD + [
        f"{a}{rng.choice([' ', ', ', '. ', '-'])}{b}"
        for a, b in zip(rng.sample(AWKWARD, len(AWKWARD)), AWKWARD)
    ]
    return made + [
        " ".join(rng.choices(WORDS + AWKWARD, k=rng.randint(1, 4)))
        for _ in range(COUNT - len(made))
    ]


def ten_answers(said):
    """Ten answers a prediction, some of them equal to it, some of them all the same."""
    rng = random.Random(1)
    bare = lambda text: text.replace(",", "").replace("?", "").replace("'s", " 's").upper()
    drawn = [
        rng.choices([text, bare(text), *rng.choices(said, k=2), *WORDS[:2]], k=10) for text in said
    ]
    return [[group[0]] * 10 if i % 7 == 0 else group for i, group in enumerate(drawn)]


@pytest.fixture(scope="module")
def said():
    return predictions()


@pytest.fixture(scope="module")
def answers(said):
    return ten_answers(said)


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
    word = lambda: "".join(rng.choices("abcdé中", k=rng.randint(1, 8)))
    for _ in range(COUNT):
        text, group = word(), [word() for _ in range(rng.randint(1, 3))]
        ours = documents.anls([text], [group])[0]
        assert (
            ours == pytest.approx(oracle.anls_score(text, group, 0.5), abs=1e-12) or ours == 0.5
        )  # which counts as 0 there


def test_relaxed_accuracy(said):
    theirs = lmms("tasks.chartqa.utils").relaxed_correctness
    rng = random.Random(2)
    number = lambda: rng.choice(["100", "104", "96%", "0.95", "1", "5%", "0.05", "0", "-3", "-3.1"])
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


def test_scienceqa_letters(said):
    theirs = lmms("tasks.scienceqa.utils").sqa_process_results
    for text in said:
        for i, name in enumerate("ABCDE"):
            expected = theirs({"choices": list("vwxyz"), "answer": i}, [text])["exact_match"]
            assert float(choices.letter(text, OPTIONS, "scienceqa") == name) == expected, text


def test_ai2d_letters(said):
    theirs = lmms("tasks.ai2d.utils").MultiChoiceRegexFilter(
        regex_pattern=r"([A-Z])\.", group_select=0
    )
    match = lmms("api.metrics").exact_match_hf_evaluate
    for text, filtered in zip(said, theirs.apply([[text] for text in said], [{}] * COUNT)):
        for name in "ABCD":
            expected = match([filtered], [name], ignore_case=True, ignore_punctuation=True)[
                "exact_match"
            ]
            assert float(choices.letter(text, OPTIONS, "ai2d") == name) == expected, text


def test_mmbench_letters(said):
    theirs = lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    extract = lmms("tasks._task_utils.mcq_extract").extract_mcq_answer
    found = [theirs.can_infer(text, dict(OPTIONS)) or "" for text in said]
    assert [choices.letter(text, OPTIONS, "mmbench") for text in said] == found
    assert [choices.guess(text, "ABCD") for text in said] == [
        extract(text, list("ABCD")) for text in said
    ]
    assert 0.1 < sum(map(bool, found)) / COUNT < 0.9


def test_circular_eval(said):
    pandas = pytest.importorskip("pandas", reason=NEED)
    theirs = lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    rng, rows = random.Random(4), []
    for i, text in enumerate(said):
        for turn in range(rng.randint(1, 3)):
            truth = rng.choice("ABCD")
            prediction = rng.choice(
                [text, truth, truth, truth, f"{truth}. {OPTIONS[truth]}", OPTIONS[truth]]
            )
            rows.append(
                {
                    "index": i + turn * choices.ROTATION,
                    "answer": truth,
                    "prediction": prediction,
                    "category": "x",
                }
                | OPTIONS
            )
    rng.shuffle(rows)
    overall, *_ = theirs.eval_result(rows, "static")
    right = [
        choices.letter(row["prediction"], OPTIONS, "mmbench-static") == row["answer"]
        for row in rows
    ]
    hits = [
        hit for hit in choices.circular(right, [row["index"] for row in rows]) if hit is not None
    ]
    assert (
        len(hits) == COUNT
        and sum(hits) / COUNT == pytest.approx(overall, abs=1e-12)
        and 0.2 < overall < 0.8
    )
    assert pandas.DataFrame(rows)["index"].is_unique
    with pytest.raises(ValueError, match="question 5 has rotations but no first round"):
        choices.circular([True], [5 + choices.ROTATION])


def test_circular_eval_with_a_judge(said):
    """Both ask the same judge, who always names an option."""
    theirs, rng, rows = (
        lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator(),
        random.Random(7),
        [],
    )
    for i, text in enumerate(said):
        for turn in range(rng.randint(1, 2)):
            row = {
                "index": i + turn * choices.ROTATION,
                "answer": rng.choice("ABCD"),
                "prediction": text,
                "category": "x",
                "question": "?",
            }
            rows.append(
                row
                | {
                    "reply": rng.choice(
                        [f"{row['answer']}.", row["answer"], f"({rng.choice('ABCD')})"]
                    )
                }
            )
    table = [row | OPTIONS for row in rows]
    theirs.extract_answer_from_item = lambda item: (
        theirs.can_infer(item["reply"], dict(OPTIONS)),
        item["reply"],
    )
    overall, *_ = theirs.eval_result(table, "openai")
    ours = [row | {"options": OPTIONS} for row in rows]
    waiting = mmbench.score(ours)
    assert (
        "circular (judge)" not in waiting.each
        and waiting.whole["not judged"] == sum(bool(mmbench.judge(row)) for row in ours) > 100
    )
    judged = mmbench.score(
        [row | ({"judgement": row["reply"]} if mmbench.judge(row) else {}) for row in ours]
    )
    hits = [hit for hit in judged.each["circular (judge)"] if hit is not None]
    assert (
        sum(hits) / COUNT == pytest.approx(100 * overall, abs=1e-9)
        and 0.1 < overall < 0.9
        and judged.whole["not judged"] == 0
    )


def test_boxes(said):
    theirs = lmms("tasks.refcoco.utils_rec")
    rng = random.Random(5)
    draw = lambda: [round(rng.random(), 2) for _ in range(4)]
    shaken = lambda box: [round(x + rng.gauss(0, 0.05), 3) for x in box]
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


def grid_boxes(said):
    """Predictions in Qwen-VL's form, good ones, bad ones and `said`, and true boxes from 0 to 1."""
    rng, predictions, truth = random.Random(8), [], []
    for text in said:
        left, top = rng.randint(0, 500), rng.randint(0, 500)
        box = [left, top, left + rng.randint(50, 400), top + rng.randint(50, 400)]
        near = [x + round(rng.gauss(0, 40)) for x in box]
        good = "<ref>it</ref><box>({},{}),({},{})</box>".format(*near)
        predictions.append(
            rng.choice(
                [
                    good,
                    good,
                    good,
                    text,
                    good[:-9],
                    good.replace(",", ", "),
                    good + good,
                    "({},{})".format(*near),
                ]
            )
        )
        truth.append([x / 1000 for x in box])
    return predictions, truth


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
    inside = lambda letter: letter if letter and letter in "ABCD" else "-"
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
