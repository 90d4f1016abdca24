"""EVLM (arXiv 2407.14177) in PyTorch alone: a ViT with taps, gated cross-attention before the
layers of a language model, media tokens.

Every token of a row sees a contiguous range of the row's images.
`model = EVLM(json of config.json)`, then load_state_dict."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .towers_evlm import LLM, Config, ViT, call, frequencies, grid, growth, sides
from .xattn_evlm import CrossAttention


def count_images(media, media_tokens, pixels, groups=None, before=0):
    """The most images that a row has, with those in front. `media`, `groups` and `before` as below.

    Raises:
      ValueError: other than one of the images in `pixels` [B, I, 3, h, w] for each run of media
        tokens. Those with a negative group are padding; without groups one row has all of them.
    """
    if pixels.ndim != 5 or len(pixels) != len(media):
        raise ValueError(
            f"pixel_values are {list(pixels.shape)}, not [B, I, 3, h, w] for {len(media)} rows"
        )
    held, shown = (
        -(-tokens // media_tokens) for tokens in (before, before + media.sum(1, keepdim=True))
    )
    new, given = (shown - held)[:, 0], pixels.new_tensor([pixels.shape[1]], dtype=torch.long)
    if groups is None:
        new = new.amax(0, keepdim=True)
    elif groups.shape != pixels.shape[:2]:
        raise ValueError(
            f"image_groups are {list(groups.shape)}, pixel_values [B, I, 3, h, w]"
            f" {list(pixels.shape)}"
        )
    else:
        given = (groups >= 0).sum(1)
    if (new != given).any():
        runs = f"runs of {media_tokens} times image_token_id"
        raise ValueError(
            f"rows of pixel_values [B, I, 3, h, w] have {given.tolist()} images, the tokens show"
            f" {new.tolist()}: {runs}"
        )
    return int(shown.max())


def visible_ranges(media, media_tokens, groups, before=0):
    """First and last + 1 image that each token of [B, T] sees: a media token its own, text the
    previous image or all frames of its video.

    Args:
      media: [B, T], which tokens are media tokens.
      groups: [B, I]; images of a row with the same number are frames of one video, padding has
        negative ones of its own.
      before: [B, 1], the number of media tokens of a row in front of these.
    """
    count = media.cumsum(1) + before
    if not groups.shape[1]:
        return torch.zeros_like(count), torch.zeros_like(count)
    whole = count.div(media_tokens, rounding_mode="floor")
    image = torch.where(media, (count - 1).div(media_tokens, rounding_mode="floor"), whole - 1)
    same = groups[:, :, None] == groups[:, None, :]  # [B, I, I]
    index = torch.arange(groups.shape[1], device=groups.device)
    first = torch.where(same, index, groups.shape[1]).amin(-1)
    last = torch.where(same, index, -1).amax(-1)
    at = image.clamp(min=0)
    start, stop = (
        torch.where(media, at, first.gather(1, at)),
        torch.where(media, at, last.gather(1, at)) + 1,
    )
    none = image < 0
    return start.masked_fill(none, 0), stop.masked_fill(none, 0)


# Parameters that the files have by shorter names than the modules.
NAMES = {f"vit.{name}": f"vit.places.{name}" for name in ("cls", "registers", "pos")} | {
    "media_tokens": "media_tokens.weight"
}


class EVLMParts:
    """The modules of EVLM and their methods, for an nn.Module with `config`; independent of
    transformers.
    """

    def build(self, config):
        """Makes the modules; `config` has the sections as attributes."""
        llm, xattn = Config(config.llm), Config(config.xattn)
        self.vit, self.llm = ViT(Config(config.vit)), LLM(llm)
        layers = range(xattn.first, llm.layers, xattn.every)
        self.xattn = nn.ModuleDict({str(layer): CrossAttention(config) for layer in layers})
        self.media_tokens = nn.Embedding(config.media["tokens"], llm.hidden)
        blocks, taps = len(self.xattn), len(config.vit["taps"])
        self.tap_of_block = [
            i * taps // blocks if config.xattn["schedule"] == "blocked" else i % taps
            for i in range(blocks)
        ]

    def _groups(self, groups, pixels):
        """[B, I]; without groups every image stands alone."""
        return (
            torch.arange(pixels.shape[1], device=pixels.device).expand(len(pixels), -1)
            if groups is None
            else groups
        )

    def _no_pixels(self, ids):
        size = sides(self.config.vit["image_size"])
        return torch.zeros((len(ids), 0, 3, *size), device=ids.device)

    def _project(self, pixel_values, sdpa=False):
        """Keys and values of all images for every block. Raises ValueError for another size."""
        (rows, count), shape = pixel_values.shape[:2], (3, *sides(self.config.vit["image_size"]))
        cfg = Config(self.config.vit)
        if count and tuple(pixel_values.shape[2:]) != shape:
            raise ValueError(
                f"images in pixel_values are {list(pixel_values.shape[2:])}, the model takes"
                f" {list(shape)}"
            )
        if count:
            taps = self.vit(pixel_values.flatten(0, 1), self._run, sdpa).unflatten(
                0, (rows, count)
            )  # [B, I, G, S, V]
        else:
            dtype = self.vit.patch.weight.dtype
            taps = pixel_values.new_zeros(
                (rows, 0, len(cfg.taps), self._visual_tokens, cfg.width), dtype=dtype
            )
        return [
            block.keys_values(taps[:, :, tap])
            for block, tap in zip(self.xattn.values(), self.tap_of_block)
        ]

    @property
    def _visual_tokens(self):
        cfg = Config(self.config.vit)
        down, across = grid(cfg)
        return down * across + cfg.class_token + cfg.registers

    def _embed(self, words, media, before=0):
        """Word embeddings [B, T, D], and the media embeddings at the media tokens."""
        slot = (media.cumsum(1) + before - 1) % self.config.media["tokens"]
        return torch.where(media[..., None], self.media_tokens(slot).to(words.device), words)

    def _rope_base(self, attention_mask):
        """theta; or Qwen 1.0's dynamic NTK by the tokens L of each prompt: theta * max(1, 2 **
        ceil(log2(L / c) + 1) - 1) ** (H / (H - 2)).

        Without a cache every call is a new prompt, as it is in Qwen's own code.
        """
        cfg = Config(self.config.llm)
        if self.training or not cfg.dynamic_ntk:
            return cfg.rope_theta
        alpha = [
            2 ** (1 + (max(n - 1, 0) // cfg.dynamic_ntk).bit_length()) - 1
            for n in attention_mask.sum(1).tolist()
        ]
        base = [cfg.rope_theta * a ** (cfg.head_dim / (cfg.head_dim - 2)) for a in alpha]
        return torch.tensor(base, dtype=torch.float32, device=attention_mask.device)[
            :, None, None, None
        ]

    def _rope(self, attention_mask, length, theta):
        """For each layer cos and sin [B, 1, T, r/2] of the last `length` tokens, and the factors
        [B, 1, T, 1] of their queries by their positions, or None.
        """
        cfg, tables = Config(self.config.llm), {}
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, None, -length:, None].float()
        grown, scaling = None, cfg.rope_scaling
        if cfg.logn and not self.training:
            grown = ((position + 1).log() / math.log(cfg.logn)).clamp(min=1)
        if scaling and scaling.get("query"):
            more = 1 + scaling["query"] * (position // scaling["original"]).log1p()
            grown = more if grown is None else grown * more
        for layer in range(cfg.layers):
            base = cfg.rope[layer % len(cfg.rope)] if cfg.rope else None
            scaled = scaling and (scaling["layers"] == "all" or not self._window(layer))
            if (base, scaled) not in tables:
                own = theta if base is None else base
                if scaled and scaling["kind"] == "dynamic" and base != 0:
                    own = own * growth(cfg, attention_mask.sum(1)[:, None, None, None])
                inverse, factor = frequencies(cfg, own, scaled, position.device)
                angle = position * inverse
                tables[base, scaled] = angle.cos() * factor, angle.sin() * factor
            yield *tables[base, scaled], grown

    def _window(self, layer):
        """Last tokens that a layer sees; 0: all."""
        windows = Config(self.config.llm).window
        return windows[layer % len(windows)]

    def _decode(
        self, x, attention_mask, rope, visible, images, count, cache=None, sdpa=False, kept=None
    ):
        """All layers: x [B, T, D] -> [B, T, D].

        `kept` gets what the layers read and weighed, lists by name.
        """
        keep = (lambda *_: None) if kept is None else (lambda name, array: kept[name].append(array))
        length, total = x.shape[1], attention_mask.shape[1]
        key = torch.arange(total, device=x.device)
        text_mask = (key <= key[total - length :, None]) & attention_mask[:, None, :].bool()
        image = torch.arange(count, device=x.device).repeat_interleave(self._visual_tokens)
        seen = (image >= visible[0][..., None]) & (image < visible[1][..., None])
        xattn = Config(self.config.xattn)
        seen = F.pad(seen, (0, xattn.sinks), value=True)
        far = key[total - length :, None] - key
        for i, (layer, own) in enumerate(zip(self.llm.layers, rope)):
            keep("hidden_states", x)
            mask = text_mask & (far < self._window(i)) if self._window(i) else text_mask
            block, rest = divmod(i - xattn.first, xattn.every)
            if not rest:
                x, weights = self._run(self.xattn[str(i)], x, *images[block], seen, sdpa)
                keep("cross_attentions", weights)
            x, weights = self._run(layer, x, own, mask[:, None], cache, i, sdpa)
            keep("attentions", weights)
        x = self.llm.ln_f(x)
        keep("hidden_states", x)
        return x

    _run = staticmethod(call)


class EVLM(EVLMParts, nn.Module):
    """Text and images -> logits [B, T, vocab], without a cache.

    `config`: the content of config.json.
    """

    def __init__(self, config):
        super().__init__()
        self.config = Config(config)
        self.build(self.config)
        if self.config.llm["tied"]:
            self.llm.head.weight = self.llm.embed.weight
        self.register_load_state_dict_pre_hook(_of_the_file)

    def forward(self, input_ids, pixel_values=None, image_groups=None, attention_mask=None):
        """
        Args:
          input_ids: [B, T]; each image is a run of media.tokens times `image_token_id`.
          pixel_values: [B, I, 3, h, w], normalised, in the order of those runs; rows with fewer
            images are padded.
          image_groups: [B, I]; frames of one video have the same number, padding a negative one.
            Left out: every image stands alone.
          attention_mask: [B, T]; 0 is padding, on either side.
        Raises:
          ValueError: other than one image for each run.
        """
        pixel_values = self._no_pixels(input_ids) if pixel_values is None else pixel_values
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        media = input_ids == self.config.image_token_id
        count_images(media, self.config.media["tokens"], pixel_values, image_groups)
        visible = visible_ranges(
            media, self.config.media["tokens"], self._groups(image_groups, pixel_values)
        )
        rope = self._rope(attention_mask, input_ids.shape[1], self._rope_base(attention_mask))
        x, images = self._embed(self.llm.embed(input_ids), media), self._project(pixel_values)
        return self.llm.logits(
            self._decode(x, attention_mask, rope, visible, images, pixel_values.shape[1])
        )


def _of_the_file(model, state, *_):
    """From names of evlm.pt, which has a tied matrix once."""
    state |= {NAMES[name]: state.pop(name) for name in NAMES.keys() & state.keys()}
    if model.config.llm["tied"]:
        state.setdefault("llm.head.weight", state["llm.embed.weight"])
