"""EVLM in vLLM: the entry point `vllm.general_plugins` calls `register` in every process.

Modelling code and processor are those of the export (`evlm convert export --format hf`); what is
here holds them to vLLM's caches, scheduler and server. No JAX.
"""

from vllm import __version__ as version

MINOR = "0.32"  # of vLLM: the names that are used here move between minor versions


def register() -> None:
    """Makes vLLM know the model type `evlm`, its model and how its prompts are spelled.

    Raises:
      ImportError: another minor version of vLLM.
    """
    if not version.startswith(f"{MINOR}."):
        raise ImportError(f"evlm-vllm is made for vLLM {MINOR}, this is {version}: install that")
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from evlm_vllm.config import RENDERER, EVLMConfig, Requirements

    if "evlm" in _CONFIG_REGISTRY:
        return
    _CONFIG_REGISTRY["evlm"] = EVLMConfig
    MODELS_CONFIG_MAP["EVLMForCausalLM"] = Requirements
    RENDERER_REGISTRY.register(RENDERER, "evlm_vllm.prompts", "EVLMRenderer")
    TokenizerRegistry.register(RENDERER, "vllm.tokenizers.hf", "CachedHfTokenizer")
    ModelRegistry.register_model("EVLMForCausalLM", "evlm_vllm.model:EVLMForCausalLM")
