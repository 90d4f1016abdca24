"""The plug-in for lmms-eval: each kind of request against our own generation and losses, and a
whole run of its command line.
"""

import importlib.metadata
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.lmms import lmms_eval, write
from evlm_jax import cli
from evlm_jax.convert import export
from evlm_jax.data import video
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, question
from evlm_jax.evals import results, tasks
from evlm_jax.evals.choice import answer_losses
from evlm_jax.generate import Generator
from evlm_jax.runs import load_trained
from tests.evals import layouts
from tests.evals.predicted import NEED
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

instance = pytest.importorskip("lmms_eval.api.instance", reason=NEED)
stored = pytest.importorskip("evlm_jax.evals.lmms.requests", reason=NEED).stored


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(data=dict(length=96, images=4, targets=32, block_pairs=24))  # noqa: C408
    run_directory(folder, cfg, random_model(cfg, 0))
    return folder


@pytest.fixture(scope="module")
def model(run):
    """The plug-in, as lmms-eval makes it, with documents that are what they show."""
    from evlm_jax.evals.lmms.jax_model import EvlmJax

    made = EvlmJax.create_from_arg_string(
        f"checkpoint={run},frames=3", {"batch_size": 4, "device": None}
    )
    return made


@pytest.fixture(scope="module")
def seen(model, tmp_path_factory):
    """Three pictures and a clip: lmms-eval's documents, and our visuals of the same."""
    folder = tmp_path_factory.mktemp("seen")
    pictures = [layouts.picture(folder / f"{i}.png", 5 * i) for i in range(3)]
    clip = layouts.video(folder).parent / "videos" / "a.mp4"
    opened = [Image.open(path) for path in pictures]
    docs = [[opened[0]], [opened[1], opened[2]], [], [str(pictures[2])], [str(clip)]]
    model.task_dict = {"task": {"test": docs}}
    one = [(ImageRef(str(path)),) for path in pictures]
    return docs, [(one[0],), (one[1], one[2]), (), (one[2],), (video.sample(clip, 3),)]


def ask(kind, *arguments):
    """A request about document `arguments[-1]`."""
    *rest, number = arguments
    return instance.Instance(
        kind, (*rest, number, "task", "test"), 0, {"task": "task", "doc_id": number, "repeats": 1}
    )


def look(doc):
    return doc


@pytest.fixture(scope="module")
def ours(run):
    """Our generator's answers to (text, visuals)."""
    trained = load_trained(str(run))
    generator = Generator(trained.model, trained.tokenizer)

    def answer(prompts, **how):
        return [
            a.text
            for a in generator.generate(
                [generator.prompt([Turn("user", t)], v) for t, v in prompts], **how
            )
        ]

    return answer


@pytest.mark.slow
def test_generate_until(ours, model, seen):
    docs, visuals = seen
    how = {"max_new_tokens": 12, "do_sample": False, "temperature": 0.7, "until": ["\n\n"]}
    answers = model.generate_until(
        [ask("generate_until", f"what {i}?", how, look, i) for i in range(len(docs))]
    )
    prompts = [(MARKER * len(v) + f"what {i}?", v) for i, v in enumerate(visuals)]
    assert (
        answers == [text.strip() for text in ours(prompts, max_new_tokens=12)]
        and len(set(answers)) > 1
    )
    between = f"{MARKER} and {MARKER}?"
    (expected,) = ours([(between, visuals[1])], max_new_tokens=12)
    assert model.generate_until([ask("generate_until", between, how, look, 1)]) == [
        expected.strip()
    ]
    end = answers[0][2:4]
    (cut,) = model.generate_until([ask("generate_until", "what 0?", how | {"until": end}, look, 0)])
    assert cut == answers[0][: answers[0].find(end)]
    with pytest.raises(ValueError, match="num_beams = 5: there is no beam search"):
        model.generate_until([ask("generate_until", "?", how | {"num_beams": 5}, look, 0)])
    with pytest.raises(ValueError, match="a visual is int; images are PIL images or paths"):
        model.generate_until([ask("generate_until", "?", how, lambda doc: [5], 0)])


def test_a_share_of_draws_says_nothing_without_a_temperature():
    """The harness's own defaults may give both; our generator refuses what it would drop."""
    from evlm_jax.evals.lmms.requests import options

    assert options({"temperature": 0, "top_p": 0.9})[1:3] == (0.0, 1.0)
    assert options({"temperature": 0.5, "top_p": 0.9})[1:3] == (0.5, 0.9)


def test_visuals_are_files_of_this_disk_with_the_pixels_of_training(tmp_path):
    """A data set that names a host asks none; 16 bits are scaled as in training."""
    with pytest.raises(
        ValueError, match="a visual is 'http://127.0.0.1:9/a.png'; .*paths of this disk"
    ):
        stored(["http://127.0.0.1:9/a.png"], tmp_path, 4)
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (((ref,),),) = (stored([Image.fromarray(grey)], tmp_path, 4),)
    np.testing.assert_array_equal(np.asarray(Image.open(ref.path))[..., 0], grey >> 8)


def test_loglikelihood(run, model, seen):
    _, visuals = seen
    targets = [" yes", "", lambda doc: "a"]
    found = model.loglikelihood(
        [ask("loglikelihood", "what?", target, look, 0) for target in targets]
    )
    trained = load_trained(str(run))
    dialogs = tuple(question(MARKER + "what?", answer) for answer in ("yes", "a"))
    ((loss, greedy),) = answer_losses(
        trained.model, trained.tokenizer, [Sample("s", "s", visuals[0], dialogs)], end=False
    )
    np.testing.assert_allclose([value for value, _ in found], [-loss[0], 0.0, -loss[1]], rtol=1e-5)
    assert [said for _, said in found] == [greedy[0], True, greedy[1]]


@pytest.mark.slow
def test_multi_round(ours, model, seen):
    docs, visuals = seen

    def following(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and previous_round_info == (
            None if round_idx == 1 else [round_idx - 1]
        )
        over = round_idx == 1 + len(doc)  # documents end at different rounds
        return (doc[:1], f"then, after {previous_output[-1]}?", over, previous_output, [round_idx])

    how = {"max_new_tokens": 5, "do_sample": False}
    numbers = (0, 1, 2)
    found = model.generate_until_multi_round(
        [ask("generate_until_multi_round", "first?", how, look, following, i) for i in numbers]
    )
    for i, answers in zip(numbers, found, strict=True):

        def say(text, seen):
            return ours([(MARKER * len(seen) + text, seen)], max_new_tokens=5)[0].strip()

        expected = [say("first?", visuals[i])]
        for _ in docs[i]:
            expected.append(say(f"then, after {expected[-1]}?", visuals[i][:1]))
        assert list(answers) == expected and len(answers) == 1 + len(docs[i])


@pytest.mark.slow
def test_an_export_answers_like_its_checkpoint(run, model, seen, tmp_path):
    from evlm_jax.evals.lmms.hf_model import EvlmHf

    export.export(str(run), str(tmp_path / "hf"), "hf")
    other = EvlmHf(str(tmp_path / "hf"), frames=3, batch_size=2, device="cpu")
    other.task_dict = model.task_dict
    how = {"max_new_tokens": 8, "do_sample": False}
    requests = [ask("generate_until", f"what {i}?", how, look, i) for i in range(len(seen[0]))]
    assert other.generate_until(requests) == model.generate_until(requests)
    requests = [
        ask("loglikelihood", "what?", target, look, i)
        for target in (" yes", " it is")
        for i in (0, 4)
    ]
    (ours, greedy), (theirs, also) = (
        zip(*plugin.loglikelihood(requests)) for plugin in (model, other)
    )
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert greedy == also


@pytest.mark.slow
def test_the_command_gives_our_evaluator_s_number(run, tmp_path, monkeypatch):
    if "evlm" not in [
        point.name for point in importlib.metadata.entry_points(group="lmms_eval.models")
    ]:
        pytest.skip("the installed metadata have no plug-in: pip install -e . again")
    data = layouts.write("gqa", tmp_path / "gqa")
    said = tmp_path / "ours.json"
    common = ["--checkpoint", str(run), "--task", "gqa", "--data", str(data), "--out", str(said)]
    assert cli.main(["eval", *common]) == 0
    predictions = [row["prediction"] for row in results.load(said)["examples"]]
    rows = json.loads((data / "testdev_balanced_questions.json").read_text())
    for row, prediction in list(zip(rows.values(), predictions, strict=True))[::3]:
        row["answer"] = prediction.upper() + "!"  # so that some are right
    (data / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    said.with_suffix(".jsonl").unlink()
    assert cli.main(["eval", *common]) == 0
    result = results.load(said)
    ours = {row["metric"]: row["value"] for row in result["scores"]}["accuracy (lmms-eval)"]

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    write(tmp_path / "tasks", tasks.find("gqa"), data, result["examples"])
    assert (
        lmms_eval(tmp_path / "tasks", "evlm_jax", f"checkpoint={run}") == (ours, predictions)
        and ours >= 50
    )
