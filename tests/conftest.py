"""The real parts that the tests share: the tiny model, its processor, and one vLLM engine in this process."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(ROOT))

import art                                                                                              # noqa: E402
import eval as tasks                                                                                    # noqa: E402


def data(task, split):
    return str(TINY / task / (split + (".csv" if task == "gpqa" else ".jsonl")))


@pytest.fixture(scope="session")
def processor():
    return tasks.load_processor(str(TINY))


@pytest.fixture(scope="session")
def model():
    return art.load_model(str(TINY), "cpu")


@pytest.fixture(scope="session")
def llm():
    return tasks.load_engine(str(TINY), max_model_len=512, max_num_seqs=64)


@pytest.fixture(scope="session")
def questions():
    """Training examples of GSM8K's tiny file."""
    return tasks.TASKS["gsm8k"].load("train", data("gsm8k", "train"))


@pytest.fixture
def seed():
    return art.load_seed(str(ROOT / "seed.png"), 256)
