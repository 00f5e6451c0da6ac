"""Numbers that go wrong, injected: the step is skipped and counted, or the run ends with the reason and a good image."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import art
import quick_loop
from conftest import ROOT
from eval import TASKS, InputError, prompt_text
from quick_loop import train, whole


class Injected:
    """The quick loop's gradient, to which something happens in some of the steps with one."""

    def __init__(self, harm, steps):
        self.harm, self.steps, self.step = harm, steps, 0

    def __call__(self, model, processor, pixels, *args):
        update, old_logps = quick_loop.backward(model, processor, pixels, *args)
        self.step += 1
        if self.step in self.steps:
            self.harm(pixels.logits.grad, update)
        return update, old_logps


def harm(what, value):
    def inject(gradient, update):
        if what == "gradient":
            gradient[0, 0, 0] = value
        else:
            update[what] = value
    return inject


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["gradient", "loss", "mismatch_max"])
def test_a_step_that_is_no_number_is_skipped_and_counted(tmp_path, what, value, capsys):
    """The pixels stay as they were, metrics.jsonl stays JSON, and the next step goes on."""
    train(tmp_path, backward=Injected(harm(what, value), [3]), steps=6)
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "metrics.jsonl")]
    assert [m["skipped"] for m in metrics[1:]] == [0, 0, 1, 0, 0, 0]
    assert metrics[3]["moved"] == metrics[2]["moved"] != metrics[4]["moved"] and "grad_norm" not in metrics[3]
    assert f"skipped: {'grad_norm' if what == 'gradient' else what} " in capsys.readouterr().out
    assert torch.isfinite(art.load_state(tmp_path / "state.safetensors", {}, (3, 64, 64))[1]["logits"]).all()


def test_a_run_of_bad_steps_ends_with_the_reason_and_the_last_good_image(tmp_path):
    with pytest.raises(InputError, match="10 steps gave a loss, gradient or logprob that is no finite number"):
        train(tmp_path, backward=Injected(harm("loss", math.nan), range(5, 100)), steps=100)
    train(tmp_path / "good", steps=4)
    bad, good = whole(tmp_path), whole(tmp_path / "good")
    assert len(bad["metrics"]) - 1 == 14 and bad["logits"] == good["logits"] and bad["last.png"] == good["last.png"]


def test_a_bad_second_update_keeps_the_first(tmp_path):
    train(tmp_path / "two", "--updates", 2, backward=Injected(harm("loss", math.nan), [2]), steps=1)
    train(tmp_path / "one", "--updates", 1, steps=1)
    assert whole(tmp_path / "two")["logits"] == whole(tmp_path / "one")["logits"]
    assert json.loads(open(tmp_path / "two" / "metrics.jsonl").readlines()[1])["skipped"] == 1


@pytest.mark.parametrize("what", ["reward", "score"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_a_reward_outside_0_and_1_ends_the_run(tmp_path, monkeypatch, what, value):
    task = SimpleNamespace(load=TASKS["gsm8k"].load, score=TASKS["gsm8k"].score, reward=TASKS["gsm8k"].reward)
    setattr(task, what, lambda example, text: 0.0 if "none" in text else value)
    monkeypatch.setitem(art.TASKS, "gsm8k", task)
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        train(tmp_path)
    assert len(whole(tmp_path)["metrics"]) == 1 and whole(tmp_path)["best.png"] == whole(tmp_path)["last.png"]


def test_ten_steps_in_which_every_group_is_equal_teach_nothing_and_break_nothing(tmp_path, capsys):
    def equal(llm, prompts, image, group_size, *args):
        return [[art.Completion(p, [1], [1], [-1.0], "", False)] * group_size for p in prompts]
    train(tmp_path, rollout=equal, steps=10)
    metrics = whole(tmp_path)["metrics"]
    assert all(m["groups"] == m["moved"] == m["reward"] == 0 and m["sampled_groups"] == 16 for m in metrics[1:])
    assert capsys.readouterr().out.count("no group with right and wrong answers: nothing to learn") == 10


@pytest.mark.parametrize("clip, clipped", [("0", False), ("1e-3", True), ("1e9", False)])
def test_the_gradients_norm_is_logged_and_clipped_by_a_flag(tmp_path, clip, clipped):
    norms = []
    step = torch.optim.AdamW.step
    with mock.patch.object(torch.optim.AdamW, "step", lambda self: (norms.append(self.param_groups[0]["params"][0].grad.norm().item()), step(self))):
        train(tmp_path, "--max-grad-norm", clip, steps=2)
    logged = [m["grad_norm"] for m in whole(tmp_path)["metrics"][1:]]
    assert all(n > 1 for n in logged) and norms == pytest.approx([1e-3, 1e-3] if clipped else logged, rel=1e-3)


@pytest.fixture(scope="module")
def groups(llm, processor, questions):
    prompts = [prompt_text(processor, TASKS["gsm8k"], e) for e in questions[:2]]
    image = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    return art.rollout(llm, prompts, image, 2, 48, seeds=[0, 100])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_a_sampled_logprob_that_is_no_number_cannot_hide(groups, model, processor, seed, value, cap):
    """In the real backward, one bad logprob of the engine shows in the metrics that decide whether the step counts."""
    first = groups[0][0]
    bad = [[art.Completion(first.prompt, first.prompt_ids, first.ids, [value, *first.logps[1:]], first.text, False), groups[0][1]], groups[1]]
    metrics, _ = art.backward(model, processor, art.PixelLogits(seed), bad, torch.ones(2, 2), weight_cap=cap)
    assert not all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("tokens", [1, 8192])
def test_a_completion_of_length_zero_changes_nothing(groups, model, processor, seed, tokens):
    empty = art.Completion(groups[0][0].prompt, groups[0][0].prompt_ids, [], [], "", False)
    with_it, without = art.PixelLogits(seed), art.PixelLogits(seed)
    art.backward(model, processor, with_it, [[*groups[0], empty], [*groups[1], empty]], torch.tensor([[1.0, -1, 1]] * 2), tokens=tokens)
    art.backward(model, processor, without, groups, torch.tensor([[1.0, -1]] * 2))
    assert (with_it.logits.grad - without.logits.grad).norm() < 1e-5 * without.logits.grad.norm()


def test_a_loop_with_empty_completions_goes_on(tmp_path):
    def some_empty(*args):
        groups = quick_loop.rollout(*args)
        return [[art.Completion(c.prompt, c.prompt_ids, [], [], "", False) if i % 2 else c for i, c in enumerate(g)] for g in groups]
    train(tmp_path, rollout=some_empty, steps=3)
    assert whole(tmp_path)["metrics"][3]["length"] == 1.5
