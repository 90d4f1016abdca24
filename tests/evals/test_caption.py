"""Generated text against what stands in the samples, with a generator that looks the answers up."""

from evlm_jax.data.samples import MARKER, ImageRef, Sample, question
from evlm_jax.data.text import encode
from evlm_jax.evals import caption
from tests.data.made import TOKENIZER
from tests.tiny import tiny_config

CFG = tiny_config(llm=dict(vocab=TOKENIZER.vocab_size), data=dict(template="plain"))
TYPES = {"yes / no": ("yes", "no"), "colour": ("red", "blue")}


def vqa(key, *pairs):
    """A sample about one image."""
    return Sample(key, "test", ((ImageRef(f"{key}.png"),),), tuple(question(MARKER + q, a) for q, a in pairs))


SAMPLES = [vqa("0", ("is it red?", "yes"), ("what colour?", "red")), vqa("1", ("is it red?", "no"))]


def test_evaluate_asks_the_trained_prompt_and_scores_raw_text():
    seen = []

    def generate(prompts):
        seen.extend(prompts)
        return ["Yes.", "blue", "no"]

    result = caption.evaluate(generate, TOKENIZER, CFG, SAMPLES, TYPES)
    for document, (sample, i) in zip(seen, [(0, 0), (0, 1), (1, 0)], strict=True):
        alone = encode(vqa(SAMPLES[sample].key, (SAMPLES[sample].dialogs[i][0].text.replace(MARKER, ""), "x")), TOKENIZER, CFG)
        assert document.tokens.tolist() == alone.tokens[: len(document.tokens)].tolist()
        assert alone.target_at[0] == len(document.tokens) - 1  # generation begins where training had its first target
        assert document.refs == SAMPLES[sample].refs
    assert [e["correct"] for e in result["examples"]] == [True, False, True]
    assert result["examples"][0] == {"image": "0", "question": "is it red?", "answer": "yes", "prediction": "Yes.", "correct": True}
    assert result["scores"]["count"] == 3 and result["scores"]["exact_match"] == 2 / 3
    assert {row["type"]: row["accuracy"] for row in result["accuracy"]} == {"all": 2 / 3, "yes / no": 1.0, "colour": 0.0}


def test_draw_questions_is_seeded_and_without_repeats():
    many = [vqa(str(i), *((f"q{j}?", "yes") for j in range(5))) for i in range(20)]
    drawn = caption.draw_questions(many, 30, seed=1)
    assert drawn == caption.draw_questions(many, 30, seed=1) != caption.draw_questions(many, 30, seed=2)
    asked = [(s.key, s.dialogs[0][0].text) for s in drawn]
    assert len(set(asked)) == 30 and all(len(s.dialogs) == 1 for s in drawn)
    assert len(caption.draw_questions(many, 1000)) == 100
