"""The three tasks: data in the benchmarks' own schemas, splits and prompts."""

import csv
import json
import random
import string

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import eval as tasks
from conftest import ROOT, data, prompt
from eval import TASKS, InputError

SHARED = ROOT.parent / "shared" / "data"                        # real rows, where they are at hand


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader(), writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keys_of(examples):
    return [example["key"] for example in examples]


# --------------------------------------------------------------------------------------------------
# Prompts

def test_the_default_prompts_end_as_the_papers():
    row = {"question": " What? ", "answer": "So.\n#### 1,080"}
    example = tasks.gsm8k_example(row)
    text, = example["messages"][0]["content"]
    assert text["text"] == "What?\n\nEnd your response with: Answer: <number>"
    assert example["target"] == 1080 and tasks.gsm8k_example({**row, "answer": "18"}) is None
    row = {"Record ID": "rec1", "Question": "What?", "Correct Answer": "right",
           **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}
    example = tasks.gpqa_example(row)
    text = example["messages"][0]["content"][0]["text"]
    assert text.endswith("\n\nEnd your response with: The correct answer is (X)")
    assert f"({example['target']}) right" in text and text.count("wrong") == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_image_stands_first_and_can_be_left_out(task, processor):
    example = TASKS[task].load("test", data(task, "test"), 1)[0]
    with_image, without = prompt(processor, example), tasks.render(processor, example)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert with_image.count(image) == 1 and with_image.replace(image, "") == without
    assert with_image.split("<|im_start|>user\n")[1].startswith(image)
    assert "image" not in str(example["messages"])                      # behind() makes a copy


def test_toolmind_rows_as_irregular_as_they_come():
    stop = [{"function": {"name": "stop", "arguments": None}}]
    row = {"conversations": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\nOne moment.",
         "tool_calls": [{"function": {"name": "book", "arguments": '{"people": 1}'}}, *stop]},
        {"role": "tool", "content": [{"status": "ok"}, "done"]}, {"role": "user", "content": None},
        {"role": "assistant", "content": "<think>\nhidden\n</think>", "tool_calls": stop}],
        "tools": [
            {"type": "function", "function": {"name": "a"}},
            {"function": {"name": "b", "parameters": None}},
            {"function": {"name": "c", "parameters": {"parameters": {"x": {"type": "str"}}}}},
            {"function": {"name": "d", "arguments": {"y": {"type": "int"}}}},
            {"name": "stop", "parameters": {}}]}
    example = tasks.toolmind_example(row)
    messages, tools = example["messages"], [tool["function"] for tool in example["tools"]]
    assert example["key"] == "Hi"
    assert [tool["name"] for tool in tools] == ["a", "b", "c", "d", "stop"]
    assert [list(tool["parameters"]["properties"]) for tool in tools] == [[], [], ["x"], ["y"], []]
    assert messages[2]["content"] == [{"type": "text", "text": "One moment."}]
    calls = [call["function"]["arguments"] for call in messages[2]["tool_calls"]]
    assert calls == [{"people": 1}, {}]
    assert messages[3]["content"][0]["text"] == '{"status": "ok"}\ndone'
    assert messages[4]["content"] == []
    assert "secret" not in str(messages) and "hidden" not in str(messages)
    text = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    assert TASKS["toolmind"].score(example, text) == 1
    row["conversations"][-1] = {"role": "assistant", "content": "Bye."}
    assert tasks.toolmind_example(row) is None


def test_tools_have_the_key_order_of_vllms_server():
    """A chat template may print them as they are: `tool | tojson`."""
    tool = {"function": {"parameters": {"properties": {"b": {}, "a": {}}, "type": "object"},
                         "strict": True, "description": "d", "name": "f"}, "type": "function"}
    ordered = tasks.tool_schema(tool)
    assert list(ordered) == ["type", "function"]
    assert list(ordered["function"]) == ["name", "description", "parameters"]
    assert list(ordered["function"]["parameters"]) == ["properties", "type"]
    assert list(ordered["function"]["parameters"]["properties"]) == ["b", "a"]


# --------------------------------------------------------------------------------------------------
# Splits

@pytest.mark.parametrize("task", TASKS)
def test_the_tiny_test_questions_are_in_no_other_file(task):
    keys = {split: set(keys_of(TASKS[task].load("test", data(task, split))))
            for split in ("train", "validation", "test")}
    assert len(keys["test"]) == 300 and not keys["train"] & keys["validation"]
    assert not keys["test"] & (keys["train"] | keys["validation"])


def gpqa_rows(count):
    """As many records as the real file has, with ids of its form."""
    rng, letters = random.Random(0), string.ascii_letters + string.digits
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    return [{"Record ID": "rec" + "".join(rng.choices(letters, k=14)), "Question": f"Question {i}?",
             "Correct Answer": "right", **wrong} for i in range(count)]


def test_gpqa_is_divided_by_ids_into_273_and_273_whatever_the_order_of_rows(tmp_path):
    rows, halves = gpqa_rows(546), []
    for order in rows, random.Random(0).sample(rows, len(rows)):
        path = write_csv(tmp_path / "gpqa_extended.csv", order)         # the hub's own name
        halves.append([TASKS["gpqa"].load(split, path) for split in ("train", "test")])
    assert halves[0] == halves[1]
    train, test = (set(keys_of(half)) for half in halves[0])
    assert len(train) == len(test) == 273 and not train & test
    targets = ["ABCD".index(example["target"]) for half in halves[0] for example in half]
    assert np.bincount(targets).min() > 100                     # the right choice stands everywhere
    mine = write_csv(tmp_path / "mine.csv", rows)                       # another name: used whole
    assert len(TASKS["gpqa"].load("test", mine)) == 546


def toolmind_row(question, **target):
    target = target or {"tool_calls": [{"function": {"name": "stop", "arguments": None}}]}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "", **target}]
    return {"conversations": turns, "tools": [{"function": {"name": "stop"}}]}


def test_toolmind_conversations_stay_on_one_side(tmp_path):
    rows = [toolmind_row(f"question {i // 2}") for i in range(2000)]
    path = write_jsonl(tmp_path / "graphsyn.jsonl", rows)
    train, test = (keys_of(TASKS["toolmind"].load(split, path)) for split in ("train", "test"))
    assert len(train) + len(test) == 2000 and not set(train) & set(test) and 4 <= len(test) <= 50


@pytest.mark.parametrize("split, most", [("train", 8192), ("test", 2000)])
def test_toolminds_rows_are_chosen_by_hash(tmp_path, monkeypatch, split, most):
    """Whatever the order of rows; and a smaller --limit is the beginning of a larger one."""
    real = tasks.key_hash
    held_out = real if split == "train" else lambda text: real(text) / 100      # all are held out
    monkeypatch.setattr(tasks, "key_hash", held_out)
    rows = [toolmind_row(f"question {i}") for i in range(9000 if split == "train" else 2500)]
    paths = []
    for name, order in ("a", rows), ("b", random.Random(0).sample(rows, len(rows))):
        (tmp_path / name).mkdir()
        paths.append(write_jsonl(tmp_path / name / "graphsyn.jsonl", order))
    chosen = keys_of(TASKS["toolmind"].load(split, paths[0]))
    assert len(chosen) == most and chosen != sorted(chosen)
    for limit in (most, 500, 7):
        assert keys_of(TASKS["toolmind"].load(split, paths[1], limit)) == chosen[:limit]


# --------------------------------------------------------------------------------------------------
# Files

def test_what_is_no_example_is_left_out_and_counted(tmp_path, capsys):
    late = toolmind_row("c")
    late["conversations"][:0] = [{"role": "system", "content": "x"}] * 2
    alone = toolmind_row("d")
    del alone["conversations"][0]
    rows = [toolmind_row("a"), toolmind_row("f", tool_calls=None), toolmind_row("g", tool_calls=[]),
            toolmind_row("h", tool_calls=[{"function": {"name": "stop", "arguments": "none"}}]),
            late, alone, {"conversations": [], "tools": []}, toolmind_row("b")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert keys_of(TASKS["toolmind"].load("test", path)) == ["a", "b"]
    assert f"{path}: 2 of 8 rows, test split" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    rows = [{"question": f"What is {i} + 1?\n\u00e9", "answer": f"#### {i + 1}"} for i in range(5)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        write_csv(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    examples = TASKS["gsm8k"].load("test", str(path))
    assert examples == list(map(tasks.gsm8k_example, rows)) and examples[4]["target"] == 5
    assert len(TASKS["gsm8k"].load("test", str(path), limit=2)) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_toolmind_reads_the_same_from_every_kind_of_file(tmp_path, suffix):
    """In CSV and Parquet the nested columns are JSON text. In JSON, calls keep the arguments that
    they have: as structs of Arrow all would get the same ones."""
    rows = [json.loads(line) for line in open(data("toolmind", "train"))][:50]
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    else:
        write_jsonl(path, rows) if suffix == "jsonl" else write_csv(path, texts)
    examples = TASKS["toolmind"].load("train", str(path))
    assert examples == list(map(tasks.toolmind_example, rows))


def test_no_answer_of_gpqa_is_taken_for_a_missing_value(tmp_path):
    row = {"Record ID": "r1", "Question": "What?", "Correct Answer": "None", "Incorrect Answer 1":
           "NA", "Incorrect Answer 2": "0.50", "Incorrect Answer 3": "1e3"}
    rows = [row, *gpqa_rows(3)]
    example = TASKS["gpqa"].load("test", write_csv(tmp_path / "a.csv", rows))[0]
    text = example["messages"][0]["content"][0]["text"]
    assert all(f") {choice}\n" in text for choice in ("None", "NA", "0.50", "1e3")), text


@pytest.mark.parametrize("name, content", [
    ("none.jsonl", None), ("a.txt", "x"), ("a.jsonl", "{"), ("a.jsonl", '{"q": 1}'),
    ("a.jsonl", "[1]"), ("a.csv", "question\nx"), ("a.jsonl", ""), ("a.parquet", "x"),
    ("a.jsonl", '{"question": "q", "answer": 18}'),
    ("a.json", '[{"question": "x", "answer": "y"}]')])
def test_wrong_data_ends_in_one_sentence(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        TASKS["gsm8k"].load("test", str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_too_long_prompts_are_left_out_to_the_token(processor, questions, capsys):
    examples, picture = questions[:20], tasks.random_picture(256, 256)
    requests = tasks.arm_requests(processor, examples, picture)
    tokens = [tasks.count_tokens(processor, *request) for request in requests]
    longest = max(tokens)
    kept = tasks.fitting(processor, examples, longest + 2, requests[:1])
    assert kept == examples and "left out" not in capsys.readouterr().err
    kept = tasks.fitting(processor, examples, longest - 1, requests[:1])
    assert 0 < len(kept) < 20 and f"left out {20 - len(kept)} of 20" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-model-len: every prompt is longer; raise it"):
        tasks.fitting(processor, examples, 9, requests[:1])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_the_real_rows_load():
    train, test = (TASKS["gsm8k"].load(split, str(SHARED / "gsm8k" / f"{split}.jsonl"))
                   for split in ("train", "test"))
    assert len(train) == 7473 and len(test) == 1319
    assert not set(keys_of(train)) & set(keys_of(test))
    for name in "graphsyn_first4.jsonl", "sample_raw.json":
        examples = TASKS["toolmind"].load("train", str(SHARED / "toolmind_sample" / name))
        assert len(examples) == 4 and all("<think>" not in str(e["messages"]) for e in examples)
