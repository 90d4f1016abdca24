"""EVLM for transformers: plain_evlm.py with generation, training and offloading.

Keys and values of the images are projected once.
"""

import re

import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple

from .configuration_evlm import EVLMConfig
from .images_evlm import Images
from .plain_evlm import NAMES, EVLMParts, count_images, visible_ranges

CACHE = (
    "cache" if "cache" in CausalLMOutputWithCrossAttentions.__annotations__ else "past_key_values"
)  # from 5.24 on, and before
KEPT = ("hidden_states", "attentions", "cross_attentions")  # of each layer


class NeverMedia(LogitsProcessor):
    """Logits processor that excludes the id of media tokens."""

    def __init__(self, image_token_id):
        self.image_token_id = image_token_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.image_token_id] = -torch.inf
        return scores


class EVLMForCausalLM(EVLMParts, PreTrainedModel, GenerationMixin):
    """Text and images -> logits, by AutoModelForImageTextToText or
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
    """

    config_class = EVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # of Trainer: num_items_in_batch
    _no_split_modules = ["VisionBlock", "Places", "Layer", "CrossAttention"]
    _supports_sdpa = True
    _tied_weights_keys = {"llm.head.weight": "llm.embed.weight"}
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _is_stateful = True  # no assisted generation

    def __init__(self, config):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.build(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, key_mapping=None, **kwargs):
        """See PreTrainedModel. Raises ValueError if the model has tensors that the files lack, or
        the files others.
        """
        places = {
            rf"^{re.escape(name)}(?!\.)": place for name, place in NAMES.items()
        }  # saved again by the file's names
        key_mapping = places | (key_mapping or {})
        model, loading = super().from_pretrained(
            *args, output_loading_info=True, key_mapping=key_mapping, **kwargs
        )
        if wrong := [
            f"{kind} {key}"
            for kind in ("missing", "unexpected")
            for key in sorted(loading[f"{kind}_keys"])
        ]:
            raise ValueError(
                f"{args[0] if args else 'these weights'}: tensors do not fit the model:\n  "
                + "\n  ".join(wrong)
            )
        return (model, loading) if output_loading_info else model

    def _init_weights(self, module):
        """New modules keep PyTorch's own initialisation; gates start at 0."""

    def get_input_embeddings(self):
        return self.llm.embed

    def set_input_embeddings(self, value):
        self.llm.embed = value

    def get_output_embeddings(self):
        return self.llm.head

    def set_output_embeddings(self, value):
        self.llm.head = value

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """See PreTrainedModel. Raises ValueError if the placeholder of images would be lost."""
        if new_num_tokens is not None and new_num_tokens <= self.config.image_token_id:
            raise ValueError(
                f"{new_num_tokens} tokens would lose image_token_id = {self.config.image_token_id}"
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.llm["vocab"] = self.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def _run(self, block, *args):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, *args)
        return block(*args)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_groups=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        cache=None,
    ):
        """
        Args:
          input_ids: [B, T]; each image is a run of media.tokens times `image_token_id`. Behind a
            cache the new tokens alone.
          pixel_values: [B, I, 3, h, w] in the order of those runs; rows with fewer images are
            padded. Behind a cache the new images alone.
          image_groups: [B, I]; frames of one video have the same number, padding a negative one.
            Left out: every image stands alone.
          attention_mask: [B, past + T]; 0 is padding, on either side.
          past_key_values: a DynamicCache, in which images are kept, too. transformers calls it
            `cache` from 5.24 on.
          inputs_embeds: [B, T, D] in place of input_ids; images stand where the embedding of
            `image_token_id` does.
          labels: [B, T]; -100 is not counted. They are compared with the logits of the position
            before.
          num_items_in_batch: what the sum of the losses is divided by; the labels that count where
            left out.
        Returns:
          hidden_states: what each layer, with the cross-attention in front of it, reads; last what
            the head reads.
          attentions, cross_attentions: of each layer, of each block.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        names = self._kept(output_attentions, output_hidden_states)
        kept = {name: [] for name in KEPT} if names else None
        words = self.llm.embed(input_ids) if inputs_embeds is None else inputs_embeds
        media = self._media(input_ids, inputs_embeds)
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        x = self._hidden(words, media, cache, pixel_values, image_groups, attention_mask, kept)
        logits, loss = self._predict(x, labels, logits_to_keep, num_items_in_batch)
        kept = {name: tuple(kept[name]) for name in names}
        return CausalLMOutputWithCrossAttentions(loss=loss, logits=logits, **{CACHE: cache}, **kept)

    def _kept(self, attentions, states):
        """Names of what is returned of each layer.

        Raises ValueError for weights that are not written out.
        """
        attentions = self.config.output_attentions if attentions is None else attentions
        states = self.config.output_hidden_states if states is None else states
        if attentions and self.config._attn_implementation == "sdpa":
            raise ValueError(
                "output_attentions needs weights that are written out: load with"
                ' attn_implementation="eager"'
            )
        return KEPT[:1] * bool(states) + KEPT[1:] * bool(attentions)

    def _hidden(self, words, media, cache, pixel_values, groups, attention_mask, kept):
        """[B, T, D], what the head reads; the cache learns of the images."""
        sdpa = self.config._attn_implementation == "sdpa"
        past, attention_mask = self._mask(cache, attention_mask, media)
        images = self._images(cache, past, pixel_values, groups, attention_mask, media, sdpa)
        visible = visible_ranges(media, self.config.media["tokens"], images.groups, images.media)
        rope = self._rope(attention_mask, media.shape[1], images.theta)
        x, count = self._embed(words, media, images.media), images.groups.shape[1]
        x = self._decode(
            x, attention_mask, rope, visible, images.keys_values, count, cache, sdpa, kept
        )
        if cache is not None:
            cache.images = images.read(media, past)
        return x

    def _predict(self, x, labels, logits_to_keep, num_items_in_batch):
        """(logits, the loss where there are labels)."""
        whole = isinstance(logits_to_keep, int)
        if labels is not None and not (whole and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep out")
        logits = self.llm.logits(x[:, slice(-logits_to_keep, None) if whole else logits_to_keep])
        if labels is None:
            return logits, None
        return logits, self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )

    def _media(self, input_ids, inputs_embeds):
        """[B, T], which tokens are media tokens."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.llm.embed(placeholder).to(inputs_embeds)).all(-1)

    def _cache(self, cache, use_cache):
        """The one to read and fill, or None.

        Raises ValueError for other kinds than DynamicCache.
        """
        checkpoints = self.gradient_checkpointing and self.training
        use_cache = (
            (self.config.use_cache and not self.training) if use_cache is None else use_cache
        )
        if cache is None:
            return DynamicCache() if use_cache and not checkpoints else None
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; EVLM keeps images in a DynamicCache:"
                " leave cache_implementation out"
            )
        if checkpoints:
            raise ValueError(
                "past_key_values and gradient checkpointing exclude each other: a layer would fill"
                " the cache twice"
            )
        return cache

    def _mask(self, cache, attention_mask, media):
        """(tokens in the cache, attention_mask [B, past + T])."""
        past = cache.get_seq_length() if cache is not None else 0
        shape = (len(media), past + media.shape[1])
        if attention_mask is None:
            return past, torch.ones(shape, dtype=torch.long, device=media.device)
        if tuple(attention_mask.shape) != shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, the tokens and {past} in front"
                f" of them in the cache {shape}"
            )
        return past, attention_mask

    def _images(self, cache, past, pixel_values, groups, attention_mask, media, sdpa):
        """The images up to now, new ones with them."""
        images = getattr(cache, "images", None) if past else None
        if past and (images is None or len(images.media) != len(media)):
            raise ValueError(
                f"past_key_values holds other rows than these {len(media)}, or another model filled"
                " it: start a new cache"
            )
        if past and past < images.until:
            raise ValueError(
                "past_key_values was cut off among or before its images: start a new cache"
            )
        pixels, tokens = (
            (self._no_pixels(media) if pixel_values is None else pixel_values),
            self.config.media["tokens"],
        )
        before = (
            images.media
            if past
            else torch.zeros((len(media), 1), dtype=torch.long, device=media.device)
        )
        count = count_images(media, tokens, pixels, groups, before)
        if past and not pixels.shape[1]:
            return images
        keys_values, groups = self._project(pixels, sdpa), self._groups(groups, pixels)
        if past:
            return images.append(keys_values, groups, tokens, self._visual_tokens, count)
        return Images(keys_values, groups, self._rope_base(attention_mask), before)

    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """See GenerationMixin; the placeholder of images is never drawn."""
        processors = LogitsProcessorList(
            [*(logits_processor or ()), NeverMedia(self.config.image_token_id)]
        )
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        pixel_values=None,
        image_groups=None,
        use_cache=None,
        logits_to_keep=None,
        output_attentions=None,
        output_hidden_states=None,
        cache=None,
        tokenizer=None,
    ):
        """See GenerationMixin; with a cache, only the new tokens and the new images are inputs.

        `tokenizer` is for stop strings, and comes here because `generate` hands it on.
        """
        past_key_values = past_key_values if cache is None else cache
        wanted = {
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        inputs = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep or 0,
            **wanted,
        }
        cut = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        if inputs_embeds is not None and is_first_iteration:  # generate always keeps a cache then
            inputs |= {"inputs_embeds": inputs_embeds[:, cut], "input_ids": None}
        else:
            inputs |= {"input_ids": input_ids[:, cut]}
        if is_first_iteration or past_key_values is None:
            new = next_sequence_length is None
            inputs |= self._new_images(
                None if new else input_ids, pixel_values, image_groups, past_key_values
            )
        return inputs

    def _new_images(self, input_ids, pixel_values, groups, cache):
        """pixel_values and image_groups, without what the cache has where they are of the whole
        text `input_ids`.
        """
        held = (
            getattr(cache, "images", None) if cache is not None and cache.get_seq_length() else None
        )
        if held is None or pixel_values is None or input_ids is None or not input_ids.shape[1]:
            return {"pixel_values": pixel_values, "image_groups": groups}
        tokens = self.config.media["tokens"]
        total, had = (
            (input_ids == self.config.image_token_id).sum(1) // tokens,
            held.media[:, 0] // tokens,
        )
        if pixel_values.shape[1] != int(total.max()) or (total < had).any():  # the new images alone
            return {"pixel_values": pixel_values, "image_groups": groups}
        new = int((total - had).max())
        at = (had[:, None] + torch.arange(new, device=had.device)).clamp(
            max=pixel_values.shape[1] - 1
        )

        def cut(a):
            return a[torch.arange(len(a), device=a.device)[:, None], at.to(a.device)]

        place = torch.arange(new, device=had.device)
        groups = (
            None
            if groups is None
            else torch.where(place < (total - had)[:, None], cut(groups), -1 - place)
        )
        return {"pixel_values": cut(pixel_values), "image_groups": groups}
