"""EVLM for transformers: plain_evlm.py with generation. Keys and values of the images are projected once and kept in the cache."""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_evlm import EVLMConfig
from .plain_evlm import EVLMParts, check_images


class EVLMCache(DynamicCache):
    """Keys and values of the text, as everywhere, and of the images: one pair for each cross-attention block. The prompts' rotary base."""

    def __init__(self):
        super().__init__()
        self.images, self.count = [], 0  # [(keys, values)], images of a row
        self.theta = None  # a number, or [B, 1, 1, 1]; all beams of a row have the same

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.images = [tuple(a.index_select(0, beam_idx.to(a.device)) for a in pair) for pair in self.images]


class EVLMForCausalLM(EVLMParts, PreTrainedModel, GenerationMixin):
    """Text and images -> logits. Loads with AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)."""

    config_class = EVLMConfig
    base_model_prefix = "evlm"
    main_input_name = "input_ids"
    _no_split_modules = ["VisionBlock", "Layer", "CrossAttention"]

    def __init__(self, config):
        super().__init__(config)
        self.build(config)
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
        pixel_values = self._no_pixels(rows) if pixel_values is None else pixel_values
        if visible is None:
            visible = self._visible(input_ids, pixel_values.shape[1], image_groups)
            check_images(visible[1], pixel_values.shape[1])
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

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        """Behind a cache only the new tokens are read; what they see follows from all tokens."""
        inputs = {name: kwargs.get(name) for name in ("pixel_values", "image_groups", "use_cache", "logits_to_keep")}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past:
            visible = self._visible(input_ids, past_key_values.count, inputs["image_groups"])
            inputs |= {"pixel_values": None, "visible": tuple(a[:, past:] for a in visible)}
            input_ids = input_ids[:, past:]
        inputs["logits_to_keep"] = inputs["logits_to_keep"] or 0
        return inputs | {"input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask}
