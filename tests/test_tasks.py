"""The three tasks: data in the benchmarks' own schemas, splits, prompts, scores and rewards."""

import csv
import json
import random
from fractions import Fraction

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import eval as tasks
from conftest import ROOT, data
from eval import TASKS, InputError

SHARED = ROOT.parent / "shared" / "data"                        # real rows, where they are at hand


@pytest.mark.parametrize("text, value", [
    ("16 - 3 - 4 = 9\n9 * 2 = 18\nAnswer: 18", 18), ("**Answer:** 18", 18), ("**Answer**: 18 dollars", 18),
    ("Answer: \\boxed{18}", 18), ("so it is \\boxed{18}.", 18), ("#### 18", 18), ("Answer: $1,080.", 1080),
    ("Answer: \\$1,080", 1080), ("Answer: -$7", -7), ("Answer: $-7", -7), ("Answer: \u22127", -7), ("Answer: 5.0", 5),
    ("Answer: 18\n2 eggs are left over", 18), ("Answer:\n\n18", 18), ("Answer: 9 * 2 = 18", 18), ("Answer: 1/2", Fraction(1, 2)),
    ("Answer: \\frac{1}{2}", Fraction(1, 2)), ("Answer: 50%", 50), ("The final answer is 18.", 18), ("answer is: 18", 18),
    ("Answer: 3\nNo. Answer: 4", 4), ("Answer: **18**", 18), ("Answer: <18>", 18), ("Answer: .5", Fraction(1, 2)),
    ("<think>Answer: 3</think>Answer: 4", 4), ("Answer: 18\n</think>", 18), ("Answer: 18\n\nI hope this answer is helpful!", 18),
    ("Answer: 18\n\n#### Explanation", 18), ("Answer: 18 (= 9 * 2)", 18), ("Answer: 18 (profit = 200 - 182)", 18),
    ("Answer:\n- 18 dollars", 18), ("Answer: Rs.500", 500), ("Answer: 1\\,080", 1080), ("**Final Answer**\n\n18", 18),
    ("Answer\uff1a18", 18), ("Answer (in dollars): 18", 18), ("Answer:\r\n18", 18), ("Answer: 5 100-dollar bills", 5), ("Answer: 1{,}080", 1080), ("Answer: 1 080", 1080),
    # no readable answer
    ("About 18, I think.", None), ("18", None), ("Answer: seven", None), ("Answer:", None), ("", None),
    ("<think>Answer: 18", None), ("The answers are 18", None), ("Answer: 9 * 2", None), ("Answer: 18 + 2", None),
    ("Answer: 1 1/2", None), ("Answer: <number>", None),
])
def test_gsm8k_reads_what_models_write(text, value):
    assert tasks.gsm8k_answer(None, text) == value
    assert TASKS["gsm8k"].score({"target": Fraction(18)}, text) == float(value == 18)


def test_gsm8k_reward_is_shaped_and_only_a_right_answer_earns_one():
    reward = lambda text: TASKS["gsm8k"].reward({"target": Fraction(200)}, text)                         # noqa: E731
    assert [reward(t) for t in ("Answer: 200", "Answer: 201", "Answer: 215", "Answer: 9", "200", "many")] == [
        1.0, 0.4, 0.2, 0.1, 0.01, 0.0]


@pytest.mark.parametrize("text, letter", [
    ("The correct answer is (B)", "B"), ("The correct answer is (b).", "B"), ("**The correct answer is (B)**", "B"),
    ("The correct answer is **B**", "B"), ("Answer: B", "B"), ("answer is: \\boxed{B}", "B"), ("Answer: B. copper", "B"),
    ("(A) looks right, but the correct answer is (B)", "B"), ("The answer is A. No: the answer is B.", "B"),
    ("The correct answer is: $\\boxed{\\text{B}}$", "B"), ("The correct answer is option (B)", "B"), ("answer is: \"B\"", "B"),
    ("The correct answer is [B]", "B"), ("Answer: B because it is", "B"), ("The correct answer is ( B )", "B"), ("answer: \\boxed{\\mathrm{B}}", "B"),
    ("Perhaps copper.", None), ("The correct answer is (A) or (B)", None), ("The answer is a difficult one", None),
    ("The correct answer is Brass", None), ("<think>The correct answer is (B)", None), ("", None), ("(B)(E)", None),
    ("The correct answer is D-glucose", None), ("The answer is A photon", None), ("The correct answer is (A)(B)(C)(D)", None),
    ("The correct answer is (A) or maybe (B)", None), ("The correct answer is (A) is incorrect", None), ("answer is" + "*" * 100_000, None),
])
def test_gpqa_reads_what_models_write(text, letter):
    assert tasks.gpqa_answer(None, text) == letter
    assert TASKS["gpqa"].reward({"target": "B"}, text) == {"B": 1.0, None: 0.0}.get(letter, 0.1)


TOOLS = [tasks.tool_schema(t) for t in (
    {"function": {"name": "book", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "people": {"type": "integer"}, "tags": {"type": "array"}, "code": {"type": "string"}}}}},
    {"function": {"name": "stop", "parameters": {}}})]
BOOK = {"tools": TOOLS, "target": tasks.comparable([("book", {"city": "Oslo", "people": 2})], TOOLS)}
HERMES = '<tool_call>\n{"name": "book", "arguments": %s}\n</tool_call>'
XML = "<tool_call>\n<function=book>\n<parameter=city>\n%s\n</parameter>\n<parameter=people>\n%s\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("text, score", [
    (XML % ("Oslo", 2), 1), (HERMES % '{"city": "Oslo", "people": 2}', 1), (HERMES % '{"people": 2.0, "city": "Oslo"}', 1),
    (HERMES % '{"city": "Oslo", "people": "2"}', 1), ("Let me see.\n" + XML % ("Oslo", 2) + "\nDone.", 1),
    (HERMES % '"{\\"city\\": \\"Oslo\\", \\"people\\": 2}"', 1), ("<think>\nOslo?\n</think>\n" + XML % ("Oslo", 2), 1),
    (XML % ("oslo", 2), 0), (XML % ("Oslo", 3), 0), (HERMES % '{"city": "Oslo"}', 0), (HERMES % '{"city": "Oslo", "people": [2]}', 0),
    (HERMES % '{"city": "Oslo", "people": 2, "code": "x"}', 0), (2 * (XML % ("Oslo", 2)), 0),
    ('<tool_call>\n{"name": "book", "arguments": {"city": "Oslo"\n</tool_call>', 0), ("book(city='Oslo', people=2)", 0),
    ((XML % ("Oslo", 2)).replace("</tool_call>", ""), 0), ((XML % ("Oslo", 2)).replace("</function>", ""), 0),
    ('<tool_call>\n{"name": "book", "parameters": {"city": "Oslo", "people": 2}}\n</tool_call>', 0),
    ('<tool_call>\n{"name": "book", "arguments": {"people": ' + "[" * 2000 + "\n</tool_call>", 0), (XML % ("Oslo", "[" * 600 + "]" * 600), 0),
    ("<tool_call>book</tool_call>", 0), ("I can help you with that.", 0), ("", 0),
])
def test_toolmind_wants_exactly_the_call_in_either_dialect(text, score):
    assert TASKS["toolmind"].score(BOOK, text) == score
    assert (TASKS["toolmind"].reward(BOOK, text) == 1) == (score == 1)


def test_toolmind_arguments_are_judged_by_the_tools_schema():
    same = lambda a, b: tasks.comparable([("book", a)], TOOLS) == tasks.comparable([("book", b)], TOOLS)    # noqa: E731
    assert same({"code": "007"}, {"code": "007"}) and not same({"code": "007"}, {"code": "7"})
    assert same({"people": None}, {"people": "None"}) and not same({"code": "1e2"}, {"code": 100})
    assert same({"people": "7"}, {"people": 7.0}) and same({"tags": "[1, 2]"}, {"tags": [1, 2]})
    assert not same({"tags": [1, 2]}, {"tags": [2, 1]}) and not same({"people": True}, {"people": 1})


def test_toolmind_parallel_calls_count_in_any_order():
    target = tasks.comparable([("book", {"people": 1}), ("stop", {})], TOOLS)
    text = '<tool_call>{"name": "stop", "arguments": {}}</tool_call><tool_call>{"name": "book", "arguments": {"people": 1}}</tool_call>'
    assert TASKS["toolmind"].score({"tools": TOOLS, "target": target}, text) == 1


def test_toolmind_reward_rises_with_what_is_right():
    texts = ["nothing", '<tool_call>{"name": "stop"}</tool_call>', HERMES % '{"city": "Rome", "people": 9}',
             HERMES % '{"city": "Oslo", "people": 9}', XML % ("Oslo", 2)]
    rewards = [TASKS["toolmind"].reward(BOOK, text) for text in texts]
    assert rewards == sorted(set(rewards)) and rewards[0] == 0 and rewards[-2] <= 0.5 and rewards[-1] == 1


def test_toolmind_rows_as_irregular_as_they_come():
    row = {"conversations": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\nOne moment.",
         "tool_calls": [{"function": {"name": "book", "arguments": '{"people": 1}'}}, {"function": {"name": "stop", "arguments": None}}]},
        {"role": "tool", "content": [{"status": "ok"}, "done"]}, {"role": "user", "content": None},
        {"role": "assistant", "content": "<think>\nhidden\n</think>", "tool_calls": [{"function": {"name": "stop", "arguments": None}}]}],
        "tools": [{"type": "function", "function": {"name": "a"}}, {"function": {"name": "b", "parameters": None}},
                  {"function": {"name": "c", "parameters": {"parameters": {"x": {"type": "str"}}}}},
                  {"function": {"name": "d", "arguments": {"y": {"type": "int"}}}}, {"name": "stop", "parameters": {}}]}
    example = tasks.toolmind_example(row)
    messages, tools = TASKS["toolmind"].messages(example)
    assert example["key"] == "Hi" and [t["function"]["name"] for t in tools] == ["a", "b", "c", "d", "stop"]
    assert [list(t["function"]["parameters"]["properties"]) for t in tools] == [[], [], ["x"], ["y"], []]
    assert messages[1]["content"][0] == {"type": "image"}
    assert messages[2]["content"] == [{"type": "text", "text": "One moment."}]
    assert [c["function"]["arguments"] for c in messages[2]["tool_calls"]] == [{"people": 1}, {}]
    assert messages[3]["content"][0]["text"] == '{"status": "ok"}\ndone'
    assert "secret" not in str(messages) and "hidden" not in str(messages)
    assert TASKS["toolmind"].score(example, '<tool_call>{"name": "stop", "arguments": {}}</tool_call>') == 1
    row["conversations"][-1] = {"role": "assistant", "content": "Bye."}
    assert tasks.toolmind_example(row) == "the target makes no tool call"


@pytest.mark.parametrize("task", TASKS)
def test_the_image_stands_first_and_can_be_left_out(task, processor):
    example = TASKS[task].load("test", data(task, "test"))[0]
    with_image = tasks.prompt_text(processor, TASKS[task], example)
    without = tasks.prompt_text(processor, TASKS[task], example, image=False)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert with_image.count(image) == 1 and with_image.replace(image, "") == without
    user = with_image.split("<|im_start|>user\n")[1]
    assert user.startswith(image)


@pytest.mark.parametrize("task", TASKS)
def test_the_tiny_test_questions_are_in_no_other_file(task):
    keys = {split: {e["key"] for e in TASKS[task].load("test", data(task, split))} for split in ("train", "validation", "test")}
    assert len(keys["test"]) == 300
    assert not keys["test"] & (keys["train"] | keys["validation"]) and not keys["train"] & keys["validation"]


def test_gpqa_is_divided_by_ids_whatever_the_order_of_rows(tmp_path):
    with open(data("gpqa", "train")) as file:
        rows = list(csv.DictReader(file))
    halves = []
    for order in rows, random.Random(0).sample(rows, len(rows)):
        with open(tmp_path / "gpqa_extended.csv", "w") as file:           # the hub's own name: a copy of the benchmark
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader(), writer.writerows(order)
        halves.append([TASKS["gpqa"].load(split, str(tmp_path / "gpqa_extended.csv")) for split in ("train", "test")])
    assert halves[0] == halves[1]
    train, test = ({e["key"] for e in half} for half in halves[0])
    assert len(train) == len(test) == 200 and not train & test
    positions = np.bincount(["ABCD".index(e["target"]) for e in halves[0][0] + halves[0][1]])
    assert positions.min() > 60                                           # the right choice stands everywhere


def test_toolmind_conversations_stay_on_one_side(tmp_path):
    with open(data("toolmind", "train")) as file:
        row = json.loads(next(file))
    with open(tmp_path / "graphsyn.jsonl", "w") as file:
        for i in range(2000):
            row["conversations"][0]["content"] = f"question {i // 2}"
            file.write(json.dumps(row) + "\n")
    train, test = ([e["key"] for e in TASKS["toolmind"].load(s, str(tmp_path / "graphsyn.jsonl"))] for s in ("train", "test"))
    assert len(train) + len(test) == 2000 and not set(train) & set(test) and 4 <= len(test) <= 50


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    rows = [{"question": f"What is {i} + 1?\n\u00e9", "answer": f"#### {i + 1}"} for i in range(5)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader(), writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(r) + "\n" for r in rows))
    examples = TASKS["gsm8k"].load("test", str(path))
    assert [e["question"] for e in examples] == [r["question"] for r in rows] and examples[4]["target"] == 5
    assert len(TASKS["gsm8k"].load("test", str(path), limit=2)) == 2


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, "no such file"), ("a.txt", "x", "must end in"), ("a.jsonl", "{", "cannot be read as jsonl"),
    ("a.jsonl", '{"q": 1}', "lacks question, answer"), ("a.jsonl", "[1]", "no columns but a list"),
    ("a.csv", "question\nx", "lacks answer"), ("a.jsonl", "", "no example"), ("a.parquet", "x", "cannot be read as parquet"),
    ("a.jsonl", b"\xff\xfe", "cannot be read as jsonl"), ("a.jsonl", '{"question": "q", "answer": 18}', "not in this task's schema"),
    ("a.jsonl", "[" * 5000, "cannot be read as jsonl"), ("a.json", '[{"question": "x", "answer": "y"}]', "no example"),
])
def test_wrong_data_ends_in_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        TASKS["gsm8k"].load("test", str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_toolmind_reads_the_same_from_parquet(tmp_path):
    """Arrow gives all calls the same arguments and sets those a call did not have to null."""
    rows = list(tasks.read_rows(data("toolmind", "train")))[:50]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert TASKS["toolmind"].load("train", str(tmp_path / "rows.parquet")) == [tasks.toolmind_example(row) for row in rows]


def test_bootstrap_interval_is_the_binomials_and_does_not_change():
    scores = [1.0] * 120 + [0.0] * 180
    mean, low, high = tasks.bootstrap_interval(scores)
    assert mean == 0.4 and low == pytest.approx(0.4 - 1.96 * 0.0283, abs=0.005) and high == pytest.approx(0.4 + 1.96 * 0.0283, abs=0.005)
    assert tasks.bootstrap_interval(scores) == (mean, low, high)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_the_real_rows_load():
    assert len(TASKS["gsm8k"].load("test", str(SHARED / "gsm8k" / "test.jsonl"))) == 1319
    assert len(TASKS["gsm8k"].load("train", str(SHARED / "gsm8k" / "train.jsonl"))) == 7473
    examples = TASKS["toolmind"].load("train", str(SHARED / "toolmind_sample" / "graphsyn_first4.jsonl"))
    assert len(examples) == 4 and all("<think>" not in str(e["messages"]) for e in examples)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_the_reference_solutions_of_gsm8k_score_one():
    rows = list(tasks.read_rows(str(SHARED / "gsm8k" / "test.jsonl")))
    assert all(TASKS["gsm8k"].score(tasks.gsm8k_example(row), row["answer"]) == 1 for row in rows)
