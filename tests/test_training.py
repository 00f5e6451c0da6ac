"""The frozen model, the engine and the loop: real vLLM, real gradients, on the tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import art
from conftest import ROOT, TINY, data
from eval import TASKS, evaluate, prompt_text


@pytest.fixture(scope="module")
def groups(llm, processor, questions):
    """Two prompts of different length, four completions each, behind the seed; and advantages for them."""
    image = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    chosen = sorted(questions[:50], key=lambda e: len(e["question"]))
    prompts = [prompt_text(processor, TASKS["gsm8k"], e) for e in (chosen[0], chosen[-1])]
    torch.manual_seed(0)
    return art.rollout(llm, prompts, image, 4, max_new_tokens=48), torch.randn(2, 4)


def plain_gradient(model, processor, pixels, groups, advantages, weight_cap=2.0):
    """The slow way: each sequence alone, image encoded each time, all logits, autograd all through."""
    total, loss = sum(len(c.ids) for g in groups for c in g), 0.0
    for group, row in zip(groups, advantages):
        for completion, advantage in zip(group, row):
            inputs = processor(text=[completion.prompt], images=[pixels.to_image()], return_tensors="pt")
            inputs["pixel_values"] = processor.image_processor(images=pixels(), return_tensors="pt")["pixel_values"]
            ids = torch.tensor([completion.prompt_ids + completion.ids])
            types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(completion.ids), dtype=torch.long)], 1)
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"],
                           mm_token_type_ids=types, attention_mask=torch.ones_like(ids), use_cache=False).logits
            start = len(completion.prompt_ids)
            logp = logits[0, start - 1:-1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
            weight = (logp.detach() - torch.tensor(completion.logps)).exp().clamp(max=weight_cap)
            loss = loss - (weight * advantage * (logp - logp.detach()).exp()).sum() / total
    loss.backward()
    return pixels.logits.grad, loss.item()


def test_the_engines_token_ids_are_the_processors(groups, processor):
    for group in groups[0]:
        for completion in group:
            ids = processor(text=[completion.prompt], images=[art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()])
            assert list(ids["input_ids"][0]) == completion.prompt_ids
            assert len(completion.ids) == len(completion.logps) > 0
            assert processor.tokenizer.decode(completion.ids, skip_special_tokens=True) == completion.text


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_shared_prefix_gives_the_plain_gradient(groups, model, processor, seed, micro_batch):
    fast, slow = art.PixelLogits(seed), art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, fast, *groups, micro_batch=micro_batch)
    expected, loss = plain_gradient(model, processor, slow, *groups)
    assert (fast.logits.grad - expected).norm() < 1e-4 * expected.norm()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)


def test_gradient_reaches_every_pixel(groups, model, processor, seed):
    pixels = art.PixelLogits(seed)
    art.backward(model, processor, pixels, *groups)
    assert (pixels.logits.grad != 0).float().mean() > 0.999 and torch.isfinite(pixels.logits.grad).all()
    assert all(p.grad is None for p in model.parameters())


def test_trainer_and_engine_agree_and_one_update_leaves_the_clip_idle(groups, model, processor, seed):
    metrics, _ = art.backward(model, processor, art.PixelLogits(seed), *groups)
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] == pytest.approx(1)
    assert 0 < metrics["mismatch"] < 0.03 and metrics["mismatch_max"] < 0.5


def test_the_clip_works_from_the_second_update(groups, model, processor, seed):
    pixels = art.PixelLogits(seed)
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.5, weight_decay=0.0)
    first, old_logps = art.backward(model, processor, pixels, *groups)
    optimizer.step()
    second, kept = art.backward(model, processor, pixels, *groups, old_logps)
    assert all(torch.equal(a, b) for a, b in zip(kept, old_logps))
    assert second["clip_fraction"] > 0 and abs(second["ratio"] - 1) > 1e-3
    assert second["mismatch"] == first["mismatch"]              # the gap to the engine is that of the policy it sampled


@pytest.mark.parametrize("shareable", [art.SHAREABLE, set()], ids=["shared prefix", "plain way"])
@pytest.mark.filterwarnings("ignore:no shared prefix")
def test_a_sampled_image_placeholder_is_an_ordinary_token(groups, model, processor, seed, shareable, monkeypatch):
    """Only the prompt's placeholders take image features. (The plain way reads a sampled one as token 0.)"""
    monkeypatch.setattr(art, "SHAREABLE", shareable)
    placeholder = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    odd = [art.Completion(c.prompt, c.prompt_ids, c.ids[:2] + [placeholder] + c.ids[2:], c.logps[:2] + [-9.0] + c.logps[2:], "", False)
           for c in groups[0][0][:2]]
    one_token = [art.Completion(c.prompt, c.prompt_ids, c.ids[:1], c.logps[:1], "", True) for c in groups[0][0][2:]]
    pixels = art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, pixels, [odd, one_token], groups[1][:, :2])
    assert torch.isfinite(pixels.logits.grad).all() and metrics["loss"] != 0


def test_the_policy_that_is_trained_is_the_png(llm, processor, questions, seed, tmp_path):
    """vLLM samples the same greedy completions for the saved file as for the image in memory."""
    pixels = art.PixelLogits(seed)
    with torch.no_grad():
        pixels.logits += torch.randn_like(pixels.logits)
    art.save_png(pixels.to_image(), tmp_path / "a.png")
    from eval import open_picture
    texts = [[r["text"] for r in evaluate(llm, processor, TASKS["gsm8k"], questions[:16], image, 48)]
             for image in (pixels.to_image(), open_picture(tmp_path / "a.png"))]
    assert texts[0] == texts[1]


def test_dynamic_sampling_keeps_groups_with_right_and_wrong_answers_only(monkeypatch):
    """Groups are judged by the score, refilled with new prompts, and the rounds are bounded."""
    asked = []

    def fake_rollout(llm, prompts, image, group_size, max_new_tokens):
        asked.extend(prompts)
        return [[art.Completion(p, [1], [1] * (4 if i else 10), [0.0], "right" if i < p else "wrong", False) for i in range(group_size)]
                for p in prompts]
    monkeypatch.setattr(art, "rollout", fake_rollout)
    monkeypatch.setattr(art, "prompt_text", lambda processor, task, example: example)
    task = SimpleNamespace(score=lambda e, t: float(t == "right"), reward=lambda e, t: 1.0 if t == "right" else 0.1 * e)
    args = SimpleNamespace(prompts=2, rounds=3, group_size=4, max_new_tokens=10, overlong_cache=8)
    groups, rewards, metrics = art.sample_groups(None, None, task, iter([0, 4, 0, 2, 1, 3]), None, args)
    assert [g[0].prompt for g in groups] == [2, 1] and asked == [0, 4, 0, 2, 1]
    assert metrics["groups"] == 2 and metrics["sampled_groups"] == 5
    assert metrics["score"] == pytest.approx((0 + 4 + 0 + 2 + 1) / 20)              # over all that was sampled
    # The first completion has 10 tokens, 8 past 10 - 8: penalty -1; the others have 4: -0.25.
    assert rewards[0].tolist() == pytest.approx([0.0, 0.75, 0.2 - 0.25, 0.2 - 0.25])
    assert art.sample_groups(None, None, task, iter([0] * 9), None, args)[2]["sampled_groups"] == 6


def test_validation_is_a_part_of_training_that_shares_no_key():
    examples = [{"key": str(i // 2)} for i in range(200)]
    train, validation = art.split_validation(examples, 20)
    assert len(validation) == 20 and not {e["key"] for e in train} & {e["key"] for e in validation}
    again = art.split_validation(examples[::-1], 20)
    assert {e["key"] for e in again[1]} == {e["key"] for e in validation}


@pytest.mark.parametrize("task", ["gsm8k", "toolmind", pytest.param("gpqa", marks=pytest.mark.xfail(
    strict=True, reason="the stand-in finds the right word of a multiple choice, but not yet its letter"))])
def test_the_stand_in_does_each_task_unreliably(llm, processor, task):
    """With no image, a random image or the seed it can do the task, but answers vaguely or wrongly most of the time."""
    examples = TASKS[task].load("test", data(task, "test"))
    seed = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    for arm in ("none", "random", seed):
        accuracy = np.mean([r["score"] for r in evaluate(llm, processor, TASKS[task], examples, arm, 64)])
        assert 0.10 <= accuracy <= 0.65


def test_the_stand_in_is_small():
    from safetensors import safe_open
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert 1e6 < sum(file.get_tensor(k).numel() for k in file.keys()) < 4e6
    assert sum(f.stat().st_size for f in TINY.iterdir() if f.is_file()) < 6e6
    assert json.loads((TINY / "config.json").read_text())["text_config"]["layer_types"][:2] == ["linear_attention", "full_attention"]
