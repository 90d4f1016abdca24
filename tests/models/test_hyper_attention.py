"""Cross-attention beside self-attention, against mPLUG-Owl3's equations in NumPy: token by token,
each document alone, with the products counted.
"""

from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from evlm_jax import flops
from evlm_jax.convert.activations import look
from evlm_jax.convert.export import export
from evlm_jax.data.samples import Sample, SampleError, Turn
from evlm_jax.data.text import encode
from evlm_jax.models import param_names
from tests.data.made import TOKENIZER, refs
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import BASELINES, tiny_batch, tiny_config

OWL = BASELINES["mplug_owl3"]
VARIANTS = {
    "240728": {},
    "241101": {"gate": "softmax"},
    "tanh, own queries": {"query": "own", "gate": "tanh", "key_rotary": False, "every": 3},
    "own queries that turn": {"query": "own", "qk_norm": "head", "first": 0, "kv_heads": 4},
}


def config(**xattn):
    """Two layers of three have a block; a row has pictures of its own, as features."""
    return tiny_config(
        bridge=OWL["bridge"],
        xattn=OWL["xattn"] | xattn,
        media=OWL["media"] if xattn.get("query") != "own" else {"tokens": 2},
        llm={"layers": 3, "qkv_bias": True},
        data={"cache_features": True, "block_pairs": 40},
    )


def softmax(scores):
    weights = np.exp(scores - scores.max(0))
    return weights / weights.sum(0)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


class Equations:
    """The language model over one document in float64, by the published equations."""

    def __init__(self, cfg, model):
        state = param_names.flatten(cfg, nnx.state(model))
        self.cfg, self.p = cfg, {name: np.asarray(a, np.float64) for name, a in state.items()}
        self.flops = Counter()

    def times(self, part, x, name):
        kernel = self.p[f"{name}/kernel"]
        self.flops[part] += 2 * x.size * kernel.shape[1]
        return x @ kernel + self.p.get(f"{name}/bias", 0)

    def turn(self, x, positions):
        """x [T, N, H]: halves as pairs, each pair by its own frequency."""
        a, b = np.split(x, 2, -1)
        inverse = self.cfg.llm.rope_theta ** (-np.arange(a.shape[-1]) / a.shape[-1])
        angle = np.asarray(positions)[:, None, None] * inverse
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    def attend(self, part, q, k, v):
        """One token: q [N, H], k and v [S, K, H] -> [N, H]."""
        k, v = (np.repeat(a, q.shape[0] // a.shape[1], 1) for a in (k, v))
        self.flops[part] += 4 * k.size
        weights = softmax(np.einsum("nh,snh->sn", q, k) / np.sqrt(q.shape[1]))
        return np.einsum("sn,snh->nh", weights, v)

    def images(self, layer, read, q, text, own, taps, place, start, stop):
        """What a layer's attention gives with images, `place` of which are their positions; `own`
        are keys and values of the text that a token sees.
        """
        x, name, h = self.cfg.xattn, f"xattn/{layer}", self.cfg.llm.head_dim

        def split(a):
            return a.reshape(*a.shape[:-1], a.shape[-1] // h, h)

        def normed(a, which):
            scale = self.p.get(f"{name}/{which}_norm/scale")
            return a if scale is None else rms(a, scale, x.eps)

        seen = taps[-1] @ self.p["bridge/proj/kernel"] + self.p["bridge/proj/bias"]  # [I, S, D]
        k, v = (split(self.times(flops.KEYS, seen, f"{name}/{c}")) for c in "kv")
        k = normed(k, "k")
        if x.query == "own":
            q = normed(split(self.times(flops.CROSS, read, f"{name}/q")), "q")
            q = self.turn(q, range(len(q))) if x.key_rotary else q
        if x.key_rotary and len(k):
            k = np.stack([self.turn(a, [at] * len(a)) for a, at in zip(k, place)])
        gate = self.p.get(f"{name}/attn_gate", 0.0)
        if x.gate == "mixing":
            gate = 1 / (1 + np.exp(-self.times(flops.CROSS, text, f"{name}/attn_gate/linear")))
        out = text.copy()
        for t, (first, last) in enumerate(zip(start, stop)):
            if first < last:
                keys, values = (a[first:last].reshape(-1, *a.shape[2:]) for a in (k, v))
                if x.gate == "softmax":  # over [visual keys, text keys]
                    keys, values = (
                        np.concatenate([images, text[: t + 1]])
                        for images, text in zip((keys, values), own)
                    )
                    out[t] = self.attend(flops.CROSS_SCORES, q[t], keys, values)
                    self.flops[flops.CROSS_SCORES] -= 4 * (t + 1) * q[t].size  # those of the text
                    continue
                image = self.attend(flops.CROSS_SCORES, q[t], keys, values)
                if x.gate == "mixing":
                    out[t] = text[t] * (1 - gate[t]) + image * gate[t]
                else:
                    out[t] = text[t] + np.tanh(gate) * image
        return out

    def hidden(self, tokens, media_slot, start, stop, taps):
        """[T, D] behind the last norm; `start` and `stop` into taps [G, I, S, V]."""
        llm, p, positions = self.cfg.llm, self.p, np.arange(len(tokens))
        media = np.asarray(media_slot)[:, None]
        x = np.where(media >= 0, p["media/embedding"][media[:, 0]], p["llm/embed"][tokens])
        first = np.flatnonzero(media[:, 0] == 0)
        place = dict(zip(np.asarray(stop)[first] - 1, first))
        place = [place.get(i, 0) for i in range(taps.shape[1])]
        for layer in range(llm.layers):
            name = f"llm/layers/{layer}"
            read = rms(x, p[f"{name}/ln1/scale"], llm.eps)
            q, k, v = (
                self.times(flops.LLM, read, f"{name}/attn/{c}").reshape(len(x), -1, llm.head_dim)
                for c in "qkv"
            )
            q, k = self.turn(q, positions), self.turn(k, positions)
            text = np.stack(
                [self.attend(flops.LLM_SCORES, q[t], k[: t + 1], v[: t + 1]) for t in range(len(x))]
            )
            if layer in self.cfg.cross_layers:
                text = self.images(layer, read, q, text, (k, v), taps, place, start, stop)
            x = x + self.times(flops.LLM, text.reshape(len(x), -1), f"{name}/attn/o")
            read = rms(x, p[f"{name}/ln2/scale"], llm.eps)
            gate, up = (self.times(flops.LLM, read, f"{name}/mlp/{c}") for c in ("gate", "up"))
            x = x + self.times(flops.LLM, gate / (1 + np.exp(-gate)) * up, f"{name}/mlp/down")
        return rms(x, p["llm/ln_f/scale"], llm.eps)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(changes):
    """Packed rows against each of their documents alone; FLOPs are those of the equations."""
    cfg = config(**changes)
    model, batch = random_model(cfg, 0), tiny_batch(cfg, 1)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(jax.jit(lambda model, batch: model.hidden(batch))(model, batch))
    equations, documents, pictures = Equations(cfg, model), 0, []
    for row in range(len(batch.tokens)):
        real = int(flops.real_tokens(batch)[row].sum())
        begins = [*np.flatnonzero(batch.positions[row, :real] == 0), real]
        for a, b in zip(begins, begins[1:]):
            start, stop = batch.visible_start[row, a:b], batch.visible_stop[row, a:b]
            slots = slice(start[start < stop].min(initial=99), max(stop.max(), 0))
            taps = np.moveaxis(np.asarray(batch.taps[row, slots], np.float64), 1, 0)
            shift = np.where(start < stop, slots.start, 0)
            tokens = batch.tokens[row, a:b], batch.media_slot[row, a:b]
            wanted = equations.hidden(*tokens, start - shift, stop - shift, taps)
            assert np.abs(got[row, a:b] - wanted).max() <= 1e-5 * np.abs(wanted).max()
            documents += 1
            pictures.append(taps.shape[1])
    assert documents > 4 and {0, 1, 2} <= set(pictures)
    costs = flops.needed(cfg, (), flops.Work.of(cfg, batch))
    for part, count in equations.flops.items():
        assert costs[part].forward == count, part


def test_text_sees_all_images_that_are_not_behind_it():
    cfg = config()
    turns = (Turn("user", "<image>a<image>"), Turn("assistant", "b"))
    found = encode(Sample("0", "made", refs(1, 2), (turns,)), TOKENIZER, cfg)
    media = np.flatnonzero(found.media_slot >= 0)
    assert found.visible_stop[media].tolist() == [1, 2, 3] and not found.visible_start.any()
    assert set(found.visible_stop[: media[0]]) == {0}
    assert set(found.visible_stop[media[0] + 1 : media[1]]) == {1}
    assert set(found.visible_stop[media[-1] + 1 :]) == {3}  # a video's frames count as images


def test_an_image_at_two_places_is_refused():
    """Branches of a document may have an image at several positions; keys that turn have one."""
    asked = [(Turn("user", f"{said}<image>"), Turn("assistant", "x")) for said in ("a", "bcd")]
    sample = Sample("7", "made", refs(1), tuple(asked))
    with pytest.raises(SampleError, match="made/7: .* an image at several positions.*dialogs = 1"):
        encode(sample, TOKENIZER, config())
    assert encode(sample, TOKENIZER, config(key_rotary=False)).refs


def test_conversion_refuses_it_by_name(tmp_path):
    cfg = tiny_config(xattn={"placement": "parallel", "heads": 4})
    cfg = run_directory(tmp_path, cfg, random_model(cfg, 0))
    for form in ("hf", "torch", "openflamingo", "idefics"):
        with pytest.raises(ValueError, match="xattn.placement = parallel"):
            export(str(tmp_path), str(tmp_path / "out"), form)
    with pytest.raises(
        ValueError, match=r"a baseline \(xattn.placement = parallel\): compared are"
    ):
        look(str(tmp_path))
