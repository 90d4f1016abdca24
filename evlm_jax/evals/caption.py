"""Free generation, scored as text: captions of pictures, and short answers by exact match."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evlm_jax.config import EVLMConfig
from evlm_jax.data.samples import MARKER, Sample
from evlm_jax.data.text import Document, prompt
from evlm_jax.evals.statistics import accuracy_table
from evlm_jax.evals.text_metrics import caption_scores, exact_match, words


def evaluate(
    generate: Callable[[Sequence[Document]], Sequence[str]],
    tokenizer,
    cfg: EVLMConfig,
    samples: Sequence[Sample],
    types: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """Generates the last turn of every dialog of the samples and compares it with what stands there.

    Args:
      generate: prompts (documents that end where the answer begins) to answers, greedy where the result is called so.
      types: answer type -> its answers, for an accuracy by type.
    Returns:
      {"task", "method", "scores": caption scores and "count", "examples": [{"image", "question", "answer", "prediction", "correct"}]},
      with types also "accuracy" (`accuracy_table`). Predictions are the raw text; correct is equality of `words`.
    """
    asked = [(sample, dialog) for sample in samples for dialog in sample.dialogs]
    predictions = generate([prompt(dialog[:-1], sample.visuals, tokenizer, cfg, sample.key) for sample, dialog in asked])
    examples = []
    for (sample, dialog), prediction in zip(asked, predictions, strict=True):
        row = {"image": sample.key, "question": dialog[-2].text.replace(MARKER, ""), "answer": dialog[-1].text, "prediction": prediction}
        examples.append(row | {"correct": bool(exact_match([words(prediction)], [[words(row["answer"])]])[0])})
    scores = {"count": len(examples)} | caption_scores([e["prediction"] for e in examples], [[e["answer"]] for e in examples])
    result = {"task": samples[0].source, "method": "greedy", "scores": scores, "examples": examples}
    return result | ({"accuracy": accuracy_table(examples, types)} if types else {})


def draw_questions(samples: Sequence[Sample], count: int | None, seed: int = 0) -> list[Sample]:
    """`count` (or all) dialogs, drawn by a seed without repeats, as samples of one dialog each, in the order of the samples."""
    places = [(i, j) for i, sample in enumerate(samples) for j in range(len(sample.dialogs))]
    chosen = sorted(random.Random(seed).sample(places, len(places))[:count])
    return [replace(samples[i], dialogs=(samples[i].dialogs[j],)) for i, j in chosen]
