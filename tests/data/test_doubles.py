"""What is said twice has no value that could be trusted: neither of the two is dropped, and the
file, row or field is named.
"""

import json
import pickle

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from evlm_jax.checkpoint.lazy_tensors import read_json
from evlm_jax.data.samples import RowError
from evlm_jax.data.sources import open_source
from evlm_jax.data.tokenizer import load_tokenizer
from tests.data.made import said, write_images, write_json, write_jsonl
from tests.data.test_containers import EXAMPLE
from tests.data.test_vqa import coco_vqa
from tests.helpers.checkpoints import tokenizer_directory

TALK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
OTHER = [
    {"role": "user", "content": "<image>p", "train": False},
    {"role": "assistant", "content": "b", "weight": 1.0, "value": None},
]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": TALK, "messages": OTHER}, "both 'conversations' and 'messages'"),
        ({"conversations": [TALK[0] | {"role": "assistant"}, TALK[1]]}, "both 'from' and 'role'"),
        ({"conversations": [TALK[0], TALK[1] | {"content": "b"}]}, "both 'value' and 'content'"),
        ({"conversations": [TALK[0], TALK[1] | {"weight": 0}]}, "'weight' 0: all are learned"),
        ({"conversations": TALK, "system": "Be brief."}, "the row has 'system', which is not read"),
        (
            {"messages": [OTHER[0], OTHER[1] | {"tool_calls": [{"id": 1}]}]},
            "a turn has 'tool_calls', which is not read",
        ),
        ({"image": {"url": "0.png"}, "conversations": TALK}, "neither bytes nor path, but url"),
        ({"image": {}, "conversations": TALK}, "neither bytes nor path"),
    ],
)
def test_rows_of_conversations(tmp_path, row, message):
    with pytest.raises(RowError, match=message):
        open_source(write_jsonl(tmp_path / "rows.jsonl", [{"image": "0.png"} | row]))[0]


def test_an_empty_column_beside_the_other_says_nothing(tmp_path):
    row = {"image": "0.png", "conversations": None, "messages": OTHER, "system": "", "tools": "[]"}
    (sample,) = open_source(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert said(sample) == [[("user", "<image>p"), ("assistant", "b")]]


def test_two_captions_of_one_picture(tmp_path):
    write_images(tmp_path, 1)
    for name in ("0.txt", "0.TXT"):
        (tmp_path / name).write_text(name)
    with pytest.raises(ValueError, match=r"the caption file of '.*/0' stands there twice"):
        open_source(f"folder:{tmp_path}")


def test_two_entries_of_one_id(tmp_path):
    file = coco_vqa(tmp_path, "v2_")
    annotations = tmp_path / "v2_mscoco_train2014_annotations.json"
    told = read_json(annotations)
    write_json(annotations, told | {"annotations": told["annotations"] * 2})
    with pytest.raises(ValueError, match="annotations.json: the question_id 52 stands there twice"):
        open_source(f"vqav2:{file}")
    pictures = [{"id": 1, "file_name": name, "width": 9, "height": 9} for name in ("a", "b")]
    content = {"images": pictures, "annotations": [{"image_id": 1, "caption": "a", "id": 1}]}
    file = write_json(tmp_path / "annotations/captions_x.json", content)
    with pytest.raises(ValueError, match="captions_x.json: the id 1 stands there twice"):
        open_source(f"coco-captions:{file}")
    write_json(tmp_path / "instances.json", content)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([]))
    with pytest.raises(ValueError, match="instances.json: the id 1 stands there twice"):
        open_source(f"refcoco:{tmp_path}/refs.p")


def test_two_values_of_a_field_of_a_record(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    packed = [msgpack.packb(part)[1:] for part in ({"text": "a"}, {"text": "b"})]
    for record in (b"\x82" + b"".join(packed), EXAMPLE * 2):
        writer.write(record)
    writer.close()
    source = open_source(f"text:{tmp_path}/a.array_record")
    for number, name in enumerate(("text", "feature3")):
        with pytest.raises(RowError, match=f"the field '{name}' stands there twice"):
            source[number]


def test_two_values_of_a_field_of_a_model_s_files(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"rope_theta": 1, "rope_theta": 2}}')
    with pytest.raises(ValueError, match="config.json: .*'rope_theta' stands there twice"):
        read_json(tmp_path / "config.json")
    folder = tokenizer_directory(tmp_path / "tokenizer")
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole.replace('"vocab"', '"vocab": {}, "vocab"'))
    with pytest.raises(ValueError, match="tokenizer.json: .*the field 'vocab' stands there twice"):
        load_tokenizer(folder)
    spec = json.loads(whole)
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 9})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"the added token '<\|.*' stands there twice"):
        load_tokenizer(folder)
