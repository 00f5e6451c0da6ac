"""Seconds and memory from a program's first moment to its line "starting vLLM".

    python tests/bench/start.py                        # a file of the hub's size is made: 2.3 GB
    python tests/bench/start.py --root ../before       # the same of another checkout

Both programs start with the tiny model, whose prompts are counted like a real one's. The files lie
in a temporary folder, and so in memory where it has room: a cold disk's own time comes on top.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

HERE = Path(__file__).parents[2]
TINY = HERE / "tests" / "tiny"


def write_toolmind(path: Path, sample: Path, size: float):
    """A file of `size` bytes like the hub's: the rows of `sample`, again and again. A number in its
    first user message makes a conversation of each round of the sample."""
    patterns = []
    for line in filter(str.strip, open(sample)):
        row = json.loads(line)
        first = next(turn for turn in row["conversations"] if turn["role"] == "user")
        first["content"] += " (NUMBER)"
        patterns.append(json.dumps(row) + "\n")
    with open(path, "w") as file:
        for number in count():
            for pattern in patterns:
                file.write(pattern.replace("NUMBER", str(number)))
            if file.tell() >= size:
                break


def write_gsm8k(path: Path, rows: int = 7473):
    """As many rows as GSM8K has to train, of the tiny data's."""
    lines = (TINY / "gsm8k" / "train.jsonl").read_text().splitlines()
    with open(path, "w") as file:
        for number in range(rows):
            row = json.loads(lines[number % len(lines)])
            file.write(json.dumps({**row, "question": f"{row['question']} ({number})"}) + "\n")


def measure(command: list, root: Path, until: str) -> tuple[float, float, float]:
    """(seconds, of them the processors', GB at most) of a Python `command` up to the line on stderr
    that begins with `until`."""
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=root, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(until):
            break
    else:
        raise SystemExit(f"it ended before {until!r}: {said[-1:]}")
    seconds = time.time() - start
    status = Path(f"/proc/{process.pid}/status").read_text()
    kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(times[11]) + int(times[12])             # of the user and of the system
    process.kill()
    process.communicate()
    return seconds, ticks / os.sysconf("SC_CLK_TCK"), kilobytes / 1e6


def commands(files: dict[str, Path], out: Path) -> dict[str, tuple[list, str]]:
    """{what is measured: (the command, the line on stderr that ends it)}."""
    found = {}
    for program in ("art", "eval"):
        code = ("import sys; sys.path.insert(0, '.'); import time; "
                f"import {program}; {program}.load_processor({str(TINY)!r}); "
                "print('ready', file=sys.stderr, flush=True); time.sleep(9)")
        found[f"{program}.py, imports and processor alone"] = ["-c", code], "ready"
    for task, path in files.items():
        flags = ["--task", task, "--model", TINY, "--data", path, "--max-model-len", 4096]
        found[f"art.py, {task}"] = ["art.py", *flags, "--out", out / task], "starting vLLM"
        found[f"eval.py, {task}"] = ["eval.py", "none", "random", *flags], "starting vLLM"
    few = [*found["eval.py, toolmind"][0], "--limit", 50]
    found["eval.py, toolmind, --limit 50"] = few, "starting vLLM"
    return found


def main():
    parser = argparse.ArgumentParser("start.py", None, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout that is measured")
    parser.add_argument("--gigabytes", type=float, default=2.3, help="of ToolMind's file (2.3)")
    parser.add_argument("--sample", type=Path, default=TINY / "toolmind" / "train.jsonl",
                        help="ToolMind's rows that the file is made of (those of the tiny data)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {"toolmind": Path(folder, "graphsyn.jsonl"), "gsm8k": Path(folder, "gsm8k.jsonl")}
        write_toolmind(files["toolmind"], args.sample, args.gigabytes * 1e9)
        write_gsm8k(files["gsm8k"])
        for name, (command, until) in commands(files, Path(folder, "runs")).items():
            seconds, busy, gigabytes = measure(command, args.root.resolve(), until)
            print(f"{name:40} {seconds:6.1f} s  {busy:6.1f} s of processor time  "
                  f"{gigabytes:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
