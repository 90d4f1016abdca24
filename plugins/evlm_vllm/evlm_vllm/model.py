"""The export's model with vLLM's caches: its own modules compute all but attention that is cached.

A prompt comes whole, and its tokens read the images that each sees from fresh keys; an answer sees
the last image or video of its prompt, whose keys stand in vLLM's cross-attention cache.
"""

import math
import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from evlm_vllm.prompts import (
    EVLMDummyInputs,
    EVLMMultiModalProcessor,
    EVLMProcessingInfo,
    visual_tokens,
)


class Prompt(NamedTuple):
    """A request whose prompt is read in this step."""

    rows: slice  # of the step's tokens
    taps: torch.Tensor  # [1, I, G, S, V]
    seen: torch.Tensor  # [1, T, I * S + sinks], the keys that each token sees
    kept: slice  # of the keys: those that the answer sees


class PagedAttention(nn.Module):
    """Self-attention of a layer, its projections around vLLM's cache; `own` is the export's."""

    def __init__(self, own, cfg, window, cache_config, prefix):
        super().__init__()
        self.own = own
        self.paged = Attention(
            cfg.heads,
            cfg.head_dim,
            own.scale or cfg.head_dim**-0.5,
            num_kv_heads=cfg.kv_heads,
            cache_config=cache_config,
            logits_soft_cap=own.cap or None,
            per_layer_sliding_window=window or None,
            prefix=f"{prefix}.paged",
        )

    def forward(self, x, rope, *_):
        """x [N, D] -> [N, D] and no weights; `rope` has cos and sin [N, 1, r/2], and factors."""
        own, (cos, sin, scale) = self.own, rope
        q, k, v = own.q(x), own.k(x), own.v(x)
        if own.qk_norm == "all":
            q, k = own.q_norm(q), own.k_norm(k)
        q, k = (a.unflatten(-1, (-1, own.head_dim)) for a in (q, k))
        if own.qk_norm == "head":
            q, k = own.q_norm(q), own.k_norm(k)
        q, k = (turned(a, cos, sin) for a in (q, k))
        if scale is not None:
            q = (q * scale).to(q.dtype)
        return own.o(self.paged(q.flatten(1), k.flatten(1), v)), None


def turned(a, cos, sin):
    """[N, heads, H] by rotary positions, what is behind the first r dimensions as it is."""
    half = cos.shape[-1]
    low, high, rest = a.float().split((half, half, a.shape[-1] - 2 * half), -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1).to(a.dtype)


@MULTIMODAL_REGISTRY.register_processor(
    EVLMMultiModalProcessor, info=EVLMProcessingInfo, dummy_inputs=EVLMDummyInputs
)
class EVLMForCausalLM(nn.Module, SupportsMultiModal):
    """Tokens and images of many requests -> hidden states, as vLLM calls it."""

    supports_multimodal_raw_input_only = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config, cache = vllm_config.model_config, vllm_config.cache_config
        self.config, self.length, self.rope = model_config.hf_config, model_config.max_model_len, []
        self.code = code = modelling_code(model_config.model)
        self.evlm = code.EVLM(self.config.to_dict()).eval()
        self.places = dict(self.evlm.named_parameters())  # by the names of the export's modules
        said = GenerationConfig.from_pretrained(model_config.model)
        self.never = [self.config.image_token_id, *(said.suppress_tokens or ())]
        llm, xattn = code.Config(self.config.llm), code.Config(self.config.xattn)
        check_length(llm, self.length)
        for number, layer in enumerate(self.evlm.llm.layers):
            name, window = f"{prefix}layers.{number}", self.evlm._window(number)
            layer.attn = PagedAttention(layer.attn, llm, window, cache, name)
        sinks = {"sinks": torch.full((xattn.heads,), math.log(xattn.sinks))} if xattn.sinks else {}
        self.paged = nn.ModuleDict()
        for number in self.evlm.xattn:
            self.paged[number] = CrossAttention(
                xattn.heads,
                xattn.head_dim,
                xattn.head_dim**-0.5,
                num_kv_heads=xattn.kv_heads,
                cache_config=cache,
                prefix=f"{prefix}xattn.{number}",
                **sinks,
            )
        self.sinks, self.keys = xattn.sinks, visual_tokens(self.config)
        self.width = len(self.config.vit["taps"]) * self.keys * self.config.vit["width"]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies the export's tensors.

        Raises:
          ValueError: some are missing, or there are others.
        """
        missing, unexpected = set(self.places), []
        for name, tensor in weights:
            place = self.code.NAMES.get(name, name)
            if place not in missing:
                unexpected.append(name)
                continue
            missing.remove(place)
            if self.places[place].shape != tensor.shape:
                unexpected.append(f"{name} {list(tensor.shape)}")
                continue
            self.places[place].data.copy_(tensor)
        if missing or unexpected:
            raise ValueError(
                f"tensors do not fit the model: missing {sorted(missing)}, unexpected {unexpected}"
            )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """How a prompt that is a text says where an image or a video is."""
        return f"<{modality}>"

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        """[N] -> [N, D]; images have no embedding, their media tokens have."""
        media = input_ids == self.config.image_token_id
        return self.evlm._embed(self.evlm.llm.embed(input_ids)[None], media[None])[0]

    def embed_multimodal(self, **pictures) -> list[torch.Tensor]:
        """Pixels [F, 3, h, w] and groups [F] of several requests -> for each its taps, a row
        [G * S * V] for each frame, with 0 or 1 behind it, which changes where a group begins.
        """
        found = []
        for pixels, groups in zip(pictures["pixel_values"], pictures["image_groups"], strict=True):
            taps = self.evlm.vit(pixels, sdpa=True).flatten(1)
            found.append(torch.cat([taps, groups[:, None].to(taps) % 2], 1))
        return found

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        encoder_outputs=(),
        **kwargs,
    ):
        """Tokens [N] of all requests of a step, pictures of those that begin -> [N, D]."""
        evlm, metadata = self.evlm, get_forward_context().attn_metadata
        starts, lengths = [0, len(input_ids)], torch.zeros(1)  # where vLLM only measures memory
        if metadata is not None:
            own = metadata[next(iter(self.paged.values())).layer_name]
            starts, lengths = own.query_start_loc.tolist(), own.seq_lens
        prompts = self._prompts(input_ids, positions, starts, list(encoder_outputs))
        counts = torch.tensor(starts).diff()
        blind = (lengths[: len(counts)] == 0).repeat_interleave(counts)
        x, at = self.embed_input_ids(input_ids), positions[: len(input_ids)]
        for number, (layer, rope) in enumerate(zip(evlm.llm.layers, self._rope())):
            if str(number) in evlm.xattn:
                x = self._cross(str(number), x, prompts, blind)
            own = [None if table is None else table[at] for table in rope]
            x, _ = layer(x, own, None, None, number, True)
        return evlm.llm.ln_f(x)

    def _rope(self):
        """For each layer cos, sin [L, 1, r/2] and factors [L, 1, 1] or None, of all positions."""
        if not self.rope:
            whole = torch.ones((1, self.length), dtype=torch.long)
            tables = self.evlm._rope(whole, self.length, self.evlm._rope_base(whole))
            self.rope = [
                [None if table is None else table[0].transpose(0, 1) for table in layer]
                for layer in tables
            ]
        return self.rope

    def _prompts(self, input_ids, positions, starts, pictures):
        """Prompts with images; `pictures` are in the order of the requests.

        Raises:
          ValueError: other pictures than prompts: vLLM has another order than it says.
        """
        tokens, found = self.config.media["tokens"], []
        for start, stop in pairwise(starts):
            media = (input_ids[start:stop] == self.config.image_token_id)[None]
            if positions[start] or not media.any():
                continue
            if not pictures or len(pictures[0]) * tokens != media.sum():
                raise ValueError("pictures of a step do not fit its prompts")
            taps, parity = pictures.pop(0).split((self.width, 1), 1)
            groups = F.pad((parity[:, 0].diff() != 0).cumsum(0), (1, 0))[None]
            first, last = self.code.visible_ranges(media, tokens, groups)
            image = torch.arange(len(taps)).repeat_interleave(self.keys)
            seen = (image >= first[..., None]) & (image < last[..., None])
            before = int((groups != groups[0, -1]).sum()) * self.keys
            found.append(
                Prompt(
                    slice(start, stop),
                    taps.unflatten(1, (-1, self.keys, self.config.vit["width"]))[None],
                    F.pad(seen, (0, self.sinks), value=True),
                    slice(before, len(taps) * self.keys),
                )
            )
        if pictures:
            raise ValueError("pictures of a step do not fit its prompts")
        return found

    def _cross(self, number, x, prompts, blind):
        """The block in front of a layer, x [N, D] -> [N, D]; who is `blind` [N] sees no image."""
        block, towers = self.evlm.xattn[number], sys.modules[self.code.LLM.__module__]
        tap = self.evlm.tap_of_block[list(self.evlm.xattn).index(number)]
        q = block.q_norm(towers.split_heads(block.to_q(block.norm(x)), block.head_dim))
        fresh = [block.keys_values(prompt.taps[:, :, tap]) for prompt in prompts]
        kept = [[a[0, :, p.kept].transpose(0, 1) for a in pair] for p, pair in zip(prompts, fresh)]
        keys, values = map(torch.cat, zip(*kept)) if kept else (None, None)
        out = self.paged[number](q.transpose(0, 1).flatten(1), keys, values)
        out = out.masked_fill(blind[:, None], 0)
        for prompt, pair in zip(prompts, fresh):
            read, _ = towers.attend(q[None, :, prompt.rows], *pair, prompt.seen[:, None], True)
            out[prompt.rows] = read[0].masked_fill(~prompt.seen[0].any(-1, keepdim=True), 0)
        x = x + block.attn_gate.float().tanh().to(x.dtype) * block.to_out(out)
        y = block.ff_norm(x)
        y = block.moe(y) if block.moe else block.ffn(y)
        return x + block.ff_gate.float().tanh().to(x.dtype) * y

    def compute_logits(self, hidden_states):
        """[N, D] -> [N, vocab]; the placeholder of images is never drawn, nor an id without a
        word.
        """
        logits = self.evlm.llm.logits(hidden_states)
        logits[:, self.never] = -torch.inf
        return logits


def modelling_code(folder: str):
    """Module plain_evlm of an export."""
    found = get_class_from_dynamic_module("plain_evlm.EVLM", folder)
    return sys.modules[found.__module__]


def check_length(llm, length: int) -> None:
    """Raises ValueError where positions mean something else in longer prompts."""
    limits = [llm.dynamic_ntk or length]
    if llm.rope_scaling and llm.rope_scaling["kind"] == "dynamic":
        limits.append(llm.rope_scaling["original"])
    if length > min(limits):
        raise ValueError(
            f"positions of this model change with the length of a text beyond {min(limits)}:"
            f" give --max-model-len {min(limits)}"
        )
