"""Whatever a model writes is scored: no exception, and no time that grows faster than the text."""

import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import eval as tasks
from conftest import data
from eval import TASKS

EXAMPLES = {name: task.load("test", data(name, "test"), 3) for name, task in TASKS.items()}
PIECES = ["Answer:", "answer is", "####", "\\boxed{", "}", "{", "\\frac{1}{2}", "The correct answer is (", ")", "A", "B", "(C)", "or", "1", "18", ",", ".", "-", "\u2212", "$", "%",
          "/", "=", "*", "**", "(", " ", "\n", "\r\n", "\t", "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "f", ">", "</function>", "<parameter=", "x", "</parameter>",
          '{"name": "', '"', '", "arguments": ', "[", "]", ":", "null", "true", "NaN", "1e999", "\\u0000", "\\ud800", "\0", "\ud800", "\u0663", "\u00bd", "\u00b2", "0" * 500, "[" * 2000, "{" * 2000, '{"a":' * 2000, "9" * 5000]
texts = st.one_of(st.text(max_size=300), st.text(st.characters(codec=None), max_size=100), st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
                  st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=40).map("".join))
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=10)
often = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TASKS)
@often
@given(text=texts)
@example(text="")
def test_every_completion_has_a_score(name, text):
    task = TASKS[name]
    for question in EXAMPLES[name]:
        score, reward, answer = task.score(question, text), task.reward(question, text), task.answer(question, text)
        assert score in (0.0, 1.0) and 0 <= reward <= 1 and (score == 1) == (reward == 1)
        assert score == 0 or answer is not None


@often
@given(name=st.text(max_size=8), arguments=json_values, dialect=st.sampled_from(["json", "xml"]))
def test_every_tool_call_has_a_score(name, arguments, dialect):
    """Calls of any arguments, written down as a model would."""
    import json
    if dialect == "json":
        text = f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'
    else:
        inner = "".join(f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n" for k, v in
                        (arguments.items() if isinstance(arguments, dict) else [("x", arguments)]))
        text = f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"
    for question in EXAMPLES["toolmind"]:
        assert 0 <= TASKS["toolmind"].reward(question, text) <= 1


@often
@given(value=json_values, schema=json_values)
def test_every_argument_is_comparable_under_every_schema(value, schema):
    first, second = (tasks.comparable([("f", {"x": value})], [{"function": {"name": "f", "parameters": schema}}]) for _ in range(2))
    assert first == second or value != value or "nan" in repr(value)


REPEATED = ["a", " ", "\n", "1", "1,000", "1 000 ", "1/", "1.", "-", "- ", "$", "$ ", "*", "Answer", "Answer:", "Answer: 1 ", "Answer:\n", "Answer: 1 1/2\n", "answer is", "answer ", "answer is ", "answer is (A) ",
            "answer is (A) or ", "answer: **", "Answer: (", "\\boxed{", "\\boxed", "#### ", "####", "\\frac{1}{2}", "\\frac{", "\\frac", "{,}", "=", "Answer: 1 = ", "<think>", "</think>", "<think></think>", "<tool_call>", "</tool_call>",
            "<tool_call></tool_call>", "<tool_call>{", "<tool_call>{}</tool_call>", "<tool_call><function=f></function></tool_call>", "<parameter=x>", "</parameter>", "<tool_call><function=f><parameter=x>", "<function=", "[", "{", '{"a":', '"', "\\", "\\\\", "\u2212",
            "\u00a0", "\u0663", "\ud800", "1\u00a0", "or ", "(A)(B)", "option ", "\\text{", "\\mathrm{"]


STARTS = ["", "Answer: ", "The answer is ", "<tool_call>\n<function=f>\n<parameter=x>\n", '<tool_call>{"name": "f", "arguments": ']


def seconds(name, text):
    begun = time.perf_counter()
    TASKS[name].reward(EXAMPLES[name][0], text)
    return time.perf_counter() - begun


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("start", STARTS)
def test_no_text_takes_time_that_grows_faster_than_it(name, start):
    """Any piece repeated: four times the text takes about four times as long, where a quadratic scorer takes sixteen."""
    for piece in REPEATED:
        short, long = (start + piece * (length // len(piece)) for length in (3_000, 12_000))
        if seconds(name, long) > 0.1:
            assert min(seconds(name, long) for _ in range(2)) < 9 * min(seconds(name, short) for _ in range(3)), piece


@pytest.mark.parametrize("name", ["gpqa", "toolmind"])
@pytest.mark.parametrize("start", STARTS)
def test_100_kb_are_scored_within_a_second(name, start):
    for piece in REPEATED:
        assert min(seconds(name, start + piece * (100_000 // len(piece))) for _ in range(2)) < 1, piece
