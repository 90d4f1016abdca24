"""config.json of an export as vLLM reads it, and what vLLM must be told beside it."""

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

RENDERER = "evlm"  # the name under which vLLM finds prompts.EVLMRenderer


class EVLMConfig(PretrainedConfig):
    """The sections of an export, with the names by which vLLM asks for a language model's sizes.

    To vLLM it is an encoder-decoder: taps are the encoder's output, to which cross-attention has
    a cache of its own.
    """

    model_type = "evlm"

    def __init__(self, vit=None, llm=None, xattn=None, moe=None, media=None, **kwargs):
        self.vit, self.llm, self.xattn, self.moe, self.media = (
            section or {} for section in (vit, llm, xattn, moe, media)
        )
        names = {
            "vocab_size": "vocab",
            "hidden_size": "hidden",
            "num_hidden_layers": "layers",
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "head_dim": "head_dim",
            "tie_word_embeddings": "tied",
        }
        kwargs |= {name: self.llm.get(field) for name, field in names.items()}
        super().__init__(**{**kwargs, "is_encoder_decoder": True})


class Requirements(VerifyAndUpdateConfig):
    """What vLLM asks before it starts."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """Prompts are spelled by the export's own processor.

        Raises:
          ValueError: the export's code may not run, or another tokenizer is asked for.
        """
        if not model_config.trust_remote_code:
            raise ValueError(
                "an export of EVLM is served by the code that it carries: look at it and give"
                " --trust-remote-code"
            )
        if model_config.tokenizer_mode not in ("auto", "hf", RENDERER):
            raise ValueError(
                f"tokenizer_mode {model_config.tokenizer_mode!r}: leave it out, EVLM has its own"
            )
        model_config.tokenizer_mode = RENDERER

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Pictures come in the order of prompts (scheduler.py). Refuses what is not there: a model
        over several devices, adapters, quantised weights, steps that are scheduled ahead.

        Raises:
          ValueError: one of them is asked for.
        """
        parallel = vllm_config.parallel_config
        asked = {
            "--tensor-parallel-size": parallel.tensor_parallel_size > 1,
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--enable-lora": vllm_config.lora_config is not None,
            "--quantization": vllm_config.model_config.quantization is not None,
            "--speculative-config": vllm_config.speculative_config is not None,
            "--async-scheduling": vllm_config.scheduler_config.async_scheduling,
        }
        if wrong := [name for name, is_asked in asked.items() if is_asked]:
            raise ValueError(f"EVLM runs on one device as it was exported: leave out {wrong}")
        vllm_config.scheduler_config.async_scheduling = False
        vllm_config.scheduler_config.scheduler_cls = "evlm_vllm.scheduler.OrderedScheduler"
