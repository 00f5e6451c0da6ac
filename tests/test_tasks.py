"""The three tasks: data in the benchmarks' own schemas, splits and prompts."""

import csv
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import eval as tasks
from conftest import ROOT, data
from eval import TASKS, InputError

SHARED = ROOT.parent / "shared" / "data"                        # real rows, where they are at hand


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
