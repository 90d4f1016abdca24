"""EVLM (arXiv 2407.14177) in PyTorch: a ViT with taps, gated cross-attention before the layers of a language model, media tokens.

Every token of a row sees a contiguous range of the row's images. Keys and values of the images are projected once and kept in the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_evlm import EVLMConfig
from .towers_evlm import LLM, Config, ViT, attend, split_heads

# --------------------------------------------------------------------------------------------------------- cross-attention


class CrossAttention(nn.Module):
    """x += tanh(attn_gate) * attention over the tap; x += tanh(ff_gate) * FFN. The zero keys are appended to the images' keys."""

    def __init__(self, cfg):
        super().__init__()
        llm, vit, xattn = Config(cfg.llm), Config(cfg.vit), Config(cfg.xattn)
        d, n = llm.hidden, xattn.heads * xattn.head_dim
        self.norm, self.kv_norm, self.ff_norm = (nn.LayerNorm(width, xattn.eps) for width in (d, vit.width, d))
        self.to_q, self.to_out = nn.Linear(d, n, bias=False), nn.Linear(n, d, bias=False)
        self.to_k, self.to_v = (nn.Linear(vit.width, n, bias=False) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(d, xattn.ffn, bias=False), nn.Linear(xattn.ffn, d, bias=False)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(())) for _ in range(2))
        self.head_dim, self.sinks = xattn.head_dim, xattn.sinks

    def keys_values(self, tap):
        """tap [B, I, S, V] -> two of [B, N, I * S + sinks, H]."""
        normed = self.kv_norm(tap).flatten(1, 2)
        return tuple(F.pad(split_heads(project(normed), self.head_dim), (0, 0, 0, self.sinks)) for project in (self.to_k, self.to_v))

    def forward(self, x, keys, values, mask):
        """mask [B, T, I * S + sinks]. A token that sees nothing at all gets exactly 0."""
        out = attend(split_heads(self.to_q(self.norm(x)), self.head_dim), keys, values, mask[:, None])
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
        x = x + self.attn_gate.float().tanh().to(x.dtype) * self.to_out(out)
        return x + self.ff_gate.float().tanh().to(x.dtype) * self.fc2(F.gelu(self.fc1(self.ff_norm(x))))


class EVLMCache(DynamicCache):
    """Keys and values of the text, as everywhere, and of the images: one pair for each cross-attention block. The prompts' rotary base."""

    def __init__(self):
        super().__init__()
        self.images, self.count = [], 0  # [(keys, values)], images of a row
        self.theta = None  # a number, or [B, 1, 1, 1]; all beams of a row have the same

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.images = [tuple(a.index_select(0, beam_idx.to(a.device)) for a in pair) for pair in self.images]


# --------------------------------------------------------------------------------------------------------------- the model


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


class EVLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Text and images -> logits. Loads with AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)."""

    config_class = EVLMConfig
    base_model_prefix = "evlm"
    main_input_name = "input_ids"
    _no_split_modules = ["VisionBlock", "Layer", "CrossAttention"]

    def __init__(self, config):
        super().__init__(config)
        llm, every = Config(config.llm), config.xattn["every"]
        self.vit, self.llm = ViT(Config(config.vit)), LLM(llm)
        self.xattn = nn.ModuleDict({str(layer): CrossAttention(config) for layer in range(0, llm.layers, every)})
        self.media_tokens = nn.Parameter(torch.zeros(config.media["tokens"], llm.hidden))
        blocks, taps = len(self.xattn), len(config.vit["taps"])
        self.tap_of_block = [i * taps // blocks if config.xattn["schedule"] == "blocked" else i % taps for i in range(blocks)]
        self.post_init()

    def _init_weights(self, module):
        """New modules keep PyTorch's own initialisation; gates start at 0."""

    def get_input_embeddings(self):
        return self.llm.embed

    def set_input_embeddings(self, value):
        self.llm.embed = value

    def forward(
        self,
        input_ids,
        pixel_values=None,
        image_groups=None,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        visible=None,
        logits_to_keep=0,
        **_,
    ):
        """
        Args:
          input_ids: [B, T]; each image is a run of media.tokens times `image_token_id`.
          pixel_values: [B, I, 3, h, w] in the order of those runs; rows with fewer images are padded.
          image_groups: [B, I]; frames of one video have the same number. Left out: every image stands alone.
          attention_mask: [B, past + T]; 0 is padding, on either side.
          labels: [B, T]; -100 is not counted. They are compared with the logits of the position before.
          visible: (start, stop) as `visible_ranges` gives them, for tokens behind a cache.
        """
        rows, length = input_ids.shape
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if use_cache and not past:
            past_key_values = EVLMCache()
        if pixel_values is None:
            pixel_values = self.media_tokens.new_zeros((rows, 0, 3, self.config.vit["image_size"], self.config.vit["image_size"]))
        if visible is None:
            index = torch.arange(pixel_values.shape[1], device=input_ids.device).expand(rows, -1)
            groups = index if image_groups is None else image_groups
            visible = visible_ranges(input_ids, self.config.image_token_id, len(self.media_tokens), groups)
            _check_images(visible[1], pixel_values.shape[1])
        images = past_key_values.images if past else self._project(pixel_values)
        count = past_key_values.count if past else pixel_values.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones((rows, past + length), dtype=torch.long, device=input_ids.device)
        theta = past_key_values.theta if past else self._rope_base(attention_mask)
        if use_cache and not past:
            past_key_values.images, past_key_values.count, past_key_values.theta = images, count, theta
        rope = self._rope(attention_mask, length, theta)
        hidden = self._decode(self._embed(input_ids), attention_mask, rope, visible, images, count, past_key_values)
        logits = self.llm.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

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

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        """Behind a cache only the new tokens are read; what they see follows from all tokens."""
        inputs = {name: kwargs.get(name) for name in ("pixel_values", "image_groups", "use_cache", "logits_to_keep")}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past:
            rows = len(input_ids)
            groups = inputs["image_groups"]
            if groups is None:
                groups = torch.arange(past_key_values.count, device=input_ids.device).expand(rows, -1)
            visible = visible_ranges(input_ids, self.config.image_token_id, len(self.media_tokens), groups)
            inputs |= {"pixel_values": None, "visible": tuple(a[:, past:] for a in visible)}
            input_ids = input_ids[:, past:]
        inputs["logits_to_keep"] = inputs["logits_to_keep"] or 0
        return inputs | {"input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask}


def _check_images(stop, count):
    if (needed := int(stop.max())) > count:
        raise ValueError(f"input_ids have {needed} images in a row, pixel_values only {count}: give pixel_values [B, I, 3, h, w]")
