"""eval.py --server: what it asks, which replies it counts and which it refuses. Servers are
stand-ins, and vLLM's own."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import eval as tasks
from conftest import ARMS, ENV, TINY, data, eval_flags, eval_main, kept
from eval import TASKS, InputError

# Stand-ins ----------------------------------------------------------------------------------------

class Stand(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server of the tiny model; a test changes how."""
    model, message, tokens = str(TINY), {"content": "Answer: 1"}, 3
    folder = str(TINY)                          # of the processor that counts the prompt's tokens
    models_in_turn = itertools.repeat(None)     # other models that answer
    status, max_model_len = 200, 4096
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
        ids = tasks.tokenized(tasks.load_processor(self.folder), prompt)
        message, model = {"role": "assistant", **self.message}, next(self.models_in_turn)
        usage = {"prompt_tokens": len(ids), "completion_tokens": self.tokens}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": model or self.model,
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                 "usage": {**usage, "total_tokens": 9}}
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
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield kind, f"http://localhost:{server.server_port}"
    server.shutdown()


def stand_flags(url, *more):
    flags = ["none", "--task", "gsm8k", "--data", data("gsm8k", "test"), "--limit", 2]
    return [*flags, "--server", url, *more]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_works_with_and_without_v1(stand, tmp_path, ending):
    kind, url = stand
    eval_main(*stand_flags(url + ending, "--out", tmp_path / "out"))
    record = kept(tmp_path / "out")["none"]
    assert {result["text"] for result in record["results"]} == {"Answer: 1"}
    assert not any(result["failed"] or result["score"] for result in record["results"])
    assert record["settings"]["model"] == str(TINY)
    assert set(kind.paths) == {"/v1/models", "/v1/chat/completions"}
    assert all(request["temperature"] == 0 and request["top_k"] == 0 for request in kind.asked)


def counted(tokens):
    """A change of a reply: it counts so many tokens of the completion, and no prompt that fits."""
    return {"usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 12}}


HTML = "<html>502 Bad Gateway</html>"
ERROR = {"error": {"message": "busy", "type": "x", "code": 7}}
CALL = {"id": "1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
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
    ({"change": counted(3)}, "its prompt, of 9 tokens, is not .*--mm-processor-kwargs or --excl"),
    ({"change": {"prompt_token_ids": [1]}}, "its prompt, of [0-9]+ tokens, is not .* of [0-9]+: "),
    ({"change": {"choices": [{"index": 0, "finish_reason": "length", "message": {
        "role": "assistant", "content": "Let me"}}]}}, "a reply off after 3 of 512 tokens: raise"),
    ({"change": counted(None)}, r"2 of 2 questions failed \(.*str, None tokens"),
    ({"change": {"model": "other"}}, f"asked for {TINY}, other answered: .* --served-model-name"),
    *[({"message": message}, "it withholds the text of a completion: start it without --tool-call")
      for message in ({"content": None}, {"content": "So:", "tool_calls": [CALL]},
                      {"content": "\n\n", "reasoning_content": "Answer: 1"},
                      {"content": "\n\n", "reasoning": "Answer: 1"})],
    ({"message": {"content": ""}}, r"2 of 2 questions failed \(a reply of 3 tokens shows 0, or no"),
    *[({"max_model_len": length}, "--max-model-len: the server's is 1024; give that")
      for length in (1024, "1024")],
    ({"max_model_len": "much"}, "it lists no model .*much"),
    ({"model": "my-model"}, "--model my-model cannot be loaded")])
def test_a_server_that_differs_ends_in_one_sentence(stand, refused_here, how, sentence):
    """Before the questions are asked, where it can be known."""
    kind, url = stand
    for name, value in how.items():
        setattr(kind, name, value)
    assert re.search(sentence.replace("URL", url), refused_here("eval", *stand_flags(url)))
    assert not kind.asked or "change" in how or "message" in how


def test_a_completion_that_ends_at_once_is_a_wrong_answer_like_others(stand, tmp_path):
    """Its only token is the end of the turn: no text, and none that is withheld."""
    kind, url = stand
    kind.message, kind.tokens = {"content": ""}, 1
    eval_main(*stand_flags(url, "--out", tmp_path / "out"))
    for result in kept(tmp_path / "out")["none"]["results"]:
        assert result["text"] == "" and not result["failed"] and not result["readable"]


def test_a_thought_that_the_prompt_opens_is_no_answer(stand, tmp_path):
    """Where the model's chat template ends in "<think>", and the reply is cut off within it."""
    kind, url = stand
    kind.folder = kind.model = thinker(tmp_path)
    flags = stand_flags(url, "--out", tmp_path / "out", "--max-new-tokens", 3)
    eval_main(*flags)
    results = kept(tmp_path / "out")["none"]["results"]
    assert {result["text"] for result in results} == {"<think>Answer: 1"}
    assert not any(result["readable"] for result in results)


def thinker(tmp_path):
    """A folder of the tiny model without weights, whose chat template opens a thought."""
    folder = shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    with open(folder / "chat_template.jinja", "a") as template:
        template.write("<think>")
    return str(folder)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_thought_that_stands_in_a_field_of_its_own_is_before_the_text(
        stand, tmp_path, field, opened):
    """As with vLLM's --reasoning-parser: the text alone would be the beginning of a thought."""
    kind, url = stand
    kind.folder = kind.model = thinker(tmp_path) if opened else str(TINY)
    kind.message = {"content": "\n\nAnswer: 1", field: "Is it 3?"}
    eval_main(*stand_flags(url, "--out", tmp_path / "out"))
    for result in kept(tmp_path / "out")["none"]["results"]:
        assert result["text"] == "<think>Is it 3?</think>\n\nAnswer: 1" and result["readable"]


def test_a_server_that_shows_no_prompt_is_said(stand, capsys):
    """Some put the picture behind the text, which their number of tokens does not tell."""
    eval_main(*stand_flags(stand[1]))
    assert capsys.readouterr().err.count("the server does not show its prompts' tokens") == 1


@pytest.mark.parametrize("opened", [True, False])
def test_a_server_that_drops_the_end_of_a_thought_is_refused(
        stand, tmp_path, refused_here, opened):
    """As vLLM 0.32 with a parser for reasoning and another for tools."""
    kind, url = stand
    kind.folder = kind.model = thinker(tmp_path) if opened else str(TINY)
    kind.message = {"content": "<think>" * (not opened) + "Is it 3?\n\nAnswer: 1"}
    assert "or no end of its thought: --tool-call-parser or" in refused_here(
        "eval", *stand_flags(url))


def test_a_server_that_drops_a_call_behind_words_is_refused(stand, refused_here):
    kind, url = stand
    kind.message, kind.tokens = {"content": "I look it up.\n\n"}, 60
    assert re.search("a reply of 60 tokens shows [0-9]+, or no", refused_here(
        "eval", *stand_flags(url)))


@pytest.mark.parametrize("tokens, truncated", [(47, False), (48, True)])
def test_a_completion_of_all_its_tokens_is_truncated(stand, tmp_path, tokens, truncated):
    """Some servers say "stop" of it."""
    kind, url = stand
    kind.tokens, kind.message = tokens, {"content": "1 + 1 = 2. " * 6}
    eval_main(*stand_flags(url, "--out", tmp_path / "out", "--max-new-tokens", 48))
    results = kept(tmp_path / "out")["none"]["results"]
    assert [result["truncated"] for result in results] == [truncated] * 2


def test_one_reply_of_another_model_ends_the_run(stand, refused_here):
    """As of a router that falls back on it: a row of the table holds one model."""
    kind, url = stand
    kind.models_in_turn = itertools.cycle([str(TINY), "fallback"])
    assert f"asked for {TINY}, fallback answered" in refused_here("eval", *stand_flags(url))


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


# vLLM's own, of the tiny model, as people start it ------------------------------------------------

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
def test_the_server_gives_the_same_greedy_completions(
        served, printing, tmp_path, llm, task, capsys):
    """The PNG as an ordinary request, with tools, several turns, or none: what it is worth in
    process it is worth there. vLLM shows its prompt's tokens: others would be refused."""
    flags = [*ARMS, *eval_flags(task, "", 16)[:-1]]
    model = ["--model", printing, "--max-model-len", 1024]
    example, = TASKS[task].load("test", data(task, "test"), 1)
    text = tasks.render(tasks.load_processor(str(printing)), example)
    assert task == "gsm8k" or '{"type": "function", "function": {"name": ' in text
    eval_main(*flags, tmp_path / "ours", *model, "--max-new-tokens", 48, llm=llm)
    eval_main(*flags, tmp_path / "theirs", *model, "--server", served,
              "--served-model-name", "art")
    assert "does not show its prompts' tokens" not in capsys.readouterr().err
    ours, theirs = kept(tmp_path / "ours"), kept(tmp_path / "theirs")
    pairs = [(a, b) for arm in ARMS for a, b in
             zip(ours[arm]["results"], theirs[arm]["results"], strict=True)]
    # bfloat16 ties may fall otherwise in a batch of another size
    assert np.mean([a["text"] == b["text"] for a, b in pairs]) > 0.95
    assert all(a["tokens"] == b["tokens"] for a, b in pairs if a["text"] == b["text"])
