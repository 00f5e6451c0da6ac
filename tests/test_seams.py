"""What people replace, or take along into another code base."""

import ast
import re
import runpy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import art
import eval as tasks
import own
from conftest import ROOT, SEED, TINY, prompt
from family_step import far, plain_logps


# tests/own.py: a reward, a judge, objectives, parameters, a hook ----------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llm, model):
    """The folder of a run of tests/own.py, and what it printed."""
    out, printed = tmp_path_factory.mktemp("own"), []
    with (mock.patch.object(tasks, "load_engine", lambda *args, **options: llm),
          mock.patch.object(art, "load_model", lambda *args: model),
          mock.patch("builtins.print", lambda *words, **options: printed.append(words)),
          mock.patch.dict(tasks.TASKS)):
        own.main(out)
    return out, printed


def pictures(folder):
    return [np.asarray(tasks.open_picture(folder / f"{name}.png"), dtype=int)
            for name in ("seed", "last")]


def metrics_of(folder):
    return tasks.pandas.read_json(folder / "metrics.jsonl", lines=True)


def test_supervised_training_raises_the_likelihood_at_each_step(runs):
    losses = next(words[1] for words in runs[1] if "supervised" in str(words[0]))
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.03


def test_a_kl_term_is_0_at_the_seed_and_grows(runs):
    found = metrics_of(runs[0] / "kl")["kl"]
    assert abs(found[1]) < 1e-9 < 1e-7 < found[2]


def test_pixels_stay_near_the_seeds(runs):
    seed, last = pictures(runs[0] / "near")
    assert 0 < abs(last - seed).max() <= 32


def test_a_frame_changes_and_the_picture_within_does_not(runs):
    seed, last = pictures(runs[0] / "frame")
    assert (seed == last)[16:-16, 16:-16].all() and (seed != last).any()


def test_a_coarse_parameter_changes_squares(runs):
    seed, last = pictures(runs[0] / "coarse")
    assert (seed != last).any()
    assert (last == last[::4, ::4].repeat(4, 0).repeat(4, 1)).all()


def test_a_hook_logs_and_ends_the_run(runs):
    """After a step whose files are there."""
    folder = runs[0] / "until"
    assert (folder / "log.csv").read_text().startswith("0,0.")
    assert len(metrics_of(folder)) == 1 and (folder / "last.png").exists()


def test_a_hook_is_given_the_groups_of_each_step(tmp_path, llm, model):
    steps = []
    art.train(own.short_run("gsm8k", tmp_path), llm=llm, model=model,
              on_step=lambda metrics, groups: steps.append((metrics, groups)))
    assert [len(groups) for _, groups in steps] == [0, 4, 4]
    for metrics, groups in steps[1:]:
        assert metrics["groups"] == 4
        assert all(len({c.score for c in group}) > 1 for group in groups)


def test_a_punishment_falls_with_the_length():
    group = [art.Completion("", [], [0] * length, [], "", score=1.0) for length in (8, 40, 48)]
    assert own.Short(None, None).rewards(None, group) == [1, 0.5, 0]


def test_graded_scores_keep_groups_without_a_right_answer():
    example, task = tasks.Example("", [], tasks.Fraction(18)), own.Programs(None, None)
    judged = task.judge([example] * 4, ["Answer: 18", "Answer: 20", "Answer: 99", "none"])
    assert [score for _, score in judged] == [1.0, 0.5, 0.0, 0.0]
    assert [answer for answer, _ in judged] == [18, 20, 99, None]


# One judgement a completion -----------------------------------------------------------------------


class Counting(tasks.Task):
    """Counts its calls."""

    def judge(self, examples, texts):
        calls.append(len(texts))
        return super().judge(examples, texts)


calls = []


def test_a_sampling_round_is_judged_once(llm, processor, questions, seed, tmp_path):
    calls.clear()
    config = own.short_run("gsm8k", tmp_path)
    task = Counting(tasks.gsm8k_example, tasks.gsm8k_answer)
    _, metrics = art.sample_groups(llm, processor, task, questions,
                                   art.PixelLogits(seed).to_image(), 1, config)
    assert len(calls) == metrics["rounds"] and sum(calls) == 8 * metrics["sampled_groups"]


def test_an_arm_is_judged_once(llm, processor, questions):
    calls.clear()
    task = Counting(tasks.gsm8k_example, tasks.gsm8k_answer)
    assert len(tasks.evaluate(llm, processor, task, questions[:5], None)) == 5
    assert calls == [5]


# Completions of given texts -----------------------------------------------------------------------


def test_given_texts_end_as_a_turn_does_and_have_the_plain_logprobs(model, processor, questions,
                                                                    seed):
    pixels = art.PixelLogits(seed)
    prompts = [prompt(processor, example) for example in questions[:2]]
    given = art.given_completions(processor, prompts, ["Answer: 7", "no"], pixels.to_image())
    assert [processor.tokenizer.decode(c.ids) for c in given] == ["Answer: 7<|im_end|>",
                                                                  "no<|im_end|>"]
    logps, mask = art.completion_logps(model, processor, pixels, given)
    expected = [plain_logps(model, processor, c, pixels()) for c in given]
    torch.testing.assert_close(logps[mask], torch.cat(expected), rtol=0, atol=1e-4)


def test_given_texts_have_no_mismatch_and_weigh_one(model, processor, questions, seed):
    pixels, weights = art.PixelLogits(seed), []
    given = art.given_completions(processor, [prompt(processor, questions[0])], ["Answer: 7"],
                                  pixels.to_image())

    def watching(*tensors, weight, **others):
        weights.append(weight)
        return art.dapo_loss(*tensors, weight=weight, **others)
    metrics = art.backward(model, processor, pixels, [given], torch.ones(1, 1), watching)
    assert metrics["mismatch"] == 0 and (weights[0] == 1).all() and metrics["entropy"] > 0


def test_a_completion_that_is_used_again_keeps_its_first_logprobs(model, processor, questions,
                                                                  seed):
    """So `entropy` is that of the policy that was sampled, as the docstring says."""
    pixels = art.PixelLogits(seed)
    given = art.given_completions(processor, [prompt(processor, questions[0])], ["Answer: 7"],
                                  pixels.to_image())
    first = art.backward(model, processor, pixels, [given], torch.ones(1, 1))
    pixels.logits.data += 1
    second = art.backward(model, processor, pixels, [given], torch.ones(1, 1))
    assert second["entropy"] == first["entropy"] and second["ratio"] != first["ratio"]


# An objective of one's own ------------------------------------------------------------------------


def gspo(logp, old_logp, advantages, mask, **others):
    """tests/own.py's over 8 completions, with a metric."""
    loss, _ = own.gspo_loss(logp, old_logp, advantages, mask)
    change = ((logp - old_logp) * mask).sum(1) / mask.sum(1)
    return 4 * loss, {"loss": 4 * loss.detach(), "change": change.sum() / 8}


def test_a_sequence_objective_is_the_same_in_micro_batches(llm, model, processor, questions, seed):
    """GSPO, with another image than the one that was sampled."""
    image = art.PixelLogits(seed).to_image()
    prompts = [prompt(processor, example) for example in questions[:2]]
    groups = art.rollout(llm, prompts, image, 4, 48, random_seeds=[0, 1])
    advantages, found = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), []
    art.backward(model, processor, art.PixelLogits(seed), groups, advantages)
    for tokens in (8192, 1):
        pixels = art.PixelLogits(seed // 2)
        metrics = art.backward(model, processor, pixels, groups, advantages, gspo,
                               tokens_per_microbatch=tokens)
        found.append((pixels.logits.grad, metrics))
    (whole, whole_metrics), (quarters, metrics) = found
    assert whole.norm() > 0 and far(quarters, whole) < 1e-5
    assert all(type(value) is float for value in metrics.values()) and metrics["change"] != 0
    assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-7)


# What a step takes along into another code base ---------------------------------------------------
# The imports at the top of the two files, and these definitions.

TAKEN = {
    "load_seed": ["eval.open_picture", "eval.explained", "eval.InputError", "eval.one_line"],
    "PixelLogits": ["eval.check_size", "eval.is_resized", "eval.random_picture",
                    "eval.model_inputs", "eval.render", "eval.prepend", "eval.user_turn",
                    "eval.Example", "eval.IMAGE", "eval.TEMPLATED", "eval.explained",
                    "eval.one_line", "eval.InputError"],
    "rollout": ["Completion", "eval.TEMPLATED"],
    "group_advantages": [],
    "dapo_loss": ["Completion"],
    "backward": ["micro_batches", "completion_logps", "prompt_inputs", "token_logps", "graph_cache",
                 "GraphLinearAttentionLayer", "pad", "dapo_loss", "Completion", "eval.TEMPLATED",
                 "eval.InputError"],
}


def definitions(file, prefix):
    """{name: its definition} of all that a file defines itself, with `prefix`."""
    found = {}
    for node in ast.parse(Path(file.__file__).read_text()).body:
        for target in getattr(node, "targets", [node]):
            for part in getattr(target, "elts", [target]):
                found[prefix + getattr(part, "name", getattr(part, "id", ""))] = node
    return found


def take(names):
    """The imports of both files and the definitions `names`, which use no others of theirs."""
    defined = {**definitions(tasks, "eval."), **definitions(art, "")}
    taken = [defined[name] for name in defined if name in names]
    used = {node.id for node in ast.walk(ast.Module(taken, [])) if isinstance(node, ast.Name)}
    own = {name.removeprefix("eval."): name for name in defined}
    assert {own[name] for name in used & {*own}} <= {*names}
    imports = [node for file in (tasks, art) for node in ast.parse(
        Path(file.__file__).read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [node for node in imports if getattr(node, "module", "") != "eval"]
    namespace = {"__name__": "taken"}
    exec(compile(ast.Module(imports + taken, []), "taken", "exec"), namespace)
    return namespace


def lifted(name):
    return take([name, *TAKEN[name]])[name]


@pytest.mark.parametrize("name, arguments", [
    ("load_seed", (SEED, 64)), ("group_advantages", (torch.rand(2, 4),)),
    ("dapo_loss", (torch.randn(2, 3), torch.randn(2, 3), torch.randn(2), torch.ones(2, 3)))])
def test_a_formula_is_lifted_alone(name, arguments):
    assert str(lifted(name)(*arguments)) == str(getattr(art, name)(*arguments))


def test_the_pixels_are_lifted_alone(model, processor, questions, seed):
    pixels, text = lifted("PixelLogits")(seed), prompt(processor, questions[0])
    found = pixels.features(model, processor, text)
    expected = art.PixelLogits(seed).features(model, processor, text)
    assert torch.equal(found.pooler_output[0], expected.pooler_output[0])
    assert pixels.to_image() == art.PixelLogits(seed).to_image()


def test_the_rollout_is_lifted_alone(llm, processor, questions, seed):
    text, image = prompt(processor, questions[0]), art.PixelLogits(seed).to_image()
    groups = [function(llm, [text], image, 4, 48, random_seeds=[0])
              for function in (lifted("rollout"), art.rollout)]
    assert [vars(c) for c in groups[0][0]] == [vars(c) for c in groups[1][0]]


def test_the_backward_pass_is_lifted_alone(llm, model, processor, questions, seed):
    text, gradients = prompt(processor, questions[0]), []
    for function in (lifted("backward"), art.backward):
        pixels = art.PixelLogits(seed)
        groups = art.rollout(llm, [text], pixels.to_image(), 4, 48, random_seeds=[0])
        function(model, processor, pixels, groups, torch.arange(4.0)[None])
        gradients.append(pixels.logits.grad)
    assert torch.equal(*gradients) and gradients[0].norm() > 0


# README's code ------------------------------------------------------------------------------------


def test_the_code_under_your_own_runs(tmp_path, llm, monkeypatch, capsys):
    """Both blocks in turn, as one script beside a tests/tiny and a seed.png, with this engine."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme.partition("## Your own\n")[2], re.M | re.S)
    (tmp_path / "script.py").write_text("".join(blocks))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "tiny").symlink_to(TINY)
    (tmp_path / "seed.png").symlink_to(SEED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "load_engine", lambda *args, **options: llm)
    with mock.patch.dict(tasks.TASKS):
        made = runpy.run_path("script.py", run_name="__main__")
    assert len(blocks) == 2 and "sums, n = 50" in capsys.readouterr().out
    assert tasks.open_picture("runs/mine.png") == made["pixels"].to_image()
    assert made["pixels"].logits.grad.norm() > 0
