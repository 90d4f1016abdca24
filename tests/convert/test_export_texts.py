"""How texts begin and are joined by the exported processor, against what training reads."""

from pathlib import Path

import pytest

from evlm_jax.convert import export
from evlm_jax.data import text
from evlm_jax.data.samples import Turn
from evlm_jax.data.tokenizer import load_tokenizer
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config
from tests.helpers.vocabularies import older_folder

torch = pytest.importorskip("torch", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")


@pytest.mark.parametrize("family", ["llama2", "mistral", "gpt2-prefix"])
@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_processor_begins_and_joins_texts_as_training_does(tmp_path, family, template):
    """A BOS in front, and the space that a vocabulary puts in front of a text in front of the first
    one alone.
    """
    cfg = tiny_config(data={"template": template})
    cfg = run_directory(tmp_path / "run", cfg, random_model(cfg, seed=0))
    older_folder(Path(cfg.init.llm), family)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), "hf")
    processor, tokenizer = (
        transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True),
        load_tokenizer(cfg.init.llm),
    )
    chat = [("user", "What is it?"), ("assistant", "red dog"), ("user", " two  spaces <s></s>")]
    document = text.prompt([Turn(*turn) for turn in chat], (), tokenizer, cfg)
    processor.tokenizer(["cut"], truncation=True, max_length=1)  # its state is another's
    inputs = processor([{"role": role, "content": content} for role, content in chat])
    assert inputs["input_ids"][0].tolist() == document.tokens.tolist()
    assert processor("red dog")["input_ids"][0].tolist() == [
        *tokenizer.bos,
        *tokenizer.encode("red dog"),
    ]
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("red dog").input_ids == [*tokenizer.bos, *tokenizer.encode("red dog")]
    messages = [{"role": "user", "content": "red"}]
    front = exported.apply_chat_template(messages, return_dict=False)[: len(tokenizer.bos)]
    assert front == list(tokenizer.bos)
    told = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert told == exported.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert torch.equal(processor(told)["input_ids"], processor(messages)["input_ids"])
    for start in tokenizer.bos:
        with pytest.raises(ValueError, match="no special token: give the chat"):
            processor(exported.convert_ids_to_tokens(start) + "red")
    again = load_tokenizer(tmp_path / "out")
    assert (again.bos, again.eos, again.specials) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.specials,
    )
