"""torchrun: two ranks, each with an engine, a model and prompts of its own, train one image."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

import art
from conftest import ENV, ROOT, SEED, TINY, config, data
from eval import TASKS
from family_step import far
from quick_loop import FILES, whole

FLAGS = ["--task", "gsm8k", "--seed", SEED, "--model", TINY, "--data", data("gsm8k", "train"),
         "--prompts", 3, "--validation", 15, "--validate-every", 2, "--max-new-tokens", 48,
         "--max-model-len", 512, "--max-num-seqs", 64, "--lr", 0.3]

# One engine and one model serve both runs. In step 2, rank 1 reads no answer: no group is usable.
SCRIPT = """
import dataclasses, sys
import torch
import art, eval as tasks
torch.distributed.init_process_group("gloo")
whole_run, resumed, *flags = sys.argv[1:]
config = lambda *more: art.Config(**vars(art.HfArgumentParser(art.Config).parse_args(
    [*flags, *more])))
llm = tasks.load_engine(config().model, 512, 64)
model = art.load_model(config().model, "cpu")
real, steps, kept = tasks.TASKS["gsm8k"], [], {}
blind = lambda: art.RANK == 1 and len(steps) == 2           # steps 0 and 1 are done
tasks.TASKS["gsm8k"] = dataclasses.replace(
    real, answer=lambda example, text: None if blind() else real.answer(example, text))
pixels = art.PixelLogits(art.load_seed(config().seed, 256))
def on_step(metrics, groups):
    steps.append(metrics)
    grad = None if pixels.logits.grad is None else pixels.logits.grad.clone()
    kept[metrics["step"]] = pixels.logits.detach().clone(), grad, metrics
    torch.save(kept, f"{whole_run}.{art.RANK}")
art.train(config("--out", whole_run, "--steps", "3"), pixels, None, on_step, llm, model)
for more in [["--steps", "2"], ["--steps", "3", "--resume"]]:
    steps = [{}] * (3 if "--resume" in more else 0)
    count = lambda metrics, groups: steps.append(metrics)
    art.train(config("--out", resumed, *more), None, None, count, llm, model)
    torch.distributed.barrier()                             # rank 0 has written the last step
torch.distributed.destroy_process_group()
"""


def torchrun(*command):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=200, env={**ENV, "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what each rank kept of each step: logits, gradient, metrics)."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "script.py").write_text(SCRIPT)
    result = torchrun(out / "script.py", out / "whole", out / "resumed", *FLAGS)
    assert result.returncode == 0, result.stderr
    for step in (0, 1, 2, 3):                                   # in both runs, by one rank
        assert result.stdout.count(f"step {step}/") == 2, result.stdout
    return out, [torch.load(f"{out / 'whole'}.{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("step, ranks", [(1, (0, 1)), (2, (0,)), (3, (0, 1))])
def test_the_gradient_is_that_of_one_process_over_all_groups(two, llm, model, processor, tmp_path,
                                                             step, ranks):
    """Each token of the ranks together weighs the same, however many each has. In step 2 a rank has
    no usable groups and contributes nothing. Metrics are over all."""
    _, (first, second) = two
    logits, (_, grad, metrics) = first[step - 1][0], first[step]
    flags = config(tmp_path, *FLAGS)
    pixels = art.PixelLogits(art.load_seed(SEED, 256))
    training, _ = art.load_examples(flags, TASKS["gsm8k"], processor, pixels.to_image())
    pixels.logits.data.copy_(logits)
    groups, counts = [], []
    for rank in ranks:
        with mock.patch.object(art, "RANK", rank):
            own, _ = art.sample_groups(llm, processor, TASKS["gsm8k"], training, pixels.to_image(),
                                       step, flags)
        groups += own
        counts.append(sum(len(c.ids) for group in own for c in group))
    rewards = torch.tensor([[c.reward for c in group] for group in groups])
    expected = art.backward(model, processor, pixels, groups, art.group_advantages(rewards))
    assert far(grad, pixels.logits.grad) < 1e-5 and metrics["groups"] == len(groups)
    assert len(set(counts)) == len(counts)                      # else a mean of means is the same
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert torch.equal(first[step][0], second[step][0])                 # the image is the same


def test_one_rank_writes_and_a_resumed_run_is_the_whole_one(two):
    out, _ = two
    assert set(os.listdir(out / "whole")) == set(os.listdir(out / "resumed")) == FILES
    assert whole(out / "whole") == whole(out / "resumed")
    assert len(whole(out / "whole")["metrics"]) == 4


def test_the_command_line_on_two_ranks(two, tmp_path):
    """torchrun art.py takes the script's first step."""
    result = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path / "run", "--steps", 1)
    assert result.returncode == 0 and result.stdout.count("step 1/1  reward") == 1, result.stderr
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert torch.equal(state["pixels"]["logits"], two[1][0][1][0])
