"""Many feed-forwards beside one another, of which each token is sent to the few that suit it.

Shapes: B sequences, T tokens, N = B T, K experts a token, D width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from instar.model.config import ModelConfig
from instar.model.feedforward import FeedForward


class Experts(nn.Module):
    """Many feed-forwards, of which a router chooses a few for each token.

    Shazeer et al. 2017 (arXiv:1701.06538, eq. 1); routed as Qwen3 does: ``p = softmax(W x)`` over
    all experts, then the K most probable ones (Yang et al. 2025, arXiv:2505.09388, section 2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.chosen = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.gate = nn.Linear(d, config.num_experts, bias=False)
        made = (FeedForward(d, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.experts = nn.ModuleList(made)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The chosen experts' answers, weighted by the router's confidence in each."""
        tokens = x.flatten(0, -2)
        weights, choices = self.route(tokens)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (choices == number).nonzero(as_tuple=True)
            # While learning, those that nobody chose run on nothing: gradients of zero are
            # gradients, so that every process has the same ones to sum.
            if len(rows) or torch.is_grad_enabled():
                answer = expert(tokens[rows]) * weights[rows, places, None]
                mixed = mixed.index_add(0, rows, answer.to(mixed.dtype))
        return mixed.view_as(x)

    def route(
        self, tokens: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Weight and number of the experts of each token; the softmax is taken in float32."""
        scores = self.gate(tokens)
        weights, choices = scores.softmax(dim=-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(scores.dtype), choices
