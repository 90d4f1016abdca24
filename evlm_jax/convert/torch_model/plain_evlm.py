"""EVLM (arXiv 2407.14177) in PyTorch alone: a ViT with taps, gated cross-attention before the layers of a language model, media tokens.

Every token of a row sees a contiguous range of the row's images. `model = EVLM(json of config.json)`, then load_state_dict.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .towers_evlm import LLM, MLP, Config, ViT, attend, split_heads


class Experts(nn.Module):
    """The matrices of all experts: fc1 [E, F, D], fc2 [E, D, F]."""

    def __init__(self, experts, width, hidden):
        super().__init__()
        self.fc1 = nn.Parameter(torch.zeros(experts, hidden, width))
        self.fc2 = nn.Parameter(torch.zeros(experts, width, hidden))


class MoE(nn.Module):
    """y = world(x) + sum over the top_k experts e of gate_e * fc2_e(gelu(fc1_e(x))); the router is float32. No expert has a limit."""

    def __init__(self, width, hidden, moe):
        super().__init__()
        experts = moe.copies * moe.slices
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width, hidden // moe.slices)
        self.world = MLP(width, hidden, "gelu", False)
        self.top_k, self.renormalise = moe.top_k, moe.gates == "renormalise"

    def forward(self, x):
        flat = x.flatten(0, -2)
        gates, chosen = F.linear(flat.float(), self.router.weight.float()).softmax(-1).topk(self.top_k)
        if self.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        out = self.world(flat)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = F.gelu(F.linear(flat[token], self.experts.fc1[expert])) * gates[token, place, None].to(x.dtype)
            out = out.index_add(0, token, F.linear(hidden, self.experts.fc2[expert]))
        return out.view_as(x)


class CrossAttention(nn.Module):
    """x += tanh(attn_gate) * attention over the tap; x += tanh(ff_gate) * FFN. The zero keys are appended to the images' keys.

    The FFN is fc2(gelu(fc1(x))), or a mixture of experts.
    """

    def __init__(self, cfg):
        super().__init__()
        llm, vit, xattn = Config(cfg.llm), Config(cfg.vit), Config(cfg.xattn)
        d, n, k = llm.hidden, *(heads * xattn.head_dim for heads in (xattn.heads, xattn.kv_heads))
        self.norm, self.kv_norm, self.ff_norm = (nn.LayerNorm(width, xattn.eps) for width in (d, vit.width, d))
        self.to_q, self.to_out = nn.Linear(d, n, bias=False), nn.Linear(n, d, bias=False)
        self.to_k, self.to_v = (nn.Linear(vit.width, k, bias=False) for _ in range(2))
        if cfg.moe["copies"]:
            self.moe = MoE(d, xattn.ffn, Config(cfg.moe))
        else:
            self.fc1, self.fc2, self.moe = nn.Linear(d, xattn.ffn, bias=False), nn.Linear(xattn.ffn, d, bias=False), None
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(())) for _ in range(2))
        self.head_dim, self.sinks = xattn.head_dim, xattn.sinks

    def keys_values(self, tap):
        """tap [B, I, S, V] -> two of [B, K, I * S + sinks, H]."""
        normed = self.kv_norm(tap).flatten(1, 2)
        return tuple(F.pad(split_heads(project(normed), self.head_dim), (0, 0, 0, self.sinks)) for project in (self.to_k, self.to_v))

    def forward(self, x, keys, values, mask):
        """mask [B, T, I * S + sinks]. A token that sees nothing at all gets exactly 0."""
        out = attend(split_heads(self.to_q(self.norm(x)), self.head_dim), keys, values, mask[:, None])
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
        x = x + self.attn_gate.float().tanh().to(x.dtype) * self.to_out(out)
        y = self.ff_norm(x)
        y = self.moe(y) if self.moe else self.fc2(F.gelu(self.fc1(y)))
        return x + self.ff_gate.float().tanh().to(x.dtype) * y


def visible_ranges(input_ids, image_token_id, media_tokens, groups):
    """First and last + 1 image that each token of [B, T] sees: a media token its own, text the previous image or all frames of its video.

    Args:
      groups: [B, I]; images of a row with the same number are frames of one video.
    """
    media = input_ids == image_token_id
    count = media.cumsum(1)
    whole = count.div(media_tokens, rounding_mode="floor")
    image = torch.where(media, (count - 1).div(media_tokens, rounding_mode="floor"), whole - 1)
    if not groups.shape[1]:
        return torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    same = groups[:, :, None] == groups[:, None, :]  # [B, I, I]
    index = torch.arange(groups.shape[1], device=groups.device)
    first = torch.where(same, index, groups.shape[1]).amin(-1)
    last = torch.where(same, index, -1).amax(-1)
    at = image.clamp(min=0)
    start, stop = torch.where(media, at, first.gather(1, at)), torch.where(media, at, last.gather(1, at)) + 1
    none = image < 0
    return start.masked_fill(none, 0), stop.masked_fill(none, 0)


def check_images(stop, count):
    """Raises ValueError where a token sees an image that is not given."""
    if (needed := int(stop.max())) > count:
        raise ValueError(f"input_ids have {needed} images in a row, pixel_values only {count}: give pixel_values [B, I, 3, h, w]")


class EVLMParts:
    """The modules of EVLM and what they do, for an nn.Module with `config`; nothing here knows transformers."""

    def build(self, config):
        """Makes the modules; `config` has the sections as attributes."""
        llm, every = Config(config.llm), config.xattn["every"]
        self.vit, self.llm = ViT(Config(config.vit)), LLM(llm)
        self.xattn = nn.ModuleDict({str(layer): CrossAttention(config) for layer in range(0, llm.layers, every)})
        self.media_tokens = nn.Parameter(torch.zeros(config.media["tokens"], llm.hidden))
        blocks, taps = len(self.xattn), len(config.vit["taps"])
        self.tap_of_block = [i * taps // blocks if config.xattn["schedule"] == "blocked" else i % taps for i in range(blocks)]

    def _visible(self, input_ids, count, groups):
        """`visible_ranges` of rows with `count` images; without groups every image stands alone."""
        if groups is None:
            groups = torch.arange(count, device=input_ids.device).expand(len(input_ids), -1)
        return visible_ranges(input_ids, self.config.image_token_id, len(self.media_tokens), groups)

    def _no_pixels(self, rows):
        size = self.config.vit["image_size"]
        return self.media_tokens.new_zeros((rows, 0, 3, size, size))

    def _project(self, pixel_values):
        """Keys and values of all images for every block."""
        rows, count = pixel_values.shape[:2]
        cfg = Config(self.config.vit)
        if count:
            taps = self.vit(pixel_values.flatten(0, 1)).unflatten(0, (rows, count))  # [B, I, G, S, V]
        else:
            taps = self.media_tokens.new_zeros((rows, 0, len(cfg.taps), self._visual_tokens, cfg.width))
        return [block.keys_values(taps[:, :, tap]) for block, tap in zip(self.xattn.values(), self.tap_of_block)]

    @property
    def _visual_tokens(self):
        cfg = Config(self.config.vit)
        return (cfg.image_size // cfg.patch) ** 2 + cfg.class_token + cfg.registers

    def _embed(self, input_ids):
        """Word embeddings, and the media embeddings at the runs of the placeholder."""
        media = input_ids == self.config.image_token_id
        slot = (media.cumsum(1) - 1) % len(self.media_tokens)
        return torch.where(media[..., None], self.media_tokens[slot], self.llm.embed(input_ids))

    def _rope_base(self, attention_mask):
        """theta; or Qwen 1.0's dynamic NTK by the tokens L of each prompt: theta * max(1, 2 ** ceil(log2(L / c) + 1) - 1) ** (H / (H - 2)).

        Without a cache every call is a new prompt, as it is in Qwen's own code.
        """
        cfg = Config(self.config.llm)
        if self.training or not cfg.dynamic_ntk:
            return cfg.rope_theta
        alpha = [2 ** (1 + (max(n - 1, 0) // cfg.dynamic_ntk).bit_length()) - 1 for n in attention_mask.sum(1).tolist()]
        base = [cfg.rope_theta * a ** (cfg.head_dim / (cfg.head_dim - 2)) for a in alpha]
        return torch.tensor(base, dtype=torch.float32, device=attention_mask.device)[:, None, None, None]

    def _rope(self, attention_mask, length, theta):
        """cos and sin [B, 1, T, H/2] of the last `length` tokens; the factors [B, 1, T, 1] of their queries by logn attention, or None."""
        cfg = Config(self.config.llm)
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, None, -length:, None].float()
        inverse = theta ** (-torch.arange(0, cfg.head_dim, 2, device=position.device, dtype=torch.float32) / cfg.head_dim)
        angle = position * inverse
        logn = cfg.logn and not self.training
        return angle.cos(), angle.sin(), ((position + 1).log() / math.log(cfg.logn)).clamp(min=1) if logn else None

    def _decode(self, x, attention_mask, rope, visible, images, count, cache):
        """All layers: x [B, T, D] -> [B, T, D]."""
        length, total = x.shape[1], attention_mask.shape[1]
        key = torch.arange(total, device=x.device)
        text_mask = (key <= key[total - length :, None]) & attention_mask[:, None, :].bool()
        image = torch.arange(count, device=x.device).repeat_interleave(self._visual_tokens)
        seen = (image >= visible[0][..., None]) & (image < visible[1][..., None])
        seen = F.pad(seen, (0, self.config.xattn["sinks"]), value=True)
        for i, layer in enumerate(self.llm.layers):
            block, rest = divmod(i, self.config.xattn["every"])
            if not rest:
                x = self.xattn[str(i)](x, *images[block], seen)
            x = layer(x, rope, text_mask[:, None], cache, i)
        return self.llm.ln_f(x)


class EVLM(EVLMParts, nn.Module):
    """Text and images -> logits [B, T, vocab], without a cache. `config`: the content of config.json."""

    def __init__(self, config):
        super().__init__()
        self.config = Config(config)
        self.build(self.config)

    def forward(self, input_ids, pixel_values=None, image_groups=None, attention_mask=None):
        """
        Args:
          input_ids: [B, T]; each image is a run of media.tokens times `image_token_id`.
          pixel_values: [B, I, 3, h, w], normalised, in the order of those runs; rows with fewer images are padded.
          image_groups: [B, I]; frames of one video have the same number. Left out: every image stands alone.
          attention_mask: [B, T]; 0 is padding, on either side.
        """
        pixel_values = self._no_pixels(len(input_ids)) if pixel_values is None else pixel_values
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = pixel_values.shape[1]
        visible = self._visible(input_ids, count, image_groups)
        check_images(visible[1], count)
        rope = self._rope(attention_mask, input_ids.shape[1], self._rope_base(attention_mask))
        hidden = self._decode(self._embed(input_ids), attention_mask, rope, visible, self._project(pixel_values), count, None)
        return self.llm.logits(hidden)
