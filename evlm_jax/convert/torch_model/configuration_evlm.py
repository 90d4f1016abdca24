"""Configuration of EVLM for transformers.

Sections and fields are those of evlm_jax/config/__init__.py.
"""

from transformers import PretrainedConfig


class EVLMConfig(PretrainedConfig):
    """`vit`, `llm`, `xattn`, `moe` and `media` are plain dicts; `image_token_id` is the id of one
    media token.
    """

    model_type = "evlm"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        vit=None,
        llm=None,
        xattn=None,
        moe=None,
        media=None,
        image_token_id=0,
        use_cache=True,
        **kwargs,
    ):
        self.vit, self.llm, self.xattn, self.moe, self.media = (
            section or {} for section in (vit, llm, xattn, moe, media)
        )
        self.image_token_id, self.use_cache = image_token_id, use_cache
        # The names by which transformers asks for the language model's sizes.
        self.vocab_size, self.hidden_size = self.llm.get("vocab"), self.llm.get("hidden")
        self.num_hidden_layers, self.num_attention_heads = (
            self.llm.get("layers"),
            self.llm.get("heads"),
        )
        self.num_key_value_heads, self.head_dim = self.llm.get("kv_heads"), self.llm.get("head_dim")
        self.tie_word_embeddings = self.llm.get("tied", False)
        for derived in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            kwargs.pop(derived, None)  # of a saved config: the sections say it
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(**kwargs)
