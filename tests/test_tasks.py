"""The three tasks: data in the benchmarks' own schemas, splits and prompts."""

import json
import random

import huggingface_hub
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from PIL import Image

import eval as tasks
from conftest import data, prompt
from eval import TASKS, Example, InputError


def write(path, rows):
    """A file of rows, of the kind that its name's end says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(task, path, rows, split="test", limit=None):
    """The examples of rows that are written to a file."""
    return TASKS[task].load(split, write(path, rows), limit)


def keys_of(examples):
    return [example.key for example in examples]


def gpqa_row(key, **other):
    return {"Record ID": key, "Question": f"Question {key}?", "Correct Answer": "right",
            **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}, **other}


def toolmind_row(question, **target):
    target = target or {"tool_calls": [{"function": {"name": "stop", "arguments": None}}]}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "", **target}]
    return {"conversations": turns, "tools": [{"function": {"name": "stop"}}]}


def test_the_default_prompts_end_as_the_papers():
    sums = tasks.gsm8k_example({"question": " What? ", "answer": "So.\n#### 1,080"})
    text = sums.messages[0]["content"][0]["text"]
    assert text == "What?\n\nEnd your response with: Answer: <number>" and sums.target == 1080
    choice = tasks.gpqa_example(gpqa_row("rec1"))
    text = choice.messages[0]["content"][0]["text"]
    assert text.endswith("\n\nEnd your response with: The correct answer is (X)")
    assert f"({choice.target}) right" in text and text.count("wrong") == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_image_stands_first_and_can_be_left_out(task, processor):
    example = TASKS[task].load("test", data(task, "test"), 1)[0]
    with_image, without = prompt(processor, example), tasks.render(processor, example)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert with_image.count(image) == 1 and with_image.replace(image, "") == without
    assert with_image.split("<|im_start|>user\n")[1].startswith(image)
    assert "image" not in str(example.messages)                         # prepend() copies


@pytest.mark.parametrize("arm", ["none", "string:4", "random", Image.new("RGB", (64, 64))])
def test_a_message_may_be_a_string_in_every_arm(processor, arm):
    """As in {"content": "Hi"}: the question is there behind an image, and for a server."""
    prompts = []
    for messages in [{"role": "user", "content": "Why so?"}], tasks.user_turn("Why so?"):
        (example, picture), = tasks.arm_requests(processor, [Example("", messages, None)], arm)
        prompts.append(tasks.render(processor, example))
        sent = str(tasks.openai_request(example, picture))
        assert "Why so?" in sent and ("image_url" in sent) == (picture is not None)
    assert prompts[0] == prompts[1] and "Why so?" in prompts[0]


def test_toolmind_rows_as_irregular_as_they_come():
    stop = [{"function": {"name": "stop", "arguments": None}}]
    book = {"function": {"name": "book", "arguments": '{"people": 1}'}}
    example = tasks.toolmind_example({"conversations": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\nOne moment.",
         "tool_calls": [book, *stop]},
        {"role": "tool", "content": [{"status": "ok"}, "done"]}, {"role": "user", "content": None},
        {"role": "assistant", "content": "<think>\nhidden\n</think>", "tool_calls": stop}],
        "tools": [{"type": "function", "function": {"name": "a"}}, {"name": "stop"}]})
    said = [message["content"] for message in example.messages]
    texts = [content[0]["text"] if content else "" for content in said]
    assert texts == ["Be brief.", "Hi", "One moment.", '[{"status": "ok"}, "done"]', ""]
    calls = [call["function"]["arguments"] for call in example.messages[2]["tool_calls"]]
    assert calls == [{"people": 1}, {}] and example.key == "Hi"
    text = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    assert TASKS["toolmind"].score(example, text) == 1


SCHEMA = {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}


@pytest.mark.parametrize("tool, properties", [
    ({"parameters": SCHEMA}, {"room": {"type": "string"}}), ({}, {}), ({"parameters": None}, {}),
    ({"parameters": {"parameters": {"room": {"type": "str"}}}}, {"room": {"type": "str"}}),
    ({"arguments": {"room": {"type": "int"}}}, {"room": {"type": "int"}}),
    ({"input_schema": SCHEMA}, {"room": {"type": "string"}}),
    ({"inputSchema": SCHEMA}, {"room": {"type": "string"}}),
    ({"parameters": {"room": "string"}}, {"room": {"type": "string"}}),
    ({"parameters": json.dumps(SCHEMA)}, {"room": {"type": "string"}})])
@pytest.mark.parametrize("wrapped", [True, False])
def test_parameters_reach_the_prompt_however_they_are_written(processor, tool, properties, wrapped):
    tool = {"name": "book", **tool}
    tool = {"type": "function", "function": tool} if wrapped else tool
    example = tasks.toolmind_example({**toolmind_row("q"), "tools": [tool]})
    assert example.tools[0]["function"]["parameters"]["properties"] == properties
    assert "room" in tasks.render(processor, example) or not properties


def test_gpqa_is_divided_by_ids_whatever_the_order_of_rows(tmp_path, monkeypatch):
    """Into 273 and 273, from the hub or from a file of the hub's name; an id may be an integer."""
    rows, halves = [gpqa_row(f"rec{i}" if i % 2 else i) for i in range(546)], []
    path = str(tmp_path / "gpqa_extended.csv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, repo_type: (
        {("Idavidrein/gpqa", "gpqa_extended.csv"): path}[name]))
    for data, order in (path, rows), (None, random.Random(0).sample(rows, len(rows))):
        write(tmp_path / "gpqa_extended.csv", order)
        halves.append([TASKS["gpqa"].load(split, data) for split in ("train", "test")])
    assert halves[0] == halves[1]
    train, test = (set(keys_of(half)) for half in halves[0])
    assert len(train) == len(test) == 273 and not train & test
    targets = ["ABCD".index(example.target) for half in halves[0] for example in half]
    assert np.bincount(targets).min() > 100                     # the right choice stands everywhere
    mine = load("gpqa", tmp_path / "mine.jsonl", rows)
    assert len(mine) == 546 and mine[0] in sum(halves[0], [])           # another name: used whole


def test_toolmind_conversations_stay_on_one_side(tmp_path):
    path, rows = tmp_path / "graphsyn.jsonl", [toolmind_row(f"q {i // 2}") for i in range(2000)]
    train, test = (keys_of(load("toolmind", path, rows, split)) for split in ("train", "test"))
    assert len(train) + len(test) == 2000 and not set(train) & set(test) and 4 <= len(test) <= 50


@pytest.mark.parametrize("split, most", [("train", 8192), ("test", 2000)])
def test_toolminds_rows_are_chosen_by_hash(tmp_path, monkeypatch, split, most):
    """Whatever the order of rows; and a smaller --limit is the beginning of a larger one."""
    real = tasks.key_hash
    held_out = real if split == "train" else lambda text: real(text) / 100      # all are held out
    monkeypatch.setattr(tasks, "key_hash", held_out)
    rows = [toolmind_row(f"question {i}") for i in range(9000 if split == "train" else 2500)]
    path = write(tmp_path / "graphsyn.jsonl", rows)
    chosen = keys_of(TASKS["toolmind"].load(split, path))
    assert len(chosen) == most and chosen != sorted(chosen)
    write(tmp_path / "graphsyn.jsonl", random.Random(0).sample(rows, len(rows)))
    for limit in (most, 7):
        assert keys_of(TASKS["toolmind"].load(split, path, limit)) == chosen[:limit]


def test_what_is_no_example_is_left_out_and_counted(tmp_path, capsys):
    """Of GPQA the rows without an id, too: they would have one hash, and stand on one side."""
    late, alone, role, no_id = *map(toolmind_row, "cde"), gpqa_row("x")
    role["conversations"][0]["role"] = "developer"
    late["conversations"][:0] = [{"role": "system", "content": "x"}] * 2
    del alone["conversations"][0], no_id["Record ID"]
    bad = {"tool_calls": [{"function": {"name": "stop", "arguments": "none"}}]}
    rows = [toolmind_row("a"), toolmind_row("f", tool_calls=None), toolmind_row("g", tool_calls=[]),
            toolmind_row("h", **bad), late, alone, {"conversations": [], "tools": []}, role,
            toolmind_row("half \ud800"), toolmind_row("b")]
    assert keys_of(load("toolmind", tmp_path / "a.jsonl", rows)) == ["a", "b"]
    assert "a.jsonl: 2 examples, 8 rows left out" in capsys.readouterr().err
    rows = [gpqa_row("a"), no_id, gpqa_row(None), gpqa_row(""), gpqa_row("b"),
            gpqa_row("c", **{"Incorrect Answer 2": None}), gpqa_row("d", Question=" ")]
    for name in ("a.jsonl", "a.parquet"):
        assert keys_of(load("gpqa", tmp_path / name, rows)) == ["a", "b"]
        assert "2 examples, 5 rows left out" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "text.parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    """Under a name that is no pattern. Nested columns are JSON text in CSV, and may be in Parquet,
    whose structs have all columns: those that a row lacks are None there, and not here."""
    path = tmp_path / f"r[o]w? *{{s}}.{suffix}"
    rows = [{"question": f"What is {i} + 1?\n\u00e9", "answer": f"#### {i + 1}"} for i in range(5)]
    assert load("gsm8k", path, rows) == list(map(tasks.gsm8k_example, rows))
    assert len(load("gsm8k", path, rows, limit=2)) == 2
    rows = [gpqa_row("r", **dict(zip(tasks.GPQA_FIELDS[2:], ["None", "NA", "0.50", "1e3"])))]
    assert load("gpqa", path, rows) == list(map(tasks.gpqa_example, rows))
    rows = [json.loads(line) for line in open(data("toolmind", "train"))][:50]
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    written = texts if suffix in ("csv", "text.parquet") else rows
    assert load("toolmind", path, written) == list(map(tasks.toolmind_example, rows))


def test_blank_lines_byte_order_marks_and_a_column_in_the_last_row_do_no_harm(tmp_path):
    row = json.dumps({"question": "x" * 1000, "answer": "#### 1"}) + "\n"
    late = {"answer": "#### 2", "note": {"by": "me"}, "question": "last"}
    text = f"\ufeff\n\n{row * 16_000}   \r\n{json.dumps(late)}\n\n\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    examples = TASKS["gsm8k"].load("test", str(tmp_path / "a.jsonl"))
    assert len(examples) == 16_001 and examples[-1] == tasks.gsm8k_example(late)
    (tmp_path / "a.csv").write_text("question,answer\nq,#### 1\n\nq,#### 2\n\n", "utf-8-sig")
    assert len(TASKS["gsm8k"].load("test", str(tmp_path / "a.csv"))) == 2


def test_a_file_is_read_as_far_as_it_is_needed(tmp_path):
    """ToolMind's file has 2.3 GB: rows come one at a time. This one's end cannot be read."""
    rows = [{"question": f"q{i}", "answer": "#### 1"} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b'{"\xff')
    assert len(TASKS["gsm8k"].load("test", path, 9)) == 9
    with pytest.raises(InputError, match=r"a\.jsonl: it cannot be read \(.utf-8"):
        TASKS["gsm8k"].load("test", path)


@pytest.mark.parametrize("name, content, reason", [
    ("none.jsonl", None, "No such file"), ("a.txt", "x", "give a .jsonl, .csv or"),
    ("a.jsonl", "{", "cannot be read"), ("a.csv", "q\n1", "no row is usable .*'question'"),
    ("a.jsonl", "[1]", "TypeError: "), ("a.jsonl", "", "empty split"),
    ("a.jsonl", "7", "TypeError: "), ("a.parquet", "x", "cannot be read"),
    ("a.jsonl", "[" * 10**6, "cannot be read"), ("a.csv", "q,a\n1,2,3\n", "Length of header"),
    ("a.csv", 'q\n"1', "EOF inside"),
    ("a.jsonl", '{"question": "x", "answer": "y"}', "Invalid literal")])
def test_wrong_data_ends_in_one_sentence(tmp_path, name, content, reason):
    """Where no row can be used, the first one's error is in it."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        TASKS["gsm8k"].load("test", str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_too_long_prompts_are_left_out_to_the_token(processor, questions, capsys):
    requests = tasks.arm_requests(processor, questions[:20], tasks.random_picture(256, 256))
    longest = max(tasks.count_tokens(processor, *request) for request in requests)
    arms = {"none": (questions[0], None), "random": requests[0]}
    kept = [tasks.drop_long(processor, questions[:20], most, arms)
            for most in (longest + 2, longest - 1)]
    assert kept[0] == questions[:20] and 0 < len(kept[1]) < 20
    assert f"{len(kept[1])} of 20 prompts fit into {longest - 1} tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-model-len: .* no room for any prompt; raise it"):
        tasks.drop_long(processor, questions[:20], 9, arms)
