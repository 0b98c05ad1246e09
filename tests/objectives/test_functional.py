"""Numbers derived by hand from the papers, and properties the functions must have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from instar.data.batch import IGNORE
from instar.objectives import functional
from instar.objectives.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    token_logprobs,
    token_logprobs_and_entropy,
    whiten,
)


def random_head(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 4, generator=g, requires_grad=True)
    head = torch.randn(7, 4, generator=g, requires_grad=True)
    targets = torch.randint(0, 7, (3, 5), generator=g)
    targets[0, :2] = targets[1] = targets[2, -1] = IGNORE
    return hidden, head, targets


class TestTokenLogprobs:
    def test_two_words_by_hand(self):
        # W h = (ln 3, 0): p = (3/4, 1/4); the entropy is 3/4 ln 4/3 + 1/4 ln 4.
        hidden = torch.tensor([[[1.0], [1.0], [1.0]]])
        head = torch.tensor([[math.log(3)], [0.0]])
        targets = torch.tensor([[0, 1, IGNORE]])
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, targets)
        torch.testing.assert_close(
            logprobs, torch.tensor([[math.log(0.75), math.log(0.25), 0.0]]), atol=1e-6, rtol=0
        )
        h = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
        torch.testing.assert_close(entropy, torch.tensor([[h, h, 0.0]]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("chunk", [1, 3, 1024])
    @pytest.mark.parametrize("kept", [0, 2**25])
    def test_chunks_and_recomputation_change_nothing(
        self, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(functional, "KEPT_LOGITS", kept)
        hidden, head, targets = random_head()
        expected = torch.distributions.Categorical(logits=hidden @ head.T)
        valid = targets != IGNORE
        logprobs = torch.where(valid, expected.log_prob(targets.clamp(min=0)), 0.0)
        entropy = torch.where(valid, expected.entropy(), 0.0)
        wanted = torch.autograd.grad(
            (logprobs + 0.3 * entropy).sum(), (hidden, head), retain_graph=True
        )
        found = token_logprobs_and_entropy(hidden, head, targets, chunk)
        torch.testing.assert_close(found, (logprobs, entropy))
        grads = torch.autograd.grad((found[0] + 0.3 * found[1]).sum(), (hidden, head))
        torch.testing.assert_close(grads, wanted, atol=1e-5, rtol=1e-5)
        only = token_logprobs(hidden, head, targets, chunk)
        torch.testing.assert_close(only, logprobs)
        torch.testing.assert_close(
            torch.autograd.grad(only.sum(), (hidden, head)),
            torch.autograd.grad(logprobs.sum(), (hidden, head)),
        )

    def test_looking_at_every_token_gives_the_same(self, monkeypatch: pytest.MonkeyPatch):
        """As on a GPU, where nobody counts which ones are wanted."""
        hidden, head, targets = random_head()
        assert (targets == IGNORE).any()
        found = []
        for everywhere in (False, True):
            if everywhere:
                monkeypatch.setattr(functional, "_places", lambda m: torch.arange(m.numel()))
            both = token_logprobs_and_entropy(hidden, head, targets)
            loss = (both[0] + 0.3 * both[1]).sum()
            found.append([*both, *torch.autograd.grad(loss, (hidden, head))])
        torch.testing.assert_close(found[0], found[1])

    def test_nothing_wanted_gives_zeros_with_a_gradient(self):
        hidden, head, targets = random_head()
        logprobs = token_logprobs(hidden, head, torch.full_like(targets, IGNORE))
        logprobs.sum().backward()
        assert not logprobs.any()
        assert hidden.grad is not None and not hidden.grad.any()

    def test_half_precision_is_reduced_in_float32(self):
        hidden, head, targets = random_head()
        found = token_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
        logits = F.linear(hidden.bfloat16(), head.bfloat16()).float()
        expected = -F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


class TestDivergence:
    P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    Q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)

    def test_k1_and_k3_are_unbiased(self):
        # The expectation under P is a finite sum, so no sampling is needed.
        kl = F.kl_div(self.Q.log(), self.P, reduction="sum")
        for estimate in (kl_k1, kl_k3):
            mean = (self.P * estimate(self.P.log(), self.Q.log())).sum()
            torch.testing.assert_close(mean, kl)

    def test_k2_is_biased_but_close(self):
        kl = F.kl_div(self.Q.log(), self.P, reduction="sum")
        mean = (self.P * kl_k2(self.P.log(), self.Q.log())).sum()
        assert 0 < abs(mean - kl) < 0.1 * kl

    def test_by_hand(self):
        # p = 1/2, q = 1/4: k1 = ln 2; k2 = ln(2)^2 / 2; k3 = (1/2 - 1) + ln 2.
        p, q = torch.tensor(0.5).log(), torch.tensor(0.25).log()
        assert kl_k1(p, q).item() == pytest.approx(0.693147, abs=1e-6)
        assert kl_k2(p, q).item() == pytest.approx(0.240227, abs=1e-6)
        assert kl_k3(p, q).item() == pytest.approx(0.193147, abs=1e-6)

    @given(st.floats(-20, 0), st.floats(-20, 0))
    def test_k2_and_k3_are_never_negative(self, p: float, q: float):
        pair = torch.tensor(p), torch.tensor(q)
        assert kl_k2(*pair) >= 0
        assert kl_k3(*pair) >= 0

    def test_the_gradient_of_k2_is_that_of_the_divergence(self):
        logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
        logp = logits.log_softmax(0)
        exact = torch.autograd.grad((logp.exp() * (logp - self.Q.log())).sum(), logits)[0]
        logp = logits.log_softmax(0)
        sampled = (logp.exp().detach() * kl_k2(logp, self.Q.log())).sum()
        torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], exact)


def rows(lengths: list[int], columns: int) -> torch.Tensor:
    return torch.arange(columns) < torch.tensor(lengths)[:, None]


class TestGAE:
    def test_by_hand(self):
        # gamma = lam = 1/2, r = (1, 0, 2), V = (1, 2, 4).
        #   delta_2 = 2 + 0 - 4          = -2     A_2 = -2
        #   delta_1 = 0 + 4 / 2 - 2      =  0     A_1 = 0 + (-2) / 4    = -0.5
        #   delta_0 = 1 + 2 / 2 - 1      =  1     A_0 = 1 + (-0.5) / 4  =  0.875
        # The padding holds rubbish that must not matter.
        rewards = torch.tensor([[1.0, 0.0, 2.0, 99.0]])
        values = torch.tensor([[1.0, 2.0, 4.0, -99.0]])
        advantages, returns = gae(rewards, values, rows([3], 4), 0.5, 0.5)
        assert advantages.tolist() == [[0.875, -0.5, -2.0, 0.0]]
        assert returns.tolist() == [[1.875, 1.5, 2.0, 0.0]]

    def test_prompt_and_gaps_are_stepped_over(self):
        rewards, values = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
        packed = gae(rewards, values, rows([3], 3), 0.9, 0.8)
        spread = torch.full((1, 7), 50.0)
        at = torch.tensor([1, 3, 4])
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[:, at] = True
        spread_rewards, spread_values = spread.clone(), spread.clone()
        spread_rewards[:, at], spread_values[:, at] = rewards, values
        found = gae(spread_rewards, spread_values, mask, 0.9, 0.8)
        for wide, narrow in zip(found, packed, strict=True):
            torch.testing.assert_close(wide[:, at], narrow)
            assert not wide[~mask].any()

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 99))
    def test_its_two_ends(self, lengths: list[int], gamma: float, seed: int):
        g = torch.Generator().manual_seed(seed)
        shape = (len(lengths), 6)
        r = torch.randn(shape, generator=g, dtype=torch.float64)
        v = torch.randn(shape, generator=g, dtype=torch.float64)
        mask = rows(lengths, 6)
        monte_carlo, _ = gae(r, v, mask, gamma, 1.0)
        one_step, _ = gae(r, v, mask, gamma, 0.0)
        for i, n in enumerate(lengths):
            for t in range(n):
                discounted = sum(gamma ** (k - t) * r[i, k].item() for k in range(t, n))
                assert monte_carlo[i, t].item() == pytest.approx(discounted - v[i, t].item())
                following = v[i, t + 1].item() if t + 1 < n else 0.0
                td = r[i, t].item() + gamma * following - v[i, t].item()
                assert one_step[i, t].item() == pytest.approx(td)


class TestWhiten:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 99), st.floats(-5, 5), st.floats(0.5, 5))
    def test_mean_and_variance(self, seed: int, shift: float, scale: float):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 6, generator=g, dtype=torch.float64) * scale + shift
        mask = rows([6, 2, 1, 5], 6)
        moved, kept = whiten(x, mask), whiten(x, mask, shift_mean=False)
        assert moved[mask].mean().item() == pytest.approx(0, abs=1e-6)
        assert moved[mask].var(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-6)
        assert kept[mask].var(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert not moved[~mask].any() and not kept[~mask].any()

    def test_a_constant_has_no_advantage(self):
        assert not whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).any()


def test_clipped_policy_loss_by_hand():
    # clip 0.2 below and 0.3 above; -min(r A, clip(r) A):
    #   r = 2,   A =  1: min( 2,    1.3) -> -1.3   the rise is cut
    #   r = 2,   A = -1: min(-2,   -1.3) ->  2     a bad token that rose is pushed down in full
    #   r = 1/2, A =  1: min( 0.5,  0.8) -> -0.5   a good token that fell is pulled up in full
    #   r = 1/2, A = -1: min(-0.5, -0.8) ->  0.8   the fall is cut
    #   r = 1.1, A =  1: inside           -> -1.1
    ratio = torch.tensor([2, 2, 0.5, 0.5, 1.1])
    logprobs = ratio.log().requires_grad_()
    advantage = torch.tensor([1.0, -1, 1, -1, 1])
    loss = clipped_policy_loss(logprobs, torch.zeros(5), advantage, 0.2, 0.3)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.3, 2, -0.5, 0.8, -1.1]))
    # d(-r A)/d log pi = -r A where it is not cut, and nothing where it is.
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0, 2, -0.5, 0, -1.1]))


def test_clipped_value_loss_by_hand():
    # V_old = 0, c = 1/2.
    #   V = 2, R = 1:  free 1,    clipped (0.5 - 1)^2 = 0.25 -> 1 / 2
    #   V = 2, R = 2:  free 0,    clipped (0.5 - 2)^2 = 2.25 -> 2.25 / 2, and no gradient
    #   V = 0.4, R = 1: both 0.36                            -> 0.18
    values = torch.tensor([2.0, 2.0, 0.4], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(3), torch.tensor([1.0, 2.0, 1.0]), 0.5)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.5, 1.125, 0.18]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1.0, 0.0, -0.6]))


def test_explained_variance_by_hand():
    # R = (0, 2, 4): n Var = 8. V = (1, 2, 3): errors (-1, 0, 1), n Var = 2. So 6 of 8.
    returns = torch.tensor([0.0, 2.0, 4.0])
    explained, total = explained_variance(torch.tensor([1.0, 2.0, 3.0]), returns)
    assert (explained.item(), total.item()) == (6.0, 8.0)
    # A constant offset is not what the score is about, and a constant explains nothing.
    assert explained_variance(returns + 5, returns)[0].item() == 8.0
    assert explained_variance(torch.ones(3), returns)[0].item() == 0.0
