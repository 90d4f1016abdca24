"""IDEFICS with random weights, as transformers saves it: it comes in, computes and answers as it
does there, and goes out again bit for bit."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import Tensor
from evlm_jax.checkpoint.safetensors_file import read_safetensors, write_folder
from evlm_jax.config import from_config_dict
from evlm_jax.convert import engine, export, importer, readers
from evlm_jax.convert.engine import PARTS
from evlm_jax.data import text
from evlm_jax.data.samples import ImageRef
from evlm_jax.data.tokenizer import load_tokenizer
from experiments import idefics as published
from tests.helpers.checkpoints import tokenizer_directory
from tests.helpers.parity import needs_transformers
from tests.helpers.published import compare, randomise, wrapped_reads_as_before
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
pytestmark = needs_transformers
MEDIA = {"placeholder": "<image>", "around": "<fake_token_around_image>"}
LLM = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3}
VISION = {"embed_dim": 32, "image_size": 8, "patch_size": 4, "intermediate_size": 48}
VISION |= {"num_hidden_layers": 3, "num_attention_heads": 4}
PERCEIVER = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 3}
PERCEIVER |= {"resampler_head_dim": 12}


def their_model(folder, seed: int, **changes):
    """transformers' model in evaluation, saved in `folder` with a tokenizer."""
    import transformers

    torch.manual_seed(seed)
    fields = {
        "vocab_size": 256,
        "eos_token_id": 253,
        "vision_config": VISION,
        "perceiver_config": PERCEIVER,
    } | LLM
    config = transformers.IdeficsConfig(**fields | changes)
    config._attn_implementation = "eager"
    model = transformers.IdeficsForVisionText2Text(config).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder)
    words(folder)
    return model


def words(folder):
    """A tokenizer with IDEFICS's two words for images and a BOS."""
    file = tokenizer_directory(folder) / "tokenizer.json"
    spelled = file.read_text().replace("<|media|>", "<image>")
    file.write_text(spelled.replace("<|im_start|>", MEDIA["around"]))
    names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def config_for(folder):
    """The tiny config with what the folder says."""
    found = engine.describe(str(folder))
    found["vit"] |= {"image_size": 8}
    found["media"] |= MEDIA
    places = {"vision": str(folder), "llm": str(folder)}
    return tiny_config(**found, data={"template": "plain"}, init=places)


def test_what_a_wrapper_put_in_front_of_all_names_is_taken_off(tmp_path):
    their_model(tmp_path, 0)
    wrapped_reads_as_before(tmp_path, "_orig_mod.module.")


def their_logits(model, cfg, tokens, start, stop, pixels) -> np.ndarray:
    """[T, vocab] of one text and its images; one that nothing sees where it has none."""
    images = max(1, stop.max())
    x = (pixels[:images] / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    number = np.arange(images)
    seen = (number >= start[:, None]) & (number < stop[:, None])
    with torch.no_grad():
        return model(
            torch.tensor(tokens[None], dtype=torch.long),
            pixel_values=torch.tensor(x.transpose(0, 3, 1, 2)[None], dtype=torch.float32),
            image_attention_mask=torch.tensor(seen[None], dtype=torch.long),
        ).logits[0].numpy()  # fmt: skip


def test_a_prompt_is_that_of_its_processor(tmp_path):
    """Ids, and which image each of them sees."""
    import transformers
    from PIL import Image

    words(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    pixels = transformers.IdeficsImageProcessor(image_size=8)
    processor, picture = transformers.IdeficsProcessor(pixels, tokenizer), Image.new("RGB", (8, 8))
    parts = ["User:", picture, "which?", picture, picture, "both"]
    theirs = processor(text=[parts], return_tensors="pt")
    said = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    cfg = tiny_config(media=MEDIA | {"tokens": 1})
    refs = [(ImageRef(f"{i}.png"),) for i in range(3)]
    ours = text.alone(said, refs, load_tokenizer(str(tmp_path)), cfg)
    assert ours.tokens.tolist() == theirs["input_ids"][0].tolist()
    number = np.arange(3)
    seen = (number >= ours.visible_start[:, None]) & (number < ours.visible_stop[:, None])
    assert np.array_equal(seen, theirs["image_attention_mask"][0].numpy().astype(bool))


CASES = {
    "resampler, words apart": {
        "num_hidden_layers": 4, "cross_layer_interval": 2, "use_resampler": True,
        "qk_layer_norms": True, "vocab_size": 253, "additional_vocab_size": 3,
        "perceiver_config": PERCEIVER | {"qk_layer_norms_perceiver": True},
    },
    "no resampler, tied": {
        "num_hidden_layers": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ["resampler, words apart", pytest.param(
    "no resampler, tied", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.ci
def test_idefics_in_and_out(tmp_path, case):
    import transformers

    theirs = their_model(tmp_path / "theirs", len(case), **CASES[case])
    cfg = config_for(tmp_path / "theirs")
    importer.import_model(cfg, str(tmp_path / "theirs"), str(tmp_path / "in"))
    compare(cfg, tmp_path / "in", partial(their_logits, theirs, cfg))

    export.export(str(tmp_path / "in"), str(tmp_path / "out"), "idefics")
    again, loading = transformers.IdeficsForVisionText2Text.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["unexpected_keys"]
    assert all("post_layernorm" in name for name in loading["missing_keys"])
    one, other = flat(theirs), flat(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if "post_layernorm" not in name)


def flat(model) -> dict:
    """Its tensors, with words in one table."""
    state = model.state_dict()
    for first, more in (
        ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
        ("lm_head.weight", "lm_head.additional_fc.weight"),
    ):
        if more in state:
            state[first] = torch.cat([state[first], state.pop(more)])
    return state


def test_published_size():
    """IDEFICS-9B in transformers, but for the vision tower's last norm, and in our config."""
    import transformers

    cfg = from_config_dict(published.get_config())
    vision = {"embed_dim": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = transformers.IdeficsConfig(
        additional_vocab_size=2, cross_layer_interval=4, qk_layer_norms=True, use_resampler=True,
        vision_config=vision, perceiver_config={"qk_layer_norms_perceiver": True},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.IdeficsForVisionText2Text(config)
    ours = sum(
        int(np.prod(shape))
        for name, shape in engine.parameter_shapes(cfg).items()
        if name.startswith(PARTS["whole"])
    )
    assert ours == sum(p.numel() for p in theirs.parameters()) - 2 * 1280


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("", {"alpha_type": "vector"}, "alpha_type 'vector'"),
        ("", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),  # which its blocks have not here
        ("", {"hidden_size": [48, 48]}, r"hidden_size \[48, 48\]"),
        ("", {"head_dim": 8}, "head_dim 8"),
        ("", {"cross_layer_interval": 3}, "cross_layer_interval 3, which must divide"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("vision_config", {"num_channels": 1}, "num_channels 1"),
        ("perceiver_config", {"resampler_stride": 2}, "resampler_stride 2"),
        ("vision_config", {"num_hidden_layers": 2}, "num_hidden_layers is 2 in vision_config of"),
        ("", {"vision_config": {}}, "embed_dim is 768 in vision_config of config.json and 32 in"),
    ],
)
def test_fields_are_understood_or_refused(tmp_path, part, change, message):
    their_model(tmp_path, 0, num_hidden_layers=2, use_resampler=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config).update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine.describe(str(tmp_path))


def test_rotary_frequencies_of_earlier_checkpoints_are_compared_and_dropped(tmp_path):
    """transformers saved those of layers, and of blocks, which are not turned."""
    their_model(tmp_path, 0, num_hidden_layers=2)
    cfg, source = config_for(tmp_path), readers.open_source(tmp_path)
    names = ("layers.1.self_attn", "gated_cross_attn_layers.1.cross_attn")
    names = [f"model.{name}.rotary_emb.inv_freq" for name in names]
    saved = Tensor.of((1e4 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32))
    more = source.tensors | dict.fromkeys(names, saved)
    found = engine.open_tower(cfg, source._replace(tensors=more), "whole")
    assert {*names} < {*found.dropped}
    more[names[0]] = Tensor.of(saved.read() / 2)
    with pytest.raises(ValueError, match="inv_freq holds other rotary frequencies"):
        engine.open_tower(cfg, source._replace(tensors=more), "whole")


def test_a_tensor_that_is_missing_is_named_in_full(tmp_path):
    their_model(tmp_path, 0, num_hidden_layers=2)
    file, name = tmp_path / "model.safetensors", "embeddings.position_embedding.weight"
    tensors = read_safetensors(file)
    del tensors[f"model.vision_model.{name}"]
    (tmp_path / "less").mkdir()
    write_folder(tmp_path / "less", tensors)
    shutil.copy(tmp_path / "config.json", tmp_path / "less")
    with pytest.raises(ValueError, match=rf"model.vision_model.{name} is missing"):
        engine.describe(str(tmp_path / "less"))


@pytest.mark.parametrize("shape", [(), (3, 40), (1, 3, 48)])
def test_words_of_two_tables_have_one_width(tmp_path, shape):
    (tmp_path / "config.json").write_text('{"model_type": "idefics"}')
    sizes = {"": (253, 48), "additional_embedding.": shape}
    tensors = {f"model.embed_tokens.{x}weight": np.ones(s, np.float32) for x, s in sizes.items()}
    write_folder(tmp_path, {name: Tensor.of(array) for name, array in tensors.items()})
    with pytest.raises(ValueError, match=r"additional_embedding.weight of model.* one table"):
        engine.describe(str(tmp_path))


def test_a_config_as_its_authors_saved_it(tmp_path):
    """With fields that transformers' class does not read."""
    their_model(tmp_path, 0, num_hidden_layers=2)
    file, before = tmp_path / "config.json", engine.describe(str(tmp_path))
    config = json.loads(file.read_text()) | {"cross_layer_activation_function": "swiglu"}
    config |= {"ffn_dim": 64, "max_new_tokens": 100, "word_embed_proj_dim": 48}
    config["vision_config"]["vision_model_name"] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    file.write_text(json.dumps(config))
    assert engine.describe(str(tmp_path)) == before
