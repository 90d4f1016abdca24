"""Conversations, against the library's single prompts and the generator called by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evlm_jax import cli
from evlm_jax.chat.conversation import Chat, Message
from evlm_jax.cli.chat import MISSING
from evlm_jax.data.samples import ImageRef, Turn
from evlm_jax.generate import Generator
from evlm_jax.library import Model, random
from evlm_jax.runs import Trained
from tests.data.test_images import write_video

GOLDEN = Path(__file__).parents[1] / "golden" / "format1_dense"


@pytest.fixture(scope="module")
def chat(trained):
    return Chat(trained, "4", 6)


def picture(number):
    return str(GOLDEN / "pictures" / f"{number}.png")


@pytest.mark.ci
def test_turns_are_answered_by_the_template(trained, chat):
    first = [Message("user", "What is it?", (picture(1), picture(2)))]
    *grown, answer = chat.answer(first)
    assert grown and all(answer.startswith(part) for part in grown)
    assert answer == Model(trained.model, trained.tokenizer).generate(
        "What is it?", [picture(1), picture(2)], 6
    )
    second = Message("user", "From <image>?", (picture(3),))
    *_, said = chat.answer([*first, Message("assistant", answer), second])
    generator = Generator(trained.model, trained.tokenizer)
    turns = [
        Turn("user", "<image><image>What is it?"),
        Turn("assistant", answer),
        Turn("user", "From <image>?"),
    ]
    prompt = generator.prompt(turns, [(ImageRef(picture(n)),) for n in (1, 2, 3)])
    assert said == generator.generate([prompt], 6)[0].text


def test_a_picture_is_encoded_once(chat, monkeypatch):
    asked, encode = [], chat._taps._encode
    monkeypatch.setattr(chat._taps, "_encode", lambda refs: asked.extend(refs) or encode(refs))
    talk = [Message("user", "What is it?", (picture(4),))]
    *_, answer = chat.answer(talk)
    more = [*talk, Message("assistant", answer), Message("user", "And this?", (picture(5),))]
    *_, again = chat.answer(more)
    chat.looks([*more, Message("assistant", again)], 0)
    assert [ref.path for ref in asked] == [picture(4), picture(5)]


def test_a_word_looks_where_the_library_says(trained, chat):
    model = Model(trained.model, trained.tokenizer)
    words = model.attention("What is it?", [picture(1)], answer="A cat.")[3:]
    assert [word["word"] for word in words] == chat.words("A cat.")
    talk = [Message("user", "What is it?", (picture(1),)), Message("assistant", "A cat.")]
    for number, word in enumerate(words):
        (look,) = chat.looks(talk, number)
        # A batch holds kept taps as bfloat16.
        assert np.abs(look.grid - word["grid"]).max() < 5e-4 and look.picture.size == (320, 320)
        assert 0 < look.grid.sum() < look.share <= 1  # the class token is no patch


def test_a_word_of_the_second_turn_sees_its_own_picture(chat):
    talk = [
        Message("user", "What is it?", (picture(1),)),
        Message("assistant", "A cat."),
        Message("user", "And these?", (picture(2),)),
        Message("assistant", "Two dogs."),
    ]
    (look,) = chat.looks(talk, 1)
    assert 0 < look.share <= 1
    assert chat.looks([Message("user", "Hello"), Message("assistant", "Hello.")], 0) == []


@pytest.mark.parametrize("name", ["film.mp4", "film.ts", "film"])  # .ts is of TypeScript, too
def test_a_word_behind_a_video_looks_at_its_frames(chat, tmp_path, name):
    write_video(tmp_path / "film.mp4", seconds=2, fps=8)
    film = (tmp_path / "film.mp4").rename(tmp_path / name)
    talk = [Message("user", "What is it?", (str(film),))]
    *_, answer = chat.answer(talk)
    looks = chat.looks([*talk, Message("assistant", answer)], 0)
    assert len(looks) == 4 and 0 < sum(look.share for look in looks) <= 1
    assert len({look.picture.tobytes() for look in looks}) == 4


def test_what_cannot_be_answered_is_one_line(chat, tmp_path):
    odd, film = tmp_path / "odd.png", tmp_path / "film.mp4"
    odd.write_bytes(b"no picture")
    page = tmp_path / "page.html"
    page.write_bytes(b"<html>")
    film.write_bytes(b"no video")
    for message, what in (
        (Message("user", "What?", (str(odd),)), "odd.png: cannot decode"),
        (Message("user", "What?", (str(film),)), "film.mp4"),
        (Message("user", "What?", (str(page),)), "page.html: cannot"),
        (Message("user", "<image> and <image>?", (picture(1),)), "2 <image> markers for 1 images"),
        (Message("user", "a " * 2000), "tokens, 1024 are the most"),
        (Message("user", "What?", (picture(1),) * 33), "33 pictures and frames, 32 are the most"),
        (Message("user", " "), "an empty message"),
    ):
        with pytest.raises(ValueError, match=what) as found:
            list(chat.answer([message]))
        assert "\n" not in str(found.value)
    assert list(chat.answer([Message("user", "What?", (picture(1),))]))


def test_gates_are_the_models(trained, chat):
    gates = chat.gates()
    assert gates["layers"] == list(trained.model.cfg.cross_layers)
    assert np.allclose(gates["attn"], np.tanh(0.5)) and len(gates["ffn"]) == len(gates["layers"])


@pytest.mark.ci
def test_a_model_without_cross_attention_has_no_gates_and_no_words(trained, monkeypatch):
    monkeypatch.chdir(GOLDEN)  # where its vocabulary is
    cfg = trained.model.cfg
    baseline = random(
        replace(
            cfg,
            bridge=replace(cfg.bridge, kind="llava"),
            xattn=replace(cfg.xattn, every=0),
            media=replace(cfg.media, tokens=4),  # its pictures have 4 patches
        )
    )
    chat = Chat(Trained(baseline.module, baseline.tokenizer, {}), "4", 6)
    assert chat.gates() is None and chat.words("A cat.") == []
    assert list(chat.answer([Message("user", "What is it?", (picture(1),))]))


def test_without_gradio_a_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["chat", "--checkpoint", "nowhere"]) == 1
    assert capsys.readouterr().err == f"evlm: {MISSING}\n" and "evlm_jax[chat]" in MISSING
