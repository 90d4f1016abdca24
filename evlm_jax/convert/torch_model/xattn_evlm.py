"""The cross-attention block of EVLM in PyTorch, and its mixture of experts."""

import torch
import torch.nn.functional as F
from torch import nn

from .towers_evlm import MLP, Config, RMSNorm, attend, split_heads

GATES = {"tanh": torch.tanh}  # what is made of the parameter


class Experts(nn.Module):
    """The matrices of all experts, fc1 [E, F, D] and fc2 [E, D, F]: the weighted sum of those that
    each token has chosen.
    """

    def __init__(self, experts, width, hidden):
        super().__init__()
        self.fc1 = nn.Parameter(torch.zeros(experts, hidden, width))
        self.fc2 = nn.Parameter(torch.zeros(experts, width, hidden))

    def forward(self, x, gates, chosen):
        """x [N, D], gates and chosen [N, K]."""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = F.gelu(F.linear(x[token], self.fc1[expert])) * gates[token, place, None].to(
                x.dtype
            )
            out = out.index_add(0, token, F.linear(hidden, self.fc2[expert]))
        return out


class Router(nn.Linear):
    """Router logits, in float32 whatever the dtype of the weights."""

    def forward(self, x):
        """x [N, D] -> logits [N, E]."""
        return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """y = world(x) + sum over the top_k experts e of gate_e * fc2_e(gelu(fc1_e(x))); the router is
    float32. No expert has a limit.
    """

    def __init__(self, width, hidden, moe):
        super().__init__()
        experts = moe.copies * moe.slices
        self.router = Router(width, experts, bias=False)
        self.experts = Experts(experts, width, hidden // moe.slices)
        self.world = MLP(width, hidden, "gelu", False)
        self.top_k, self.renormalise = moe.top_k, moe.gates == "renormalise"

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        flat = x.flatten(0, -2)
        gates, chosen = self.router(flat).softmax(-1).topk(self.top_k)
        if self.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        return (self.world(flat) + self.experts(flat, gates, chosen)).view_as(x)


class CrossAttention(nn.Module):
    """x += opening(attn_gate) * attention over the tap; x += tanh(ff_gate) * FFN. The zero keys are
    appended to the images' keys.

    The FFN is fc2(gelu(fc1(x))), or a mixture of experts.
    """

    def __init__(self, cfg):
        super().__init__()
        llm, vit, xattn = Config(cfg.llm), Config(cfg.vit), Config(cfg.xattn)
        d, n, k = llm.hidden, *(heads * xattn.head_dim for heads in (xattn.heads, xattn.kv_heads))
        self.norm, self.ff_norm = (
            RMSNorm(d, xattn) if xattn.norm_kind == "rms" else nn.LayerNorm(d, xattn.eps)
            for _ in range(2)
        )
        self.kv_norm = nn.LayerNorm(vit.width, xattn.eps) if xattn.kv_norm else nn.Identity()
        self.to_q, self.to_out = nn.Linear(d, n, bias=False), nn.Linear(n, d, bias=False)
        self.to_k, self.to_v = (nn.Linear(vit.width, k, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (
            RMSNorm(xattn.head_dim, xattn) if xattn.qk_norm == "head" else nn.Identity()
            for _ in range(2)
        )
        if cfg.moe["copies"]:
            self.moe = MoE(d, xattn.ffn, Config(cfg.moe))
        else:
            self.fc1, self.fc2, self.moe = (
                nn.Linear(d, xattn.ffn, bias=False),
                nn.Linear(xattn.ffn, d, bias=False),
                None,
            )
            self.up = nn.Linear(d, xattn.ffn, bias=False) if xattn.gated else None
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(())) for _ in range(2))
        self.head_dim, self.sinks = xattn.head_dim, xattn.sinks
        self.opening = GATES[xattn.gate]

    def ffn(self, x):
        """x [B, T, D] -> [B, T, D]."""
        y = self.fc1(x)
        return self.fc2(F.gelu(y) if self.up is None else F.silu(y) * self.up(x))

    def keys_values(self, tap):
        """tap [B, I, S, V] -> two of [B, K, I * S + sinks, H]."""
        normed = self.kv_norm(tap).flatten(1, 2)
        return tuple(
            F.pad(norm(split_heads(project(normed), self.head_dim)), (0, 0, 0, self.sinks))
            for project, norm in ((self.to_k, self.k_norm), (self.to_v, nn.Identity()))
        )

    def forward(self, x, keys, values, mask, sdpa):
        """mask [B, T, I * S + sinks].

        A token that sees nothing at all gets exactly 0. Also the weights, where they are written
        out.
        """
        q = self.q_norm(split_heads(self.to_q(self.norm(x)), self.head_dim))
        out, weights = attend(q, keys, values, mask[:, None], sdpa)
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
        x = x + self.opening(self.attn_gate.float()).to(x.dtype) * self.to_out(out)
        y = self.ff_norm(x)
        y = self.moe(y) if self.moe else self.ffn(y)
        return x + self.ff_gate.float().tanh().to(x.dtype) * y, weights
