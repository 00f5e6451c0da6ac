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

from conftest import ROOT, TINY, data

QUICK = ["--model", str(TINY), "--max-new-tokens", "48", "--max-model-len", "512", "--data"]


def run(*command, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


def refused(*command, **env):
    """The one sentence with which a wrong input is refused."""
    result = run(*command, **env)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(art|eval)\.py: error: ", last), result.stderr
    return last


def test_training_improves_the_image_and_leaves_a_whole_folder(tmp_path):
    """A short run from a folder with a space in its name: files, metrics, panel, and a better picture by its own slice."""
    out = tmp_path / "a run"
    command = [ROOT / "art.py", "--task", "gsm8k", "--seed", ROOT / "seed.png", *QUICK, data("gsm8k", "train"), "--out", out,
               "--steps", 8, "--prompts", 8, "--validate-every", 4, "--updates", 4]
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["best.png", "last.png", "metrics.jsonl", "panel.png", "seed.png", "state.safetensors"]
    steps = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [s["step"] for s in steps] == list(range(9))
    validation = {s["step"]: s["validation"] for s in steps if "validation" in s}
    assert list(validation) == [0, 4, 8] and max(validation.values()) >= validation[0] + 0.1
    assert np.mean([s["score"] for s in steps[6:]]) > np.mean([s["score"] for s in steps[1:4]]) + 0.05
    assert steps[1]["lr"] == pytest.approx(0.02) and steps[5]["lr"] == pytest.approx(0.1)
    assert max(m["clip_fraction"] for m in steps[1:]) > 0                   # of the last of four updates: the clip works
    for key in ("reward", "groups", "mismatch", "mismatch_max", "clip_fraction", "grad_norm", "moved", "loss", "cut", "length"):
        assert np.isfinite(steps[-1][key])
    best, last = (Image.open(out / f"{n}.png") for n in ("best", "last"))
    assert best.size == last.size == (256, 256) and best.mode == "RGB"
    moved = np.abs(np.asarray(last, dtype=int) - np.asarray(Image.open(ROOT / "seed.png"), dtype=int)).mean()
    assert moved == pytest.approx(steps[-1]["moved"]) and 1 < moved < 64
    assert re.search(r"step +8  reward 0\.\d+", result.stdout)
    assert "holds a run already" in refused(*command)                           # a second run does not overwrite the first


def run_to_step_2(out):
    """A long run that has just printed its second step."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "art.py"), "--task", "gsm8k", *QUICK, data("gsm8k", "train"), "--out", str(out), "--steps", "500",
         "--prompts", "4", "--validation", "16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))        # ignored, where a shell put the tests aside
    for line in process.stdout:
        if line.startswith("step    2"):
            break
    return process


def test_interrupting_leaves_whole_pictures_and_says_where(tmp_path):
    process = run_to_step_2(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert str(tmp_path / "run" / "best.png") in out and str(tmp_path / "run" / "last.png") in out
    for name in ("best.png", "last.png", "panel.png"):
        Image.open(tmp_path / "run" / name).load()


def test_kill_leaves_whole_pictures(tmp_path):
    process = run_to_step_2(tmp_path / "run")
    process.kill()
    process.communicate()
    for name in ("best.png", "last.png"):
        Image.open(tmp_path / "run" / name).load()


@pytest.mark.parametrize("task", ["gpqa", "toolmind"])
def test_the_other_tasks_train_too(tmp_path, task):
    result = run(ROOT / "art.py", "--task", task, "--seed", ROOT / "seed.png", *QUICK, data(task, "train"), "--out", tmp_path / "run",
                 "--steps", 2, "--validation", 16, "--overlong-cache", 8)
    assert result.returncode == 0, result.stderr
    assert json.loads(open(tmp_path / "run" / "metrics.jsonl").readlines()[-1])["groups"] > 0


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """The tiny model's tokenizer with the configuration of a text-only model."""
    folder = tmp_path_factory.mktemp("text model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    return folder


ART = [ROOT / "art.py", "--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train")]
EVAL = [ROOT / "eval.py", "none", "--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "test")]


@pytest.mark.parametrize("command, sentence", [
    ([*ART, "--seed", "no such.png"], r"no such\.png: there is no such picture file"),
    ([*ART, "--seed", ROOT / "README.md"], r"README\.md: it cannot be read as a picture"),
    ([ROOT / "eval.py", "no such.png", *EVAL[2:]], r"no such\.png: there is no such picture file"),
    ([ROOT / "art.py", "--task", "sudoku"], r"invalid choice: 'sudoku' \(choose from .?gsm8k.?, .?gpqa.?, .?toolmind.?\)"),
    ([*ART, "--size", "200"], r"--size 200: .* sizes that work near it: .*256"),
    ([*ART, "--group-size", "1"], r"argument --group-size: invalid number \(at least 2\) \(at most 1024\) value: '1'"),
    ([*ART, "--data", "rows.jsonl"], r"--data rows\.jsonl: there is no such file"),
    ([*ART, "--data", data("gpqa", "train")], r"a row lacks question, answer \(it has Record ID, .*\); this task reads question, answer"),
    ([*ART, "--limit", "5"], r"5 training examples|fewer than --prompts"),
    ([*ART, "--model", ROOT / "tests"], r"--model .*tests: it is no model folder, for it holds no config\.json"),
    ([*EVAL, "--model", "nobody/nothing"], r"--model nobody/nothing .*(could not be fetched|neither a local path)"),
    ([ROOT / "eval.py", "none", "--task", "gsm8k", "--model", TINY], r"openai/gsm8k.* could not be fetched from the Hugging Face hub"),
])
def test_a_wrong_input_gets_one_sentence(command, sentence):
    assert re.search(sentence, refused(*command))


def test_a_model_without_vision_is_refused(text_model):
    assert "ART needs a model that takes images" in refused(*ART, "--model", text_model)


@pytest.mark.parametrize("module, sentence", [
    ("raise ImportError('libcudart.so: cannot open shared object file')", r"vLLM cannot be imported \(libcudart.*tests/setup\.sh"),
    ("LLM = None", r"GPU build on a machine without a GPU; .*tests/setup\.sh"),
])
def test_no_gpu_and_no_cpu_build_of_vllm(tmp_path, module, sentence):
    """A vLLM that does not import, and one that finds no device, stand in for a GPU build on this machine."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(module)
    (tmp_path / "vllm" / "platforms.py").write_text(
        "class P:\n    is_unspecified = lambda self: True\ncurrent_platform = P()")
    assert re.search(sentence, refused(*EVAL, PYTHONPATH=str(tmp_path)))


@pytest.fixture
def hub():
    """A stand-in for the hub on this machine, since the real one is out of reach: gpqa is gated, all else is unknown."""
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "gpqa" in self.path and "/resolve/" in self.path
            listed = "gpqa" in self.path and not gated
            body = b'{"id": "Idavidrein/gpqa", "sha": "0", "siblings": []}'
            if "/paths-info/" in self.path or "/tree/" in self.path:
                body = json.dumps([{"type": "file", "path": "gpqa_extended.csv", "size": 10, "oid": "0"}]).encode()
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
        log_message = lambda self, *_: None                                                             # noqa: E731

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_gated_data_set_says_where_to_ask(hub, tmp_path):
    sentence = refused(ROOT / "eval.py", "none", "--task", "gpqa", "--model", TINY, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0",
                       HF_HOME=str(tmp_path))
    assert "Idavidrein/gpqa" in sentence and "is gated: ask for access" in sentence and "HF_TOKEN" in sentence


def test_an_unknown_model_on_the_hub(hub, tmp_path):
    sentence = refused(*EVAL, "--model", "nobody/nothing", HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert "nobody/nothing is neither a local path nor a public repository" in sentence


def test_a_hub_that_cannot_be_reached(tmp_path):
    start = time.time()
    sentence = refused(*EVAL, "--model", "nobody/nothing", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert "nobody/nothing" in sentence and "could not be fetched" in sentence and time.time() - start < 90
