"""The plug-in for lmms-eval: `--model evlm_jax --model_args checkpoint=DIR`, and `--model evlm_hf
--model_args pretrained=EXPORT`.

lmms-eval finds it by the entry-point group "lmms_eval.models"; this file is all that it imports
before a model is asked for."""


def manifests():
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    models = {"evlm_jax": "jax_model.EvlmJax", "evlm_hf": "hf_model.EvlmHf"}
    return [
        ModelManifest(name, simple_class_path=f"evlm_jax.evals.lmms.{place}")
        for name, place in models.items()
    ]
