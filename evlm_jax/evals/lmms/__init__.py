"""The plug-in for lmms-eval: `python -m lmms_eval --model evlm_jax --model_args checkpoint=DIR --tasks ...`.

lmms-eval finds it by the entry-point group "lmms_eval.models"; this file is all that it imports before the model is asked for.
"""


def manifest():
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("evlm_jax", simple_class_path="evlm_jax.evals.lmms.model.EvlmJax")
