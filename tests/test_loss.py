"""The algorithm's two formulas against TRL's GRPOTrainer: code of the field that this project did
not write."""

from collections import Counter

import pytest
import torch

import art

P, G, T = 6, 4, 9                           # prompts, completions of each, tokens of the longest


@pytest.fixture(scope="module")
def trl_trainer(processor, tmp_path_factory):
    """A real GRPOTrainer with DAPO's loss and clip, on a random text model; its reward function
    reads `rewards`."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(
        tmp_path_factory.mktemp("trl"), loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        num_generations=G, per_device_train_batch_size=P * G, gradient_accumulation_steps=1,
        steps_per_generation=1, max_completion_length=4, use_cpu=True, bf16=False, report_to="none")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(processor.tokenizer), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    trainer = GRPOTrainer(model, lambda completions, **_: trainer.rewards, args,
                          Dataset.from_list([{"prompt": "How many?"}]),
                          processing_class=processor.tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def their_loss(trainer, monkeypatch, logp, old_logp, advantages, mask, total_tokens, weight=None):
    """TRL's loss of a batch whose logprobs are given."""
    def logps_and_entropies(*_, **__):
        return logp, torch.zeros(logp.shape), None
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", logps_and_entropies)
    ones = torch.ones(len(logp), 1, dtype=torch.long)
    return trainer._compute_loss(trainer.model, {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones.expand(-1, T),
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old_logp,
        "num_items_in_batch": total_tokens, "importance_sampling_ratio": weight})


def test_advantages_are_trls(trl_trainer):
    torch.manual_seed(0)
    rewards = [torch.rand(P - 3, G), torch.tensor([[1.0, 0, 0, 0], [0.1] * G, [1.0] * G])]
    rewards = torch.cat(rewards)
    trl_trainer.rewards = rewards.flatten().tolist()
    rows = [{"prompt": "How many?"}] * (P * G)
    expected = trl_trainer._generate_and_score_completions(rows)["advantages"]
    ours = art.group_advantages(rewards).flatten()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert (expected[-2 * G:].abs() < 1e-3).all() and expected[-3 * G] > 1      # equal: nothing


@pytest.fixture(params=[1, 3], ids=["whole", "in three micro-batches"])
def batch(request):
    """(parts of the rows, logp, old_logp, advantages, mask, weight): unequal lengths, and ratios on
    both sides of both clips, for both signs of the advantage."""
    torch.manual_seed(request.param)
    logp = (torch.randn(P * G, T, dtype=torch.double) - 2).requires_grad_()
    old_logp = logp.detach() + 0.5 * torch.randn_like(logp)
    mask = torch.arange(T) < torch.randint(1, T + 1, (P * G, 1))
    advantages = art.group_advantages(torch.rand(P, G)).flatten().double()
    for bound, sign in ((0.8, -1), (1.28, 1)):
        beyond = (((logp - old_logp).exp() - bound) * sign > 0) & mask
        assert (beyond & (advantages[:, None] > 0)).any()
        assert (beyond & (advantages[:, None] < 0)).any()
    parts = torch.arange(P * G).chunk(request.param)
    return parts, logp, old_logp, advantages, mask, torch.rand_like(old_logp) * 2


def compared(trainer, monkeypatch, batch, weighted):
    """((our loss, TRL's), (our metrics, TRL's clip fraction)), each added up over the parts."""
    parts, *tensors, mask, weight = batch
    monkeypatch.setattr(trainer, "use_vllm", weighted)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", weighted)
    trainer._metrics["train"].clear()
    ours, theirs, clipped, metrics = 0.0, 0.0, 0.0, Counter()
    for rows in parts:
        part = [tensor[rows] for tensor in (*tensors, mask)]
        part_weight = weight[rows] if weighted else None
        theirs += their_loss(trainer, monkeypatch, *part, mask.sum(), part_weight)
        clip = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
        clipped += clip * mask[rows].sum().item() / mask.sum().item()
        loss, logged = art.dapo_loss(*part, total_tokens=int(mask.sum()), weight=part_weight)
        ours += loss
        metrics.update({name: value.item() for name, value in logged.items()})
    return (ours, theirs), (metrics, clipped)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_trls(trl_trainer, monkeypatch, batch, weighted):
    losses, _ = compared(trl_trainer, monkeypatch, batch, weighted)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_its_gradient_is_trls(trl_trainer, monkeypatch, batch, weighted):
    losses, _ = compared(trl_trainer, monkeypatch, batch, weighted)
    gradients = [torch.autograd.grad(loss, batch[1], retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_its_clip_fraction_is_trls(trl_trainer, monkeypatch, batch):
    _, (metrics, clipped) = compared(trl_trainer, monkeypatch, batch, False)
    assert metrics["clip_fraction"] == pytest.approx(clipped, rel=1e-5) and clipped > 0.1


def test_its_ratio_is_the_mean_over_completion_tokens(trl_trainer, monkeypatch, batch):
    _, (metrics, _) = compared(trl_trainer, monkeypatch, batch, False)
    _, logp, old_logp, _, mask, _ = batch
    assert metrics["ratio"] == pytest.approx((logp - old_logp)[mask].exp().mean().item())


@pytest.fixture
def rows():
    """logp, old_logp, advantages (4,) and a mask of four rows of five tokens."""
    torch.manual_seed(0)
    return torch.randn(4, 5), torch.randn(4, 5), torch.randn(4), torch.rand(4, 5) < 0.7


def loss_of_tokens_alone(logp, old, advantages, mask):
    """Each token that the mask shows as a row of its own."""
    rows = logp[mask], old[mask], advantages[:, None].expand(4, 5)[mask], torch.ones(mask.sum())
    return art.dapo_loss(*(row[:, None] for row in rows))[0].item()


def test_what_is_masked_counts_for_nothing_however_large_it_is(rows):
    logp, old, advantages, mask = rows
    expected = loss_of_tokens_alone(*rows)
    logp[~mask] = torch.tensor([50.0, -torch.inf]).repeat(10)[:(~mask).sum()]
    loss, _ = art.dapo_loss(logp.requires_grad_(), old, advantages, mask)
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss, logp)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_the_mask_may_be_of_any_kind(rows, dtype):
    loss, _ = art.dapo_loss(*rows[:3], rows[3].to(dtype))
    assert loss.item() == pytest.approx(loss_of_tokens_alone(*rows))


def test_advantages_may_be_a_column(rows):
    logp, old, advantages, mask = rows
    loss, _ = art.dapo_loss(logp, old, advantages[:, None], mask)
    assert loss.item() == pytest.approx(loss_of_tokens_alone(*rows))


@pytest.mark.parametrize("shape", [(4, 5), (4, 4), (5,), (1,)])
def test_advantages_of_another_shape_are_refused(shape):
    """(N, T), or one for all, would spread silently."""
    with pytest.raises(RuntimeError, match="shape"):
        art.dapo_loss(torch.zeros(4, 5), torch.zeros(4, 5), torch.ones(shape), torch.ones(4, 5))
