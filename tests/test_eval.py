"""eval.py as an instrument: arms on the same questions, paired differences, kept results, and the
server people run."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

import eval as tasks
from conftest import ENV, QUICK, SEED, TINY, data, eval_main
from eval import TASKS, InputError

ARMS = ["none", "random", "string:8", SEED]
LIMIT = 24


def flags_of(task, out, limit=LIMIT):
    return ["--task", task, *QUICK, data(task, "test"), "--limit", limit, "--out", out]


@pytest.fixture(scope="module")
def results(tmp_path_factory, llm):
    """Four arms on two tasks: what is printed, and the file of completions."""
    file, printed = tmp_path_factory.mktemp("results") / "results.jsonl", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load_engine", lambda *args, **options: llm)
        for task in ("gsm8k", "toolmind"):
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                eval_main(*ARMS, *flags_of(task, file))
            printed[task] = stdout.getvalue()
    return printed, file


@pytest.fixture
def asked(monkeypatch):
    """The arms of which eval.py asks an engine, which answers nothing right."""
    requests_of = []

    def ask_engine(llm, processor, requests, sampling, progress=False):
        requests_of.append(requests)
        return [[("Answer: 1", 3, False)] * sampling["n"] for _ in requests]
    monkeypatch.setattr(tasks, "load_engine", lambda *args, **options: None)
    monkeypatch.setattr(tasks, "ask_engine", ask_engine)
    return requests_of


# --------------------------------------------------------------------------------------------------
# The table

ROW = re.compile(r"(.+?) +([\d.]+)  \[ *([\d.]+), +([\d.]+)\] +(-?[\d.]+)  \[ *(-?[\d.]+), +"
                 r"(-?[\d.]+)\] +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +(\d+)")


@pytest.mark.parametrize("task", ["gsm8k", "toolmind"])
def test_arms_answer_the_same_questions_in_one_table(results, task):
    printed, file = results
    held = tasks.read_results(file, task)
    assert list(held) == ARMS
    table = printed[task][printed[task].index(f"{task}, n = {LIMIT}\n"):].splitlines()[1:]
    keys = [result["key"] for result in held["none"]["results"]]
    base = np.array([result["score"][0] for result in held["none"]["results"]])
    for line, (arm, record) in zip(table[1:], held.items(), strict=True):
        name, *cells, size = ROW.fullmatch(line).groups()
        accuracy, low, high, less, less_low, less_high, paper, passed, readable, cut, tokens = cells
        columns = {column: np.array([result[column][0] for result in record["results"]])
                   for column in ("score", "readable", "tokens", "cut")}
        assert name == arm and [result["key"] for result in record["results"]] == keys
        assert float(accuracy) == pytest.approx(100 * columns["score"].mean(), abs=0.01)
        assert 0 <= float(low) <= float(accuracy) <= float(high) <= 100 and passed == accuracy
        assert float(less) == pytest.approx(100 * (columns["score"] - base).mean(), abs=0.01)
        assert float(less_low) <= float(less) <= float(less_high)
        assert float(readable) == pytest.approx(100 * columns["readable"].mean(), abs=0.1)
        assert float(cut) == pytest.approx(100 * columns["cut"].mean(), abs=0.1)
        assert float(tokens) == pytest.approx(columns["tokens"].mean(), abs=0.1)
        assert (paper == "-") == (task != "gsm8k")
        picture = tasks.png_bytes(tasks.open_picture(SEED))
        assert int(size) == (len(picture) if arm == SEED else 0)
    assert any(0 < result["score"][0] for record in held.values() for result in record["results"])


def test_samples_give_mean_accuracy_and_pass_at_k(tmp_path, engine, capsys):
    out = tmp_path / "results.jsonl"
    eval_main(SEED, *flags_of("gsm8k", out, 16), "--samples", 4, "--temperature", 1)
    record, = tasks.read_results(out, "gsm8k").values()
    scores = [result["score"] for result in record["results"]]
    printed = capsys.readouterr().out.strip().splitlines()
    cells = ROW.fullmatch(printed[-1]).groups()
    assert {len(row) for row in scores} == {4} and any(0 < np.mean(row) < 1 for row in scores)
    assert float(cells[1]) == pytest.approx(100 * np.mean(scores), abs=0.01)
    assert float(cells[8]) == pytest.approx(100 * np.mean([max(row) for row in scores]), abs=0.01)
    assert "pass@4 %" in printed[-2]


def test_the_bootstrap_interval_is_the_binomials_and_does_not_change():
    scores = [1.0] * 120 + [0.0] * 180
    mean, low, high = tasks.bootstrap_interval(scores, range(300))
    assert mean == 0.4 and low == pytest.approx(0.4 - 1.96 * 0.0283, abs=0.005)
    assert high == pytest.approx(0.4 + 1.96 * 0.0283, abs=0.005)
    assert tasks.bootstrap_interval(scores, range(300)) == (mean, low, high)


def test_the_bootstrap_draws_rows_of_a_conversation_together():
    """Twice the same rows under the same keys say no more than once: the interval stays. As other
    questions they would narrow it."""
    scores = np.random.default_rng(0).random(60).round()
    once = tasks.bootstrap_interval(scores, range(60))
    twice = tasks.bootstrap_interval(np.tile(scores, 2), list(range(60)) * 2)
    apart = tasks.bootstrap_interval(np.tile(scores, 2), range(120))
    assert twice == pytest.approx(once) and apart[2] - apart[1] < 0.8 * (once[2] - once[1])


def test_a_paired_difference_is_sharper_than_two_intervals():
    hard = np.random.default_rng(0).random(400)
    a, b = (hard < 0.5).astype(float), (hard < 0.56).astype(float)      # b answers all that a does
    difference, low, high = tasks.bootstrap_interval(b - a, range(400))
    assert low > 0
    assert tasks.bootstrap_interval(a, range(400))[2] > tasks.bootstrap_interval(b, range(400))[1]


# --------------------------------------------------------------------------------------------------
# Arms

def test_string_is_so_many_random_tokens_before_the_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 8)

    def count(arm):
        requests = tasks.arm_requests(processor, examples, arm)
        return [tasks.count_tokens(processor, *request) for request in requests]

    def texts():
        return [example["messages"][0]["content"][0]["text"]
                for example, _ in tasks.arm_requests(processor, examples, "string:64")]
    newlines = len(processor.tokenizer("\n\n")["input_ids"])
    for plain, longer in zip(count("none"), count("string:64")):
        assert 64 <= longer - plain <= 64 + newlines
    assert texts() == texts() and len(set(texts())) == 8                # fresh for each question


def test_random_strings_hold_no_control_tokens(processor):
    texts = [tasks.random_string(processor.tokenizer, 8, i) for i in range(100)]
    assert not [text for text in texts if re.search(r"<\||<tool_call>|<think>", text)]


def test_random_is_a_fresh_picture_for_every_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 4)
    pictures = [[picture.tobytes() for _, picture in
                 tasks.arm_requests(processor, examples, "random", rng, 64)] for rng in (0, 0, 1)]
    assert pictures[0] == pictures[1] and len({*pictures[0], *pictures[2]}) == 8
    assert len(pictures[0][0]) == 3 * 64 * 64
    values = np.asarray(tasks.random_picture(300, 200, 7))
    assert values.shape == (200, 300, 3) and values.min() == 0 and values.max() == 255


def test_a_picture_that_the_processor_resizes_is_said(tmp_path, asked, capsys):
    Image.new("RGB", (128, 128)).save(tmp_path / "small.png")
    eval_main(SEED, tmp_path / "small.png", *flags_of("gsm8k", tmp_path / "out", 4))
    said = [line for line in capsys.readouterr().err.splitlines() if "resizes" in line]
    assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'small.png'}: the model's processor")


# --------------------------------------------------------------------------------------------------
# Kept results

def test_a_second_call_asks_only_what_is_missing(results, tmp_path, asked, capsys):
    printed, file = results
    out = shutil.copy(file, tmp_path / "results.jsonl")
    eval_main(*ARMS, *flags_of("gsm8k", out))
    assert not asked and capsys.readouterr().out == printed["gsm8k"]        # no engine was asked
    eval_main(*ARMS, "string:9", *flags_of("gsm8k", out), "--baseline", SEED)
    assert len(asked) == 1 and len(asked[0]) == LIMIT
    assert "less " + SEED in capsys.readouterr().out
    eval_main("string:9", *flags_of("gsm8k", out))                          # all arms are shown
    shown = capsys.readouterr().out
    assert len(asked) == 1 and all(f"\n{arm} " in shown for arm in [*ARMS, "string:9"])


@pytest.mark.parametrize("more", [["--rng", 1], ["--max-new-tokens", 47], ["--temperature", 0.5],
                                  ["--presence-penalty", 0], ["--size", 288], ["--limit", 23]])
def test_results_of_other_settings_are_not_mixed(results, tmp_path, asked, more):
    out = shutil.copy(results[1], tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="other settings, or on other questions: name"):
        eval_main(*ARMS, *flags_of("gsm8k", out), *more)
    assert not asked


def test_results_of_other_questions_are_not_mixed(tmp_path, asked):
    """The same file name, another content."""
    out, rows = tmp_path / "results.jsonl", tmp_path / "rows.jsonl"
    lines = open(data("gsm8k", "test")).readlines()
    flags = ["none", "--task", "gsm8k", *QUICK, rows, "--out", out]
    rows.write_text("".join(lines[:4]))
    eval_main(*flags)
    rows.write_text("".join(lines[1:5]))
    with pytest.raises(InputError, match="other questions"):
        eval_main(*flags)
    assert len(asked) == 1


def test_a_changed_picture_is_scored_anew(tmp_path, asked):
    """Other pixels, or the same bytes in another shape; the same pixels in another file are not."""
    out, path = tmp_path / "results.jsonl", tmp_path / "a.png"
    pictures = [Image.new("RGB", (256, 256), "red"), Image.new("RGB", (256, 256), "blue"),
                Image.new("RGB", (1024, 64), "blue")]
    for number, picture in enumerate(pictures, 1):
        picture.save(path)
        eval_main(path, *flags_of("gsm8k", out, 4))
        assert len(asked) == number and asked[-1][0][1].size == picture.size
    pictures[-1].save(path, compress_level=0)
    eval_main(path, *flags_of("gsm8k", out, 4))
    assert len(asked) == 3
    record, = tasks.read_results(out, "gsm8k").values()                     # the last one counts
    assert record["bytes"] == len(tasks.png_bytes(pictures[-1]))


def keep_an_arm(out, name, text):
    record = {"task": "gsm8k", "arm": name, "results": [{"text": [text]}]}
    tasks.keep_result(out, "\n" + json.dumps(record) + "\n")


def test_six_processes_with_one_file_keep_six_arms(tmp_path):
    out, text = str(tmp_path / "results.jsonl"), "x" * 3_000_000
    processes = [get_context("fork").Process(target=keep_an_arm, args=(out, f"arm {i}", text))
                 for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    held = tasks.read_results(out, "gsm8k")
    assert sorted(held) == [f"arm {i}" for i in range(6)]
    assert all(record["results"][0]["text"] == [text] for record in held.values())


@pytest.mark.parametrize("left", [0.3, 0.9, "after a bracket"])
def test_a_line_that_a_kill_cut_off_does_no_harm(results, tmp_path, asked, left):
    text = results[1].read_text()
    lines = text.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"arm": "string:8"' in line)
    whole, line = "".join(lines[:last]), lines[last]
    end = line.index("}, {") + 1 if left == "after a bracket" else int(left * len(line))
    out = tmp_path / "results.jsonl"
    out.write_text(whole + line[:end])
    task = json.loads(line)["task"]
    eval_main(*ARMS[:3], *flags_of(task, out))
    assert len(asked) == 1                                                  # that one again
    eval_main(*ARMS[:3], *flags_of(task, out))
    assert len(asked) == 1


# --------------------------------------------------------------------------------------------------
# A server: stand-ins

class Stand(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server of the tiny model; a test changes how."""
    model, content, status, sleep, paths = str(TINY), "Answer: 1", 200, 0, None

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.sleep)
        processor = tasks.load_processor(str(TINY))
        text = request["messages"][0]["content"][-1]["text"]
        prompt = {"messages": tasks.user_turn(text), "tools": None}
        message = {"role": "assistant", "content": self.content}
        usage = {"prompt_tokens": tasks.count_tokens(processor, prompt), "completion_tokens": 3,
                 "total_tokens": 9}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": self.model,
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": usage})

    def reply(self, body):
        self.paths.append(self.path)
        body = json.dumps(body).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):                  # the client may have given up
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def stand(monkeypatch):
    """A stand-in: (its class, its address without /v1). A proxy that is out of order stands in the
    environment, and must not stand between us and this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    kind = type("Kind", (Stand,), {"paths": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://localhost:{server.server_port}"
    server.shutdown()


def ask_stand(url, tmp_path, *more):
    flags = ["none", "--task", "gsm8k", "--data", data("gsm8k", "test"), "--limit", 2]
    eval_main(*flags, "--server", url, "--out", tmp_path / "out", *more)
    return tasks.read_results(tmp_path / "out", "gsm8k")["none"]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_works_with_and_without_v1(stand, tmp_path, ending):
    kind, url = stand
    record = ask_stand(url + ending, tmp_path)
    assert record["results"][0]["text"] == ["Answer: 1"]
    assert record["settings"]["model"] == str(TINY)
    assert set(kind.paths) == {"/v1/models", "/v1/chat/completions"}


def test_a_server_that_wants_a_key_names_the_variable(stand, tmp_path):
    kind, url = stand
    kind.status = 401
    with pytest.raises(InputError, match=rf"^--server {url}: .*401.*set OPENAI_API_KEY"):
        ask_stand(url, tmp_path)


def test_timeout_is_the_clients_limit(stand, tmp_path):
    kind, url = stand
    kind.sleep, start = 20, time.monotonic()
    with pytest.raises(InputError, match=rf"^--server {url}: .*timed out.*--timeout"):
        ask_stand(url, tmp_path, "--timeout", 1)
    assert time.monotonic() - start < 15


def test_text_that_is_withheld_is_no_wrong_answer(stand, tmp_path):
    kind, url = stand
    kind.content = None
    with pytest.raises(InputError, match=rf"^--server {url}: it withholds the text"):
        ask_stand(url, tmp_path)


def test_an_empty_text_is_a_wrong_answer(stand, tmp_path):
    kind, url = stand
    kind.content = ""
    assert ask_stand(url, tmp_path)["results"][0]["score"] == [0.0]


def test_a_served_name_that_is_no_model_asks_for_one(stand, tmp_path):
    kind, url = stand
    kind.model = "my-model"
    with pytest.raises(InputError, match="--model my-model cannot be loaded"):
        ask_stand(url, tmp_path)
    record = ask_stand(url, tmp_path, "--model", TINY)
    assert record["results"][0]["text"] == ["Answer: 1"]


def test_another_model_shows_in_its_prompts_tokens(stand, tmp_path, monkeypatch):
    kind, url = stand
    count, calls = tasks.count_tokens, []

    def one_more(*args):
        calls.append(threading.current_thread())
        return count(*args) + (threading.current_thread().name.startswith("ThreadPool"))
    monkeypatch.setattr(tasks, "count_tokens", one_more)
    with pytest.raises(InputError, match=rf"^--server {url}: its prompt has \d+ tokens"):
        ask_stand(url, tmp_path)


def test_a_server_that_is_down_gets_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"^--server http://127.0.0.1:9/v1: Connection error"):
        ask_stand("http://127.0.0.1:9/v1", tmp_path)


# --------------------------------------------------------------------------------------------------
# A server: vLLM's own, of the tiny model, as people start it

# A server of the tiny model that agrees with us, and one that differs in every way at once: in the
# size of its pictures, in the tools it shows, and in the text it hands out.
BIG = '{"size": {"shortest_edge": 262144, "longest_edge": 16777216}}'
OTHER = ["--mm-processor-kwargs", BIG, "--exclude-tools-when-tool-choice-none",
         "--enable-auto-tool-choice", "--tool-call-parser", "qwen3_xml",
         "--reasoning-parser", "deepseek_r1"]


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
    """Both servers, [(process, address)], as they start while other tests run."""
    started = []
    for model, flags in ((printing, []), (TINY, OTHER)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
                   "--port", port, "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len",
                   1024, "--max-num-seqs", 64, "--enforce-eager", "--generation-config", "vllm",
                   "--limit-mm-per-prompt", '{"image": 1, "video": 0}', *flags]
        process = subprocess.Popen(
            list(map(str, command)), env={**ENV, "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        started.append((process, f"http://127.0.0.1:{port}"))
    yield started
    for process, _ in started:
        process.terminate()
    for process, _ in started:
        process.wait(60)


@pytest.fixture(scope="module")
def servers(starting):
    """Their addresses, once they answer."""
    for process, url in starting:
        for _ in range(240):
            assert process.poll() is None
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0:
                    break
            time.sleep(1)
    return [url for _, url in starting]


@pytest.mark.parametrize("task", ["gsm8k", "toolmind"])
def test_the_server_gives_the_same_greedy_completions(servers, printing, tmp_path, engine, task):
    """The PNG as an ordinary request, with tools, several turns, or none: what it is worth in
    process it is worth there. The prompt has the same tokens, or it would be refused."""
    flags = [*ARMS, *flags_of(task, "", 16)[:-1]]
    model = ["--model", printing, "--max-model-len", 1024]
    processor = tasks.load_processor(str(printing))
    prompts = [tasks.render(processor, example)
               for example in TASKS[task].load("test", data(task, "test"), 16)]
    assert task != "toolmind" or all('{"type": "function", "function": {"name": ' in text
                                     for text in prompts)
    eval_main(*flags, tmp_path / "ours.jsonl", *model, "--max-new-tokens", 48)
    eval_main(*flags, tmp_path / "theirs.jsonl", *model, "--server", servers[0])
    ours, theirs = (tasks.read_results(tmp_path / name, task)
                    for name in ("ours.jsonl", "theirs.jsonl"))
    pairs = [(a, b) for arm in ARMS for a, b in
             zip(ours[arm]["results"], theirs[arm]["results"], strict=True)]
    # bfloat16 ties may fall otherwise in a batch of another size
    assert np.mean([a["text"] == b["text"] for a, b in pairs]) > 0.95
    assert np.mean([a["score"] == b["score"] for a, b in pairs]) > 0.95
    assert [a["tokens"] for a, b in pairs if a["text"] == b["text"]] == [
        b["tokens"] for a, b in pairs if a["text"] == b["text"]]


@pytest.mark.parametrize("arm, task, sentence", [
    (SEED, "gsm8k", "its prompt has .* tokens.*--mm-processor-kwargs"),
    ("none", "toolmind", "its prompt has .* tokens.*--exclude-tools-when-tool-choice-none"),
    ("none", "gsm8k", "it withholds the text of a completion")])
def test_a_server_that_differs_is_refused(servers, tmp_path, arm, task, sentence):
    flags = [*flags_of(task, tmp_path / "out", 8), "--max-model-len", 1024]
    with pytest.raises(InputError, match=sentence):
        eval_main(arm, *flags, "--server", servers[1])
    assert not tasks.read_results(tmp_path / "out", task)
