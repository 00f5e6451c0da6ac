"""What people replace or take along, in README's words."""

import ast
import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch

import art
import eval as tasks
from conftest import ROOT, SEED, TINY, prompt
from family_step import far


def gspo(logp, old_logp, advantages, mask, total_tokens=None, weight=None):
    """Clips the ratio of whole sequences; their number is known beforehand, here 8."""
    change = ((logp - old_logp) * mask).sum(1) / mask.sum(1)
    ratio = change.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.9997, 1.0004) * advantages)
    return -surrogate.sum() / 8, {"loss": -surrogate.sum() / 8, "change": change.sum() / 8}


def test_a_sequence_objective_is_the_same_in_micro_batches(llm, model, processor, questions, seed):
    """GSPO: whole groups against quarters, behind another image than the one that was sampled."""
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


README = (ROOT / "README.md").read_text()
STEPS = ["load_seed", "PixelLogits", "rollout", "group_advantages", "dapo_loss", "backward"]


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


@pytest.mark.parametrize("step", range(1, 7))
def test_a_step_takes_along_what_readme_lists(step, llm, model, processor, questions, seed):
    """It runs and does what it does in art.py."""
    table = README.partition("### What a step takes along")[2]
    row = re.search(rf"^\| *{step}\b.*?\|(.*)\|", table, re.M)[1]
    names = re.findall(r"`([\w.]+)`", row)
    taken, name = take(names), STEPS[step - 1]
    lifted, own, text = taken[name], getattr(art, name), prompt(processor, questions[0])
    pixels, rewards = art.PixelLogits(seed), torch.rand(2, 4)
    numbers = {"load_seed": (SEED, 64), "group_advantages": (rewards,), "dapo_loss": (
        torch.randn(2, 3), torch.randn(2, 3), torch.randn(2), torch.ones(2, 3))}
    if name in numbers:
        assert str(lifted(*numbers[name])) == str(own(*numbers[name]))
    if name == "PixelLogits":
        features = lifted(seed).features(model, processor, text)
        expected = pixels.features(model, processor, text)
        assert torch.equal(features.pooler_output[0], expected.pooler_output[0])
        assert lifted(seed).to_image() == pixels.to_image()
    if name == "rollout":
        groups = [function(llm, [text], pixels.to_image(), 4, 48, random_seeds=[0])
                  for function in (lifted, own)]
        assert [vars(c) for c in groups[0][0]] == [vars(c) for c in groups[1][0]]
    if name == "backward":
        for function, image in ((lifted, pixels), (own, art.PixelLogits(seed))):
            groups = art.rollout(llm, [text], image.to_image(), 4, 48, random_seeds=[0])
            function(model, processor, image, groups, rewards[:1])
        assert torch.equal(pixels.logits.grad, image.logits.grad) and image.logits.grad.norm() > 0


def test_the_code_under_your_own_runs(tmp_path, llm, monkeypatch, capsys):
    """All of it in turn, as one script beside a tests/tiny and a seed.png, with this engine."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.partition("## Your own\n")[2], re.M | re.S)
    (tmp_path / "script.py").write_text("".join(blocks))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "tiny").symlink_to(TINY)
    (tmp_path / "seed.png").symlink_to(SEED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "load_engine", lambda *args, **options: llm)
    with mock.patch.dict(tasks.TASKS):
        made = runpy.run_path("script.py", run_name="__main__")
    said = capsys.readouterr().out
    assert blocks and "sums, n = 50" in said and "a log of your own: 2" in said
    assert tasks.open_picture("runs/mine.png") == made["pixels"].to_image()
    assert made["pixels"].logits.grad.norm() > 0
    group = [art.Completion("", [], [0] * length, [], "Answer: 7") for length in (8, 40, 48)]
    short = made["Short"](made["example"], made["answer"])
    assert short.rewards(tasks.Example("", [], "7"), group) == [1, 0.5, 0]
    near, seed = (tasks.open_picture(f"runs/short/{name}.png") for name in ("last", "seed"))
    moved = torch.tensor(list(near.tobytes())) - torch.tensor(list(seed.tobytes()))
    assert 0 < moved.abs().max() <= 32
