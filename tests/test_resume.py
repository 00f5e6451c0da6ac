"""A run that was stopped, in whatever way, goes on exactly where it was, or says in one sentence
why it cannot."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import art
import quick_loop
from conftest import ENV, ROOT, SEED, TINY, config, data
from eval import InputError
from quick_loop import train, whole


def test_a_real_run_killed_and_resumed_is_the_uninterrupted_one(tmp_path, llm, model):
    """Another process is killed at its second step and resumed. It ends with the same pixels,
    metrics and pictures, bit for bit, as a run in this process, whose engine has sampled other
    things before."""
    flags = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train"), "--seed", SEED,
             "--prompts", 2, "--validation", 16, "--validate-every", 2, "--max-new-tokens", 48,
             "--max-model-len", 512, "--max-num-seqs", 64, "--updates", 2]
    command = [sys.executable, ROOT / "art.py", "--out", tmp_path / "b", *flags]
    process = subprocess.Popen([*map(str, command), "--steps", "50"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=ENV)
    next(line for line in process.stdout if line.startswith("step 2/50  reward"))
    process.kill()
    process.communicate()
    assert len(whole(tmp_path / "b")["metrics"]) >= 3
    art.train(config(tmp_path / "a", *flags, "--steps", 4), llm=llm, model=model)
    art.train(config(tmp_path / "b", *flags, "--steps", 4, "--resume"), llm=llm, model=model)
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    assert a == b and len(a["metrics"]) == 5 and a["metrics"][4]["moved"] > 0


# Each step that validates writes state.pt, four pictures and a line.
@pytest.mark.parametrize("writes", range(1, 13))
def test_killed_while_a_file_is_written_all_files_are_of_one_step(tmp_path, writes, monkeypatch):
    """A kill breaks no file. state.pt comes first, and the rest from it: as soon as the run is
    taken up again, pictures, metrics and state agree, whichever write was the last."""
    class Killed(BaseException):
        pass

    def replace(unfinished, path):
        if len(written) == writes:
            raise Killed                        # the new file is there, under its other name
        written.append(path.name)
        os.rename(unfinished, path)
    written, every = [], ["--validate-every", "1"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        train(tmp_path / "killed", *every)
    for path in (tmp_path / "killed").glob("*.png"):
        Image.open(path).load()
    reached = written.count("state.pt") - 1
    assert len(torch.load(tmp_path / "killed" / "state.pt")["history"]) == reached + 1
    train(tmp_path / "killed", *every, "--resume", steps=max(reached, 1))
    train(tmp_path / "left alone", *every, steps=max(reached, 1))
    assert whole(tmp_path / "killed") == whole(tmp_path / "left alone")


def test_metrics_can_be_followed(tmp_path):
    """`tail -f` shows each step as it ends: one file, appended to."""
    followed, lines = [], []

    def follow(metrics, groups):
        if not followed:
            followed.append(open(tmp_path / "metrics.jsonl"))
        lines.append(json.loads(followed[0].readline()))
    train(tmp_path, on_step=follow, steps=5)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5] and not followed[0].read()


def test_a_run_may_grow(tmp_path):
    """The steps after are those of a run that was long from the start, whatever the size of its
    micro-batches."""
    train(tmp_path / "long")
    train(tmp_path / "grown", steps=14)         # ends with a validation, as step 14 of 30 does
    for _ in range(2):                          # the second time nothing is left to do
        train(tmp_path / "grown", "--resume", "--tokens-per-microbatch", 99, "--max-num-seqs", 9)
        assert whole(tmp_path / "grown") == whole(tmp_path / "long")
    assert len(whole(tmp_path / "long")["history"]) == 31


def test_best_png_is_the_earliest_of_the_best(tmp_path):
    """Of a run that goes on, too; the earlier of two equally good images is nearer to the seed."""
    scores = iter([0.25, 0.5, 0.5, 0.25, 0.5])
    validated = []

    def evaluate(llm, processor, task, examples, image, max_new_tokens):
        validated.append(image.tobytes())
        return [{"score": 5 * next(scores)}]
    train(tmp_path, steps=14, evaluate=evaluate)
    train(tmp_path, "--resume", steps=28, evaluate=evaluate)
    assert len(validated) == 5 and whole(tmp_path)["best.png"] == validated[1] != validated[2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[7])["validation"] == 0.5


def test_a_resumed_run_that_is_not_there_says_that_it_begins(tmp_path, capsys):
    """Its name may be a slip of the hand."""
    train(tmp_path / "slip", "--resume", steps=1)
    assert "slip: holds no run to go on with, so a new one begins" in capsys.readouterr().out


# What is refused ----------------------------------------------------------------------------------


def refused(out, *flags, **stand_ins):
    """The one sentence. What was in the folder is as it was."""
    def files():
        return {path: path.is_file() and path.read_bytes() for path in Path(out).glob("*")}
    before = files()
    with pytest.raises(InputError) as error:
        train(out, *flags, **stand_ins)
    assert files() == before
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "finished"
    train(out, steps=1)
    return out


@pytest.mark.parametrize("flags, named", [
    (["--task", "gpqa", "--data", data("gpqa", "train")], "task, data, data_and_seed"),
    (["--model", "another/model"], "model"), (["--lr", "0.2"], "lr"),
    (["--random-seed", "1"], "random_seed"), (["--size", "32"], "size, data_and_seed"),
    (["--no-rounding"], "rounding"),
    (["--weight_cap", "0", "--group_size", "9"], "group_size, weight_cap")])
def test_a_run_of_other_flags_is_not_gone_on_with(finished, flags, named):
    sentence = refused(finished, "--resume", *flags, steps=2)
    assert sentence.startswith("--resume: ") and str(finished) in sentence
    assert f" other {named}: " in sentence


@pytest.mark.parametrize("place", [0, -1])
def test_a_run_whose_rows_have_changed_is_not_gone_on_with(tmp_path, questions, place):
    """Neither of validation, which comes first by the keys' hashes, nor of training."""
    rows = Path(data("gsm8k", "train")).read_text().splitlines(keepends=True)[:50]
    rows.sort(key=lambda row: art.key_hash(json.loads(row)["question"]))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = ["--data", tmp_path / "rows.jsonl", "--validation", 1]
    train(tmp_path / "run", *flags, steps=1)
    train(tmp_path / "run", *flags, "--resume", steps=2)
    changed = json.loads(rows[place])
    rows[place] = json.dumps({**changed, "answer": "#### 12345"}) + "\n"
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    assert "other data_and_seed" in refused(tmp_path / "run", *flags, "--resume", steps=3)


def test_another_picture_under_the_seeds_name_is_not_gone_on_with(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "seed.png")
    train(tmp_path / "run", "--seed", tmp_path / "seed.png", steps=1)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "seed.png")
    sentence = refused(tmp_path / "run", "--resume", "--seed", tmp_path / "seed.png", steps=2)
    assert sentence.startswith("--resume: ") and "other data_and_seed" in sentence


@pytest.mark.parametrize("left", ["state.pt", "best.png", "notes.txt"])
def test_a_new_run_in_a_folder_that_is_not_empty_is_refused(finished, tmp_path, left):
    path = finished / left
    (tmp_path / left).write_bytes(path.read_bytes() if path.exists() else b"my own")
    sentence = refused(tmp_path)
    assert sentence.startswith(f"--out {tmp_path}: it is not empty; ") and "--resume" in sentence


LOCKING = """import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
input()"""


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_folder_into_which_another_process_trains_is_refused(tmp_path, flags):
    """As from a loop over random seeds without --out, also before the other one has written a file;
    but not once that process has ended, in whatever way."""
    with subprocess.Popen([sys.executable, "-c", LOCKING, tmp_path], cwd=ROOT, env=ENV, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        assert refused(tmp_path, *flags) == (
            f"--out {tmp_path}: another process trains into it: give another folder.")
        other.kill()
    train(tmp_path, *flags, steps=1)
    train(tmp_path, "--resume", steps=2)                    # this process holds it already


@pytest.mark.parametrize("broken", [b"", b"{}", pickle.dumps(Path), 1000, -100])
def test_a_broken_state_is_refused(finished, tmp_path, broken):
    """Another file, or a part of its own; nothing in it is run."""
    state = (finished / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(state[:broken] if isinstance(broken, int) else broken)
    assert refused(tmp_path, "--resume", steps=2).startswith(f"--out {tmp_path}: it holds no run ")


@pytest.mark.parametrize("out", ["seed.png", "seed.png/run", "x" * 300, "/proc/run"])
def test_where_no_folder_can_be_made(out):
    with pytest.raises(InputError, match=f"^--out {ROOT / out}: "):
        train(ROOT / out)


def injected(what, value, steps):
    """The quick loop's gradient, to which something happens in some of the steps."""
    calls = []

    def backward(model, processor, pixels, *args):
        metrics = quick_loop.backward(model, processor, pixels, *args)
        calls.append(args)
        if len(calls) in steps and what == "gradient":
            pixels.logits.grad[0, 0, 0] = value
        elif len(calls) in steps:
            metrics[what] = value
        return metrics
    return backward


@pytest.mark.parametrize("what, value", [("gradient", math.nan), ("gradient", -math.inf),
                                         ("loss", math.nan), ("mismatch", math.inf)])
def test_a_step_that_is_no_number_is_skipped_and_counted(tmp_path, what, value):
    """The pixels stay as they were, metrics.jsonl stays JSON, and the next step goes on."""
    train(tmp_path, backward=injected(what, value, [3]), steps=6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["skipped"] for line in metrics[1:]] == [0, 0, 1, 0, 0, 0]
    assert metrics[3]["moved"] == metrics[2]["moved"] != metrics[4]["moved"]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.isfinite(state["pixels"]["logits"]).all()


def test_a_bad_second_update_keeps_the_first(tmp_path):
    train(tmp_path / "two", "--updates", 2, backward=injected("loss", math.nan, [2]), steps=1)
    train(tmp_path / "one", steps=1)
    assert whole(tmp_path / "two")["logits"] == whole(tmp_path / "one")["logits"]
    assert whole(tmp_path / "two")["metrics"][1]["skipped"] == 1


def equal(llm, prompts, image, group_size, *args):
    """Groups of one completion, again and again."""
    return [[art.Completion(p, [1], [1], [-1.0], "")] * group_size for p in prompts]


def test_groups_that_are_all_equal_teach_nothing_and_break_nothing(tmp_path):
    train(tmp_path, rollout=equal, steps=12)
    for line in whole(tmp_path)["metrics"][1:]:
        assert line["groups"] == line["moved"] == line["reward"] == line["skipped"] == 0
        assert line["sampled_groups"] == 4 * 4 * 3 and line["rounds"] == 4


def test_steps_that_train_on_nothing_say_what_keeps_a_group(tmp_path, capsys):
    """Once, after three of them."""
    train(tmp_path / "equal", rollout=equal, steps=9)
    said = capsys.readouterr().out
    assert said.count("a group of completions is kept if their scores differ") == 1
    train(tmp_path / "varied", steps=9)
    assert "is kept if" not in capsys.readouterr().out
