"""Configuration of EVLM for transformers. Sections and fields are those of evlm_jax/config.py."""

from transformers import PretrainedConfig


class EVLMConfig(PretrainedConfig):
    """`vit`, `llm`, `xattn`, `moe` and `media` are plain dicts; `image_token_id` is the id that stands for one media token."""

    model_type = "evlm"

    def __init__(self, vit=None, llm=None, xattn=None, moe=None, media=None, image_token_id=0, **kwargs):
        self.vit, self.llm, self.xattn, self.moe, self.media = (section or {} for section in (vit, llm, xattn, moe, media))
        self.image_token_id = image_token_id
        # The names by which transformers' generation asks for the language model's sizes.
        self.vocab_size, self.hidden_size = self.llm.get("vocab"), self.llm.get("hidden")
        self.num_hidden_layers, self.num_attention_heads = self.llm.get("layers"), self.llm.get("heads")
        self.num_key_value_heads, self.head_dim = self.llm.get("kv_heads"), self.llm.get("head_dim")
        kwargs.setdefault("tie_word_embeddings", False)  # a tied head is the embedding itself here, not a second parameter
        super().__init__(**kwargs)
