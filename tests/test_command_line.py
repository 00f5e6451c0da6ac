"""The two programs, run as a person runs them, and what they say when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import art
import eval as tasks
from conftest import ENV, QUICK, ROOT, SEED, TINY, art_args, data, refused
from test_resume import FILES

ART = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train")]
EVAL = ["none", "--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "test")]


# --------------------------------------------------------------------------------------------------
# What works

def test_training_improves_the_image_and_leaves_a_whole_folder(tmp_path, engine, capsys):
    """A short run in a folder with a space in its name: files, metrics, panel, and a better
    picture by its own slice. A second run does not overwrite the first."""
    out = tmp_path / "a run"
    flags = ["--task", "gsm8k", "--seed", SEED, *QUICK, data("gsm8k", "train"), "--steps", 8,
             "--prompts", 8, "--validate-every", 4, "--updates", 2]
    art.train(art_args(out, *flags))
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
                "moved", "loss", "cut", "length", "skipped", "rollout_s", "trainer_s"):
        assert np.isfinite(steps[-1][key])
    best, last, seed = (Image.open(path) for path in (out / "best.png", out / "last.png", SEED))
    assert best.size == last.size == (256, 256) and best.mode == "RGB"
    moved = np.abs(np.asarray(last, dtype=int) - np.asarray(seed.convert("RGB"), dtype=int)).mean()
    assert moved == pytest.approx(steps[-1]["moved"]) and 1 < moved < 64
    assert re.search(r"^step 8  reward 0\.\d+", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(tasks.InputError, match="it is not empty; go on with the run in it by"):
        art.train(art_args(out, *flags))


@pytest.mark.parametrize("task", ["gpqa", "toolmind"])
def test_the_other_tasks_train_too(tmp_path, engine, task):
    art.train(art_args(tmp_path / "run", "--task", task, "--seed", SEED, *QUICK,
                       data(task, "train"), "--steps", 2, "--validation", 16,
                       "--overlong-cache", 8))
    last = json.loads(open(tmp_path / "run" / "metrics.jsonl").readlines()[-1])
    assert last["groups"] > 0 and last["validation"] > 0


def started(*command, **options):
    # SIGINT is ignored where a shell put the tests into the background
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=ENV, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def test_ctrl_c_in_a_step_leaves_whole_pictures_and_says_what_goes_on(tmp_path):
    process = started(ROOT / "art.py", "--task", "gsm8k", *QUICK, data("gsm8k", "train"),
                      "--out", tmp_path / "run", "--steps", 500, "--validation", 16)
    next(line for line in process.stdout if line.startswith("step 2"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    said = f"interrupted: --resume goes on with what {tmp_path / 'run'} holds"
    assert err.strip().splitlines()[-1] == said
    for name in ("best.png", "last.png", "panel.png", "seed.png"):
        Image.open(tmp_path / "run" / name).load()
    assert len(open(tmp_path / "run" / "metrics.jsonl").readlines()) >= 3


def test_ctrl_c_in_step_0_says_what_is_true(tmp_path, engine, monkeypatch, capsys):
    """art.main with Ctrl-C while the seed is validated."""
    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    monkeypatch.setattr(art, "evaluate", evaluate)
    flags = [*ART, "--max-new-tokens", "48", "--max-model-len", "512", "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["art.py", *map(str, flags)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            art.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    said = f"interrupted: --resume goes on with what {tmp_path / 'run'} holds"
    assert capsys.readouterr().err.strip().splitlines()[-1] == said
    assert os.listdir(tmp_path / "run") == []
    monkeypatch.undo()                                          # and so it does: it starts the run
    monkeypatch.setattr(art, "load_engine", lambda *args: engine)
    art.train(art_args(tmp_path / "run", *flags[:-2], "--steps", 1, "--validation", 8, "--resume"))
    assert set(os.listdir(tmp_path / "run")) == FILES


@pytest.mark.parametrize("command", [["art.py", *ART], ["eval.py", *EVAL]])
@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_ctrl_c_in_the_first_second_gives_no_traceback(command, seconds, tmp_path):
    process = started(*command, "--out", tmp_path / "out")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in out + err, err


# --------------------------------------------------------------------------------------------------
# What is refused: one sentence and exit code 2

@pytest.fixture
def refused_here(monkeypatch, capsys):
    """As `refused`, in this process, which saves the imports."""
    def sentence(program, *flags):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, flags)])
        handler = signal.getsignal(signal.SIGINT)
        try:
            if program == "art":
                with pytest.raises(SystemExit) as exit:
                    art.main()
            else:
                with pytest.raises(SystemExit) as exit:
                    parser, args = tasks.parse_args()
                    try:
                        tasks.main(args)
                    except tasks.InputError as error:       # as eval.py's last lines
                        parser.error(str(error))
        finally:
            signal.signal(signal.SIGINT, handler)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and last.startswith(f"{program}.py: error: "), last
        return last
    return sentence


def test_both_programs_end_with_a_sentence_and_code_2():
    assert "no.png: there is no such picture file" in refused("art.py", *ART, "--seed", "no.png")
    assert "no.png: there is no such picture file" in refused("eval.py", "no.png", *EVAL)


WRONG = [
    ("art", ["--seed", "no such.png"], r"no such\.png: there is no such picture file"),
    ("art", ["--seed", ROOT / "README.md"], r"README\.md: it is no readable picture"),
    ("art", ["--task", "sudoku"], r"invalid choice: 'sudoku' \(choose from .?gsm8k.?, .?gpqa.?, "),
    ("art", ["--size", "200"], r"--size 200: .* sizes that work near it: .*256"),
    ("art", ["--group-size", "none"], r"argument --group-size: invalid .* value: 'none'"),
    ("art", ["--steps", "-1"], r"argument --steps: invalid .* value: '-1'"),
    ("art", ["--data", "rows.jsonl"], r"--data rows\.jsonl: there is no such "),
    ("art", ["--data", data("gpqa", "train")], r"Record ID, Question.*openai/gsm8k"),
    ("art", ["--limit", "5"], r"--prompts 4: only \d examples are left beside --validation"),
    ("art", ["--model", ROOT / "tests"], r"--model .*tests cannot be loaded "),
    ("art", ["--max-model-len", "520"], r"--max-model-len: every prompt is longer"),
    ("eval", ["no such.png"], r"no such\.png: there is no such picture file"),
    ("eval", ["--task", "sudoku"], r"invalid choice: 'sudoku'"),
    ("eval", ["--data", "rows.txt"], r"--data rows\.txt: there is no such "),
    ("eval", ["--limit", "0"], r"argument --limit: invalid .* value: '0'"),
    ("eval", ["--samples", "2"], r"--samples: greedy completions .* give a --temperature"),
    ("eval", ["--baseline", "best.png"], r"--baseline best\.png: it is none of the arms"),
    ("eval", ["--out", "nowhere/results.jsonl"], r"--out nowhere/results\.jsonl cannot be written"),
    ("eval", ["--out", ROOT], r"--out .* is no file of results"),
    ("eval", ["--model", "nobody/nothing"], r"--model nobody/nothing cannot be loaded .*HF_TOKEN"),
]


@pytest.mark.parametrize("program, flags, sentence", WRONG)
def test_a_wrong_input_gets_one_sentence(program, flags, sentence, refused_here, tmp_path,
                                         monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = [*(EVAL if program == "eval" else [*ART, "--out", tmp_path / "run"]), *flags]
    if flags[-1] == "no such.png" and program == "eval":
        flags = ["no such.png", *EVAL]
    assert re.search(sentence, refused_here(program, *flags))


@pytest.mark.parametrize("content", ["# My notes\n\nfor ever\n", "[1]\n", '{"question": "q"}\n'])
def test_a_file_of_another_kind_is_not_written_to(refused_here, tmp_path, monkeypatch, content):
    """A wrong --out could be anyone's notes."""
    monkeypatch.setattr(tasks, "load_engine", None)
    (tmp_path / "notes.md").write_text(content)
    sentence = refused_here("eval", *EVAL, "--out", tmp_path / "notes.md")
    assert f"--out {tmp_path / 'notes.md'} is no file of results" in sentence
    assert (tmp_path / "notes.md").read_text() == content


def test_nothing_to_score_is_said(refused_here):
    assert "--task" in refused_here("eval", "none")
    assert "ARM" in refused_here("eval", "--task", "gsm8k")


def test_a_model_without_vision_is_refused(refused_here, tmp_path):
    """The tiny model's tokenizer with the configuration of a text-only model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentence = refused_here("art", *ART, "--model", tmp_path)
    assert f"--model {tmp_path}" in sentence and "image processor" in sentence


def test_a_vllm_that_does_not_import(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so: not here')")
    sentence = refused("eval.py", *EVAL, PYTHONPATH=str(tmp_path))
    assert re.search(r"vLLM cannot start it \(libcudart.*tests/cpu/setup\.sh", sentence)


@pytest.fixture
def hub():
    """A stand-in for the hub, which is out of reach: gpqa is gated there, all else is unknown."""
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "gpqa" in self.path and "/resolve/" in self.path
            listed = "gpqa" in self.path and not gated
            body = b'{"id": "Idavidrein/gpqa", "sha": "0", "siblings": []}'
            if "/paths-info/" in self.path or "/tree/" in self.path:
                file = {"type": "file", "path": "gpqa_extended.csv", "size": 10, "oid": "0"}
                body = json.dumps([file]).encode()
            self.send_response(200 if listed else 403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", str(len(body) if listed else 0))
            self.end_headers()
            if listed and self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()
        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def online(endpoint, tmp_path):
    return {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}


def test_a_gated_data_set_says_where_to_ask(hub, tmp_path):
    command = ["eval.py", "none", "--task", "gpqa", "--model", TINY]
    sentence = refused(*command, **online(hub, tmp_path))
    assert "Idavidrein/gpqa" in sentence and "gated" in sentence
    assert "ask for access on its page" in sentence and "HF_TOKEN" in sentence


def test_an_unknown_model_on_the_hub(hub, tmp_path):
    sentence = refused("eval.py", *EVAL, "--model", "nobody/nothing", **online(hub, tmp_path))
    assert "--model nobody/nothing cannot be loaded" in sentence and "correct the name" in sentence


def test_a_hub_that_cannot_be_reached(tmp_path):
    """For the model and for the data; both at once, for they mostly wait."""
    start, away = time.time(), {**ENV, **online("http://127.0.0.1:9", tmp_path)}
    commands = [["eval.py", *EVAL, "--model", "nobody/nothing"],
                ["eval.py", "none", "--task", "gsm8k", "--model", TINY]]
    processes = [subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=away,
                                  stderr=subprocess.PIPE, text=True) for command in commands]
    for process, named in zip(processes, ("nobody/nothing", "openai/gsm8k")):
        _, err = process.communicate(timeout=120)
        last = err.strip().splitlines()[-1]
        assert process.returncode == 2 and last.startswith("eval.py: error: "), err
        assert named in last and "connect to the Hugging Face" in last
    assert time.time() - start < 90
