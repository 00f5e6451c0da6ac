"""What the tests share: the tiny model, its processor, one vLLM engine, and the two programs.

Where a new test belongs: test_pixels (seed, image), test_loss, test_training (rollout, gradient,
sampling), test_families, test_ranks, test_resume (the run's folder), test_seams (what adopters
replace), test_rows and test_tasks (data, splits, prompts), test_scorers (answers), test_eval (arms,
tables, engine), test_server, test_command_line (both programs), test_bench and test_baselines.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

# Two processes whose threads wait for each other on the same cores take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest                                                                           # noqa: E402
from transformers import HfArgumentParser                                               # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
SEED = str(ROOT / "seed.png")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402


def data(task, split):
    return str(TINY / task / (split + (".csv" if task == "gpqa" else ".jsonl")))


# The programs, in a process of their own ----------------------------------------------------------

QUICK = ["--model", TINY, "--max-new-tokens", 48, "--max-model-len", 512, "--data"]
ENV = dict(os.environ)


def run(*command, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True,
                          text=True, timeout=300, env={**ENV, **env})


def refused(*command, **env):
    """The one sentence with which a wrong input is refused."""
    result = run(*command, **env)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(art|eval)\.py: error: ", last), result.stderr
    return last


# The programs, in this process --------------------------------------------------------------------


@pytest.fixture
def refused_here(capsys):
    """As `refused`, in this process, which saves the imports."""
    def sentence(program, *flags, **seams):
        with pytest.raises(SystemExit) as exit:
            {"art": art, "eval": tasks}[program].main([*map(str, flags)], **seams)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and last.startswith(f"{program}.py: error: "), last
        return last
    return sentence


def config(out, *flags):
    """The Config of `python art.py --out OUT FLAGS`; the last of equal flags counts."""
    argv = [*map(str, ["--out", out, *flags])]
    return art.Config(**vars(HfArgumentParser(art.Config).parse_args(argv)))


def keep(lines):
    """art.train's `on_step` that puts the metrics of each step into a list."""
    return lambda metrics, groups: lines.append(metrics)


def eval_main(*flags, llm=None):
    """`python eval.py FLAGS`, with an engine that is there already."""
    return tasks.main([*map(str, flags)], llm=llm)


@pytest.fixture(scope="session")
def processor():
    return tasks.load_processor(str(TINY))


@pytest.fixture(scope="session")
def model():
    return art.load_model(str(TINY), "cpu")


# Where a test has started an engine before, the next one joins its process group, as one of
# torchrun's ranks does.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="session")
def llm():
    with mock.patch.dict(os.environ, ONE_RANK):
        return tasks.load_engine(str(TINY), max_model_len=1024, max_num_seqs=64)


@pytest.fixture(scope="session")
def questions():
    """Training examples of GSM8K's tiny file."""
    return tasks.TASKS["gsm8k"].load("train", data("gsm8k", "train"))


@pytest.fixture
def seed():
    return art.load_seed(SEED, 256)


def score(task, example, text):
    """1.0 if the text answers the example rightly, else 0.0."""
    (_, found), = tasks.TASKS[task].judge([example], [text])
    return found


def reward(task, example, text):
    """The training reward of one completion."""
    (answer, found), = tasks.TASKS[task].judge([example], [text])
    completion = art.Completion("", [], [], None, text, answer=answer, score=found)
    return tasks.TASKS[task].rewards(example, [completion])[0]


def prompt(processor, example):
    """The rendered prompt of an example behind the image."""
    return tasks.render(processor, tasks.prepend(tasks.IMAGE, example))


# What eval.py is asked, and what it kept ----------------------------------------------------------

ARMS, LIMIT = ["none", "random", "string:8", SEED], 24


def eval_flags(task, out, limit=LIMIT):
    """eval.py's flags for a task's tiny test file."""
    return ["--task", task, *QUICK, data(task, "test"), "--limit", limit, "--out", out]


def kept(out):
    """The records in a file of completions, {arm: record}."""
    return {record["arm"]: record for record in map(json.loads, open(out))}
