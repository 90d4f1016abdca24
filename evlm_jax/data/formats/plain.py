"""Text, and pictures of text: what is written is what is to be said."""

import json

from evlm_jax.data.containers import files
from evlm_jax.data.samples import MARKER, ImageRef, Sample, Turn, literal, question
from evlm_jax.data.source import key_of

READ = "Read the text in this image."


def text(name: str, root: str, row: dict) -> Sample:
    """{"text"}: a document of text alone, supervised from its second token on."""
    return Sample(key_of(row), name, (), ((Turn("assistant", literal(row["text"])),),))


def synthdog(name: str, root: str, row: dict, *, prompt: str = READ) -> Sample:
    """SynthDoG, a folder with metadata.jsonl or parquet: "file_name" or "image", "ground_truth": JSON with gt_parse.text_sequence."""
    truth = json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
    file = files.join(root, row["file_name"]) if "file_name" in row else row["image"]["bytes"]
    return Sample(file.partition("::")[0], name, ((ImageRef(file),),), (question(MARKER + prompt, literal(truth)),))
