"""The engine's process dies, hangs or does not start; a server answers nonsense, slowly or never: one sentence, and nothing is lost."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval as tasks
from conftest import ROOT, TINY, data
from quick_loop import whole
from test_command_line import EVAL, QUICK, refused
from test_ranks import children


def sentence(process, started, seconds=60):
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and time.monotonic() - started < seconds, err
    return next(line for line in err.splitlines() if line.startswith("art.py: error: "))


@pytest.mark.parametrize("harm, timeout, said", [(signal.SIGKILL, 60, "the process EngineCore died"),
                                                 (signal.SIGSTOP, 5, "vLLM hangs: it made no step in 5 seconds (--timeout)")])
def test_the_engines_process_dies_or_hangs(tmp_path, harm, timeout, said):
    """In the middle of a run, with the engine in a process of its own: the reason within a minute, no process left, and the
    run goes on where it was."""
    command = [sys.executable, str(ROOT / "art.py"), "--task", "gsm8k", *QUICK, data("gsm8k", "train"), "--out", str(tmp_path / "run"),
               "--prompts", "4", "--validation", "16", "--timeout", str(timeout)]
    process = subprocess.Popen([*command, "--steps", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    next(line for line in process.stdout if line.startswith("step    2  reward"))
    engines = [pid for pid in children(process.pid) if "EngineCore" in open(f"/proc/{pid}/comm").read() + open(f"/proc/{pid}/cmdline").read()]
    assert len(engines) == 1
    everyone = [process.pid, *children(process.pid)]
    os.kill(engines[0], harm)
    last = sentence(process, time.monotonic(), 15)
    assert last.startswith(f"art.py: error: {said}") and "--resume" in last
    time.sleep(1)
    assert not [pid for pid in everyone if os.path.exists(f"/proc/{pid}") and "Z (zombie)" not in open(f"/proc/{pid}/status").read()]
    steps = len(whole(tmp_path / "run")["metrics"]) - 1
    assert steps >= 1
    if harm == signal.SIGKILL:
        subprocess.run([*command, "--steps", str(steps + 1), "--resume"], check=True, capture_output=True)
        assert len(whole(tmp_path / "run")["metrics"]) == steps + 2


@pytest.mark.parametrize("block, suspended, code", [("time.sleep(60)", 0, 2), ("[time.sleep(0.1) for _ in range(20)]", 6, 0),
                                                    ("[(time.sleep(1.5), silent.__setitem__(0, 0)) for _ in range(3)]", 0, 0)])
def test_what_hangs_is_ended_and_what_was_suspended_or_works_is_not(block, suspended, code):
    process = subprocess.Popen([sys.executable, "-c", f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from eval import deadline
with deadline(3, "it hangs.") as silent:
    print("begun", flush=True)
    {block}
"""], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    if suspended:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(suspended)
        os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and err == ("-c: error: it hangs.\n" if code else "")


def test_a_generation_that_is_broken_off_leaves_nothing_behind(llm, processor, questions):
    """The next one gets its own completions, not those that were under way."""
    from vllm import SamplingParams
    prompts = [tasks.prompt_text(processor, tasks.TASKS["gsm8k"], e, image=False) for e in questions[:12]]
    generate = lambda part: tasks.generate(llm, part, [None] * len(part), [SamplingParams(temperature=0, max_tokens=32)] * len(part))     # noqa: E731
    texts = [output.outputs[0].text for _, output in sorted(generate(prompts), key=lambda each: each[0])]
    broken_off = generate(prompts)
    next(broken_off)
    broken_off.close()
    assert not llm.llm_engine.has_unfinished_requests()
    assert {i: output.outputs[0].text for i, output in generate(prompts[6:])} == dict(enumerate(texts[6:]))


def test_too_little_memory_at_the_start():
    last = refused(*EVAL, VLLM_CPU_KVCACHE_SPACE="1000000")
    assert f"--model {TINY}: vLLM cannot start it (" in last and "emory" in last


def test_answers_are_kept_as_they_come_and_not_asked_again(tmp_path, monkeypatch):
    """Killed at question 30 of 40, 10 seconds after the last answers were kept: the next start asks for the others only."""
    out, asked, clock = tmp_path / "results.json", [], iter(range(0, 10**6, 11))
    monkeypatch.setattr(tasks.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tasks, "load_engine", lambda *args, **options: None)

    def ask(llm, processor, requests, sampling, timeout):
        asked.append(len(requests))
        for i in range(len(requests))[::-1]:                            # they end in any order
            if len(asked) == 1 and i == 10:
                raise SystemExit(len([r for r in json.loads(out.read_text())["tasks"]["gsm8k"]["none"]["results"] if r]))
            yield i, [(f"Answer: {i}", 3, False)]
    monkeypatch.setattr(tasks, "ask_engine", ask)
    argv = ["eval.py", "none", "--task", "gsm8k", "--model", str(TINY), "--data", data("gsm8k", "test"), "--limit", "40", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="29"):                         # kept before anything has ended
        tasks.main(tasks.parse_args())
    monkeypatch.setattr(sys, "argv", [argv[0], *argv[-2:]])
    tasks.main(tasks.parse_args())                                      # the table of a file that is not whole
    monkeypatch.setattr(sys, "argv", argv)
    tasks.main(tasks.parse_args())
    results = json.loads(out.read_text())["tasks"]["gsm8k"]["none"]["results"]
    assert asked == [40, 11] and all(results)
    assert [r["key"] for r in results] == [e["key"] for e in tasks.TASKS["gsm8k"].load("test", data("gsm8k", "test"), 40)]


def test_a_file_of_results_that_is_not_whole_says_so(tmp_path):
    out = tmp_path / "results.json"
    frame = {"settings": {"samples": 1}, "tasks": {"gsm8k": {"none": {"bytes": None, "sha256": None, "questions": "1", "results": [None] * 3}}}}
    out.write_text(json.dumps(frame))
    result = subprocess.run([sys.executable, ROOT / "eval.py", "--out", out], capture_output=True, text=True)
    assert result.returncode == 0 and "gsm8k, none: 3 questions have no answer yet" in result.stderr


# ------------------------------------------------------------------------------------------------------------------
# Servers

MODELS = b'{"object": "list", "data": [{"id": "%s", "object": "model"}]}' % str(TINY).encode()
DEEP, BOMB = b"[" * 100_000, gzip.compress(bytes(1 << 30))


def reply(handler, body, status=200, kind="application/json", **headers):
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.3)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 20))


def chat(**changed):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Answer: 1"}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                       "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, **changed}).encode()


ANSWERS = {
    "bytes": lambda h: reply(h, bytes(range(256)) * 40), "page": lambda h: reply(h, b"<html>hello</html>", kind="text/html"), "nothing": lambda h: reply(h, b""),
    "half": lambda h: reply(h, MODELS[:20]), "null": lambda h: reply(h, b"null"), "list": lambda h: reply(h, b"[]"), "number": lambda h: reply(h, b"7"), "object": lambda h: reply(h, b"{}"),
    "deep": lambda h: reply(h, DEEP), "no models": lambda h: reply(h, b'{"data": []}'), "wrong models": lambda h: reply(h, b'{"data": 3}'), "not utf8": lambda h: reply(h, b'{"data": "\xff"}'),
    "errors": lambda h: reply(h, b'{"error": "no"}', 500), "forbidden": lambda h: reply(h, b"{}", 403), "not found": lambda h: reply(h, b"", 404),
    "elsewhere": lambda h: reply(h, b"", 307, Location="http://127.0.0.1:1/v1/models"), "in circles": lambda h: reply(h, b"", 302, Location=h.path),
    "cut off": lambda h: reply(h, MODELS, **{"Content-Length": 10**6}), "no choices": lambda h: reply(h, chat(choices=None)), "wrong choices": lambda h: reply(h, chat(choices=[1])),
    "no choice": lambda h: reply(h, chat(choices=[])), "no usage": lambda h: reply(h, chat(usage=None)), "no message": lambda h: reply(h, chat(choices=[{"message": None}])),
    "never": lambda h: time.sleep(60), "slowly": drip, "without end": endless,
    "bomb": lambda h: reply(h, BOMB, **{"Content-Encoding": "gzip"}), "hangs up": lambda h: h.connection.close(),
}
CASES = [*[("models", name) for name in ANSWERS if name not in ("no choices", "no choice", "wrong choices", "no usage", "no message")],
         *[("completions", name) for name in ANSWERS if name not in ("no models", "wrong models")]]


def nonsense(where, name):
    """What eval.py's part that asks a server says of one that answers so, at once or only to the task's questions."""
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            ANSWERS[name](self) if where == "models" else reply(self, MODELS)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            ANSWERS[name](self)
        log_message = lambda self, *_: None                                                             # noqa: E731

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, started = f"http://127.0.0.1:{server.server_port}/v1", time.monotonic()
    try:
        if name in ("never", "slowly"):                     # the program ends, whatever it waits for
            last = refused(ROOT / "eval.py", "none", "--task", "gsm8k", "--data", data("gsm8k", "test"), "--limit", 3, "--timeout", 5, "--server", url)
            return last.removeprefix("eval.py: error: "), url, time.monotonic() - started
        with pytest.raises(tasks.InputError) as error:
            list(tasks.ask_server(url, tasks.served_model(url), [(tasks.user_turn("a", False), None, None)] * 3))
        return str(error.value), url, time.monotonic() - started
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def sentences():
    """All at once, for they mostly wait."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(lambda case: nonsense(*case), CASES)))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_servers_that_answer_nonsense_slowly_or_never(sentences, case):
    """One sentence that names the server; retries included, it takes no longer than 30 seconds, but for many cases at once."""
    said, url, seconds = sentences[case]
    assert said.startswith(f"--server {url}: ") and "\n" not in said and seconds < 60
    assert ("no OpenAI-compatible server" if case[0] == "models" else "it gives no completions of") in said or case[1] in ("never", "slowly")
