"""torchrun: two ranks, each with an engine and a model of its own, do what one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import art
from conftest import ROOT, TINY, data
from test_command_line import QUICK

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FLAGS = ["--task", "gsm8k", "--seed", ROOT / "seed.png", "--model", TINY, "--data", data("gsm8k", "train"), "--prompts", 3, "--validation", 15,
         "--validate-every", 2, "--max-new-tokens", 48, "--max-model-len", 512, "--max-num-seqs", 64, "--updates", 2]


def torchrun(*command, flags=("--nproc-per-node", "2"), **options):
    return subprocess.Popen([*TORCHRUN, *map(str, [*flags, *command])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **options)


def metrics(out):
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in open(out / "metrics.jsonl")]


def test_two_ranks_train_as_one_process(tmp_path, llm, monkeypatch):
    """Three prompts a step on two ranks: one has more of them than the other. Pixels and metrics are equal up to the order of
    floating-point sums, one rank writes, and one process goes on with what two have begun."""
    process = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path / "two", "--steps", 2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("step    2  reward") == 1
    assert sorted(os.listdir(tmp_path / "two")) == ["best.png", "last.png", "metrics.jsonl", "panel.png", "seed.png", "state.safetensors"]
    monkeypatch.setattr(art, "load_engine", lambda *args: llm)

    def one(*flags):
        monkeypatch.setattr(sys, "argv", list(map(str, ["art.py", *FLAGS, *flags])))
        art.train(art.parse_args())
    one("--out", tmp_path / "one", "--steps", 2)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("one", "two")]
    seed = torch.logit(art.load_seed(str(ROOT / "seed.png"), 256) / 255)
    moved = (states[0]["logits"] - seed)[seed.isfinite()].abs().mean()
    assert (states[0]["logits"] - states[1]["logits"]).abs().mean() < 1e-3 * moved
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    one("--out", tmp_path / "two", "--steps", 3, "--resume")
    assert len(metrics(tmp_path / "two")) == 4


def test_two_ranks_score_as_one_process(tmp_path):
    """As on two machines, each with a torchrun of its own. A rank asks every second question, and rank 0 prints and keeps all."""
    command = [ROOT / "eval.py", "none", "seed.png", "--task", "gsm8k", *QUICK, data("gsm8k", "test"), "--limit", 41, "--out"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    machines = [torchrun(*command, tmp_path / "two.json", cwd=ROOT, flags=[
        "--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port]) for rank in (0, 1)]
    (out, err), (silent, other) = (process.communicate(timeout=300) for process in machines)
    assert [process.returncode for process in machines] == [0, 0], err + other
    assert out.count("gsm8k, n = 41") == 1 and silent == ""
    subprocess.run([sys.executable, *map(str, command), tmp_path / "one.json"], check=True, capture_output=True, cwd=ROOT)
    one, two = (json.loads((tmp_path / name).read_text())["tasks"]["gsm8k"] for name in ("one.json", "two.json"))
    assert [r["key"] for r in one["none"]["results"]] == [r["key"] for r in two["none"]["results"]]
    same = [a["text"] == b["text"] for arm in one for a, b in zip(one[arm]["results"], two[arm]["results"], strict=True)]
    assert len(same) == 82 and np.mean(same) > 0.97                     # bfloat16 ties may fall otherwise in another batch


def test_answers_of_killed_ranks_are_not_asked_again(tmp_path):
    """Both ranks are killed in the middle; one process goes on with what either has kept."""
    files = out, _ = [tmp_path / "a.json", tmp_path / "a.json.rank1"]
    command = [ROOT / "eval.py", "none", "random", "--task", "gsm8k", *QUICK, data("gsm8k", "test"), "--out", out]
    answered = lambda: [sum(r is not None for a in json.loads(f.read_text())["tasks"].get("gsm8k", {}).values() for r in a["results"])     # noqa: E731
                        if f.exists() else 0 for f in files]
    process = torchrun(*command)
    while process.poll() is None and not all(answered()):
        time.sleep(0.05)
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    kept = sum(answered())
    assert 0 < kept < 600
    for file in files:                                                  # whoever asks again replaces the mark
        saved = json.loads(file.read_text())
        for arm in saved["tasks"]["gsm8k"].values():
            for result in filter(None, arm["results"]):
                result["text"] = ["kept"]
        file.write_text(json.dumps(saved))
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    results = [r for a in json.loads(out.read_text())["tasks"]["gsm8k"].values() for r in a["results"]]
    assert len(results) == 600 and sum(r["text"] == ["kept"] for r in results) == kept and os.listdir(tmp_path) == ["a.json"]


def test_ranks_exchange_values_of_any_size_and_sum_tensors(tmp_path):
    """20 MiB, which torchrun's own store would not take; and a wrong sum or order would show."""
    (tmp_path / "talk.py").write_text(f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from eval import Ranks
ranks = Ranks()
values = ranks.gather(bytes([ranks.rank]) * ((20 + ranks.rank) << 20))
assert values == [bytes(20 << 20), bytes([1]) * (21 << 20)]
ranks.add_up(total := torch.tensor([1.5, 2.0]) * (ranks.rank + 1))
assert total.tolist() == [4.5, 6.0] and list(range(5))[ranks.mine] == [[0, 2, 4], [1, 3]][ranks.rank]
print("rank", ranks.rank)
""")
    out, err = (process := torchrun(tmp_path / "talk.py")).communicate(timeout=60)
    assert process.returncode == 0 and out == "rank 0\n", err


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_a_rank_that_dies_ends_all(tmp_path):
    process = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path / "run", "--steps", 500)
    next(line for line in process.stdout if line.startswith("step    2  reward"))
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60 and "Signal 9 (SIGKILL)" in err
    assert len(ranks) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    assert load_file(tmp_path / "run" / "state.safetensors")["logits"].isfinite().all()


def test_a_wrong_input_ends_all_ranks_with_its_sentence(tmp_path):
    process = torchrun(ROOT / "art.py", *FLAGS, "--out", tmp_path / "run", "--size", 200)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and "art.py: error: --size 200: the model's image processor would resize it" in err
