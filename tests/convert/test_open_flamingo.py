"""open_flamingo's whole model with random weights: its checkpoint comes in, computes and answers as
it does there, and goes out again bit for bit."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evlm_jax.config import from_config_dict
from evlm_jax.convert import engine, export, importer
from experiments import open_flamingo as published
from tests.helpers.checkpoints import IMAGE, tokenizer_directory
from tests.helpers.parity import open_flamingo
from tests.helpers.published import compare, randomise
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch", reason="needs the extra parity")
pytestmark = pytest.mark.parity


def their_model(folder: Path, seed: int, llm: str, every: int, **sizes):
    """open_flamingo's Flamingo in evaluation, whose towers are saved in `folder`."""
    import transformers

    torch.manual_seed(seed)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip
    config = getattr(transformers, f"{llm}Config")(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_attention_heads=6,
        eos_token_id=253, **sizes
    )  # fmt: skip
    decoder = getattr(transformers, f"{llm}ForCausalLM")(config)
    randomise(clip), randomise(decoder)
    clip.save_pretrained(folder / "vit")
    decoder.save_pretrained(folder / "llm")
    tokenizer_directory(folder / "llm")

    class Visual(torch.nn.Module):
        """What open_clip's tower gives: (pooled, patches of the last block before ln_post)."""

        def __init__(self):
            super().__init__()
            self.tower = clip

        def forward(self, x):
            return None, self.tower(x, output_hidden_states=True).hidden_states[-1][:, 1:]

    open_flamingo("utils").extend_instance(decoder, open_flamingo("flamingo_lm").FlamingoLMMixin)
    decoder.set_decoder_layers_attr_name("model.layers")
    model = open_flamingo("flamingo").Flamingo(
        SimpleNamespace(visual=Visual()), decoder, 0, IMAGE, 32, cross_attn_every_n_layers=every
    )
    model.requires_grad_(False)
    for part in (model.perceiver, decoder.gated_cross_attn_layers):
        part.requires_grad_(True)
        randomise(part)
    decoder.get_input_embeddings().requires_grad_(True).weight.data.normal_(0, 0.2)
    return model.eval()


def checkpoint(model) -> dict:
    """As open_flamingo's train/train_utils.py (filter_state_dict_to_trainable) saves it."""
    state, doubled = model.state_dict(), ("old_decoder_blocks", "gated_cross_attn_layers")
    for name, p in model.named_parameters():
        if "embed" not in name and not p.requires_grad:
            state.pop(name, None)
    others = (*(f"lang_encoder.{name}" for name in doubled), "vision_encoder")
    return {name: p for name, p in state.items() if not name.startswith(others)}


def config_for(folder: Path, every: int):
    """The tiny config with open_flamingo's sections."""
    vit = engine.describe(str(folder / "vit")) | {"image_size": 8, "taps": (3,)}
    return tiny_config(
        vit=vit,
        llm=engine.describe(str(folder / "llm")),
        xattn={"heads": 8, "kv_heads": 8, "head_dim": 64, "ffn": 192, "sinks": 0, "every": every,
               "first": every - 1, "kv_norm": False},
        bridge={"kind": "flamingo", "latents": 64, "depth": 6, "heads": 8, "head_dim": 64,
                "ffn": 4, "prefix": False},
        media={"tokens": 1},
        data={"template": "plain"},
        init={"vision": str(folder / "vit"), "llm": str(folder / "llm")},
    )  # fmt: skip


def their_logits(model, cfg, tokens, start, stop, pixels) -> np.ndarray:
    """[T, vocab] of one text and its images; one that nothing sees where it has none."""
    images = max(1, int((tokens == IMAGE).sum()))
    x = (pixels[:images] / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    x = torch.tensor(x.transpose(0, 3, 1, 2)[None, :, None], dtype=torch.float32)
    ids = torch.tensor(tokens[None], dtype=torch.long)
    with torch.no_grad():
        return model(x, ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()


@pytest.mark.parametrize(
    "seed, llm, every, sizes",
    [
        (0, "Llama", 2, {"num_hidden_layers": 5, "num_key_value_heads": 2}),
        pytest.param(
            1, "Qwen2", 1, {"num_hidden_layers": 3, "tie_word_embeddings": True},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
@pytest.mark.ci
def test_open_flamingo_in_and_out(tmp_path, seed, llm, every, sizes):
    theirs = their_model(tmp_path, seed, llm, every, **sizes)
    state = checkpoint(theirs)
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "checkpoint.pt")
    cfg = config_for(tmp_path, every)
    importer.import_model(cfg, str(tmp_path / "checkpoint.pt"), str(tmp_path / "in"))
    compare(cfg, tmp_path / "in", partial(their_logits, theirs, cfg))

    export.export(str(tmp_path / "in"), str(tmp_path / "out"), "openflamingo")
    again = torch.load(tmp_path / "out/openflamingo.pt", weights_only=True)
    tied = {"lang_encoder.lm_head.weight"} if cfg.llm.tied else set()
    assert again.keys() == state.keys() - tied
    assert all(torch.equal(again[name], state[name]) for name in again)
    missing, unexpected = theirs.load_state_dict(again, strict=False)
    assert not unexpected


def test_published_size():
    """What OpenFlamingo-9B trains: counted in open_flamingo's own modules, and in our config."""
    helpers, cfg = open_flamingo("helpers"), from_config_dict(published.get_config())
    with torch.device("meta"):
        block = helpers.GatedCrossAttentionBlock(dim=4096, dim_visual=1024)
        parts = [helpers.PerceiverResampler(dim=1024), torch.nn.Embedding(32003, 4096)]
        parts += [block] * 8
    theirs = sum(p.numel() for part in parts for p in part.parameters())
    ours = sum(
        int(np.prod(shape))
        for name, shape in engine.parameter_shapes(cfg).items()
        if name.startswith(engine.PARTS["xattn"])
    )
    assert ours == theirs == 1_309_919_248


def changed(state: dict, how: str) -> dict:
    """A checkpoint that is not whole, or of another model."""
    blocks = "lang_encoder.model.layers"
    if how == "MPT":
        return {name.replace(blocks, "lang_encoder.transformer.blocks"): p
                for name, p in state.items()}  # fmt: skip
    if how == "no blocks":
        return {name: p for name, p in state.items() if "gated_cross_attn_layer" not in name}
    if how == "another layer":
        return {name.replace(f"{blocks}.3", f"{blocks}.2"): p for name, p in state.items()}
    if how == "frames":
        return state | {"perceiver.frame_embs": torch.zeros(2, 32)}
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how, message",
    [
        ("MPT", "the gated blocks lie in lang_encoder.transformer.blocks"),
        ("no blocks", "a resampler without gated blocks"),
        ("another layer", "no place for lang_encoder.model.layers.2.gated"),
        ("frames", "no place for perceiver.frame_embs"),
    ],
)
def test_other_checkpoints_are_refused_by_name(tmp_path, how, message):
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2}
    theirs = their_model(tmp_path, 0, "Llama", 2, **sizes)
    torch.save(changed(checkpoint(theirs), how), tmp_path / "checkpoint.pt")
    cfg = config_for(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        importer.import_model(cfg, str(tmp_path / "checkpoint.pt"), str(tmp_path / "in"))
    assert not (tmp_path / "in").exists()
