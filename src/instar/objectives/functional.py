"""The mathematics of training, as pure functions that bear the papers' symbols.

Shapes: B rows, T positions, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from instar.compilation import compilable
from instar.data.batch import IGNORE
from instar.model.layers import product_dtype

CHUNK = 1024
"""Tokens whose logits exist at the same time."""

GRAIN = 64
"""Row counts of the logits' product are multiples of this."""

KEPT_LOGITS = 2**25
"""Up to this many logits (128 MiB) are kept for the backward pass; more are computed again."""


def token_logprobs(
    hidden: Float[Tensor, "b t d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    chunk: int = CHUNK,
) -> Float[Tensor, "b t"]:
    """Log-probability of each target, ``log softmax(W h)[target]``.

    The logits are the largest tensor of a small model, so they are computed only where a target
    is wanted, and ``chunk`` tokens at a time.

    Args:
        hidden: Last hidden states ``(B, T, D)``.
        head_weight: Output embedding ``W (V, D)``.
        targets: The token that follows each position ``(B, T)``; ``IGNORE`` where none is wanted.
        chunk: Tokens whose logits exist at the same time.

    Returns:
        Nats ``(B, T)``, float32, zero where ignored; carries the gradient.
    """
    return _by_chunks(_logprobs, hidden, head_weight, targets, chunk)[0]


def token_logprobs_and_entropy(
    hidden: Float[Tensor, "b t d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """``token_logprobs``, and from the same logits the entropy ``-sum_v p_v log p_v``.

    Args:
        hidden: Last hidden states ``(B, T, D)``.
        head_weight: Output embedding ``W (V, D)``.
        targets: The token that follows each position ``(B, T)``; ``IGNORE`` where none is wanted.
        chunk: Tokens whose logits exist at the same time.

    Returns:
        Log-probabilities and entropies in nats, both ``(B, T)``, zero where ignored. Both carry
        the gradient: detach the entropy where it is only watched.
    """
    logprobs, entropy = _by_chunks(_logprobs_and_entropy, hidden, head_weight, targets, chunk)
    return logprobs, entropy


@compilable
def _logprobs(
    hidden: Float[Tensor, "n d"], head_weight: Float[Tensor, "v d"], targets: Int[Tensor, " n"]
) -> Float[Tensor, "1 n"]:
    logits = F.linear(hidden, head_weight).float()
    return -F.cross_entropy(logits, targets, reduction="none")[None]


def _logprobs_and_entropy(
    hidden: Float[Tensor, "n d"], head_weight: Float[Tensor, "v d"], targets: Int[Tensor, " n"]
) -> Float[Tensor, "2 n"]:
    logp = F.linear(hidden, head_weight).float().log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    return torch.stack((logp.gather(1, targets[:, None]).squeeze(1), entropy))


def top_logprobs(
    hidden: Float[Tensor, "b t d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    k: int,
    chunk: int = CHUNK,
) -> tuple[Int[Tensor, "b t k"], Float[Tensor, "b t k"]]:
    """The likeliest tokens where a target is wanted, and their log-probabilities.

    Args:
        hidden: Last hidden states ``(B, T, D)``.
        head_weight: Output embedding ``W (V, D)``.
        targets: ``IGNORE`` where nothing is wanted ``(B, T)``.
        k: How many of the likeliest tokens.
        chunk: Tokens whose logits exist at the same time.

    Returns:
        Their ids, and log-probabilities in nats, both ``(B, T, k)``, likeliest first, zero where
        nothing is wanted.
    """

    def top(h: Tensor, head: Tensor, _: Tensor) -> Tensor:
        best = F.linear(h, head).float().log_softmax(dim=-1).topk(k, dim=-1)
        # Ids travel as float32, which is exact up to 2^24.
        return torch.cat((best.indices.float(), best.values), dim=-1).T

    found = _by_chunks(top, hidden, head_weight, targets, chunk)
    ids, logprobs = found.permute(1, 2, 0).chunk(2, dim=-1)
    return ids.long(), logprobs


def top_divergence(
    hidden: Float[Tensor, "b t d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    ids: Int[Tensor, "b t k"],
    logprobs: Float[Tensor, "b t k"],
    chunk: int = CHUNK,
) -> Float[Tensor, "b t"]:
    """``KL(p || q)`` of a known distribution from the model's, all but ``k`` tokens as one class.

    ``sum_i p_i log(p_i / q_i)`` over the k tokens, and ``r log(r / s)`` with what p and q leave for
    all the others, ``r = 1 - sum p_i`` and ``s = 1 - sum q_i``. Putting classes together never
    makes a divergence larger: this is a lower bound, and exact where k is the whole vocabulary.

    Args:
        hidden: Last hidden states ``(B, T, D)`` of the model that learns.
        head_weight: Its output embedding ``W (V, D)``.
        targets: ``IGNORE`` where nothing is wanted ``(B, T)``.
        ids: The k tokens ``(B, T, k)``, as ``top_logprobs`` gives them.
        logprobs: Their log-probabilities under p ``(B, T, k)``, nats.
        chunk: Tokens whose logits exist at the same time.

    Returns:
        Nats ``(B, T)``, zero where ignored; carries the gradient.
    """
    return _by_chunks(_top_divergence, hidden, head_weight, targets, chunk, ids, logprobs)[0]


def _top_divergence(
    hidden: Float[Tensor, "n d"],
    head_weight: Float[Tensor, "v d"],
    _: Int[Tensor, " n"],
    ids: Int[Tensor, "n k"],
    logprobs: Float[Tensor, "n k"],
) -> Float[Tensor, "1 n"]:
    logq = F.linear(hidden, head_weight).float().log_softmax(dim=-1)
    divergence = (logprobs.exp() * (logprobs - logq.gather(1, ids))).sum(dim=-1)
    if ids.shape[-1] < logq.shape[-1]:
        # The others' share by adding them up: one minus the rest loses all digits near one.
        log_s = logq.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
        r = (1 - logprobs.exp().sum(dim=-1)).clamp(min=0)
        divergence = divergence + torch.xlogy(r, r) - r * log_s
    return divergence[None]


def _by_chunks(
    quantities: Callable[..., Tensor],
    hidden: Float[Tensor, "b t d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    chunk: int,
    *beside: Float[Tensor, "b t m"] | Int[Tensor, "b t m"],
) -> Float[Tensor, "k b t"]:
    """Apply ``quantities`` to the wanted tokens, chunk by chunk, and put the results in place.

    What stands ``beside`` the targets is cut in the same way and handed on after them.
    """
    mask = targets != IGNORE
    places = _places(mask)
    # Numbers of rows in steps of GRAIN: matrix products are tuned afresh for every new shape.
    index = F.pad(places, (0, -len(places) % GRAIN))
    states = hidden.flatten(0, 1)[index].split(chunk)
    wanted = targets.flatten()[index].clamp(min=0).split(chunk)
    if not head_weight.requires_grad:  # autocast would cast what is frozen for every chunk
        head_weight = head_weight.to(product_dtype(hidden))
    others = [tensor.flatten(0, 1)[index].split(chunk) for tensor in beside]
    # One more product with the head is cheap; keeping every logit of a large vocabulary is not.
    many = sum(map(len, wanted)) * len(head_weight) > KEPT_LOGITS
    found = [
        checkpoint(quantities, h, head_weight, y, *more, use_reentrant=False)
        if many and torch.is_grad_enabled()
        else quantities(h, head_weight, y, *more)
        for h, y, *more in zip(states, wanted, *others, strict=True)
    ]
    values = torch.cat(found, dim=1)  # type: ignore[arg-type]
    values = values[:, : len(places)]
    zeros = values.new_zeros(len(values), *targets.shape)
    if len(places) == mask.numel():
        return torch.where(mask, values.view_as(zeros), zeros)
    return zeros.masked_scatter(mask, values)


def _places(mask: Bool[Tensor, "b t"]) -> Int[Tensor, " n"]:
    """Which tokens to look at: the wanted ones, or on a GPU all.

    There, to know how many are wanted, the processor would have to wait in the middle of a step.
    """
    if mask.is_cuda:
        return torch.arange(mask.numel(), device=mask.device)
    return mask.flatten().nonzero().squeeze(1)


def kl_k1(
    logprobs: Float[Tensor, "*s"], other_logprobs: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """``k1 = log p - log q`` estimates KL(p || q) from samples of p; unbiased, high variance.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). There the
    sampling distribution is called q; here it is always the first argument. Single values may be
    negative though the divergence is not.

    Args:
        logprobs: Log-probabilities of the samples under the distribution that drew them.
        other_logprobs: The same samples under the other distribution.
    """
    return logprobs - other_logprobs


def kl_k2(
    logprobs: Float[Tensor, "*s"], other_logprobs: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """``k2 = (log p - log q)^2 / 2``: never negative, low variance, *biased* (slightly).

    Schulman 2020; arguments as for ``kl_k1``. Its gradient with respect to p is the divergence's
    own, which that of k3 is not.
    """
    return (logprobs - other_logprobs).square() / 2


def kl_k3(
    logprobs: Float[Tensor, "*s"], other_logprobs: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """``k3 = (r - 1) - log r`` with ``r = q / p``: never negative, low variance, unbiased.

    Schulman 2020; arguments as for ``kl_k1``. It is k1 plus the control variate ``r - 1``, whose
    mean under p is zero. GRPO's KL term (Shao et al. 2024, arXiv:2402.03300, eq. 4).
    """
    log_r = other_logprobs - logprobs
    return log_r.expm1() - log_r


def gae(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    ``A_t = sum_l (gamma lam)^l delta_{t+l}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``. An
    episode is the row's masked positions in order; after the last one the value is zero, and
    what lies between them (a prompt, padding, another speaker's turn) is stepped over.

    Args:
        rewards: Reward for the token chosen at each position ``(B, T)``.
        values: The critic's value before that choice ``(B, T)``.
        mask: Which positions are choices of the policy ``(B, T)``.
        gamma: Discount of the future, a factor a token.
        lam: 0 trusts the critic (one step), 1 trusts the sampled return.

    Returns:
        Advantages, and returns ``A_t + V_t`` for the critic, ``(B, T)``, zero outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages * mask
    return advantages, (advantages + values) * mask


def whiten(
    x: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], shift_mean: bool = True
) -> Float[Tensor, "*s"]:
    """Scale to variance 1 and, with ``shift_mean``, shift to mean 0, over all masked values.

    Advantages are shifted. Rewards must not be: their mean is what the policy is to raise, so for
    them only the scale changes.

    Args:
        x: Any shape.
        mask: Which values count.
        shift_mean: Whether the mean becomes zero or stays.

    Returns:
        The same shape, zero outside the mask.
    """
    valid = x[mask]
    mean = valid.mean()
    scaled = (x - mean) * torch.rsqrt(valid.var(correction=0) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def clipped_policy_loss(
    logprobs: Float[Tensor, "*s"],
    old_logprobs: Float[Tensor, "*s"],
    advantage: Float[Tensor, "*s"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "*s"]:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` of each token, with ``r = pi / pi_old``.

    Schulman et al. 2017 (arXiv:1707.06347, eq. 7), negated so that lower is better. A larger
    ``clip_high`` is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476, eq. 10).

    Args:
        logprobs: Of the tokens under the policy that learns; carries the gradient.
        old_logprobs: Of the same tokens under the policy that sampled them.
        advantage: How much better each token was than expected.
        clip_low: How far below 1 the ratio may usefully fall.
        clip_high: How far above 1 it may usefully rise.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clipped_value_loss(
    values: Float[Tensor, "*s"],
    old_values: Float[Tensor, "*s"],
    returns: Float[Tensor, "*s"],
    clip: float,
) -> Float[Tensor, "*s"]:
    """``max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2`` of each token.

    The worse of the free and the clipped error, so that one rollout moves the critic only so far
    (an implementation detail of PPO: Engstrom et al. 2020, arXiv:2005.12729).

    Args:
        values: What the critic says now; carries the gradient.
        old_values: What it said when the rollout was made.
        returns: What it should have said.
        clip: How far a value may usefully move, in units of return.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def explained_variance(
    values: Float[Tensor, " n"], returns: Float[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The variance of the returns that a critic explains, and all of it; their ratio is the score.

    ``1 - Var(R - V) / Var(R)``: 1 is perfect, 0 no better than a constant, negative is worse.
    Both are sums of squares, so that micro-batches are added and the division comes last.

    Args:
        values: Predictions ``(N,)``.
        returns: What was to be predicted ``(N,)``.

    Returns:
        ``n Var(R) - n Var(R - V)`` and ``n Var(R)``.
    """
    error = returns - values
    total = (returns - returns.mean()).square().sum()
    return total - (error - error.mean()).square().sum(), total
