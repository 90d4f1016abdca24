"""Text, and pictures of text: what is written is what is to be said."""

import json

from evlm_jax.data.formats.fields import facts, files_of, members, words
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal, question
from evlm_jax.data.source import key_of

READ = "Read the text in this image."


def text(name: str, root: str, row: dict) -> Sample:
    """{"text"}, or the .txt of a tar: a document of text alone, supervised from its second token
    on.
    """
    told = facts(row)
    said = words(told["txt"] if "text" not in told and "txt" in told else told["text"], "text")
    return Sample(key_of(row), name, (), ((Turn("assistant", literal(said)),),))


def synthdog(name: str, root: str, row: dict, *, prompt: str = READ) -> Sample:
    """SynthDoG, a folder with metadata.jsonl or parquet: "file_name" or "image", "ground_truth":
    JSON with gt_parse.text_sequence.
    """
    truth = json.loads(words(facts(row)["ground_truth"], "ground_truth"))["gt_parse"][
        "text_sequence"
    ]
    (file,) = files_of(row, root, "file_name") or files_of(row, root, "image") or members(row)
    return Sample(
        file.partition("::")[0],
        name,
        ((ImageRef(file),),),
        (question(MARKER + prompt, literal(words(truth, "text_sequence"))),),
    )
