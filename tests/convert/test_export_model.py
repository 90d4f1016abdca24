"""The exported model as transformers' users handle it: kept caches, offloading, training,
arguments. test_export.py compares it with JAX.

Other releases of transformers run these files, too: `pip install --no-deps --target DIR
transformers==5.19.0`, then PYTHONPATH=DIR pytest."""

import copy
import shutil

import numpy as np
import pytest

from evlm_jax.convert import export
from tests.helpers.checkpoints import IMAGE, run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
accelerate = pytest.importorskip("accelerate", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

FORMS = {
    "dense": {},
    "experts": {
        "moe": {"copies": 2, "slices": 4, "top_k": 3},
        "vit": {"registers": 3},
        "llm": {"tied": False},
        "xattn": {"every": 2, "sinks": 0},
    },
}
RUN = [IMAGE] * 2  # what an image is to the language model
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    cfg = tiny_config(**FORMS[request.param])
    run_directory(place / "run", cfg, random_model(cfg, seed=0))
    export.export(str(place / "run"), str(place / "out"), "hf")
    return place / "out"


def load(folder, **how):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, **how
    ).eval()


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def eager(folder):
    return load(folder, attn_implementation="eager")


def words(count, seed=0):
    return (np.random.default_rng(seed).integers(0, 250, count)).tolist()


def pixels(*shape, seed=0):
    return torch.tensor(
        np.random.default_rng(seed).standard_normal((*shape, 3, 8, 8)), dtype=torch.float32
    )


@pytest.fixture
def batch():
    """A row with a video of two frames; one with an image, padded on the left."""
    rows = [
        words(3) + RUN + words(4, 1) + RUN + words(5, 2),
        [0] * 6 + words(2, 3) + RUN + words(6, 4),
    ]
    mask = torch.tensor([[1] * 16, [0] * 6 + [1] * 10])
    groups = torch.tensor([[0, 0], [0, -1]])
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": mask,
        "pixel_values": pixels(2, 2),
        "image_groups": groups,
    }


def far(a, b, mask=None):
    """Largest difference by the largest magnitude, where the mask is 1."""
    a, b = (x if mask is None else x[mask.bool()] for x in (a.detach(), b.detach()))
    return float((a - b).abs().max() / b.abs().max())


def cache_of(out):
    return out["cache"] if "cache" in out else out["past_key_values"]


@torch.no_grad()
def test_sdpa_equals_eager_and_what_is_asked_for_comes(model, eager, batch):
    out = eager(**batch, output_attentions=True, output_hidden_states=True)
    fast, mask = model(**batch, output_hidden_states=True), batch["attention_mask"]
    assert far(fast.logits, out.logits, mask) <= 1e-5
    assert len(out.hidden_states) == 1 + len(out.attentions) == 5
    assert len(out.cross_attentions) == len(eager.xattn)
    for mine, theirs in zip(fast.hidden_states, out.hidden_states, strict=True):
        assert far(mine, theirs, mask) <= 1e-5
    assert far(eager.get_output_embeddings()(out.hidden_states[-1]), out.logits) <= 1e-6
    weights = torch.stack(out.attentions)
    assert torch.allclose(weights.sum(-1), torch.ones(())) and not weights[:, 0].triu(1).any()
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="does not support Flash"):
        model.set_attn_implementation("flash_attention_2")
    model.set_attn_implementation("eager")
    assert torch.equal(model(**batch).logits, out.logits)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, batch):
    whole = model(**batch).logits
    ids = batch.pop("input_ids")
    given = model.get_input_embeddings()(ids)
    assert torch.equal(model(**batch, inputs_embeds=given).logits, whole)
    told = model.generate(input_ids=ids, **batch, max_new_tokens=6, **GREEDY)[:, ids.shape[1] :]
    drawn = model.generate(inputs_embeds=given, **batch, max_new_tokens=6, **GREEDY)
    assert torch.equal(drawn, told)
    last, two = ({"logits_to_keep": kept} for kept in (3, torch.tensor([1, 5])))
    assert far(model(**batch, input_ids=ids, **last).logits, whole[:, -3:]) <= 1e-6
    assert far(model(**batch, input_ids=ids, **two).logits, whole[:, [1, 5]]) <= 1e-6
    (logits,) = model(**batch, input_ids=ids, use_cache=False, return_dict=False)
    assert len(logits) == 2
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": given}):
        with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
            model(**batch, **wrong)


@torch.no_grad()
def test_a_new_image_behind_a_kept_cache(model, batch):
    """Given as the whole text or as its new tokens, with all images or the new one: what the whole
    text gives without a cache.
    """
    cache = transformers.DynamicCache()
    said = model.generate(**batch, max_new_tokens=4, past_key_values=cache, **GREEDY)
    later = torch.tensor([words(4, 5) + words(3, 6), words(2, 7) + RUN + words(3, 8)])
    ids, past = torch.cat([said, later], 1), cache.get_seq_length()
    mask = torch.cat(
        [batch["attention_mask"], torch.ones(2, ids.shape[1] - 16, dtype=torch.long)], 1
    )
    new, every = pixels(2, 1, seed=1), batch["pixel_values"].clone()
    every[1, 1] = new[1, 0]
    everything = {"pixel_values": every, "image_groups": torch.tensor([[0, 0], [0, 1]])}
    whole = model.generate(
        input_ids=ids, attention_mask=mask, **everything, max_new_tokens=6, **GREEDY
    )[:, -6:]
    for tokens, images in (
        (ids, {"pixel_values": new}),
        (ids, everything),
        (ids[:, past:], {"pixel_values": new}),
    ):
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "past_key_values": copy.deepcopy(cache),
            **images,
        }
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, **GREEDY)[:, -6:], whole)
    inputs = {"input_ids": ids[:, past:], "attention_mask": mask}
    out = model(**inputs, pixel_values=new, past_key_values=copy.deepcopy(cache))
    assert (
        far(out.logits, model(input_ids=ids, attention_mask=mask, **everything).logits[:, past:])
        <= 1e-5
    )
    third = torch.tensor([RUN + words(2)] * 2)  # a row has 2 images, the other by now too
    last, more = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1), pixels(2, 1, seed=2)
    mine = model(
        input_ids=third, attention_mask=last, pixel_values=more, past_key_values=cache_of(out)
    ).logits
    groups = torch.tensor([[0, 0, 1], [0, 1, 2]])
    ids, every = torch.cat([ids, third], 1), torch.cat([every, more], 1)
    assert (
        far(
            mine,
            model(
                input_ids=ids, attention_mask=last, pixel_values=every, image_groups=groups
            ).logits[:, -4:],
        )
        <= 1e-5
    )
    for wrong in (
        inputs,
        {"input_ids": third[:, 2:], "attention_mask": mask[:, : past + 2], "pixel_values": new},
    ):
        kept = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="images, the tokens show"):
            model(**wrong, past_key_values=kept)
        assert kept.get_seq_length() == past  # nothing was read


@torch.no_grad()
def test_what_is_refused(model, batch):
    with pytest.raises(ValueError, match=r"have \[0\] images, the tokens show \[2\]"):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match=r"have \[2\] images, the tokens show \[0\]"):
        model(torch.tensor([words(4)] * 2), pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match=r"have \[2, 2\] images, the tokens show \[2, 1\]"):
        model(**batch | {"image_groups": torch.tensor([[0, 0], [0, 1]])})
    some = batch["pixel_values"]
    for wrong in (some[:1], some[0], some[..., :6, :]):  # the first would be every row's
        with pytest.raises(ValueError, match=r"pixel_values are \[\d, .*(for 2 rows|\[3, 8, 8\])"):
            model(**batch | {"image_groups": None, "pixel_values": wrong})
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 16\), .* \(2, 15\)"):
        model(**batch | {"input_ids": batch["input_ids"][:, 1:]})
    with pytest.raises(TypeError, match="position_ids"):
        model(**batch, position_ids=batch["attention_mask"])
    with pytest.raises(ValueError, match="labels need all logits"):
        model(**batch, labels=batch["input_ids"], logits_to_keep=1)
    with pytest.raises(ValueError, match="StaticCache; EVLM keeps images in a DynamicCache"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static", **GREEDY)
    alone = {name: array[:1] for name, array in batch.items()}
    for assisted in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(**alone, max_new_tokens=2, **GREEDY, **assisted)
    with pytest.raises(ValueError, match="pixel_value"):
        model.generate(input_ids=batch["input_ids"], pixel_value=batch["pixel_values"])
    cache = cache_of(model(**batch, use_cache=True))
    with pytest.raises(ValueError, match="holds other rows than these 1"):
        model(torch.tensor([[1]]), past_key_values=cache)
    until = cache.get_seq_length() + 1  # as if it had been cropped
    cache.images = cache.images._replace(until=until)
    with pytest.raises(ValueError, match="cut off among or before its images"):
        model(torch.tensor([[1], [2]]), past_key_values=cache)


@torch.no_grad()
def test_stop_strings(folder, model, batch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    alone = {name: array[:1] for name, array in batch.items()}
    free = model.generate(**alone, max_new_tokens=6, **GREEDY)
    text = tokenizer.decode(free[0, 17:19])
    how = {"stop_strings": [text], "tokenizer": tokenizer}
    stopped = model.generate(**alone, max_new_tokens=6, **GREEDY, **how)[0]
    assert len(stopped) < free.shape[1] and (stopped == free[0, : len(stopped)]).all()
    assert text in tokenizer.decode(stopped[16:])


@torch.no_grad()
def test_the_placeholder_is_never_drawn(model, batch):
    """Also where it is by far the likeliest."""
    inclined = copy.deepcopy(model)
    inclined.llm.head = torch.nn.Linear(64, 256)
    torch.nn.init.zeros_(inclined.llm.head.weight)
    inclined.llm.head.bias[IMAGE] = 50
    assert inclined(**batch).logits.argmax(-1).eq(IMAGE).all()
    how = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    sampled = [{"do_sample": True} | more for more in ({"top_k": 3}, {"temperature": 0.1})]
    for drawn in (*sampled, {"num_beams": 3}, {"do_sample": False}):
        assert not inclined.generate(**batch, **how, **drawn)[:, 16:].eq(IMAGE).any(), drawn
    told = model.generate(**batch, **how, num_beams=3, num_return_sequences=2)
    assert len(told) == 4 and torch.equal(
        told, model.generate(**batch, **how, num_beams=3, num_return_sequences=2, use_cache=False)
    )


PLACES = {
    "auto": {"device_map": "auto", "max_memory": {"cpu": 250_000}},
    "disk": {"device_map": {"": "disk"}},
    "parts": {"device_map": {"vit": "disk", "llm": "cpu", "xattn": "disk", "media_tokens": "disk"}},
}


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_offloaded_equals_not_offloaded(folder, model, batch, place, tmp_path):
    away = load(folder, offload_folder=tmp_path, **PLACES[place])
    assert any(parameter.device.type == "meta" for parameter in away.parameters())
    assert far(away(**batch).logits, model(**batch).logits) <= 1e-6
    if place == "parts":
        how = {"max_new_tokens": 3, **GREEDY}
        assert torch.equal(away.generate(**batch, **how), model.generate(**batch, **how))


@torch.no_grad()
def test_offloaded_by_accelerate(folder, model, batch, tmp_path):
    for offload in (
        accelerate.cpu_offload,
        lambda net: accelerate.disk_offload(net, tmp_path, execution_device="cpu"),
    ):
        away = load(folder)
        offload(away)
        assert far(away(**batch).logits, model(**batch).logits) <= 1e-6


@pytest.mark.ci
def test_checkpointed_gradients_and_frozen_towers_under_trainer(folder, batch, tmp_path):
    model = load(folder).train()
    labels = torch.where(
        batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE), batch["input_ids"], -100
    )
    loss = model(**batch, labels=labels).loss
    loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    again = model(**batch, labels=labels)
    again.loss.backward()
    assert torch.allclose(again.loss, loss) and again.keys() == {"loss", "logits"}
    assert all(
        torch.allclose(parameter.grad, plain[name], atol=1e-6)
        for name, parameter in model.named_parameters()
    )
    with pytest.raises(ValueError, match="exclude each other"):
        model(**batch, past_key_values=transformers.DynamicCache())
    for tower in (model.vit, model.llm):
        tower.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    items = [
        {name: array[i] for name, array in (batch | {"labels": labels}).items()} for i in (0, 1)
    ]
    how = {
        "output_dir": str(tmp_path),
        "max_steps": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 1,
    }
    arguments = transformers.TrainingArguments(
        **how, gradient_accumulation_steps=2, max_grad_norm=0
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=items)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(
        loss.item(), rel=1e-4
    )  # of two accumulated batches, by all their labels
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(("vit.", "llm.")), name
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert far(load(tmp_path / "saved")(**batch).logits, model.eval()(**batch).logits) <= 1e-6


@torch.no_grad()
def test_saved_weights(folder, model, batch, tmp_path):
    """By the names of the export, in shards; more or fewer tensors are refused; other sizes and
    types.
    """
    from safetensors.torch import load_file, save_file

    from evlm_jax.checkpoint.safetensors_file import read_folder

    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    names = set(load_file(folder / "model.safetensors"))
    assert (
        len(list((tmp_path / "again").glob("*.safetensors"))) > 2
        and set(read_folder(tmp_path / "again")) == names
    )
    assert far(load(tmp_path / "again")(**batch).logits, model(**batch).logits) <= 1e-6
    shutil.copytree(folder, tmp_path / "spoilt")
    state = load_file(folder / "model.safetensors")
    del state["media_tokens"]
    save_file(
        state | {"extra": torch.zeros(2)},
        tmp_path / "spoilt/model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError,
        match=r"do not fit the model:\n  missing media_tokens.weight\n  unexpected extra",
    ):
        load(tmp_path / "spoilt")
    half = load(folder, dtype=torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and far(half(**batch).logits.float(), model(**batch).logits, batch["attention_mask"]) < 0.1
    )
    with pytest.raises(ValueError, match="200 tokens would lose image_token_id = 255"):
        half.resize_token_embeddings(200)
    larger = load(folder)
    larger.resize_token_embeddings(300)
    larger.save_pretrained(tmp_path / "larger")
    found = load(tmp_path / "larger")(**batch).logits
    assert (
        found.shape[-1] == 300
        and far(found[..., :256], model(**batch).logits, batch["attention_mask"]) <= 1e-5
    )
