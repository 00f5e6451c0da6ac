"""The frozen model, the engine and the loop: real vLLM, real gradients, on the tiny model."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import art
import eval as tasks
from conftest import ROOT, TINY, data
from eval import TASKS, evaluate, prompt_text
from family_step import plain_gradient


@pytest.fixture(scope="module")
def groups(llm, processor, questions):
    """Two prompts of different length, four completions each, behind the seed; and advantages for them."""
    image = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    chosen = sorted(questions[:50], key=lambda e: len(e["question"]))
    prompts = [prompt_text(processor, TASKS["gsm8k"], e) for e in (chosen[0], chosen[-1])]
    torch.manual_seed(0)
    return art.rollout(llm, prompts, image, 4, max_new_tokens=48), torch.randn(2, 4)


def test_the_engines_token_ids_are_the_processors(groups, processor):
    for group in groups[0]:
        for completion in group:
            ids = processor(text=[completion.prompt], images=[art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()])
            assert list(ids["input_ids"][0]) == completion.prompt_ids
            assert len(completion.ids) == len(completion.logps) > 0
            assert processor.tokenizer.decode(completion.ids, skip_special_tokens=True) == completion.text


@pytest.mark.parametrize("tokens", [1, 220, 8192])
def test_shared_prefix_gives_the_plain_gradient(groups, model, processor, seed, tokens):
    fast, slow = art.PixelLogits(seed), art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, fast, *groups, tokens=tokens)
    expected, loss, _ = plain_gradient(model, processor, slow, *groups)
    assert (fast.logits.grad - expected).norm() < 1e-5 * expected.norm()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_gradient_is_that_of_double_precision(groups, model, processor, seed):
    """The slow loop in float64, but for the gated delta net's kernel, which transformers computes in float32."""
    fast, slow = art.PixelLogits(seed), art.PixelLogits(seed)
    art.backward(model, processor, fast, *groups)
    expected, _, _ = plain_gradient(copy.deepcopy(model).double(), processor, slow, *groups)
    assert (fast.logits.grad - expected).norm() < 1e-5 * expected.norm()


def test_gradient_reaches_every_pixel(groups, model, processor, seed):
    pixels = art.PixelLogits(seed)
    art.backward(model, processor, pixels, *groups)
    assert (pixels.logits.grad != 0).float().mean() > 0.999 and torch.isfinite(pixels.logits.grad).all()
    assert all(p.grad is None for p in model.parameters())


class Unrounded(art.PixelLogits):
    """The image as the paper's backward sees it: continuous."""

    def forward(self):
        return 255 * torch.sigmoid(self.logits)


def test_the_gradient_is_the_slope_of_the_loss(groups, model, processor, seed):
    """Central differences along random directions, on the image before rounding, which has a slope."""
    pixels, step = Unrounded(seed), 0.02
    _, old_logps = art.backward(model, processor, pixels, *groups)
    for direction in torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)):
        direction, losses = torch.kron(direction, torch.ones(16, 16)), []
        for sign in (1, -1):
            moved = Unrounded(seed)
            with torch.no_grad():
                moved.logits += sign * step * direction
            losses.append(art.backward(model, processor, moved, *groups, old_logps)[0]["loss"])
        expected = (pixels.logits.grad * direction).sum().item()
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=0.02, abs=1.5e-5)


def test_rounding_straight_through_trains_what_is_deployed(groups, model, processor, seed):
    """Logprobs behind the image that is trained against those behind the PNG: equal to the bit here, and not where the
    backward sees the continuous image, as in the paper."""
    noise, gap = torch.randn(seed.shape, generator=torch.Generator().manual_seed(0)), {}
    for kind in art.PixelLogits, Unrounded:
        trained = kind(seed)
        with torch.no_grad():
            trained.logits += 0.5 * noise
        deployed = art.PixelLogits(torch.from_numpy(np.array(trained.to_image())).permute(2, 0, 1))
        logps = [torch.cat([x.flatten() for x in art.backward(model, processor, pixels, *groups)[1]]) for pixels in (trained, deployed)]
        gap[kind] = (logps[0] - logps[1]).abs()
    print(f"mean {gap[Unrounded].mean():.0e}, largest {gap[Unrounded].max():.0e} nat behind the continuous image")
    assert gap[art.PixelLogits].max() == 0 < gap[Unrounded].mean()


class Odd:
    """The engine, made to sample image placeholders and ends of text anywhere in a completion."""

    def __init__(self, llm, tokenizer):
        self.llm = llm
        self.allowed = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "7"])

    @property
    def llm_engine(self):
        return self

    def add_request(self, name, request, params, **kwargs):
        params.allowed_token_ids, params.ignore_eos = self.allowed, True
        return self.llm.llm_engine.add_request(name, request, params, **kwargs)

    def __getattr__(self, name):
        return getattr(self.llm.llm_engine, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sums", "choices", "tool calls", "cut short", "odd tokens"])
def test_the_trainer_is_the_engine(llm, processor, model, seed, kind, dtype):
    """Token ids are vLLM's own and the logprobs agree, whatever the prompt (image first, then several turns and tools) and
    whatever was sampled (cut at the limit, with image placeholders and ends of text in the middle)."""
    name = {"choices": "gpqa", "tool calls": "toolmind"}.get(kind, "gsm8k")
    task, pixels = TASKS[name], art.PixelLogits(seed)
    examples = sorted(task.load("train", data(name, "train")), key=lambda e: len(str(e)))[-3:]
    assert name != "toolmind" or all(len(e["messages"]) > 1 and e["tools"] for e in examples)
    engine = Odd(llm, processor.tokenizer) if kind == "odd tokens" else llm
    groups = art.rollout(engine, [prompt_text(processor, task, e) for e in examples], pixels.to_image(), 4,
                         max_new_tokens=5 if kind == "cut short" else 48)
    if kind == "cut short":
        assert all(len(c.ids) == 5 if c.cut else len(c.ids) <= 5 for g in groups for c in g) and any(c.cut for g in groups for c in g)
    if kind == "odd tokens":
        assert all(set(engine.allowed) >= set(c.ids) and len(c.ids) == 48 for g in groups for c in g)
    metrics, _ = art.backward(copy.deepcopy(model).to(dtype), processor, pixels, groups, torch.ones(3, 4))
    # The engine computes in bfloat16, whose step at the odd tokens' logits of about 16 is 1/8.
    assert 0 < metrics["mismatch"] < (0.1 if kind == "odd tokens" else 0.01) and metrics["mismatch_max"] < 0.3
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] == pytest.approx(1)       # one update: the clip is idle


def test_the_clip_works_from_the_second_update(groups, model, processor, seed):
    pixels = art.PixelLogits(seed)
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.5, weight_decay=0.0)
    first, old_logps = art.backward(model, processor, pixels, *groups)
    optimizer.step()
    second, kept = art.backward(model, processor, pixels, *groups, old_logps)
    assert all(torch.equal(a, b) for a, b in zip(kept, old_logps))
    assert first["clip_fraction"] == 0 < second["clip_fraction"] and abs(second["ratio"] - 1) > 1e-3
    for eps_low, eps_high in ((0.2, 1e9), (1.0, 0.28)):                 # each clip alone: both bite
        assert art.backward(model, processor, pixels, *groups, old_logps, eps_low=eps_low, eps_high=eps_high)[0]["clip_fraction"] > 0
    assert second["mismatch"] == first["mismatch"]              # the gap to the engine is that of the policy it sampled


def test_an_empty_completion_counts_for_nothing(groups, model, processor, seed):
    """Beside others its tokens are none; their loss and gradient stay what they were."""
    empty = art.Completion(groups[0][0][0].prompt, groups[0][0][0].prompt_ids, [], [], "", False)
    with_it, without = art.PixelLogits(seed), art.PixelLogits(seed)
    art.backward(model, processor, with_it, [[*g, empty] for g in groups[0]], torch.cat([groups[1], torch.ones(2, 1)], 1))
    art.backward(model, processor, without, *groups)
    assert (with_it.logits.grad - without.logits.grad).norm() < 1e-5 * without.logits.grad.norm()


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
    (tmp_path / "a.png").write_bytes(tasks.png_bytes(pixels.to_image()))
    from eval import open_picture
    texts = [[r["text"] for r in evaluate(llm, processor, TASKS["gsm8k"], questions[:16], image, 48)]
             for image in (pixels.to_image(), open_picture(tmp_path / "a.png"))]
    assert texts[0] == texts[1]


def test_dynamic_sampling_keeps_groups_with_right_and_wrong_answers_only(monkeypatch):
    """Groups are judged by the score, refilled with new prompts, and the rounds are bounded."""
    asked = []

    def fake_rollout(llm, prompts, image, group_size, max_new_tokens, seeds, timeout):
        asked.extend(prompts)
        return [[art.Completion(p, [1], [1] * (4 if i else 10), [0.0], "right" if i < p else "wrong", False) for i in range(group_size)]
                for p in prompts]
    monkeypatch.setattr(art, "rollout", fake_rollout)
    monkeypatch.setattr(art, "prompt_text", lambda processor, task, example: example)
    task = SimpleNamespace(score=lambda e, t: float(t == "right"), reward=lambda e, t: 1.0 if t == "right" else 0.1 * e)
    args = SimpleNamespace(prompts=2, rounds=3, group_size=4, max_new_tokens=10, overlong_cache=8, timeout=60)
    groups, rewards, metrics = art.sample_groups(None, None, task, enumerate([0, 4, 0, 2, 1, 3]), None, args, tasks.Ranks())
    assert [g[0].prompt for g in groups] == [2, 1] and asked == [0, 4, 0, 2, 1]
    assert metrics["groups"] == 2 and metrics["sampled_groups"] == 5
    assert metrics["score"] == pytest.approx((0 + 4 + 0 + 2 + 1) / 20)              # over all that was sampled
    # The first completion has 10 tokens, 8 past 10 - 8: penalty -1; the others have 4: -0.25.
    assert rewards[0].tolist() == pytest.approx([0.0, 0.75, 0.2 - 0.25, 0.2 - 0.25])
    assert art.sample_groups(None, None, task, enumerate([0] * 9), None, args, tasks.Ranks())[2]["sampled_groups"] == 6


def test_validation_is_a_part_of_training_that_shares_no_key():
    examples = [{"key": str(i // 2)} for i in range(200)]
    train, validation = art.split_validation(examples, 20)
    assert len(validation) == 20 and not {e["key"] for e in train} & {e["key"] for e in validation}
    again = art.split_validation(examples[::-1], 20)
    assert {e["key"] for e in again[1]} == {e["key"] for e in validation}


@pytest.mark.parametrize("task", ["gsm8k", "toolmind", "gpqa"])
def test_the_stand_in_does_each_task_unreliably(llm, processor, task):
    """With no image, a random image or the seed it does 25 to 60 % of each task (and a little that another CPU may add):
    it can, but answers vaguely or wrongly as often as not."""
    examples = TASKS[task].load("test", data(task, "test"))
    seed = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    for arm in ("none", "random", seed):
        accuracy = np.mean([r["score"] for r in evaluate(llm, processor, TASKS[task], examples, arm, 64)])
        assert 0.23 <= accuracy <= 0.62


def test_the_stand_in_is_small():
    from safetensors import safe_open
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert 1e6 < sum(file.get_tensor(k).numel() for k in file.keys()) < 4e6
    assert sum(f.stat().st_size for f in TINY.iterdir() if f.is_file()) < 6e6
    assert json.loads((TINY / "config.json").read_text())["text_config"]["layer_types"][:2] == ["linear_attention", "full_attention"]
