"""What EVLM, LLaVA's way and Flamingo's way cost at one config's towers: a plain dict, as JSON
holds it.

config, text, frames, context  what was asked; `context` are the tokens that the language model is
                               made for
sizes                          what decides the costs
tokens, needs                  {kind: {F: ...}} of cases.py
programs                       {name: ...} of counted.py
chip                           for which bytes are counted; None: for none
crossovers                     of crossover.py
measured                       of measure.py, where asked
"""

import json

from evlm_jax.config import EVLMConfig
from evlm_jax.costs.cases import case, counterparts, needs
from evlm_jax.costs.crossover import crossovers


def study(
    cfg: EVLMConfig,
    frames: list[int],
    text: int,
    chip: str | None,
    programs: dict,
    context: int | None = None,
) -> dict:
    """All figures but `measured`.

    Args:
      programs: of counted.py.
      context: by default llm.dynamic_ntk or, where that is 0, data.length.
    Raises:
      ValueError: `cfg` is a baseline.
    """
    models = counterparts(cfg)

    def each(f):
        return {
            kind: {n: f(case(model, n, text)) for n in frames} for kind, model in models.items()
        }

    found = {
        "config": cfg.name,
        "text": text,
        "frames": frames,
        "context": context or cfg.llm.dynamic_ntk or cfg.data.length,
        "sizes": sizes(cfg),
        "tokens": each(lambda model: model.data.length),
        "needs": each(needs),
        "programs": programs,
        "chip": chip,
        "crossovers": crossovers(cfg, text),
    }
    return json.loads(json.dumps(found))  # numbers of frames become text, as in a file


def sizes(cfg: EVLMConfig) -> dict[str, int]:
    """What decides the costs, with the names that people use."""
    return {
        "layers of the language model": cfg.llm.layers,
        "hidden": cfg.llm.hidden,
        "query heads": cfg.llm.heads,
        "key and value heads": cfg.llm.kv_heads,
        "their width": cfg.llm.head_dim,
        "cross-attention blocks": len(cfg.cross_layers),
        "their width (r_c h)": cfg.xattn.heads * cfg.xattn.head_dim,
        "their FFN (r_f h)": cfg.xattn.ffn,
        "media tokens of a frame": cfg.media.tokens,
        "latents of a frame (flamingo)": cfg.bridge.latents,
        "patches of a frame": cfg.vit.patches,
        "visual tokens of a frame": cfg.vit.tokens,
    }
