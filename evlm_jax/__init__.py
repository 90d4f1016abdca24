"""EVLM (arXiv 2407.14177) in JAX: gated cross-attention from hierarchical ViT features into a
frozen language model.

    import evlm_jax, jax

    model = evlm_jax.load("runs/demo")  # a run, an import, or an export for transformers
    model.generate("What shape is this?", images=["cat.jpg"])  # lists of prompts: lists of answers
    model.logits("Some text")  # [tokens, vocabulary]
    model.features("cat.jpg")  # the taps, of which cross-attention reads: [taps, ViT tokens, width]

    sample = evlm_jax.make_sample("What is it?", "A cat.", images=["cat.jpg"])
    batch = evlm_jax.make_batch([sample], model.config)
    jax.grad(lambda params: model.loss(batch, params))(model.params)

Also: `random` makes a model of a config, with new weights; `Model.attention` says where it looks
for each word; `with_params` gives the same model with other parameters, `save` writes a run for
every command, and `generate(.., stream=True)` gives pieces of the answer as they come.

Pictures are paths, Pillow images or uint8 arrays [height, width, 3]. Prompts are plain text; each
`<image>` in it is where the next picture stands, and without any the pictures come first. Errors
are ValueError or OSError of one line, with the mend. Importing the package imports no JAX and asks
for no device; the first use of a name below does. The command line is `evlm` (`evlm --help`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evlm_jax.library import Model, load, make_batch, make_sample, random

__all__ = ["Model", "load", "make_batch", "make_sample", "random"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("evlm-jax")
    if name in __all__:
        from evlm_jax import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
