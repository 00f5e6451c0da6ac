"""The three tasks: data in the benchmarks' own schemas, splits and prompts."""

import csv
import json
import random
import re
import string

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


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader(), writer.writerows(rows)
    return str(path)


def gpqa_rows(count):
    """As many records as the real file has, with ids of its form."""
    rng = random.Random(0)
    return [{"Record ID": "rec" + "".join(rng.choices(string.ascii_letters + string.digits, k=14)), "Question": f"Question {i}?",
             "Correct Answer": "right", **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}} for i in range(count)]


def test_gpqa_is_divided_by_ids_into_273_and_273_whatever_the_order_of_rows(tmp_path):
    rows, halves = gpqa_rows(546), []
    for order in rows, random.Random(0).sample(rows, len(rows)):
        path = write_csv(tmp_path / "gpqa_extended.csv", order)           # the hub's own name: a copy of the benchmark
        halves.append([TASKS["gpqa"].load(split, path) for split in ("train", "test")])
    assert halves[0] == halves[1]
    train, test = ({e["key"] for e in half} for half in halves[0])
    assert len(train) == len(test) == 273 and not train & test
    positions = np.bincount(["ABCD".index(e["target"]) for e in halves[0][0] + halves[0][1]])
    assert positions.min() > 100                                          # the right choice stands everywhere


@pytest.mark.parametrize("name, count", [("gpqa_main", 448), ("gpqa_diamond", 198)])
def test_gpqas_smaller_files_do_not_mix_what_the_whole_one_divides(tmp_path, capsys, name, count):
    whole, part = gpqa_rows(546), gpqa_rows(546)[:count]
    keys = {}
    for rows, file in (whole, "gpqa_extended"), (part, name):
        path = write_csv(tmp_path / f"{file}.csv", rows)
        keys[file] = [{e["key"] for e in TASKS["gpqa"].load(split, path)} for split in ("train", "test")]
    assert keys[name][0] <= keys["gpqa_extended"][0] and keys[name][1] <= keys["gpqa_extended"][1]
    assert min(map(len, keys[name])) > 0.3 * count
    used = len(keys[name][1])
    assert f"used {used} of {count} rows; {count - used} are not of the test split" in capsys.readouterr().err
    assert len(TASKS["gpqa"].load("test", write_csv(tmp_path / "mine.csv", part))) == count        # another name: used whole


def toolmind_row(question, tools=({"function": {"name": "stop"}},), **target):
    target = target or {"tool_calls": [{"function": {"name": "stop", "arguments": None}}]}
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "", **target}],
            "tools": tools and list(tools)}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_toolmind_conversations_stay_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "graphsyn.jsonl", [toolmind_row(f"question {i // 2}") for i in range(2000)])
    train, test = ([e["key"] for e in TASKS["toolmind"].load(s, path)] for s in ("train", "test"))
    assert len(train) + len(test) == 2000 and not set(train) & set(test) and 4 <= len(test) <= 50


def test_toolmind_scores_the_same_2000_rows_whatever_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "key_hash", lambda text: hash("x" + text) // 100 * 100)              # all are held out
    rows, kept = [toolmind_row(f"question {i}") for i in range(2500)], []
    for order in rows, rows[::-1]:
        kept.append([e["key"] for e in TASKS["toolmind"].load("test", write_jsonl(tmp_path / "graphsyn.jsonl", order))])
    assert len(kept[0]) == 2000 and kept[0] == kept[1]


def test_nothing_is_dropped_silently(tmp_path, capsys):
    turns, tools = toolmind_row("c")["conversations"], [{"name": "stop"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [
        toolmind_row("a"), toolmind_row("d", tools=None), toolmind_row("e", tools=()), toolmind_row("f", tool_calls=None),
        toolmind_row("g", tool_calls=[]), toolmind_row("h", tool_calls=[{"function": {"name": "stop", "arguments": "no object"}}]),
        {"conversations": [{"role": "system", "content": "x"}] * 2 + turns, "tools": tools},
        {"conversations": turns[1:], "tools": tools}, {"conversations": [], "tools": []}, "text", toolmind_row("b")])
    assert [e["key"] for e in TASKS["toolmind"].load("test", path)] == ["a", "b"]
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: used 2 of 11 rows; skipped 2: a row lacks tools (it has conversations, tools)")
    for reason in ("2: the target makes no tool call", "2: no user's turn, a late system message or an unknown role",
                   "1: a row lacks conversations, tools (it has conversations, tools)", "1: a row is not in this task's schema (ValueError",
                   "1: a row lacks conversations, tools (it has no columns but a str)"):
        assert f"; skipped {reason}" in said
    assert 2 + sum(map(int, re.findall(r"skipped (\d+):", said))) == 11 and said.count("\n") == 1


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    rows = [{"question": f"What is {i} + 1?\n\u00e9", "answer": f"#### {i + 1}"} for i in range(5)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        write_csv(path, rows)
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


def test_a_question_that_holds_the_images_placeholder_is_left_out(processor, capsys):
    """It would be taken for an image, of which there is one."""
    task = TASKS["gsm8k"]
    examples = [{"question": f"What is 2 + 3{odd}?", "key": odd, "target": 5} for odd in ("", "<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<|image_", "<|im_end|>")]
    picture = tasks.random_picture(256, 0)
    kept = tasks.fitting(processor, task, examples, 400, picture)
    assert [e["key"] for e in kept] == ["", "<|image_", "<|im_end|>"]
    assert "left out 3 of 6 examples: their text holds the image's placeholder\n" in capsys.readouterr().err
    longest = max(tasks.model_inputs(processor, tasks.prompt_text(processor, task, e), picture)["input_ids"].shape[1] for e in kept)
    assert tasks.fitting(processor, task, kept, longest, picture) == kept               # to the token
    assert len(tasks.fitting(processor, task, kept, longest - 1, picture)) < 3
    assert len(tasks.fitting(processor, task, kept, longest - 66, None)) == 3           # the text alone: without 64 + 2 tokens
    with pytest.raises(InputError, match="every prompt is longer than 9 tokens"):
        tasks.fitting(processor, task, kept, 9, picture)
    with pytest.raises(InputError, match="every question holds the image's placeholder"):
        tasks.fitting(processor, task, examples[1:4], 400, picture)


def test_bootstrap_interval_is_the_binomials_and_does_not_change():
    scores = [1.0] * 120 + [0.0] * 180
    mean, low, high = tasks.bootstrap_interval(scores)
    assert mean == 0.4 and low == pytest.approx(0.4 - 1.96 * 0.0283, abs=0.005) and high == pytest.approx(0.4 + 1.96 * 0.0283, abs=0.005)
    assert tasks.bootstrap_interval(scores) == (mean, low, high)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_the_real_rows_load(capsys):
    train, test = (TASKS["gsm8k"].load(split, str(SHARED / "gsm8k" / f"{split}.jsonl")) for split in ("train", "test"))
    assert len(train) == 7473 and len(test) == 1319 and not {e["key"] for e in train} & {e["key"] for e in test}
    for name in "graphsyn_first4.jsonl", "sample_raw.json":
        examples = TASKS["toolmind"].load("train", str(SHARED / "toolmind_sample" / name))
        assert len(examples) == 4 and all("<think>" not in str(e["messages"]) for e in examples)
    said = capsys.readouterr().err
    assert "used 7473 of 7473 rows\n" in said and "used 1319 of 1319 rows\n" in said and "skipped" not in said


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
@pytest.mark.parametrize("ending", ["#### {}", "**Answer:** {}", "Answer: ${}.", "Answer:\n\n\\boxed{{{}}}", "Answer: 1 + 1 = {}",
                                    "The answer is {} dollars. Check: 1 + 1 = 2."])
def test_the_reference_solutions_of_gsm8k_score_one_however_they_end(ending):
    for row in tasks.read_rows(str(SHARED / "gsm8k" / "test.jsonl")):
        solution, number = row["answer"].split("#### ")
        assert TASKS["gsm8k"].score(tasks.gsm8k_example(row), solution + ending.format(number)) == 1
