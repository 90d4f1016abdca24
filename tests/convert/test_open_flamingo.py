"""open_flamingo's whole model with random weights: its checkpoint comes in, computes and answers as
it does there, and goes out again bit for bit."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from evlm_jax.batch import Batch
from evlm_jax.checkpoint import store
from evlm_jax.config import from_config_dict
from evlm_jax.convert import engine, export, importer
from evlm_jax.data import text
from evlm_jax.data.samples import ImageRef, Sample
from evlm_jax.generate import Generator
from evlm_jax.models.evlm import EVLM
from evlm_jax.models.param_names import unflatten
from experiments import open_flamingo as published
from tests.helpers.checkpoints import IMAGE, tokenizer_directory
from tests.helpers.parity import open_flamingo, relative
from tests.helpers.tiny import tiny_config
from tests.models.test_evlm import row

torch = pytest.importorskip("torch", reason="needs the extra parity")
pytestmark = pytest.mark.parity
TEXTS = {  # "i" is an image, numbers are words
    "text alone": [9],
    "one image": ["i", 5],
    "several images": ["i", 2, "i", "i", 4],
    "text before an image": [3, "i", 3],
}
NEW = 40


def randomise(model):
    """Every parameter, gates too."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = float("norm" in name and name.endswith("weight"))
            p.normal_(scale, p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)


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


def imported(cfg, folder: Path) -> EVLM:
    """The model of an imported checkpoint."""
    arrays, _ = store.load_params(str(folder))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, unflatten(cfg, arrays, shapes)))


def their_logits(model, cfg, tokens: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """[T, vocab] of one text and its images; one that nothing sees where it has none."""
    images = max(1, int((tokens == IMAGE).sum()))
    x = (pixels[:images] / 255 - np.array(cfg.vit.mean)) / np.array(cfg.vit.std)
    x = torch.tensor(x.transpose(0, 3, 1, 2)[None, :, None], dtype=torch.float32)
    ids = torch.tensor(tokens[None], dtype=torch.long)
    with torch.no_grad():
        return model(x, ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()


def rows_of(cfg) -> Batch:
    """A row for each of TEXTS."""
    rows = [row(cfg, [parts], seed) for seed, parts in enumerate(TEXTS.values())]
    batch = Batch(*(None if a[0] is None else np.concatenate(a) for a in zip(*rows, strict=True)))
    return batch._replace(tokens=np.where(batch.media_slot >= 0, IMAGE, batch.tokens))


def lengths(batch: Batch) -> list[int]:
    """Tokens of each row's one document."""
    return [int(until[0]) for until in batch.visible_until]


def answers(cfg, model: EVLM, batch: Batch) -> list[list[int]]:
    """NEW greedy tokens behind each row, by the caches."""
    documents = []
    for number, (parts, length) in enumerate(zip(TEXTS.values(), lengths(batch), strict=True)):
        refs = tuple((ImageRef(f"{number}.{i}"),) for i in range(parts.count("i")))
        names = ("tokens", "media_slot", "visible_start", "visible_stop")
        path = np.stack([getattr(batch, name)[number, :length] for name in names], 1).tolist()
        sample = Sample("prompt", "prompt", refs, ())
        documents.append(text.lay_out([[*map(tuple, path)]], [()], sample, cfg))

    def features(refs):
        places = [tuple(map(int, ref.path.split("."))) for ref in refs]
        return np.asarray(model.encode(np.stack([batch.pixels[place] for place in places])))

    tokenizer = importer.vocabulary(cfg, cfg.init.llm)
    generator = Generator(model, tokenizer, features=features)
    return [list(one.tokens) for one in generator.generate(documents, NEW, stop=())]


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
def test_open_flamingo_in_and_out(tmp_path, seed, llm, every, sizes):
    theirs = their_model(tmp_path, seed, llm, every, **sizes)
    state = checkpoint(theirs)
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "checkpoint.pt")
    cfg = config_for(tmp_path, every)
    importer.import_model(cfg, str(tmp_path / "checkpoint.pt"), str(tmp_path / "in"))
    model, batch = imported(cfg, tmp_path / "in"), rows_of(cfg)

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(nnx.jit(lambda model, batch: model.logits(model.hidden(batch)))(
            model, batch
        ))  # fmt: skip
        found = answers(cfg, model, batch)
    for number, length in enumerate(lengths(batch)):
        tokens, pixels = batch.tokens[number, :length], batch.pixels[number]
        expected = their_logits(theirs, cfg, np.concatenate([tokens, found[number]]), pixels)
        assert relative(ours[number, :length], expected[:length]) <= 1e-5
        allowed = sorted(set(importer.vocabulary(cfg, cfg.init.llm).ids) - {IMAGE})
        best = expected[length - 1 : -1, allowed].argmax(-1)
        assert [allowed[i] for i in best] == found[number]

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
