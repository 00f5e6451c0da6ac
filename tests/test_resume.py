"""A run that was stopped, in whatever way, goes on exactly where it was, or says in one sentence why it cannot."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import art
import quick_loop
from conftest import ROOT, TINY, data
from eval import TASKS, InputError, prompt_text
from quick_loop import train, whole


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run of 30 steps that nothing disturbs leaves behind."""
    out = tmp_path_factory.mktemp("run") / "uninterrupted"
    train(out)
    return whole(out)


class Disturbed:
    """The sampling of the quick loop, with something else happening at its call number `at`."""

    def __init__(self, event, at=20):
        self.event, self.left = event, at

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            self.event()
        return quick_loop.rollout(*args)


def stop():
    raise KeyboardInterrupt


def test_real_runs_killed_and_resumed_are_the_uninterrupted_one(tmp_path, llm, monkeypatch):
    """With the real engine and model: another process is killed at its second step and resumed, and ends with the same
    pixels, metrics and pictures, bit for bit, as a run in this process, whose engine has sampled other things before."""
    command = [sys.executable, str(ROOT / "art.py"), "--task", "gsm8k", "--model", str(TINY), "--data", data("gsm8k", "train"),
               "--seed", str(ROOT / "seed.png"), "--prompts", "2", "--validation", "16", "--validate-every", "2", "--max-new-tokens",
               "48", "--max-model-len", "512", "--max-num-seqs", "64", "--updates", "2", "--max-grad-norm", "0.01", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "b"), "--steps", "50"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    next(line for line in process.stdout if line.startswith("step    2  reward"))
    process.kill()
    process.communicate()
    subprocess.run([*command, str(tmp_path / "b"), "--steps", "4", "--resume"], check=True, capture_output=True)
    monkeypatch.setattr(art, "load_engine", lambda *args: llm)
    monkeypatch.setattr(sys, "argv", [*command[1:], str(tmp_path / "a"), "--steps", "4"])
    art.train(art.parse_args())
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    assert a == b and len(a["metrics"]) == 5 and a["metrics"][4]["moved"] > 0


def test_killed_at_30_random_moments(tmp_path):
    """After each kill every file is whole, and the run that went on 30 times ends as one that was left alone."""
    result = subprocess.run([sys.executable, quick_loop.__file__, str(tmp_path / "run")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    train(tmp_path / "uninterrupted", steps=200)
    assert whole(tmp_path / "run") == whole(tmp_path / "uninterrupted")
    assert {name for name in os.listdir(tmp_path / "run") if not name.endswith(".tmp")} == {
        "best.png", "last.png", "panel.png", "seed.png", "metrics.jsonl", "state.safetensors"}


@pytest.mark.parametrize("at", [1, 20])
def test_ctrl_c_and_resume(tmp_path, uninterrupted, at, capsys):
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path, rollout=Disturbed(stop, at))
    assert "--resume goes on" in capsys.readouterr().out
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted


def test_a_run_may_grow(tmp_path, uninterrupted):
    """--steps may be raised: the steps after are those of a run that was long from the start."""
    train(tmp_path, steps=14)                           # ends with a validation, as step 14 of 30 does
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted
    train(tmp_path, "--resume")                         # nothing is left to do, and nothing is done
    assert whole(tmp_path) == uninterrupted


def test_metrics_of_the_future_or_lost_ones_are_set_right(tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        train(tmp_path, rollout=Disturbed(stop))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "state.safetensors.tmp").write_bytes(b"half a state")
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted and not (tmp_path / "state.safetensors.tmp").exists()


def test_the_sampling_depends_on_the_seed_alone(llm, processor, questions, seed):
    """Not on the batch or on what was sampled before; without seeds it does. Each completion of a prompt gets its own seed."""
    prompts = [prompt_text(processor, TASKS["gsm8k"], e) for e in questions[:8]]

    def sample(places, seeded=True):
        groups = art.rollout(llm, [prompts[i] for i in places], art.PixelLogits(seed).to_image(), 8, 48,
                             [1000 * i for i in places] if seeded else None)
        return {i: [(c.ids, c.logps) for c in group] for i, group in zip(places, groups)}
    first = sample(range(8))
    assert sample([7, 2]) == {i: first[i] for i in (7, 2)} and sample(range(8)) == first != sample(range(8), seeded=False)
    assert sum(len({tuple(ids) for ids, _ in group}) for group in first.values()) > 8 * 3


def refused(out, *flags, **stand_ins):
    """The one sentence. Where nothing happened on the way to it, the folder is as it was."""
    files = lambda: {p: p.is_file() and p.read_bytes() for p in Path(out).glob("*")} if os.path.isdir(out) else {}     # noqa: E731
    before = files()
    with pytest.raises(InputError) as error:
        train(out, *flags, **stand_ins)
    assert stand_ins or files() == before
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "finished"
    train(out, steps=1)
    return out


@pytest.mark.parametrize("flags, named", [
    (["--task", "toolmind", "--data", data("toolmind", "train")], "--task gsm8k --data of hash"),
    (["--model", "another/model"], "--model Qwen/Qwen3.5-0.8B;"),
    (["--lr", "0.2"], "--lr 0.1;"),
    (["--rng", "1"], "--rng 0;"),
    (["--size", "32"], "--seed of hash"),
    (["--seed", str(ROOT / "tests" / "panel.png")], "--seed of hash"),
    (["--data", data("gsm8k", "test")], "--data of hash"),
    (["--limit", "49"], "--data of hash"),
])
def test_a_folder_of_another_run_is_not_gone_on_with(finished, flags, named):
    assert f"is of a run with {named}" in (sentence := refused(finished, "--resume", *flags, steps=2)), sentence


def test_a_new_run_in_an_old_folder_is_refused_and_told_of_resume(finished, tmp_path):
    assert "it holds a run already; go on with it by --resume" in refused(finished)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')                    # of a version without --resume
    assert "it holds a run already" in refused(tmp_path)


def test_resume_never_starts_anew(tmp_path):
    assert "no run to go on with" in refused(tmp_path, "--resume")
    assert "no run to go on with" in refused(tmp_path / "new", "--resume")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "no run to go on with" in refused(tmp_path, "--resume")


def test_a_seed_in_the_runs_folder_is_not_replaced(tmp_path):
    """It may bear the name of one of the run's pictures. With --resume it may be the run's own."""
    art.save((ROOT / "seed.png").read_bytes(), tmp_path / "seed.png")
    assert "the seed lies in it" in refused(tmp_path, "--seed", tmp_path / "seed.png")
    train(tmp_path / "run", "--seed", tmp_path / "seed.png", steps=1)
    train(tmp_path / "run", "--seed", tmp_path / "run" / "seed.png", "--resume", steps=2)
    assert len(whole(tmp_path / "run")["metrics"]) == 3


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def without(name):
    def edit(path):
        save_file({k: v for k, v in load_file(path).items() if k != name}, path, art.safe_open(path, "pt").metadata())
    return edit


def with_tensors(**tensors):
    return lambda path: save_file({**load_file(path), **tensors}, path, art.safe_open(path, "pt").metadata())


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes()[1:]),
    lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    lambda path: path.write_text("{}"),
    lambda path: path.write_bytes(pickle.dumps(Payload())),
    lambda path: torch.save({"logits": Payload()}, path),
    lambda path: save_file(load_file(path), path),
    lambda path: save_file(load_file(path), path, {"run": "[]"}),
    lambda path: save_file(load_file(path), path, {"run": "{"}),
    lambda path: save_file(load_file(path), path, {"run": '{"settings": [], "metrics": []}'}),
    without("logits"),
    with_tensors(logits=torch.full((3, 64, 64), torch.nan)),
    with_tensors(exp_avg_sq=torch.full((3, 64, 64), torch.inf)),
    with_tensors(exp_avg=torch.zeros(3, 8, 8)),
    lambda path: (path.unlink(), path.mkdir()),
])
def test_a_broken_state_is_refused_and_runs_nothing(finished, tmp_path, damage, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    for file in finished.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    damage(out / "state.safetensors")
    assert "state.safetensors cannot be read as the state of a run" in refused(out, "--resume", steps=2)
    assert not (tmp_path / "executed").exists()


def test_a_second_run_in_a_folder_is_refused(tmp_path, uninterrupted):
    """Whether it resumes or, before there is anything to resume, starts: and the first one is not disturbed."""
    sentences = []

    def second():
        for flags in ([], ["--resume"]):
            with pytest.raises(InputError) as error:
                train(tmp_path, *flags)
            sentences.append(str(error.value))

    def second_at_once(*args):
        with pytest.raises(InputError, match="another run is at work in it"):
            train(tmp_path)
    train(tmp_path, rollout=Disturbed(second), load_engine=second_at_once)
    assert ["another run is at work in it" in sentence for sentence in sentences] == [True, True]
    assert whole(tmp_path) == uninterrupted


def test_a_full_disk(tmp_path, uninterrupted, capsys):
    """The device that is always full stands in the way of every new file."""
    os.symlink("/dev/full", tmp_path / "seed.png.tmp")
    assert "seed.png: it cannot be written (No space left on device)" in refused(tmp_path)
    (tmp_path / "seed.png.tmp").unlink()
    fill = lambda: os.symlink("/dev/full", tmp_path / "last.png.tmp")                                  # noqa: E731
    assert "cannot be written (No space left on device); what was there before is whole" in refused(tmp_path, rollout=Disturbed(fill))
    assert f"{tmp_path}/best.png" in capsys.readouterr().out
    whole(tmp_path)
    (tmp_path / "last.png.tmp").unlink()
    train(tmp_path, "--resume")
    assert whole(tmp_path) == uninterrupted


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_fills_up(small_disk, uninterrupted):
    """Nothing left of 2 MiB at one moment, little at another: no broken file, and once there is room the run goes on."""
    out, filler = small_disk / "run", small_disk / "filler"

    def fill(spare):
        filler.write_bytes(b"")
        left = os.statvfs(small_disk)
        filler.write_bytes(bytes(left.f_bavail * left.f_bsize - spare))
    resume = []
    for spare in (0, 4096, 20_000, 150_000):
        sentence = refused(out, *resume, rollout=Disturbed(lambda: fill(spare), 5))
        assert "it cannot be written (No space left on device)" in sentence
        whole(out)
        filler.unlink()
        resume = ["--resume"]
    train(out, "--resume")
    assert whole(out) == uninterrupted


def test_a_folder_that_cannot_be_written(small_disk, uninterrupted):
    out = small_disk / "run"
    mount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)     # noqa: E731
    mount("ro")
    assert "Read-only file system" in refused(out, load_engine=None)            # it is said before a model is loaded
    mount("rw")
    with pytest.raises(SystemExit):
        train(out, rollout=Disturbed(stop))
    mount("ro")
    assert "it cannot be written (Read-only file system)" in refused(out, "--resume", load_engine=None)
    mount("rw")
    train(out, "--resume")
    assert whole(out) == uninterrupted


@pytest.mark.parametrize("out, reason", [("seed.png", "File exists"), ("seed.png/run", "Not a directory"),
                                         ("x" * 300, "File name too long"), ("/proc/run", "No such file or directory")])
def test_no_folder_can_be_made(out, reason):
    assert f"--out {ROOT / out}: {reason}; name another folder." == refused(ROOT / out)


def test_a_save_reaches_the_disk_before_it_replaces(tmp_path, monkeypatch):
    """Written, flushed, renamed: in this order."""
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(art.os, name, lambda *args, name=name, real=getattr(os, name): (
            calls.append((name, (tmp_path / "a.tmp").read_bytes())), real(*args)))
    art.save(b"whole", tmp_path / "a")
    assert calls == [("fsync", b"whole"), ("replace", b"whole")] and (tmp_path / "a").read_bytes() == b"whole"
