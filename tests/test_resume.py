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
from PIL import Image
import torch

import art
import quick_loop
from conftest import ENV, ROOT, SEED, TINY, art_args, data, prompt
from eval import InputError, save
from quick_loop import train, whole

FILES = {"best.png", "last.png", "panel.png", "seed.png", "metrics.jsonl", "state.pt"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run of 30 steps that nothing disturbs leaves behind."""
    out = tmp_path_factory.mktemp("run") / "uninterrupted"
    train(out)
    return whole(out)


def disturbed(at):
    """The sampling of the quick loop, with Ctrl-C at its call number `at`."""
    calls = []

    def rollout(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return quick_loop.rollout(*args)
    return rollout


def test_a_real_run_killed_and_resumed_is_the_uninterrupted_one(tmp_path, engine):
    """Another process is killed at its second step and resumed. It ends with the same pixels,
    metrics and pictures, bit for bit, as a run in this process, whose engine has sampled other
    things before."""
    flags = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train"), "--seed", SEED,
             "--prompts", 2, "--validation", 16, "--validate-every", 2, "--max-new-tokens", 48,
             "--max-model-len", 512, "--max-num-seqs", 64, "--updates", 2]
    command = [sys.executable, ROOT / "art.py", "--out", tmp_path / "b", *flags]
    process = subprocess.Popen([*map(str, command), "--steps", "50"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=ENV)
    next(line for line in process.stdout if line.startswith("step 2  reward"))
    process.kill()
    process.communicate()
    assert len(whole(tmp_path / "b")["metrics"]) >= 3
    art.train(art_args(tmp_path / "a", *flags, "--steps", 4))
    art.train(art_args(tmp_path / "b", *flags, "--steps", 4, "--resume"))
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    assert a == b and len(a["metrics"]) == 5 and a["metrics"][4]["moved"] > 0


def test_killed_at_ten_random_moments(tmp_path):
    """After each kill every file is whole; in the end all is as in a run that was left alone."""
    result = subprocess.run([sys.executable, quick_loop.__file__, str(tmp_path / "run")],
                            capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    train(tmp_path / "uninterrupted", steps=200)
    assert whole(tmp_path / "run") == whole(tmp_path / "uninterrupted"), result.stdout
    left = {name for name in os.listdir(tmp_path / "run") if not name.endswith(".tmp")}
    assert left == FILES


@pytest.mark.parametrize("at", [1, 20])
def test_ctrl_c_and_resume(tmp_path, uninterrupted, at):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, rollout=disturbed(at))
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted


def test_a_run_may_grow(tmp_path, uninterrupted):
    """The steps after are those of a run that was long from the start, whatever the size of its
    micro-batches."""
    train(tmp_path, steps=14)                   # ends with a validation, as step 14 of 30 does
    train(tmp_path, "--resume", "--tokens-per-microbatch", 99, "--max-num-seqs", 9)
    assert whole(tmp_path) == uninterrupted
    train(tmp_path, "--resume")                 # nothing is left to do, and nothing is done
    assert whole(tmp_path) == uninterrupted


def test_resume_starts_a_run_where_there_is_none(tmp_path, uninterrupted):
    train(tmp_path / "run", "--resume")
    assert whole(tmp_path / "run") == uninterrupted


def test_a_lost_file_of_metrics_comes_again(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, rollout=disturbed(20))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / ".state.pt.1.tmp").write_bytes(b"half a state")
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted


def test_best_png_is_the_earliest_of_the_best(tmp_path):
    """Of a run that goes on, too; the earlier of two equally good images is nearer to the seed."""
    scores = iter([0.25, 0.5, 0.5, 0.25, 0.5])
    validated = []

    def evaluate(llm, processor, task, examples, image, max_new_tokens):
        validated.append(image.tobytes())
        return [{"score": [5 * next(scores)]}]
    train(tmp_path, steps=14, evaluate=evaluate)
    train(tmp_path, "--resume", steps=28, evaluate=evaluate)
    assert len(validated) == 5 and whole(tmp_path)["best.png"] == validated[1] != validated[2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[7])["validation"] == 0.5


def test_the_sampling_depends_on_the_random_number_seed_alone(llm, processor, questions, seed):
    """Not on the batch or on what was sampled before; without seeds it does. Each completion of a
    prompt gets another one."""
    prompts = [prompt(processor, example) for example in questions[:8]]
    image = art.PixelLogits(seed).to_image()

    def sample(places, seeded=True):
        rngs = [1000 * i for i in places] if seeded else None
        groups = art.rollout(llm, [prompts[i] for i in places], image, 8, 48, rngs=rngs)
        return {i: [(c.ids, c.logps) for c in group] for i, group in zip(places, groups)}
    first = sample(range(8))
    assert sample([7, 2]) == {i: first[i] for i in (7, 2)}
    assert sample(range(8)) == first != sample(range(8), seeded=False)
    assert sum(len({tuple(ids) for ids, _ in group}) for group in first.values()) > 8 * 3


# --------------------------------------------------------------------------------------------------
# What is refused

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
    (["--task", "toolmind", "--data", data("toolmind", "train")], "task, data;"),
    (["--model", "another/model"], "model;"), (["--lr", "0.2"], "lr;"), (["--rng", "1"], "rng;"),
    (["--size", "32"], "size;"), (["--seed", str(TINY / "a.png")], "seed;"),
    (["--limit", "49"], "limit;"), (["--betas", "0.5", "0.9"], "betas;"),
    (["--rounding", "none"], "rounding;")])
def test_a_run_of_other_flags_is_not_gone_on_with(finished, flags, named, monkeypatch):
    monkeypatch.setattr(art, "load_seed", lambda path, size: torch.zeros(3, size, size))
    sentence = refused(finished, "--resume", *flags, steps=2)
    assert sentence.startswith("--resume: "), sentence
    assert f"another {named[:-1]}, inputs;" in sentence, sentence           # the seed is another


def test_another_picture_under_the_seeds_name_is_not_gone_on_with(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "seed.png")
    train(tmp_path / "run", "--seed", tmp_path / "seed.png", steps=1)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "seed.png")
    sentence = refused(tmp_path / "run", "--resume", "--seed", tmp_path / "seed.png", steps=2)
    assert "the run in " in sentence and "has another inputs;" in sentence


@pytest.mark.parametrize("left", [FILES, {"best.png", "last.png"}, {"notes.txt"}])
def test_a_new_run_in_a_folder_that_is_not_empty_is_refused(finished, tmp_path, left):
    for name in left:
        (tmp_path / name).write_bytes(
            (finished / name).read_bytes() if name in FILES else b"my own")
    sentence = refused(tmp_path)
    assert sentence.startswith(f"--out {tmp_path}: it is not empty; ") and "--resume" in sentence


class Payload:
    """Unpickled, it leaves a file behind."""
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_text("{}"),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    lambda path: path.write_bytes(pickle.dumps(Payload())),
    lambda path: torch.save({"logits": Payload()}, path)])
def test_a_broken_state_is_refused_and_runs_nothing(finished, tmp_path, damage, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    for file in finished.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    damage(out / "state.pt")
    assert refused(out, "--resume", steps=2).startswith(f"--out {out}: ")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("out", ["seed.png", "seed.png/run", "x" * 300, "/proc/run"])
def test_where_no_folder_can_be_made(out):
    with pytest.raises(InputError, match=f"^--out {ROOT / out}: "):
        train(ROOT / out)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The device that is always full stands where the new file is written."""
    save(b"old", tmp_path / "a.png")
    os.symlink("/dev/full", tmp_path / f".a.png.{os.getpid()}.tmp")
    with pytest.raises(InputError, match=r"a\.png cannot be written \(No space left on device\)"):
        save(b"new", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_a_save_reaches_the_disk_before_it_replaces(tmp_path, monkeypatch):
    """Written, flushed, renamed: in this order."""
    calls = []

    def noted(name, real):
        def call(*args):
            unfinished, = tmp_path.glob(".a.*")
            calls.append((name, unfinished.read_bytes()))
            return real(*args)
        return call
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    save(b"whole", tmp_path / "a")
    assert calls == [("fsync", b"whole"), ("replace", b"whole")]
    assert (tmp_path / "a").read_bytes() == b"whole"


# --------------------------------------------------------------------------------------------------
# Numbers that are none

def injected(what, value, steps):
    """The quick loop's gradient, to which something happens in some of the steps."""
    calls = []

    def backward(model, processor, pixels, *args):
        metrics, old_logps = quick_loop.backward(model, processor, pixels, *args)
        calls.append(args)
        if len(calls) in steps and what == "gradient":
            pixels.logits.grad[0, 0, 0] = value
        elif len(calls) in steps:
            metrics[what] = value
        return metrics, old_logps
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
    assert torch.isfinite(state["logits"]).all()


def test_ten_bad_steps_in_a_row_end_the_run_with_the_last_good_image(tmp_path):
    with pytest.raises(InputError, match="ten steps in a row had a loss or gradient that is not"):
        train(tmp_path / "bad", backward=injected("loss", math.nan, range(5, 100)), steps=100)
    train(tmp_path / "good", steps=4)
    bad, good = whole(tmp_path / "bad"), whole(tmp_path / "good")
    assert len(bad["metrics"]) - 1 == 14
    assert bad["logits"] == good["logits"] and bad["last.png"] == good["last.png"]


def test_ten_bad_steps_in_all_do_not_end_the_run(tmp_path):
    train(tmp_path, backward=injected("loss", math.nan, [*range(2, 11), *range(12, 21)]))
    skipped = [line["skipped"] for line in whole(tmp_path)["metrics"][1:]]
    assert len(skipped) == 30 and sum(skipped) == 18


def test_the_first_ten_steps_may_be_the_bad_ones(tmp_path):
    with pytest.raises(InputError, match="ten steps in a row"):
        train(tmp_path, backward=injected("gradient", math.nan, range(1, 100)))
    metrics = whole(tmp_path)["metrics"]
    assert len(metrics) == 11 and metrics[10]["moved"] == 0


def test_a_bad_second_update_keeps_the_first(tmp_path):
    train(tmp_path / "two", "--updates", 2, backward=injected("loss", math.nan, [2]), steps=1)
    train(tmp_path / "one", steps=1)
    assert whole(tmp_path / "two")["logits"] == whole(tmp_path / "one")["logits"]
    assert whole(tmp_path / "two")["metrics"][1]["skipped"] == 1


def test_groups_that_are_all_equal_teach_nothing_and_break_nothing(tmp_path):
    def equal(llm, prompts, image, group_size, *args):
        return [[art.Completion(p, [1], [1], [-1.0], "", False)] * group_size for p in prompts]
    train(tmp_path, rollout=equal, steps=12)
    for line in whole(tmp_path)["metrics"][1:]:
        assert line["groups"] == line["moved"] == line["reward"] == line["skipped"] == 0
        assert line["sampled_groups"] == 4 * 4
