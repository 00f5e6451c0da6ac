"""eval.py as an instrument: arms on the same questions, paired differences, completions that are
kept, the engine it starts and the server people run."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
import vllm
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

import eval as tasks
from conftest import ENV, QUICK, SEED, TINY, data, eval_main
from eval import TASKS, InputError
from test_command_line import refused_here                                  # noqa: F401, a fixture

ARMS, LIMIT = ["none", "random", "string:8", SEED], 24


def flags_of(task, out, limit=LIMIT):
    return ["--task", task, *QUICK, data(task, "test"), "--limit", limit, "--out", out]


def kept(out):
    """The records in a file of completions, {arm: record}."""
    return {record["arm"]: record for record in map(json.loads, open(out))}


class Parrot:
    """An engine that says the same to all requests, until it fails."""
    def __init__(self, calls=9):
        self.calls = iter(range(calls))

    def generate(self, prompts, sampling, **options):
        next(self.calls)
        sample = mock.Mock(text="Answer: 1", token_ids=[1, 2, 3], finish_reason="stop")
        return [mock.Mock(outputs=[sample]) for _ in prompts]


@pytest.mark.parametrize("task", ["gsm8k", "toolmind"])
def test_arms_answer_the_same_questions_in_one_table(task, tmp_path, llm, capsys):
    eval_main(*ARMS, *flags_of(task, tmp_path / "out"), llm=llm)
    printed, records = capsys.readouterr().out, kept(tmp_path / "out")
    table = tasks.table(records)
    assert f"{task}, n = {LIMIT}, " in printed and printed.endswith(table.to_string() + "\n")
    assert list(records) == list(table.index) == ARMS
    assert ("paper_score %" in table) == (task == "gsm8k")
    results = {arm: pandas.DataFrame(record["results"]) for arm, record in records.items()}
    for arm, found in results.items():
        row = table.loc[arm]
        assert list(found["key"]) == list(results["none"]["key"]) and len(found) == LIMIT
        pattern = r"([-\d.]+)  \[ *([-\d.]+), *([-\d.]+)\]"
        accuracy, low, high = map(float, re.fullmatch(pattern, row.iloc[0]).groups())
        assert accuracy == pytest.approx(100 * found["score"].mean(), abs=0.01)
        assert 0 <= low <= accuracy <= high <= 100
        less, low, high = map(float, re.fullmatch(pattern, row["less none"]).groups())
        difference = found["score"] - results["none"]["score"]
        assert less == pytest.approx(100 * difference.mean(), abs=0.01) and low <= less <= high
        for name in ("readable", "truncated", "failed"):
            assert float(row[f"{name} %"]) == pytest.approx(100 * found[name].mean(), abs=0.1)
        assert float(row["tokens"]) == pytest.approx(found["tokens"].mean(), abs=0.1)
        picture = tasks.png_bytes(tasks.open_picture(SEED))
        assert row["bytes"] == (len(picture) if arm == SEED else 0)
    assert any(found["score"].any() for found in results.values())


def test_the_bootstrap_interval_is_the_binomials_and_does_not_change():
    scores, keys = np.array([1.0] * 120 + [0.0] * 180), list(range(300))
    found = tasks.interval(scores, keys)
    assert found == pytest.approx((40, 40 - 1.96 * 2.83, 40 + 1.96 * 2.83), abs=0.5)
    assert tasks.interval(scores, keys) == found


def test_the_bootstrap_draws_rows_of_a_conversation_together():
    """Twice the same rows under the same keys say no more than once; as others they would."""
    scores = np.random.default_rng(0).random(60).round()
    once = tasks.interval(scores, list(range(60)))
    twice = tasks.interval(np.tile(scores, 2), list(range(60)) * 2)
    apart = tasks.interval(np.tile(scores, 2), list(range(120)))
    assert twice == pytest.approx(once) and apart[2] - apart[1] < 0.8 * (once[2] - once[1])


def test_each_arm_is_kept_when_it_ends(tmp_path):
    """The second arm's engine fails: the first one's completions are there."""
    with pytest.raises(StopIteration):
        eval_main("none", SEED, *flags_of("gsm8k", tmp_path / "out", 4), llm=Parrot(calls=1))
    record = kept(tmp_path / "out")["none"]
    assert [result["text"] for result in record["results"]] == ["Answer: 1"] * 4
    assert record["settings"]["limit"] == 4 and list(kept(tmp_path / "out")) == ["none"]


def test_string_is_so_many_random_tokens_before_the_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 8)
    requests = [tasks.arm_requests(processor, examples, arm)
                for arm in ("none", "string:64", "string:64")]
    counts = [[tasks.count_tokens(processor, *request) for request in arm] for arm in requests]
    newlines = len(processor.tokenizer("\n\n")["input_ids"])
    assert all(64 <= longer - plain <= 64 + newlines for plain, longer, _ in zip(*counts))
    assert requests[1] == requests[2]
    texts = {example.messages[0]["content"][0]["text"] for example, _ in requests[1]}
    assert len(texts) == 8                                              # fresh for each question
    texts |= {tasks.random_string(processor.tokenizer, 8, i) for i in range(100)}
    assert not [text for text in texts if re.search(r"<\||<tool_call>|<think>", text)]


def test_random_is_a_fresh_picture_for_every_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 4)
    pictures = [[picture.tobytes() for _, picture in
                 tasks.arm_requests(processor, examples, "random", seed, 64)] for seed in (0, 0, 1)]
    assert pictures[0] == pictures[1] and len({*pictures[0], *pictures[2]}) == 8
    values = np.asarray(tasks.random_picture(300, 200, 7))
    assert values.shape == (200, 300, 3) and values.min() == 0 and values.max() == 255


def test_what_the_processor_resizes_is_said(tmp_path, capsys):
    """Of picture files and of `random --size N` alike."""
    small = tmp_path / "small.png"
    Image.new("RGB", (128, 128)).save(small)
    flags = [*flags_of("gsm8k", tmp_path / "out", 2), "--size", 128]
    eval_main(SEED, small, "random", *flags, llm=Parrot())
    said = [line for line in capsys.readouterr().err.splitlines() if "resizes" in line]
    assert [line.partition(": the processor")[0] for line in said] == [str(small), "random"]


THIN, BITS = "refuses it .*aspect ratio.*200", r"no readable picture \(32 bits a value\): .*save it"


@pytest.mark.parametrize("size, mode, reason", [
    ((2050, 8), "RGB", THIN), ((300, 1), "L", THIN), ((256, 256), "F", BITS), ((9, 9), "I", BITS)])
def test_a_picture_that_is_refused_is_named(tmp_path, refused_here, size, mode, reason):
    Image.new(mode, size).save(tmp_path / "a.tiff")
    flags = ["none", tmp_path / "a.tiff", *flags_of("gsm8k", tmp_path / "out")]
    assert re.search(f"{tmp_path}/a.tiff: .*{reason}", refused_here("eval", *flags, llm=Parrot()))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_whose_exif_resolution_is_a_text_is_read(tmp_path, suffix):
    rotation, resolution = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI", 0x011A, 2, 3)
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + rotation + resolution + b"72\0\0" + bytes(4)
    Image.new("RGB", (20, 10), "red").save(tmp_path / f"a.{suffix}", exif=exif)
    assert tasks.open_picture(tmp_path / f"a.{suffix}").size == (20, 10)


@pytest.fixture
def gpu(monkeypatch):
    """vllm.LLM as load_engine calls it on a machine that seems to have a GPU."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with mock.patch.object(vllm, "LLM") as LLM:
        before = torch._dynamo.config.disable
        yield LLM
        torch._dynamo.config.disable = before


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_all_options_on_a_gpu_are_vllms(gpu, monkeypatch, by_torchrun, capsys):
    """One's own options override ours; a silent first start of minutes would look like a hang."""
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: by_torchrun)
    gpu.side_effect = lambda *args, **options: print("the engine", file=sys.stderr)
    tasks.load_engine(str(TINY), gpu_memory_utilization=0.7, dtype="float16", quantization="fp8")
    (model,), options = gpu.call_args
    assert model == str(TINY) and options["dtype"] == "float16" and options["quantization"] == "fp8"
    assert set(options) <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert options["gdn_prefill_backend"] == "triton" and options["gpu_memory_utilization"] == 0.7
    assert "enforce_eager" not in options and "enable_prefix_caching" not in options
    assert ("distributed_executor_backend" in options) == by_torchrun
    said = capsys.readouterr().err.splitlines()
    assert "the first start compiles for minutes" in said[0] and said[1] == "the engine"


@pytest.mark.parametrize("error", [
    ValueError("Free memory on cuda:0 is less than desired"), ImportError("no libcudart.so")])
def test_an_engine_that_cannot_start_gets_a_sentence(gpu, refused_here, tmp_path, error):
    gpu.side_effect = error
    sentence = refused_here("eval", "none", *flags_of("gsm8k", tmp_path / "out", 2))
    assert f"--model {TINY}: vLLM cannot start it ({str(error)[:20]}" in sentence


# A server: stand-ins ------------------------------------------------------------------------------

class Stand(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server of the tiny model; a test changes how."""
    model, content, status, max_model_len = str(TINY), "Answer: 1", 200, 4096
    models, change, failing = None, {}, ()      # another list, change of a reply, failing questions

    def do_GET(self):
        model = {"id": self.model, "object": "model", "max_model_len": self.max_model_len}
        self.send({"object": "list", "data": [model]} if self.models is None else self.models)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        text = request["messages"][0]["content"][-1]["text"]
        self.status = 400 if text.startswith(tuple(self.failing)) else self.status
        prompt = tasks.Example("", tasks.user_turn(text), None)
        tokens = tasks.count_tokens(tasks.load_processor(str(TINY)), prompt)
        message = {"role": "assistant", "content": self.content}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": self.model,
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                 "usage": {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": 9}}
        is_part = isinstance(self.change, dict) and "error" not in self.change
        self.send({**reply, **self.change} if is_part else self.change)

    def send(self, body):
        self.paths.append(self.path)
        kind = "text/html" if isinstance(body, str) else "application/json"
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def stand(monkeypatch):
    """(Its class, its address without /v1.) A broken proxy in the environment must not matter."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    kind = type("Kind", (Stand,), {"paths": [], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://localhost:{server.server_port}"
    server.shutdown()


def stand_flags(url, *more):
    flags = ["none", "--task", "gsm8k", "--data", data("gsm8k", "test"), "--limit", 2]
    return [*flags, "--server", url, *more]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_works_with_and_without_v1(stand, tmp_path, ending):
    """An empty completion is a wrong answer like others."""
    kind, url = stand
    kind.content = "" if ending else "Answer: 1"
    eval_main(*stand_flags(url + ending, "--out", tmp_path / "out"))
    record = kept(tmp_path / "out")["none"]
    assert {result["text"] for result in record["results"]} == {kind.content}
    assert not any(result["failed"] or result["score"] for result in record["results"])
    assert record["settings"]["model"] == str(TINY)
    assert set(kind.paths) == {"/v1/models", "/v1/chat/completions"}
    assert all(request["temperature"] == 0 and request["top_k"] == 0 for request in kind.asked)


HTML = "<html>502 Bad Gateway</html>"
ERROR = {"error": {"message": "busy", "type": "x", "code": 7}}
TOKENS = {"usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
NO_LISTS = [{"object": "list", "data": []}, {"data": None}, {}, ERROR, HTML, []]
NO_COMPLETIONS = [{"usage": None}, {"choices": []}, {"choices": None}, {"choices": [{}]},
                  {"choices": [{"index": 0, "finish_reason": "stop"}]}, ERROR, HTML, [1], "null",
                  *({"choices": [{"index": 0, "finish_reason": reason,
                                  "message": {"role": "assistant", "content": content}}]}
                    for reason, content in (("abort", "A"), ("stop", 7), ("stop", ["A"])))]


@pytest.mark.parametrize("how, sentence", [
    *[({"models": models}, r"--server URL: it lists no model \(") for models in NO_LISTS],
    *[({"change": reply}, r"2 of 2 questions failed \(") for reply in NO_COMPLETIONS],
    ({"status": 401}, "--server URL: it lists no model .*401.* set OPENAI_API_KEY"),
    ({"change": TOKENS}, "its prompt has 9 tokens.*--mm-processor-kwargs or --exclude-tools-when"),
    ({"content": None}, "it withholds the text of a completion: start it without --tool-call-pars"),
    ({"max_model_len": 1024}, "--max-model-len: the server's is 1024; give that"),
    ({"model": "my-model"}, "--model my-model cannot be loaded")])
def test_a_server_that_differs_ends_in_one_sentence(stand, refused_here, how, sentence):
    """Before the questions are asked, where it can be known."""
    kind, url = stand
    for name, value in how.items():
        setattr(kind, name, value)
    assert re.search(sentence.replace("URL", url), refused_here("eval", *stand_flags(url)))
    assert not kind.asked or "change" in how or "content" in how


def test_a_question_that_fails_costs_that_question(stand, tmp_path, capsys, refused_here):
    """One of thirty is counted as wrong, shown and said once; more than one in ten end the run."""
    kind, url = stand
    questions = [json.loads(line)["question"] for line in open(data("gsm8k", "test"))]
    kind.failing, flags = questions[7:8], [*stand_flags(url), "--limit", 30]
    eval_main(*flags, "--out", tmp_path / "out")
    results = kept(tmp_path / "out")["none"]["results"]
    assert [i for i, result in enumerate(results) if result["failed"]] == [7]
    assert results[7]["score"] == 0 and results[7]["text"] is None
    out, err = capsys.readouterr()
    assert err.count("1 of 30 questions failed (Error code: 400") == 1
    assert re.search(r" failed % +tokens +bytes\nnone .* 3\.3 +2\.9 +0$", out)
    kind.failing = questions[4:8]
    assert "--server: 4 of 30 questions failed" in refused_here("eval", *flags)


def test_the_model_that_is_named_is_asked(stand, refused_here):
    """--model names the processor, and what is asked if --served-model-name does not."""
    kind, url = stand
    kind.model, flags = "my-model", stand_flags(url, "--model", TINY)
    assert f"{TINY}: {url} serves my-model." in refused_here("eval", *flags)
    sentence = refused_here("eval", *flags, "--served-model-name", "other")
    assert f"--served-model-name other: {url} serves my-model." in sentence and not kind.asked
    eval_main(*flags, "--served-model-name", "my-model")
    assert {request["model"] for request in kind.asked} == {"my-model"}


# A server: vLLM's own, of the tiny model, as people start it --------------------------------------

@pytest.fixture(scope="module")
def printing(tmp_path_factory):
    """The tiny model, with a chat template that prints tools as JSON, as Qwen3.5's does."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(TINY, folder)
    template = (TINY / "chat_template.jinja").read_text()
    start = template.index("{{- '\\n' + f.name")
    end = template.index("{%- endfor %}{{- '<|im_end|>\\n' }}{%- elif")
    template = template[:start] + "{{- '\\n' }}{{- tool | tojson }}" + template[end:]
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module", autouse=True)
def starting(printing):
    """(Its process, its address); it starts while other tests run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", printing,
               "--served-model-name", "art", "--port", port, "--host", "127.0.0.1", "--dtype",
               "bfloat16", "--max-model-len", 1024, "--max-num-seqs", 64, "--enforce-eager",
               "--generation-config", "vllm", "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    process = subprocess.Popen(
        list(map(str, command)), env={**ENV, "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    yield process, f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)                  # with its engine, started or not
    process.wait(60)


@pytest.fixture(scope="module")
def served(starting):
    """Its address, once it answers."""
    process, url = starting
    for _ in range(240):
        assert process.poll() is None
        with contextlib.suppress(InputError):
            tasks.Server(url)
            return url
        time.sleep(1)


@pytest.mark.parametrize("task", ["gsm8k", "toolmind"])
def test_the_server_gives_the_same_greedy_completions(served, printing, tmp_path, llm, task):
    """The PNG as an ordinary request, with tools, several turns, or none: what it is worth in
    process it is worth there. The prompt has the same tokens, or it would be refused."""
    flags = [*ARMS, *flags_of(task, "", 16)[:-1]]
    model = ["--model", printing, "--max-model-len", 1024]
    example, = TASKS[task].load("test", data(task, "test"), 1)
    text = tasks.render(tasks.load_processor(str(printing)), example)
    assert task == "gsm8k" or '{"type": "function", "function": {"name": ' in text
    eval_main(*flags, tmp_path / "ours", *model, "--max-new-tokens", 48, llm=llm)
    eval_main(*flags, tmp_path / "theirs", *model, "--server", served,
              "--served-model-name", "art")
    ours, theirs = kept(tmp_path / "ours"), kept(tmp_path / "theirs")
    pairs = [(a, b) for arm in ARMS for a, b in
             zip(ours[arm]["results"], theirs[arm]["results"], strict=True)]
    # bfloat16 ties may fall otherwise in a batch of another size
    assert np.mean([a["text"] == b["text"] for a, b in pairs]) > 0.95
    assert all(a["tokens"] == b["tokens"] for a, b in pairs if a["text"] == b["text"])
