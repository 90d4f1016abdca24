"""Llama 3.2 Vision with random weights, as transformers saves it: it comes in, computes and answers
as it does there, and goes out again bit for bit."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from evlm_jax.checkpoint.lazy_tensors import Source, Tensor
from evlm_jax.config import from_config_dict
from evlm_jax.convert import engine, export, importer, mllama
from evlm_jax.convert.describe import describe_source
from evlm_jax.convert.engine import PARTS
from evlm_jax.convert.readers import read_directory
from evlm_jax.data import text
from evlm_jax.data.samples import MARKER, ImageRef
from evlm_jax.data.tokenizer import load_tokenizer
from experiments import mllama as published
from tests.helpers.checkpoints import IMAGE, tokenizer_directory
from tests.helpers.parity import needs_transformers
from tests.helpers.published import compare, randomise, wrapped_reads_as_before
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
pytestmark = needs_transformers
SIDE = 8  # of a tile
VISION = {
    "hidden_size": 32, "attention_heads": 4, "intermediate_size": 48, "patch_size": 4,
    "image_size": SIDE, "num_hidden_layers": 3, "num_global_layers": 2,
    "intermediate_layers_indices": [0, 2], "vision_output_dim": 96,
}  # fmt: skip
TEXT = {
    "vocab_size": 255, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "num_hidden_layers": 6, "cross_attention_layers": [1, 4],
    "bos_token_id": 254, "eos_token_id": 253, "pad_token_id": 252,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


FAST_FIRST = TEXT["rope_parameters"] | {"low_freq_factor": 5.0}


def their_model(folder, seed: int, vision=(), words=()):
    """transformers' model in evaluation, saved in `folder` with a tokenizer."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.MllamaConfig(
        vision_config=VISION | dict(vision), text_config=TEXT | dict(words), image_token_index=255
    )
    config._attn_implementation = "eager"
    model = transformers.MllamaForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    file = tokenizer_directory(folder) / "tokenizer.json"
    file.write_text(file.read_text().replace("<|media|>", "<|image|>"))
    names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return model


def config_for(folder, grid=(1, 1)):
    """The tiny config with what the folder says, and pictures of so many tiles down and across;
    None: of different grids.
    """
    found = engine.describe(str(folder))
    tiles = found["vit"]["tiles"]
    found["vit"] |= {"image_size": tuple(SIDE * count for count in grid or (tiles, 1))}
    found["vit"] |= {"grid_by_picture": grid is None}
    found["media"] |= {"placeholder": "<|image|>"}
    places = {"vision": str(folder), "llm": str(folder)}
    return tiny_config(**found, data={"template": "plain"}, init=places)


def test_what_a_wrapper_put_in_front_of_all_names_is_taken_off(tmp_path):
    their_model(tmp_path, 0)
    wrapped_reads_as_before(tmp_path, "module.")


def their_logits(model, cfg, tokens, start, stop, pixels) -> np.ndarray:
    """[T, vocab] of one text and its images. Text in front of all images sees none, as in Meta's
    own code: transformers' blocks let it see all of them, but for the MLP.
    """
    ids, images = torch.tensor(tokens[None], dtype=torch.long), int(stop.max())
    if not images:
        with torch.no_grad():
            return model(ids).logits[0].numpy()
    (down, across), tiles = cfg.vit.laid, cfg.vit.tiles
    x = (pixels[:images, ..., :3] / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    x = x.reshape(images, down, SIDE, across, SIDE, 3).transpose(0, 1, 3, 5, 2, 4)
    x = x.reshape(images, down * across, 3, SIDE, SIDE)
    x = np.pad(x, ((0, 0), (0, tiles - down * across), (0, 0), (0, 0), (0, 0)))
    numbers = np.full(images, 1 + cfg.vit.grids.index(cfg.vit.laid))
    if cfg.vit.grid_by_picture:
        numbers = pixels[:images, 0, 0, 3].astype(int)
    counts = np.array([math.prod(cfg.vit.grids[n - 1]) for n in numbers])
    there = np.arange(tiles) < counts[:, None]
    x[~there] = 0
    number = np.arange(images)
    seen = (number >= start[:, None]) & (number < stop[:, None])
    sees = torch.tensor(seen.any(1), dtype=torch.float32)[None, :, None]
    hooks = [
        layer.cross_attn.register_forward_hook(lambda _, args, out: (out[0] * sees, *out[1:]))
        for layer in model.model.language_model.layers
        if hasattr(layer, "cross_attn")
    ]
    with torch.no_grad():
        logits = model(
            ids,
            pixel_values=torch.tensor(x[None], dtype=torch.float32),
            aspect_ratio_ids=torch.tensor(numbers[None]),
            aspect_ratio_mask=torch.tensor(there[None], dtype=torch.long),
            cross_attention_mask=torch.tensor(seen[None, :, :, None] & there, dtype=torch.long),
        ).logits[0].numpy()  # fmt: skip
    for hook in hooks:
        hook.remove()
    return logits


CASES = {
    "a grid for each picture": (None, {}, {}),
    "a tile": ((1, 1), {}, {}),
    "2 x 2 tiles": ((2, 2), {}, {}),
    "1 x 3 of 3 tiles, no block in front": (
        (1, 3),
        {
            "max_num_tiles": 3,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]],
            "hidden_act": "quick_gelu",
        },
        {"cross_attention_layers": [0, 4], "rms_norm_eps": 1e-6},
    ),
}


MARKS = {"a grid for each picture": pytest.mark.ci}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=MARKS.get(case, pytest.mark.slow)) for case in CASES],
)
def test_mllama_in_and_out(tmp_path, case):
    import transformers

    grid, vision, words = CASES[case]
    theirs = their_model(tmp_path / "theirs", len(case), vision, words)
    cfg = config_for(tmp_path / "theirs", grid)
    importer.import_model(cfg, str(tmp_path / "theirs"), str(tmp_path / "in"))
    compare(cfg, tmp_path / "in", partial(their_logits, theirs, cfg))

    export.export(str(tmp_path / "in"), str(tmp_path / "out"), "mllama")
    again, loading = transformers.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    one, other = theirs.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert again.config.text_config.rope_parameters == theirs.config.text_config.rope_parameters


def test_images_side_by_side_are_seen_together(tmp_path):
    """What each token sees, as their processor has it, and ids but for the place of the BOS."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    file = tokenizer_directory(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace("<|media|>", "<|image|>"))
    cfg = tiny_config(media={"placeholder": "<|image|>", "tokens": 1, "sight": "neighbours"})
    said = "a<|image|>b<|image|><|image|>c<|image|><|image|><|image|>"
    refs = [(ImageRef(f"{i}.png"),) for i in range(6)]
    ours = text.alone(said.replace("<|image|>", MARKER), refs, load_tokenizer(str(tmp_path)), cfg)
    spans = get_cross_attention_token_mask(ours.tokens.tolist(), IMAGE)
    theirs = convert_sparse_cross_attention_mask_to_dense([spans], [[1] * 6], 1, len(ours.tokens))
    number = np.arange(6)
    seen = (number >= ours.visible_start[:, None]) & (number < ours.visible_stop[:, None])
    assert np.array_equal(seen, theirs[0, :, :, 0].astype(bool))
    video = text.alone(
        MARKER + "d", [tuple(ref for (ref,) in refs)], load_tokenizer(str(tmp_path)), cfg
    )
    assert video.visible_start.tolist() == [0] * 7
    assert video.visible_stop.tolist() == [1, 2, 3, 4, 5, 6, 6]


def test_published_size():
    """Llama-3.2-11B-Vision in transformers and in our config."""
    import transformers

    cfg = from_config_dict(published.get_config())
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.MllamaConfig(
        vision_config={"image_size": 560}, text_config={"rope_parameters": scaling}
    )
    with torch.device("meta"):
        theirs = transformers.MllamaForConditionalGeneration(config)
    shapes = engine.parameter_shapes(cfg)
    ours = {name: shape for name, shape in shapes.items() if name.startswith(PARTS["whole"])}
    total = sum(math.prod(shape) for shape in ours.values())
    assert total == sum(p.numel() for p in theirs.parameters()) == 10_670_220_835
    folder = Source(Path("published"), json.loads(config.to_json_string(use_diff=False)), {})
    kernel = "model.vision_model.patch_embedding.weight"
    tensors = {kernel: Tensor.of(np.zeros((1280, 3, 14, 14), np.float32))}
    said = describe_source(folder._replace(tensors=tensors), "mllama", "")
    del said["vit"]["mean"], said["vit"]["std"]  # of preprocessor_config.json
    assert not engine.differences(cfg, said, "transformers")


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("", {"head_dim": 8}, "head_dim 8"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("text_config", {"head_dim": 16}, "head_dim 16"),
        ("text_config", {"cross_attention_layers": [1, 5]}, r"cross_attention_layers \[1, 5\]"),
        ("text_config", {"cross_attention_layers": [2, 3]}, r"cross_attention_layers \[2, 3\]"),
        ("text_config", {"cross_attention_layers": 3}, "cross_attention_layers 3"),
        (
            "text_config",
            {"rope_parameters": FAST_FIRST},
            "low_freq_factor 5.0, high_freq_factor 4.0",
        ),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("vision_config", {"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ("vision_config", {"num_channels": 1}, "num_channels 1"),
        ("vision_config", {"max_num_tiles": 3}, "supported_aspect_ratios"),
        ("vision_config", {"supported_aspect_ratios": [[2, 1], [1, 1]]}, "supported_aspect_ratios"),
        ("vision_config", {"vision_output_dim": 64}, "vision_output_dim 64"),
        ("vision_config", {"image_size": 9}, "image_size 9; .* whole patches"),
        ("vision_config", {"intermediate_layers_indices": [2, 0]}, "intermediate_layers_indices"),
        ("vision_config", {"num_attention_heads": 2}, "num_attention_heads 2"),
        (
            "vision_config",
            {"patch_size": 2},
            "patch_size is 2 in vision_config of config.json and 4",
        ),
    ],
)
def test_fields_are_understood_or_refused(saved, tmp_path, part, change, message):
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config).update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine.describe(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"max_image_tiles": 2},
            "preprocessor_config.json has max_image_tiles 2; .* max_image_tiles 4",
        ),
        ({"size": {"height": 4, "width": 8}}, "has size {'height': 4, 'width': 8}"),
        ({"do_pad": False, "resample": 3}, "has do_pad False, resample 3"),
    ],
)
def test_another_image_processor_is_refused(saved, tmp_path, change, message):
    shutil.copytree(saved, tmp_path / "model")
    file, third = tmp_path / "model/preprocessor_config.json", [1 / 3] * 3
    said = {"image_mean": third, "image_std": third, "max_image_tiles": 4, "do_pad": True}
    file.write_text(json.dumps(said | {"size": {"height": SIDE, "width": SIDE}, "resample": 2}))
    assert engine.describe(str(tmp_path / "model"))["vit"]["mean"] == tuple(third)
    file.write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=message):
        engine.describe(str(tmp_path / "model"))


def test_blocks_are_a_set_of_layers(saved):
    source = read_directory(saved)
    text = source.metadata["text_config"] | {"cross_attention_layers": [4, 1, 4]}
    text |= {"hidden_act": "swish"}
    again = source._replace(metadata=source.metadata | {"text_config": text})
    one, other = (describe_source(mllama.plain(s), "mllama", "") for s in (source, again))
    assert one == other


def test_a_missing_tensor_is_named_by_its_layer_in_the_file(saved):
    """The second block, which stands in front of the fourth of four layers without blocks."""
    cfg, source = config_for(saved), mllama.plain(read_directory(saved))
    tensors = {
        n: t for n, t in source.tensors.items() if n != "model.cross.3.cross_attn.q_norm.weight"
    }
    assert len(tensors) + 1 == len(source.tensors)
    with pytest.raises(ValueError, match=r"layers\.4\.cross_attn\.q_norm\.weight is missing"):
        engine.open_tower(cfg, source._replace(tensors=tensors), "whole")


def test_two_tensors_for_one_place_are_named(saved):
    """Of three local layers config.json counts two: the third and the first global one would have
    one name.
    """
    config = json.loads((saved / "config.json").read_text())
    config["vision_config"] |= {"num_hidden_layers": 2, "intermediate_layers_indices": [0, 1]}
    tensors = read_directory(saved).tensors
    message = r"global_transformer.layers.0\..* and .*model.transformer.layers.2\..* 2 local layers"
    with pytest.raises(ValueError, match=message):
        mllama.plain(Source(saved, config, tensors))


@pytest.mark.parametrize(
    "vit, message",
    [
        ({"image_size": (16, 12)}, "vit.image_size must be 1 to vit.tiles = 4 squares"),
        ({"image_size": (24, 16)}, "vit.image_size must be 1 to vit.tiles = 4 squares"),
        ({"global_blocks": 0}, "vit.global_blocks must lie in 1..4"),
        ({"grid_by_picture": True}, "vit.image_size must be 32,8 where vit.grid_by_picture"),
        ({"taps": (1, 3)}, "vit.taps must end with vit.depth = 5"),
    ],
)
def test_grids_are_of_whole_tiles(saved, vit, message):
    found = engine.describe(str(saved))
    with pytest.raises(ValueError, match=message):
        tiny_config(**found | {"vit": found["vit"] | {"image_size": SIDE} | vit})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that transformers has written."""
    folder = tmp_path_factory.mktemp("mllama")
    their_model(folder, 0)
    return folder
