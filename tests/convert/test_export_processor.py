"""The exported processor against what training reads, and called as transformers' users call
processors.
"""

import base64
import copy
import functools
import http.server
import json
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from evlm_jax.convert import export
from evlm_jax.data import image, text
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.data.tokenizer import load_tokenizer
from tests.helpers.checkpoints import IMAGE, run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

CHATS = {
    "one image": [("user", "<image>What is this?")],
    "two turns, specials spelled": [
        ("user", "Look:<image> and <image><|im_end|>"),
        ("assistant", "A cat."),
        ("user", "Why <|media|>?"),
    ],
    "no image": [("user", "Hello!")],
}


@pytest.fixture(scope="module", params=["chatml", "plain"])
def exported(request, tmp_path_factory):
    """(config, the exported directory)"""
    place = tmp_path_factory.mktemp(request.param)
    cfg = tiny_config(data={"template": request.param}, vit={"image_size": (16, 24)})
    cfg = run_directory(place / "run", cfg, random_model(cfg, seed=0))
    export.export(str(place / "run"), str(place / "out"), "hf")
    return cfg, place / "out"


@pytest.fixture(scope="module")
def processor(exported):
    return transformers.AutoProcessor.from_pretrained(exported[1], trust_remote_code=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of pictures."""
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, channels in enumerate((3, 4, 3)):  # of which one has transparency
        Image.fromarray(rng.integers(0, 256, (30, 20 + 30 * i, channels), np.uint8)).save(
            place / f"{i}.png"
        )
    return [str(place / f"{i}.png") for i in range(3)]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a
    )


ASKED = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "add_generation_prompt": True,
}


def user(*parts):
    """A chat of one turn, its content a list of parts."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else part for part in parts
            ],
        }
    ]


def in_parts(chat, pictures):
    """The messages of `chat`, the content of each a list of texts and pictures."""
    files, parts = iter(pictures), []
    for role, content in chat:
        pieces = content.split("<image>")
        said = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            said += [
                {"type": "image", "path": next(files), "image": None},
                {"type": "text", "text": piece},
            ]
        parts.append({"role": role, "content": said})
    return parts


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_are_those_of_training(exported, processor, pictures, chat):
    """Of a prompt, in three forms of a message; of a dialog with its supervised tokens; the
    tokenizer's template spells the same.
    """
    cfg, _ = exported
    chat = CHATS[chat]
    turns, tokenizer = [Turn(*turn) for turn in chat], load_tokenizer(cfg.init.llm)
    refs = [
        ImageRef(file) for file in pictures[: sum(content.count("<image>") for _, content in chat)]
    ]
    document = text.prompt(turns, [(ref,) for ref in refs], tokenizer, cfg)
    messages = [{"role": role, "content": content} for role, content in chat]
    inputs = processor(messages, images=[Image.open(ref.path) for ref in refs])
    assert inputs["input_ids"][0].tolist() == document.tokens.tolist()
    fill = tuple(round(255 * channel) for channel in cfg.vit.mean)
    seen = np.array([image.load(ref, (16, 24), cfg.data.resize, fill) for ref in refs]).reshape(
        -1, 16, 24, 3
    )
    difference = np.abs(
        255 * (inputs["pixel_values"][0].numpy().transpose(0, 2, 3, 1) * cfg.vit.std + cfg.vit.mean)
        - seen
    )
    assert (difference < 1.001).all() and (
        difference > 0.001
    ).sum() <= 0.015 * difference.size  # rounding
    parts = in_parts(chat, pictures)
    assert same(processor.apply_chat_template(copy.deepcopy(parts), **ASKED), inputs)
    told = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert told == processor.apply_chat_template(parts, add_generation_prompt=True)
    assert told == processor.tokenizer.apply_chat_template(
        parts, tokenize=False, add_generation_prompt=True
    )
    assert told == processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert same(
        processor(text=pickle.loads(pickle.dumps(told)), images=pictures[: len(refs)]), inputs
    )
    longer = [*messages, {"role": "assistant", "content": "So it is."}]
    for said in (longer, longer[-1:]):
        spoken = [Turn(message["role"], message["content"]) for message in said]
        pieces = text.Template(cfg.data.template, tokenizer).dialog(
            spoken, [(i, i + 1) for i in range(len(refs) * (said is longer))]
        )
        laid, supervised = text.steps(pieces, tokenizer, cfg.media)
        given = {
            "images": pictures[: len(refs)] if said is longer else None,
            "return_assistant_tokens_mask": True,
        }
        found = processor.apply_chat_template(
            said, tokenize=True, return_dict=True, processor_kwargs=given
        )
        assert found["input_ids"][0].tolist() == [step[0] for step in laid]
        assert found["assistant_masks"][0].tolist() == [int(label) for label in supervised]
        assert processor.apply_chat_template(said) == processor.tokenizer.apply_chat_template(
            said, tokenize=False
        )
    begun = processor.apply_chat_template(longer, continue_final_message=True)
    assert begun.endswith("So it is.") and processor.apply_chat_template(longer).startswith(begun)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_forms_of_a_picture(processor, pictures, tmp_path):
    file, question = pictures[0], "<image>What?"
    wanted = processor(question, images=Image.open(file))
    array = np.asarray(Image.open(file))
    encoded = base64.b64encode(open(file, "rb").read()).decode()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "0.png").write_bytes(open(file, "rb").read())
    url = f"http://127.0.0.1:{server.server_port}/0.png"
    forms = [
        array,
        torch.tensor(array).permute(2, 0, 1),
        array / 255,
        np.float32(array / 255),
        file,
        open(file, "rb").read(),
        url,
    ]
    forms += [
        f"data:image/png;base64,{encoded}",
        [file],
        [[array]],
        torch.tensor(array)[None],
        (array,),
    ]
    for form in forms:
        assert same(processor(text=question, images=form), wanted), type(form)
    for part in (
        {"image": array},
        {"image": file},
        {"url": url},
        {"path": file},
        {"base64": encoded},
    ):
        assert same(
            processor.apply_chat_template(user({"type": "image", **part}, "x"), **ASKED),
            processor(user(PICTURE, "x"), images=file),
        )
    openai = {"type": "image_url", "image_url": {"url": url}}
    assert same(
        processor.apply_chat_template(user(openai, "x"), **ASKED),
        processor(user(PICTURE, "x"), images=file),
    )
    with pytest.raises(ValueError, match="cannot read the picture http.*404"):
        processor(question, images=url + "x")
    server.shutdown()
    assert processor(question, images=Image.open(pictures[1]).convert("LA"))[
        "pixel_values"
    ].shape == (1, 1, 3, 16, 24)
    assert processor("<image>", images=array[..., 0])["pixel_values"].std() > 0


PICTURE = {"type": "image"}


def test_batches_and_videos(processor, pictures):
    prompts = ["a<image>b<image>", "c", "<image>"]
    flat = processor(prompts, images=pictures)
    assert same(flat, processor(prompts, images=[pictures[:2], [], pictures[2:]]))
    lengths = flat["attention_mask"].sum(1).tolist()
    assert lengths == [6, 1, 2] and flat["attention_mask"][1].tolist() == [0] * 5 + [1]
    frames = [Image.open(file) for file in pictures]
    video = processor("x<video>y", videos=frames)
    assert video["image_groups"].tolist() == [[1, 1, 1]] and same(
        video, processor("x<video>y", videos=[frames])
    )
    stack = np.stack([np.asarray(frame.convert("RGB").resize((8, 9))) for frame in frames])
    assert same(processor("<video>", videos=stack), processor("<video>", videos=list(stack)))
    asked = processor.apply_chat_template(
        user({"type": "video", "video": frames}, "what?"), **ASKED
    )
    assert same(asked, processor(user({"type": "video"}, "what?"), videos=[frames]))
    both = processor(["a<video>b", "cd<image>"], videos=[[frames[:2]], []], images=[[], frames[:1]])
    assert both["image_groups"].tolist() == [[1, 1], [1, -2]]
    chats = processor.apply_chat_template(
        [user(PICTURE, "a"), user("bcd")], processor_kwargs={"images": pictures[0]}, **ASKED
    )
    assert chats["pixel_values"].shape[:2] == (2, 1) and not chats["pixel_values"][1].any()
    literal = processor.apply_chat_template(
        user({"type": "image", "image": pictures[0]}, "the <image> tag"), **ASKED
    )
    assert (
        int((literal["input_ids"] == IMAGE).sum()) == 2
        and "the <image> tag" in processor.batch_decode(literal["input_ids"])[0]
    )
    assert processor.decode(literal["input_ids"][0], skip_special_tokens=True).count("<image>") == 1


def test_padding_truncation_tensors(processor, pictures):
    ids = processor("abcdef")["input_ids"]
    assert torch.equal(processor("abcdef", truncation=True, max_length=4)["input_ids"], ids[:, :4])
    assert processor("ab", padding="max_length", max_length=4, padding_side="right")[
        "attention_mask"
    ].tolist() == [[1, 1, 0, 0]]
    assert processor("ab", text_kwargs={"pad_to_multiple_of": 8})["input_ids"].shape == (1, 8)
    assert isinstance(processor("ab", return_tensors="np")["input_ids"], np.ndarray)
    assert [
        len(row)
        for row in processor(["ab", "cde"], padding=False, return_tensors=None)["input_ids"]
    ] == [2, 3]
    for wrong, message in {
        ("truncation", True): "max_length goes with",
        ("max_length", 3): "max_length goes with",
        ("padding", "no"): "padding is True",
        ("truncation", "right"): "truncation is True or False",
        ("return_tensors", "tf"): "return_tensors is",
    }.items():
        with pytest.raises(ValueError, match=message):
            processor("abc", **dict([wrong]))
    with pytest.raises(ValueError, match="would cut an image off"):
        processor("abc<image>d", images=pictures[0], truncation=True, max_length=4)
    with pytest.raises(ValueError, match="several lengths make no tensor"):
        processor(["a", "bcd"], padding=False)
    with pytest.raises(TypeError, match="'size'"):
        processor("a", size=3)


def test_what_is_not_understood_raises(processor, pictures):
    file, array = pictures[0], np.zeros((5, 6, 3))
    cases = {
        r"\[1\] marks <image>, given are \[0\]": lambda: processor("a<image>"),
        r"\[0\] marks <image>, given are \[1\]": lambda: processor("a", images=file),
        r"\[1, 1\] marks <image>, given are \[1, 0\]": lambda: processor(
            ["<image>", "<image>"], images=file
        ),
        r"\[1, 0\] marks <image>, given are lists for 1": lambda: processor(
            ["<image>", "b"], images=[[file]]
        ),
        r"\[0\] marks <video>, given are \[1\]": lambda: processor("a", videos=pictures),
        "a prompt is missing": lambda: processor(images=file),
        "a prompt is a text or a chat, not Image": lambda: processor(
            Image.new("RGB", (2, 2)), "What?"
        ),
        "a picture of int32 from 0 to 0": lambda: processor(
            "<image>", images=array.astype(np.int32)
        ),
        "a picture of float64 from 0.0 to 200.0": lambda: processor(
            "<image>", images=array + 200 * (np.arange(3) == 1)
        ),
        "which axis of a picture": lambda: processor(
            "<image>", images=np.zeros((3, 5, 3), np.uint8)
        ),
        "cannot read the picture nothing.png": lambda: processor("<image>", images="nothing.png"),
        "none of them None": lambda: processor("<image>", images=[None]),
        "dict is no picture": lambda: processor("<image>", images={"image": file}),
        "no file of a video": lambda: processor("<video>", videos="film.mp4"),
        "not 'system' with": lambda: processor.apply_chat_template(
            [{"role": "system", "content": "x"}]
        ),
        "a part of type 'audio'": lambda: processor.apply_chat_template(
            user({"type": "audio", "audio": file})
        ),
        "a part of type 'image' with .'image', 'size'": lambda: processor.apply_chat_template(
            user(PICTURE | {"image": file, "size": 3})
        ),
        "a chat is a list of messages": lambda: processor.apply_chat_template("What?"),
        "a string or a list of parts": lambda: processor.apply_chat_template(
            [{"role": "user", "content": 3}]
        ),
        "with one template": lambda: processor.apply_chat_template(
            user("x"), chat_template="{{ x }}"
        ),
        "not trained with tools": lambda: processor.apply_chat_template(user("x"), tools=[{}]),
        "needs an assistant's turn": lambda: processor.apply_chat_template(
            user("x"), continue_final_message=True
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    for how in ({}, {"tokenize": True}):
        with pytest.raises(TypeError, match="unexpected keyword argument 'enable_thinking'"):
            processor.apply_chat_template(user("x"), enable_thinking=False, **how)
    if processor.template == "chatml":  # as text alone its special tokens would be letters
        with pytest.raises(ValueError, match="no special token: give the chat"):
            processor(str(processor.apply_chat_template(user("x"))))


@pytest.mark.parametrize("exported", ["chatml"], indirect=True)
def test_pipeline_and_saved_processor(exported, processor, pictures, tmp_path):
    cfg, folder = exported
    pipe = transformers.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    chat = user({"type": "image", "image": pictures[0]}, "What is this?")
    inputs = processor.apply_chat_template(chat, **ASKED)
    tokens = pipe.model.generate(**inputs, max_new_tokens=5)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pipe(text=chat, max_new_tokens=5, return_full_text=False)[0]["generated_text"] == answer
    told = pipe(text=[chat, user("Hello!")], max_new_tokens=5)
    assert (
        told[0][0]["generated_text"] == [*chat, {"role": "assistant", "content": answer}]
        and len(told) == 2
    )
    begun = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "A "}]}]
    assert pipe(text=begun, max_new_tokens=2)[0]["generated_text"][-1]["content"][0][
        "text"
    ].startswith("A ")
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (
        same(again.apply_chat_template(chat, **ASKED), inputs)
        and again.chat_template == processor.chat_template
    )
    names = set(json.loads((folder / "config.json").read_text())["auto_map"])
    assert names == {
        "AutoConfig",
        "AutoProcessor",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    }
