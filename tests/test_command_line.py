"""The two programs, run as a person runs them, and what they say when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import art
import eval as tasks
from conftest import ENV, QUICK, ROOT, SEED, TINY, config, data, refused
from quick_loop import FILES, FLAGS, STAND_INS, whole

ART = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train")]
EVAL = ["none", "--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "test")]


def test_training_improves_the_image_and_leaves_a_whole_folder(tmp_path, llm, model, capsys):
    """A short run in a folder with a space in its name: files, metrics, panel, and a better
    picture by its own slice. A second run does not overwrite the first."""
    out = tmp_path / "a run"
    flags = ["--task", "gsm8k", "--seed", SEED, *QUICK, data("gsm8k", "train"), "--steps", 8,
             "--prompts", 8, "--validate-every", 4, "--updates", 2]
    art.train(config(out, *flags), llm=llm, model=model)
    assert set(os.listdir(out)) == FILES
    steps = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [step["step"] for step in steps] == list(range(9))
    validation = {step["step"]: step["validation"] for step in steps if "validation" in step}
    assert list(validation) == [0, 4, 8]
    assert max(validation.values()) >= validation[0] + 0.1
    scores = [step["score"] for step in steps[1:]]
    assert np.mean(scores[5:]) > np.mean(scores[:3]) + 0.05
    assert [step["lr"] for step in (steps[1], steps[5])] == pytest.approx([0.02, 0.1])
    assert max(step["clip_fraction"] for step in steps[1:]) > 0     # of the second update
    for key in ("reward", "groups", "mismatch", "entropy", "clip_fraction", "ratio", "grad_norm",
                "moved", "loss", "truncated", "length", "skipped", "rollout_s", "trainer_s"):
        assert np.isfinite(steps[-1][key])
    best, last, seed = (Image.open(path) for path in (out / "best.png", out / "last.png", SEED))
    assert best.size == last.size == (256, 256) and best.mode == "RGB"
    moved = np.abs(np.asarray(last, dtype=int) - np.asarray(seed.convert("RGB"), dtype=int)).mean()
    assert moved == pytest.approx(steps[-1]["moved"]) and 1 < moved < 64
    printed = capsys.readouterr().out
    assert re.search(r"^step 4/8  reward 0\.\d+ .* \d+\.\d min left$", printed, re.MULTILINE)
    with pytest.raises(tasks.InputError, match="it is not empty; give another, or --resume"):
        art.train(config(out, *flags), llm=llm, model=model)


def test_ctrl_c_in_a_step_leaves_whole_files(tmp_path):
    command = [sys.executable, ROOT / "art.py", "--task", "gsm8k", *QUICK, data("gsm8k", "train"),
               "--out", tmp_path / "run", "--validation", 16, "--steps", 500]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENV,                # SIGINT is ignored where a shell put the tests into the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    next(line for line in process.stdout if line.startswith("step 2/500"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.strip().splitlines()[-1] == "interrupted: --resume goes on after the last step"
    assert len(whole(tmp_path / "run")["metrics"]) >= 3


WRONG = [
    ("art", ["--seed", "no such.png"], r"no such\.png: it is no readable picture \(.*No such file"),
    ("art", ["--size", "200"], r"--size 200: .*would resize or refuse it; found to work: .*256"),
    ("art", ["--prompts", "1000"], r"--prompts 1000: only \d+ examples are left beside --validat"),
    ("art", ["--gpu-memory-utilization", "2"], r"--gpu-memory-utilization 2.0: give .* to 1"),
    ("eval", ["no such.png"], r"no such\.png: it is no readable picture"),
    ("eval", ["string:1000"], "string:1000: give string:N, with N from 1 to 999"),
    ("eval", ["string:0"], "string:0: give string:N, with N from 1 to 999"),
    ("eval", ["--temperature", "-1"], r"--temperature -1.0: give a number from 0"),
    ("eval", ["--temperature", "nan"], r"--temperature nan: give a number from 0"),
    ("eval", ["--presence-penalty", "3"], r"--presence-penalty 3.0: give a number from -2 to 2"),
    ("eval", ["--size", "5000"], r"--size 5000: give a number from 1 to 4096"),
    ("eval", ["--random-seed", "-1"], r"--random-seed -1: give a number from 0"),
    ("eval", ["--gpu-memory-utilization", "2"], r"--gpu-memory-utilization 2.0: give .* 0 to 1"),
    ("eval", ["--max-new-tokens", "5000"], r"--max-model-len: .* no room for any prompt"),
    ("eval", ["--server", "http://127.0.0.1:9/v1"], r"9/v1: it lists no model .Connection error"),
    ("eval", ["--out", "nowhere/results.jsonl"], r"No such file .*: 'nowhere/results\.jsonl'"),
    ("eval", ["--model", "nobody/nothing"], r"--model nobody/nothing cannot be loaded .*HF_TOKEN"),
]


@pytest.mark.parametrize("program, flags, sentence", WRONG)
def test_a_wrong_input_gets_one_sentence(program, flags, sentence, refused_here, tmp_path,
                                         monkeypatch):
    """Before an engine is started."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(art, "load_engine", None)
    monkeypatch.setattr(tasks, "load_engine", None)
    usual = [*ART, "--out", tmp_path / "run"] if program == "art" else EVAL
    is_arm = not str(flags[0]).startswith("--")
    flags = [*flags, *usual] if is_arm else [*usual, *flags]
    assert re.search(sentence, refused_here(program, *flags))


def test_a_full_disk_ends_in_one_sentence(refused_here, tmp_path):
    full = mock.patch.object(Path, "write_bytes", side_effect=OSError(28, "No space left"))
    nothing = dict.fromkeys(("load_engine", "load_model"), lambda *arguments: "none")
    with full, mock.patch.multiple(art, **STAND_INS, **nothing):
        sentence = refused_here("art", *FLAGS, "--out", tmp_path)
    assert sentence.endswith("No space left")


def test_a_model_without_vision_is_refused(refused_here, tmp_path):
    """The tiny model's tokenizer with the configuration of a text-only model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    sentence = refused_here("art", *ART, "--model", tmp_path)
    assert f"--model {tmp_path} takes no image (Qwen2Config): give a multimodal model" in sentence


def test_a_world_size_of_another_launcher_is_not_ours():
    """A job's environment may hold it without torchrun: nobody else would come to the meeting."""
    sentence = refused("art.py", *ART, "--data", "none.jsonl", WORLD_SIZE="2", RANK="1")
    assert "none.jsonl: it cannot be read" in sentence


def test_both_programs_end_with_a_sentence_and_code_2(tmp_path):
    """If the hub cannot be reached, or data are gated there, what to do is said, and soon."""
    assert "no.png: it is no readable picture" in refused("art.py", *ART, "--seed", "no.png")
    start, away = time.time(), {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = ["eval.py", "none", "--task", "gpqa", "--model", TINY]
    sentence = refused(*command, HF_HOME=str(tmp_path), **away)
    assert "Idavidrein/gpqa gpqa_extended.csv cannot be read (" in sentence
    assert tasks.HUB in sentence and time.time() - start < 90
