"""A tokenizer's own chat template: ids and labels of transformers' apply_chat_template."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra parity")

from transformers import AutoTokenizer

from evlm_jax.config import MediaConfig
from evlm_jax.convert.export import write_tokenizer
from evlm_jax.data.samples import SampleError, Turn
from evlm_jax.data.template import Template
from evlm_jax.data.text import whole_steps
from evlm_jax.data.tokenizer import load_tokenizer, save_tokenizer
from tests.helpers.tiny import tiny_config
from tests.helpers.vocabularies import FAMILIES, vocabulary, write_json

LOOP, END = "{% for m in messages %}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}"
TEMPLATES = {  # vocabulary, further special tokens, template; each in the form of a family
    "Llama 3": (
        "llama3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{ bos_token }}{% if messages[0].role != 'system' %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%Y') }}<|eot_id|>"
        "{% endif %}"
        + LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
        " + '<|eot_id|>' }}" + END + ASK + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
    ),
    "Gemma": (
        "llama3",
        ("<start_of_turn>", "<end_of_turn>"),
        "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content.strip() + '<end_of_turn>\n' }}"
        + END
        + ASK
        + "{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "Qwen3": (
        "qwen2",
        (),
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{- (m.content.split('</think>') | last).lstrip('\n') + '<|im_end|>\n' }}"
        + END
        + ASK
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "SmolLM3": (
        "qwen2",
        (),
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
        + END
        + ASK
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "Mistral": (
        "llama3",
        ("[INST]", "[/INST]"),
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}" + END,
    ),
    "Phi-3": (
        "qwen2",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        + END
        + ASK
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
}
DIALOGS = {
    "one turn": ["What is it?", "A red disc."],
    "two turns": ["is it red?", "yes", "and 3?", "no, 4"],
    "spelled": ["is it red?", "yes", "and <|im_end|> [INST] <end_of_turn>?", "no, 3"],
    "white space": ["  What\n\nis it?\n", " A disc. "],
}


def folder(place, family):
    """A tokenizer with the template of a family; special tokens of Phi take white space away."""
    base, more, template = TEMPLATES[family]
    _, bos, eos, _ = FAMILIES[base]
    spec = json.loads(vocabulary(base))
    first = 1 + max(token["id"] for token in spec["added_tokens"])
    for i, name in enumerate(more):
        flags = {"single_word": False, "lstrip": False, "rstrip": family == "Phi-3"}
        flags |= {"normalized": False, "special": True}
        spec["added_tokens"].append({"id": first + i, "content": name} | flags)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    config |= {"chat_template": template} | ({"bos_token": bos} if bos else {})
    return write_json(place, tokenizer=spec, tokenizer_config=config)


def turns(texts):
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("family", TEMPLATES)
def test_ids_are_those_of_transformers(tmp_path, family):
    theirs = AutoTokenizer.from_pretrained(folder(tmp_path, family))
    ours = load_tokenizer(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    save_tokenizer(ours, again)
    for name, texts in DIALOGS.items():
        spelled = any(special in text for text in texts for special in ours.specials)
        said = turns(texts)
        messages = [{"role": turn.role, "content": turn.text} for turn in said]
        for tokenizer in (ours, load_tokenizer(again)):
            template = Template("own", tokenizer)
            whole, told = whole_steps(template.dialog(said, ()), tokenizer, None)
            asked = whole_steps(template.prompt(said[:-1], ()), tokenizer, None)[0]
            if spelled:  # what a user spells is text here, and a special token there
                assert len([i for i, *_ in whole if i in ours.specials.values()]) < sum(
                    i in ours.specials.values() for i in ids(theirs, messages)
                )
                continue
            assert [i for i, *_ in whole] == ids(theirs, messages), name
            assert [i for i, *_ in asked] == ids(theirs, messages[:-1], True), name
            assert [i for i, *_ in whole][: len(asked)] == [i for i, *_ in asked]
            answer = ours.decode([i for (i, *_), one in zip(whole, told, strict=True) if one])
            for text in texts[1::2]:
                before, found, answer = answer.partition(text.strip())
                assert found and before.strip() in ("", "<think>\n\n</think>")
            assert not answer.strip()


@pytest.mark.parametrize("family", ["Gemma", "Qwen3"])
def test_the_processor_of_an_export_lays_out_what_training_does(tmp_path, family):
    from evlm_jax.convert.torch_model.processing_evlm import EVLMProcessor

    theirs = AutoTokenizer.from_pretrained(folder(tmp_path, family))
    ours, media = load_tokenizer(tmp_path), MediaConfig(2, "<|media|>")
    processor = EVLMProcessor(
        theirs,
        image_size=8,
        media_tokens=2,
        image_token_id=ours.id("<|media|>"),
        template="own",
        text_start=ours.bos,
    )
    said = turns(["is it <image> red?", "yes, <image>", " and <|im_end|>?", "no"])
    messages = [{"role": turn.role, "content": turn.text} for turn in said]
    picture = np.zeros((8, 8, 3), np.uint8)
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        images=[picture, picture],
        return_assistant_tokens_mask=True,
    )
    whole, told = whole_steps(Template("own", ours).dialog(said, [(0, 1), (1, 2)]), ours, media)
    assert inputs["input_ids"][0].tolist() == [i for i, *_ in whole]
    assert inputs["assistant_masks"][0].tolist() == told


def test_an_export_keeps_the_template(tmp_path):
    theirs = AutoTokenizer.from_pretrained(folder(tmp_path / "in", "Llama 3"))
    (tmp_path / "out").mkdir()
    ours = load_tokenizer(tmp_path / "in")
    write_tokenizer(tmp_path / "out", ours, tiny_config(data={"template": "own"}))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "What is it?"}]
    assert ids(again, messages, True) == ids(theirs, messages, True)
    assert load_tokenizer(tmp_path / "out").chat.source == ours.chat.source


def ids(tokenizer, messages, answer_begins=False):
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=answer_begins)
    return list(found if isinstance(found, list) else found["input_ids"])


def test_labels_are_what_the_template_says_that_an_assistant_says(tmp_path):
    theirs = AutoTokenizer.from_pretrained(folder(tmp_path, "SmolLM3"))
    ours, said = load_tokenizer(tmp_path), turns(["is it red?", "yes", "is it 3?", "no, it is 4"])
    messages = [{"role": turn.role, "content": turn.text} for turn in said]
    found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    _, told = whole_steps(Template("own", ours).dialog(said, ()), ours, None)
    assert told == [bool(one) for one in found["assistant_masks"]] and any(told)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no') }}", "refuses the chat: no"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses the chat"),
        (LOOP + "{{ m.content | upper }}<|im_end|>" + END, "not once|changes what is said"),
        (LOOP + "{{ m.content * 2 }}<|im_end|>" + END, "not once"),
        (LOOP + "{{ m.content }}" + END, "no special token ends an answer"),
        ("{% if %}", "chat template: "),
    ],
)
def test_what_a_template_must_not_do(tmp_path, template, message):
    folder(tmp_path, "Qwen3")
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises((ValueError, SampleError), match=message):
        Template("own", tokenizer).dialog(turns(["a", "b"]), ())


def test_a_tokenizer_without_a_template(tmp_path):
    write_json(
        tmp_path, tokenizer=vocabulary("qwen2"), tokenizer_config={"eos_token": "<|im_end|>"}
    )
    with pytest.raises(ValueError, match="no chat template of its own"):
        Template("own", load_tokenizer(tmp_path))
