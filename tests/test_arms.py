"""eval.py as an instrument: arms on the same questions, paired differences, kept results, and the server people run."""

import json
import math
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eval as tasks
from conftest import ROOT, TINY, data
from test_command_line import QUICK, refused, run

ARMS = [ROOT / "eval.py", "none", "random", "string:8", "seed.png"]
TWO_TASKS = ["--task", "gsm8k", "toolmind", *QUICK, data("gsm8k", "test"), data("toolmind", "test"), "--limit", 24]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Four arms on two tasks: the table as printed, and the file of completions."""
    file = tmp_path_factory.mktemp("results") / "results.json"
    result = run(*ARMS, *TWO_TASKS, "--out", file)
    assert result.returncode == 0, result.stderr
    return result.stdout, file


def test_arms_answer_the_same_questions_in_one_table(results):
    stdout, file = results
    saved = json.loads(file.read_text())
    assert list(saved["tasks"]) == ["gsm8k", "toolmind"]
    for task, arms in saved["tasks"].items():
        block = stdout[stdout.index(f"{task}, n = 24"):].splitlines()[1:]
        keys = [r["key"] for r in arms["none"]["results"]]
        for line, (arm, scored) in zip(block, arms.items()):
            name, accuracy, low, high, tokens, unreadable, cut, size = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
            assert name == arm and [r["key"] for r in scored["results"]] == keys
            assert float(accuracy) == pytest.approx(100 * np.mean([r["score"] for r in scored["results"]]), abs=0.01)
            assert 0 <= float(low) <= float(accuracy) <= float(high) <= 100 and float(tokens) > 1
            assert float(unreadable) == pytest.approx(100 - 100 * np.mean([r["readable"] for r in scored["results"]]), abs=0.1)
            assert size == (str(len(tasks.png_bytes(Image.open(ROOT / "seed.png")))) if arm == "seed.png" else "-")
        assert [line.split()[0] for line in block[4:8]] == ["less", "random", "string:8", "seed.png"]


def test_a_second_call_prints_the_table_again_and_runs_only_what_is_new(results, tmp_path):
    stdout, file = results
    again = run(ROOT / "eval.py", "--out", file)
    assert again.returncode == 0 and again.stdout == stdout
    against = run(*ARMS, *TWO_TASKS, "--out", file, "--baseline", "seed.png", PYTHONPATH=str(broken_vllm(tmp_path)))
    assert against.returncode == 0 and "less seed.png" in against.stdout                # no engine was started
    assert "vLLM cannot be imported" in refused(*ARMS, "random", "string:9", *TWO_TASKS, "--out", file, PYTHONPATH=str(tmp_path))
    assert "made with other settings" in refused(*ARMS, *TWO_TASKS, "--out", file, "--rng", 1)
    assert "--baseline best.png: it is none of the arms" in refused(ROOT / "eval.py", "--out", file, "--baseline", "best.png")


def broken_vllm(folder):
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("raise ImportError('not here')")
    return folder


def test_string_is_so_many_random_tokens_before_the_question(processor):
    task = tasks.TASKS["gsm8k"]
    examples = task.load("test", data("gsm8k", "test"), 8)
    count = lambda arm: [len(processor.tokenizer(tasks.render(processor, m, t))["input_ids"])                   # noqa: E731
                         for m, t, _ in tasks.arm_requests(processor, task, examples, arm)]
    plain, longer = count("none"), count("string:64")
    newlines = len(processor.tokenizer("\n\n")["input_ids"])
    assert all(64 <= b - a <= 64 + newlines for a, b in zip(plain, longer))
    texts = [m[0]["content"][0]["text"] for m, _, _ in tasks.arm_requests(processor, task, examples, "string:64")]
    assert len(set(texts)) == 8                                                                         # fresh for each question
    assert texts == [m[0]["content"][0]["text"] for m, _, _ in tasks.arm_requests(processor, task, examples, "string:64")]


def test_samples_give_mean_accuracy_and_pass_at_k(tmp_path):
    out = tmp_path / "results.json"
    result = run(ROOT / "eval.py", "seed.png", "--task", "gsm8k", *QUICK, data("gsm8k", "test"), "--limit", 16, "--samples", 4,
                 "--temperature", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    scores = [r["score"] for r in json.loads(out.read_text())["tasks"]["gsm8k"]["seed.png"]["results"]]
    line = result.stdout.strip().splitlines()[-1].replace("[", " ").replace("]", " ").replace(",", " ").split()
    assert {len(s) for s in scores} == {4} and any(0 < np.mean(s) < 1 for s in scores)
    assert float(line[1]) == pytest.approx(100 * np.mean(scores), abs=0.01)
    assert float(line[4]) == pytest.approx(100 * np.mean([max(s) for s in scores]), abs=0.01)
    assert "give a --temperature" in refused(ROOT / "eval.py", "none", "--task", "gsm8k", *QUICK, data("gsm8k", "test"), "--samples", 2)


def test_paired_bootstrap_draws_rows_of_a_conversation_together():
    """Twice the same rows under the same keys say no more than once: the interval stays. As other questions they would narrow it."""
    scores = np.random.default_rng(0).random(60).round()
    once, twice = tasks.bootstrap_interval(scores), tasks.bootstrap_interval(np.tile(scores, 2), list(range(60)) * 2)
    apart = tasks.bootstrap_interval(np.tile(scores, 2))
    assert twice == pytest.approx(once) and apart[2] - apart[1] < 0.8 * (once[2] - once[1])


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a, b = (hard < 0.5).astype(float), (hard < 0.56).astype(float)                      # b answers all that a does, and some more
    difference, low, high = tasks.bootstrap_interval(b - a)
    assert low > 0 and tasks.bootstrap_interval(a)[2] > tasks.bootstrap_interval(b)[1]


@pytest.mark.parametrize("won, lost, p", [(0, 0, 1), (5, 0, 2 / 32), (1, 0, 1), (9, 1, 2 * 11 / 1024), (4, 4, 1), (620, 580, None)])
def test_mcnemar_is_the_exact_sign_test(won, lost, p):
    a, b = [1] * won + [0] * lost + [1, 0], [0] * won + [1] * lost + [1, 0]
    p_value = tasks.mcnemar(a, b, range(len(a)))
    assert p_value == tasks.mcnemar(b, a, range(len(a)))
    if p is None:                                                                       # large n: near the normal approximation
        p = math.erfc((won - lost - 1) / math.sqrt(2 * (won + lost)))
        assert p_value == pytest.approx(p, rel=0.05)
    else:
        assert p_value == pytest.approx(p)


def test_mcnemar_counts_a_conversation_once():
    """Twenty rows of one conversation say as much as one, as they do in the interval beside it."""
    assert tasks.mcnemar([1.0] * 20 + [1.0], [0.0] * 20 + [1.0], ["a"] * 20 + ["b"]) == 1


def test_random_strings_hold_no_control_tokens_and_must_fit(processor):
    texts = [tasks.random_string(processor.tokenizer, 8, i) for i in range(300)]
    assert not [t for t in texts if "<|" in t or "<tool_call>" in t or "<think>" in t]
    sentence = refused(ROOT / "eval.py", "string:600", "--task", "gsm8k", *QUICK, data("gsm8k", "test"))
    assert "every prompt is longer than 464 tokens" in sentence


def test_results_of_other_questions_are_not_mixed(results, tmp_path):
    """Another server, other data under the same name, a file that is none: refused before any work."""
    file, rows = tmp_path / "results.json", tmp_path / "rows.jsonl"
    rows.write_text("".join(open(data("gsm8k", "test")).readlines()[:4]))
    command = [ROOT / "eval.py", "none", "--task", "gsm8k", *QUICK, rows, "--out", file]
    assert run(*command).returncode == 0
    assert "made with other settings" in refused(*command, "--server", "http://127.0.0.1:9/v1")
    rows.write_text("".join(open(data("gsm8k", "test")).readlines()[1:5]))
    assert "answered other questions of gsm8k" in refused(*command)
    assert run(ROOT / "eval.py", "--out", file).returncode == 0                                     # and it is whole
    file.write_text('{"a":')
    assert "it is no file of results" in refused(*command)
    assert "cannot be written" in refused(*command[:-1], tmp_path / "nowhere" / "results.json")


@pytest.fixture(scope="module")
def server():
    """vLLM's own OpenAI-compatible server of the tiny model, as people start it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY), "--port", str(port), "--host", "127.0.0.1",
               "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager", "--generation-config", "vllm",
               "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    process = subprocess.Popen(command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            time.sleep(1)
            assert process.poll() is None
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_gives_the_same_greedy_completions(results, server, tmp_path):
    """The PNG as an ordinary request, with tools, several turns, or none at all: what it is worth in process it is worth there."""
    _, file = results
    out = tmp_path / "results.json"
    result = run(*ARMS, *TWO_TASKS, "--server", server, "--out", out)
    assert result.returncode == 0, result.stderr
    ours, theirs = (json.loads(f.read_text())["tasks"] for f in (file, out))
    same = [a["text"] == b["text"] for task in ours for arm in ours[task]
            for a, b in zip(ours[task][arm]["results"], theirs[task][arm]["results"], strict=True)]
    assert np.mean(same) > 0.97                         # bfloat16 ties may fall otherwise in a batch of another size


def test_a_server_that_is_down_gets_one_sentence():
    sentence = refused(ROOT / "eval.py", "none", "--task", "gsm8k", "--data", data("gsm8k", "test"), "--server", "http://127.0.0.1:9/v1")
    assert "--server http://127.0.0.1:9/v1: no OpenAI-compatible server answers there (Connection error)" in sentence


def test_the_png_knows_what_it_is(tmp_path):
    """Model and task are taken from the picture's text chunks, whatever else they hold; the pixels are untouched."""
    seed = Image.open(ROOT / "seed.png").convert("RGB")
    notes = {"Title": "ART image for gsm8k", "model": str(TINY), "task": "gsm8k", "step": 7, "settings": "{}", "Ünïcode": "schön " * 1000}
    tasks.save(tasks.png_bytes(seed, notes), tmp_path / "a b.png")
    assert tasks.png_notes(tmp_path / "a b.png") == {k: str(v) for k, v in notes.items()}
    assert np.array_equal(np.asarray(tasks.open_picture(tmp_path / "a b.png")), np.asarray(seed))
    assert tasks.png_bytes(tasks.open_picture(tmp_path / "a b.png")) == tasks.png_bytes(seed)
    info = run(ROOT / "eval.py", "--info", tmp_path / "a b.png", "seed.png")
    assert info.returncode == 0 and "  task: gsm8k\n" in info.stdout and "seed.png: 256 x 256, " in info.stdout
    scored = run(ROOT / "eval.py", tmp_path / "a b.png", "--data", data("gsm8k", "test"), "--limit", 4, *QUICK[2:-1])
    assert scored.returncode == 0 and "gsm8k, n = 4" in scored.stdout, scored.stderr
    assert f"a b.png: model {TINY}, task gsm8k, step 7\n" in scored.stdout
    assert "no picture tells its task: choose among gsm8k, gpqa, toolmind" in refused(ROOT / "eval.py", "seed.png")


def test_hostile_notes_do_no_harm(tmp_path):
    """Chunks that inflate to 100 MB, or name no task: one sentence or none, and little memory."""
    chunks = PngInfo()
    chunks.add_text("task", "rm -rf /")
    chunks.add_text("bomb", "0" * 100_000_000, zip=True)
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png", pnginfo=chunks)
    sentence = refused(ROOT / "eval.py", tmp_path / "a.png")
    assert "cannot be read as a picture" in sentence or "no picture tells its task" in sentence
