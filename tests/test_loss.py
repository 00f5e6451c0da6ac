"""DAPO's numbers, worked out by hand."""

import math

import pytest
import torch

import art


def test_loss_by_hand_on_both_sides_of_both_clips():
    """Completions of one token: both signs of the advantage; ratios below, between, above."""
    ratios = torch.tensor([[0.5], [1.1], [1.5], [0.5], [1.1], [1.5], [0.75]])
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0, -1.0])
    # min(r A, clip(r, 0.8, 1.28) A): for A > 0 large ratios are cut, for A < 0 small ones.
    surrogate = [2 * 0.5, 2 * 1.1, 2 * 1.28, -0.8, -1.1, -1.5, -0.8]
    logp = torch.log(ratios).requires_grad_()
    mask = torch.ones_like(logp, dtype=torch.bool)
    loss, metrics = art.dapo_loss(logp, torch.zeros_like(logp), advantages, mask)
    assert loss.item() == pytest.approx(-sum(surrogate) / 7, rel=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(3 / 7)                    # rows 3, 4 and 7
    assert metrics["ratio"] == pytest.approx(ratios.mean().item())
    loss.backward()
    # d(r A)/d logp = r A where the clip is idle, 0 where it bites.
    expected = [-2 * 0.5, -2 * 1.1, 0, 0, 1.1, 1.5, 0]
    assert logp.grad[:, 0].tolist() == pytest.approx([g / 7 for g in expected], rel=1e-5)


def test_masked_tokens_count_for_nothing():
    logp = torch.tensor([[math.log(1.1), 50.0], [float("-inf"), math.log(0.9)]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    loss, metrics = art.dapo_loss(logp, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask)
    assert loss.item() == pytest.approx(-(1.1 - 0.9) / 2, rel=1e-5)
    assert metrics["clip_fraction"] == 0
    loss.backward()
    assert logp.grad.isfinite().all()


def test_every_token_weighs_the_same_whatever_its_completions_length():
    """DAPO divides by all tokens of the batch, not first by each completion's length."""
    mask = torch.tensor([[True] * 3, [True, False, False]])
    zeros = torch.zeros(2, 3)
    loss, _ = art.dapo_loss(zeros, zeros, torch.tensor([1.0, -1.0]), mask)
    assert loss.item() == pytest.approx(-(3 * 1 - 1) / 4)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_micro_batches_add_up_to_the_batch(cut):
    torch.manual_seed(0)
    logp, old = torch.randn(2, 6, 7, dtype=torch.double)
    mask, weight = torch.rand(6, 7) < 0.7, torch.rand(6, 7).double()
    advantages, total = torch.randn(6, dtype=torch.double), int(mask.sum())
    whole, metrics = art.dapo_loss(logp, old, advantages, mask, total_tokens=total, weight=weight)
    parts = [art.dapo_loss(logp[rows], old[rows], advantages[rows], mask[rows], total_tokens=total,
                           weight=weight[rows]) for rows in (slice(cut), slice(cut, None))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    for name in metrics:
        assert sum(found[name] for _, found in parts) == pytest.approx(metrics[name])
    unsaid = art.dapo_loss(logp, old, advantages, mask, weight=weight)[0]
    assert whole.item() == pytest.approx(unsaid.item())


def test_weight_scales_a_token_and_takes_no_part_in_the_clip():
    logp, old = torch.log(torch.tensor([[1.5, 1.0]])), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = art.dapo_loss(logp, old, torch.tensor([1.0]), mask,
                                  weight=torch.tensor([[2.0, 0.5]]))
    assert loss.item() == pytest.approx(-(2.0 * 1.28 + 0.5 * 1.0) / 2)
    assert metrics["clip_fraction"] == 0.5


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    deviation = math.sqrt(4 * 0.25 / 3)                                  # Bessel-corrected
    expected = [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation]
    assert art.group_advantages(rewards, eps=1e-12)[0].tolist() == pytest.approx(expected)
    assert art.group_advantages(rewards)[1].abs().max() < 1e-3      # an equal group: no gradient


@pytest.mark.parametrize("length, penalty", [
    (0, 0), (400, 0), (412, 0), (462, -0.5), (512, -1), (600, -1)])
def test_overlong_penalty_point_by_point(length, penalty):
    assert art.overlong_penalty(length, 512, 100) == pytest.approx(penalty)
    assert art.overlong_penalty(length, 512, 0) == 0
