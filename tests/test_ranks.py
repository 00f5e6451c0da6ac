"""torchrun: two ranks, each with an engine and a model of its own, do what one process does."""

import json
import os
import subprocess
import sys

import pytest
import torch

import art
from conftest import ENV, ROOT, SEED, TINY, art_args, data
from test_resume import FILES

FLAGS = ["--task", "gsm8k", "--seed", SEED, "--model", TINY, "--data", data("gsm8k", "train"),
         "--prompts", 3, "--validation", 15, "--validate-every", 2, "--max-new-tokens", 48,
         "--max-model-len", 512, "--max-num-seqs", 64, "--updates", 2]


def torchrun(*command, timeout=200):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=timeout, env=ENV)


def metrics(out):
    return [{name: value for name, value in json.loads(line).items() if not name.endswith("_s")}
            for line in open(out / "metrics.jsonl")]


def test_two_ranks_train_as_one_process(tmp_path, engine):
    """Three prompts a step on two ranks: one has more of them than the other. Pixels and metrics
    are equal up to the order of floating-point sums, one rank writes, and one process goes on with
    what two have begun."""
    result = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path / "two", "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 2  reward") == 1
    assert set(os.listdir(tmp_path / "two")) == FILES
    art.train(art_args(tmp_path / "one", *FLAGS, "--steps", 2))
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True)["logits"]
                for name in ("one", "two"))
    moved = (one - art.PixelLogits(art.load_seed(SEED, 256)).logits.detach()).abs().mean()
    assert (one - two).abs().mean() < 1e-3 * moved
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    art.train(art_args(tmp_path / "two", *FLAGS, "--steps", 3, "--resume"))
    assert len(metrics(tmp_path / "two")) == 4


def test_a_wrong_input_ends_all_ranks_with_its_sentence(tmp_path):
    result = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path, "--size", 200, timeout=100)
    assert result.returncode != 0
    assert "art.py: error: --size 200: the model's image processor would resize" in result.stderr
