"""Files of rows: every kind gives the same examples, what is unusable is left out and counted, and
of the hub's large file each split has its own rows, whatever their order."""

import datetime
import decimal
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from unittest import mock

import datasets
import pyarrow.json
import pyarrow.parquet
import pytest

import eval as tasks
from conftest import ENV, ROOT, TINY, data, score
from eval import TASKS, InputError
from rows import STOP, gpqa_row, gsm8k_row, hermes, keys_of, load, toolmind_row, write

# Kinds of files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "text.parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    """Under a name that is no pattern. Nested columns are JSON text in CSV, and may be in Parquet,
    whose structs have all columns: those that a row lacks are None there, and not here."""
    path = tmp_path / f"r[o]w? *{{s}}.{suffix}"
    rows = [gsm8k_row(f"What is {i} + 1?\n\u00e9", f"#### {i + 1}") for i in range(5)]
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
    """This one's end cannot be read."""
    path = write(tmp_path / "a.jsonl", [gsm8k_row(f"q{i}") for i in range(2000)])
    with open(path, "ab") as file:
        file.write(b'{"\xff')
    assert len(TASKS["gsm8k"].load("test", path, 9)) == 9
    with pytest.raises(InputError, match=r"a\.jsonl: it cannot be read \(line 2001: .utf-8"):
        TASKS["gsm8k"].load("test", path)


@pytest.mark.parametrize("name, content, reason", [
    ("none.jsonl", None, "No such file"), ("a.txt", "x", "give a .jsonl, .csv or"),
    ("a.jsonl", "{", "line 1, column 2: Expecting property name"),
    ("a.jsonl", '{}\n\n{"a": 1,}\n{}', "line 3, column 9: Expecting property name"),
    ("a.jsonl", "{}\n" + "[" * 10**6, "line 2: maximum recursion"),
    ("a.csv", "q\n1", "no row is usable .*'question'"), ("a.parquet", "x", "cannot be read"),
    ("a.jsonl", '[{"question": "x"}]', "a row is one JSON object in one line"),
    ("a.jsonl", "7", "a row is one JSON object in one line"),
    ("a.jsonl", "", "empty split"), ("a.csv", "", "empty split"),
    ("a.csv", "q,a\n1,2,3\n", "line 2: it has more fields than the header"),
    ("a.csv", 'q\n"1', "line 2: unexpected end of data"),
    ("a.csv", 'question,answer\n"He said \\"hi, there\\" twice",#### 1\n',
     "line 2: ',' expected after '\"'; quotes in a CSV field are doubled"),
    ("a.csv", 'question,answer\nq,#### 1\n"A 5\\", and more?",#### 1\n',
     "line 3: it has more fields than the header"),
    ("a.jsonl", '{"question": "x", "answer": "y"}', "Invalid literal")])
def test_wrong_data_ends_in_one_sentence(tmp_path, name, content, reason):
    """It names the line where the file is broken, and where no row can be used the first error. The
    last two of CSV are as Spark writes it: quotes behind a backslash."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        TASKS["gsm8k"].load("test", str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_csv_file_changes_nothing_for_the_rest_of_the_process(tmp_path):
    before = list(warnings.filters)
    load("gsm8k", tmp_path / "a.csv", [gsm8k_row("q")])
    assert warnings.filters == before


def test_a_long_conversation_fits_into_a_field_of_csv(tmp_path):
    row = toolmind_row("long " * 100_000)
    row = {name: json.dumps(value) for name, value in row.items()}
    assert len(load("toolmind", tmp_path / "a.csv", [row])) == 1


# Fields -------------------------------------------------------------------------------------------


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


def test_text_that_parquet_holds_as_bytes_is_text(tmp_path):
    """Bytes that are no text leave their row out, and another column of bytes does no harm."""
    row = {name: value.encode() for name, value in gpqa_row("zinc \u00e9").items()}
    rows = [row, {**row, "Question": b"\xff\xfe"}, {**row, "picture": b"\x89PNG\xff"}]
    plain = tasks.gpqa_example(gpqa_row("zinc \u00e9"))
    assert load("gpqa", tmp_path / "a.parquet", rows) == [plain, plain]
    texts = {name: json.dumps(value).encode() for name, value in toolmind_row("zinc").items()}
    assert keys_of(load("toolmind", tmp_path / "a.parquet", [texts])) == ["zinc"]


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), -float("inf"), None, True, [], ["a"], {"a": 1}, {}])
def test_a_field_that_is_neither_text_nor_a_finite_number_leaves_its_row_out(tmp_path, value):
    rows = [gpqa_row("a", **{"Incorrect Answer 2": value}), gpqa_row("b", Question=value),
            gpqa_row("c", **{"Correct Answer": value}), gpqa_row("d")]
    assert keys_of(load("gpqa", tmp_path / "a.jsonl", rows)) == ["d"]
    rows = [gsm8k_row(value), gsm8k_row("q", value), gsm8k_row("r"), gsm8k_row(" \n")]
    assert keys_of(load("gsm8k", tmp_path / "a.jsonl", rows)) == ["r"]


def test_nan_and_numbers_too_large_are_no_fields_in_any_file(tmp_path):
    """JSON has no word for them, and Parquet has."""
    rows = [gpqa_row("a", **{"Incorrect Answer 2": 0.5}),
            gpqa_row("b", **{"Incorrect Answer 2": float("nan")})]
    assert keys_of(load("gpqa", tmp_path / "a.parquet", rows)) == ["a"]
    (tmp_path / "b.jsonl").write_text(
        json.dumps(rows[0]) + "\n" + json.dumps(rows[0]).replace("0.5", "1e999"))
    assert keys_of(TASKS["gpqa"].load("test", str(tmp_path / "b.jsonl"))) == ["a"]


@pytest.mark.parametrize("number", [18, 18.0, "18", "So.\n#### 18", "#### 18.00"])
def test_a_finite_number_is_a_field(tmp_path, number):
    example, = load("gsm8k", tmp_path / "a.jsonl", [gsm8k_row("q", number)])
    assert example.target == 18


def test_a_decimal_of_parquet_is_a_number(tmp_path):
    rows = [gsm8k_row("q", decimal.Decimal("2.50"))]
    assert load("gsm8k", tmp_path / "a.parquet", rows)[0].target == 2.5


@pytest.mark.parametrize("number, target", [
    ("3,5", None), ("0,125", None), ("1,0800", None), ("1,08", None), ("1,,080", None),
    ("12345,678", None), (",500", None), ("1,080", 1080), ("-1,080", -1080), ("10,800.5", 10800.5),
    ("1,234,567", 1234567), ("1080", 1080)])
def test_a_comma_parts_thousands_or_leaves_the_row_out(tmp_path, number, target):
    rows = [gsm8k_row("q", f"So.\n#### {number}"), gsm8k_row("r", "#### 7")]
    found = [example.target for example in load("gsm8k", tmp_path / "a.jsonl", rows)]
    assert found == [7] if target is None else found == [target, 7]


def test_a_question_whose_right_choice_is_listed_twice_is_left_out(tmp_path):
    rows = [gpqa_row("a", **{"Incorrect Answer 3": " right\n"}), gpqa_row("b"),
            gpqa_row("c", **{"Incorrect Answer 1": "Right"})]
    assert keys_of(load("gpqa", tmp_path / "a.jsonl", rows)) == ["b", "c"]


def test_parts_of_text_are_joined(tmp_path):
    """A question in parts is the question as a text, also as the key of its conversation."""
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " v?"}]
    said = [{"role": "assistant", "content": parts}, {"role": "tool", "content": parts}]
    texts = [{**turn, "content": "What is v?"} for turn in said]
    rows = [toolmind_row(parts, *said), toolmind_row("What is v?", *texts)]
    first, second = load("toolmind", tmp_path / "a.jsonl", rows)
    assert first == second and first.key == "What is v?"


@pytest.mark.parametrize("content", [
    {"a": 1}, [{"type": "image_url", "image_url": {"url": "x"}}], ["What is v?"], True,
    [{"type": "text", "text": None}], [{"type": "text"}]])
def test_a_question_of_other_parts_is_left_out(tmp_path, content):
    rows = [toolmind_row(content), toolmind_row("b")]
    assert keys_of(load("toolmind", tmp_path / "a.jsonl", rows)) == ["b"]


@pytest.mark.parametrize("content, text", [
    ({"city": "Z\u00fcrich"}, '{"city": "Z\u00fcrich"}'), (["a", 1], '["a", 1]'), (0, "0"),
    (False, "false"), (1.5, "1.5"), ([{"text": "a"}], '[{"text": "a"}]'), (None, None), ("", None),
    ([], None), ({"a": float("nan"), "b": [None]}, '{"b": [null]}'), (float("inf"), None)])
def test_a_tools_result_reaches_the_prompt_as_the_characters_it_holds(tmp_path, content, text):
    row = toolmind_row("q", {"role": "tool", "content": content})
    example, = load("toolmind", tmp_path / "a.jsonl", [row])
    said = example.messages[1]["content"]
    assert said == ([] if text is None else [{"type": "text", "text": text}])


def test_nan_in_a_structure_of_parquet_is_a_field_that_is_not_there(tmp_path):
    rows = [{"result": {"a": float("nan"), "b": "c"}}]
    assert [*tasks.read_rows(write(tmp_path / "a.parquet", rows))] == [{"result": {"b": "c"}}]


def go(call, **turn):
    """A row whose call of a tool `go` has the arguments `call`; all turns have the same keys."""
    row = toolmind_row("q", {"role": "assistant", "content": "", "tool_calls": None, **turn},
                       tool_calls=[{"name": "go", "arguments": call}])
    row["conversations"][0]["tool_calls"] = None
    properties = {name: {"type": ["string", "integer"]} for name in call}
    return {**row, "tools": [{"name": "go", "parameters": {
        "type": "object", "properties": properties}}]}


MIXED = {                   # a field that holds a text in one row, and something else in another
    "an argument": ("toolmind", [go({"to": "Oslo"}), go({"to": 5}), go({"to": "5"})]),
    "content": ("toolmind", [go({"to": "Oslo"}, content=[{"type": "text", "text": "a\nb"}]),
                             go({"to": "Rome"}, content="a\nb")]),
    "a choice": ("gpqa", [gpqa_row("a", **{"Correct Answer": 3}),
                          gpqa_row("b", **{"Correct Answer": "1 eV"})]),
    "a call": ("toolmind", [go({"to": "Oslo"}), go({"from": ["Rome"]}), go({"to": {"city": 1}})])}


@pytest.mark.parametrize("field", MIXED)
def test_what_the_library_datasets_stores_as_json_in_parquet_is_decoded(tmp_path, field):
    task, rows = MIXED[field]
    plain = load(task, tmp_path / "a.jsonl", rows)
    table = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train",
                                  cache_dir=str(tmp_path))
    table.to_parquet(tmp_path / "a.parquet")
    assert "extension<arrow.json>" in str(pyarrow.parquet.read_schema(tmp_path / "a.parquet"))
    assert TASKS[task].load("test", str(tmp_path / "a.parquet")) == plain


def test_a_map_of_parquet_is_an_object(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table({"a": pyarrow.array([{"b": {"c": 1}}], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [*tasks.read_rows(str(tmp_path / "a.parquet"))] == [{"a": {"b": {"c": 1}}}]


def test_timestamps_within_a_conversation_are_refused(tmp_path):
    """Arrow's reader of JSON makes them of dates: "2024-05-01" could not be told from a time."""
    path = write(tmp_path / "a.jsonl", [go({"day": "2024-05-01"})])
    pyarrow.parquet.write_table(pyarrow.json.read_json(path), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column conversations holds timestamps: .*write them as"):
        TASKS["toolmind"].load("test", str(tmp_path / "a.parquet"))


def test_a_timestamp_beside_the_question_does_no_harm(tmp_path):
    row = {**gsm8k_row("q"), "created_at": datetime.datetime(2024, 5, 1)}
    assert keys_of(load("gsm8k", tmp_path / "a.parquet", [row])) == ["q"]


@pytest.mark.parametrize("name", ["inputs", "args", "parameter_definitions", "schema"])
def test_arguments_of_which_the_tool_shows_none_leave_the_row_out(tmp_path, name):
    """Such as where the parameters stand in a field with another name: no prompt shows them."""
    row = go({"to": "Oslo"})
    row["tools"][0][name] = row["tools"][0].pop("parameters")
    assert keys_of(load("toolmind", tmp_path / "a.jsonl", [row, toolmind_row("b")])) == ["b"]


@pytest.mark.parametrize("name", ["value", "text", "parts"])
def test_a_question_in_another_field_leaves_the_row_out(tmp_path, name):
    row = toolmind_row("a")
    row["conversations"][0] = {"role": "user", name: "a"}
    assert keys_of(load("toolmind", tmp_path / "a.jsonl", [row, toolmind_row("b")])) == ["b"]


def test_calls_may_be_written_as_before_there_were_several(tmp_path):
    """The OpenAI protocol's first way to write a call, in the history or at the end."""
    call = {"role": "assistant", "function_call": {"name": "go", "arguments": '{"to": "Oslo"}'}}
    row = go({"to": "Oslo"})
    old = {**row, "conversations": [row["conversations"][0], call, call]}
    new = {**row, "conversations": [row["conversations"][0], *[row["conversations"][-1]] * 2]}
    first, second = load("toolmind", tmp_path / "a.jsonl", [old, new])
    assert first == second and len(first.messages[1]["tool_calls"]) == 1


# The hub's file of ToolMind -----------------------------------------------------------------------


def variants(question):
    """Rows of one conversation, written in many ways: (text of a line, whether it is usable)."""
    system = {"role": "system", "content": "A \"role\": \"user\" speaks: [{"}
    call = {"role": "assistant", "tool_calls": STOP, "content": ""}
    for row in (toolmind_row(question), toolmind_row(question, call, {"role": "tool", "content": 1},
                                                     {"role": "user", "content": "other"})):
        yield json.dumps(row)
        yield json.dumps(row, ensure_ascii=False)
        yield "  " + json.dumps(row, separators=(",", ":"))
        yield json.dumps(dict(reversed(row.items())))
        turned = [dict(reversed(turn.items())) for turn in row["conversations"]]
        yield json.dumps({**row, "conversations": turned})
        yield json.dumps({**row, "conversations": [system, *turned]})
        yield json.dumps({"note": '{"conversations": [{"role": "user"', **row})
        yield json.dumps({**row, "conversations": json.dumps(turned)})
    yield json.dumps(toolmind_row([{"type": "text", "text": question}]))


def graphsyn(path, lines):
    (path / "graphsyn.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(path / "graphsyn.jsonl")


def test_conversations_stay_on_one_side_however_their_rows_are_written(tmp_path):
    lines = [line for i in range(400) for line in variants(f"A \"question\", {i}: \u00fc\u20ac?")]
    path = graphsyn(tmp_path, random.Random(0).sample(lines, len(lines)))
    train, test = (keys_of(TASKS["toolmind"].load(split, path)) for split in ("train", "test"))
    assert len(train) + len(test) == len(lines) == 17 * 400
    assert not set(train) & set(test) and 3 <= len(set(test)) <= 30


def test_the_conversations_that_are_held_out_are_always_the_same(tmp_path):
    """Three in a hundred, by the hash of the first user message."""
    path = graphsyn(tmp_path, [json.dumps(toolmind_row(f"question {i}")) for i in range(300)])
    assert sorted(keys_of(TASKS["toolmind"].load("test", path))) == [
        "question 120", "question 135", "question 261", "question 66"]


@pytest.mark.parametrize("split, most", [("train", 8192), ("test", 2000)])
def test_the_rows_that_are_used_depend_on_no_order(tmp_path, monkeypatch, split, most):
    """Also where the last line, another one then, does not end; and a smaller --limit is the
    beginning of a larger one."""
    real = tasks.key_hash
    held_out = real if split == "train" else lambda text: real(text) / 100      # all are held out
    monkeypatch.setattr(tasks, "key_hash", held_out)
    lines = [json.dumps(toolmind_row(f"question {i // 2}", {"role": "tool", "content": i}))
             for i in range(9000 if split == "train" else 2500)]
    chosen = TASKS["toolmind"].load(split, graphsyn(tmp_path, lines))
    assert len(chosen) == most and keys_of(chosen) != sorted(keys_of(chosen))
    path = graphsyn(tmp_path, random.Random(0).sample(lines, len(lines)))
    for limit in (None, most + 1, 7):
        assert TASKS["toolmind"].load(split, path, limit) == chosen[:limit]


def filled_row(**filled):
    """Two calls of a tool `go`, the first one answered. Each structure has `filled` beside its own
    fields, as Parquet's have."""
    call = {"name": "go", "arguments": {"to": "Oslo", "stop": {"at": "Bergen", **filled}, **filled}}
    row = toolmind_row("q", {"role": "assistant", "tool_calls": [call], **filled},
                       {"role": "tool", "content": {"code": 1, **filled}}, tool_calls=[call])
    text = {"type": "string", **filled}
    properties = {"to": text, "stop": {"type": "object", "properties": {"at": text, **filled}}}
    row["tools"] = [{"name": "go", **filled, "parameters": {
        "type": "object", "properties": {**properties, **filled}, **filled}}]
    return row


def parameters_as(form, row):
    tool, = row["tools"]
    return {**row, "tools": [{**tool, "parameters": form(tool["parameters"])}]}


LAYOUTS = {
    "as it is": lambda row: row,
    "tools as a text": lambda row: {**row, "tools": json.dumps(row["tools"])},
    "a tool as a text": lambda row: {**row, "tools": [*map(json.dumps, row["tools"])]},
    "parameters as a text": lambda row: parameters_as(json.dumps, row),
    "properties alone": lambda row: parameters_as(lambda schema: schema["properties"], row),
    "all as texts": lambda row: {name: json.dumps(value) for name, value in row.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_whose_structs_were_filled_with_null_are_the_same_examples(tmp_path, layout):
    """As Parquet's are once they are exported as JSON: each struct has the keys of all others. The
    prompts hold no null either."""
    plain, filled = map(LAYOUTS[layout], (filled_row(), filled_row(room=None, id=None)))
    first, second = load("toolmind", tmp_path / "a.jsonl", [plain, filled])
    assert first == second and "null" not in json.dumps([second.messages, second.tools])
    assert score("toolmind", second, hermes({"to": "Oslo", "stop": {"at": "Bergen"}}, "go")) == 1
    assert score("toolmind", second, hermes({"to": "Oslo", "stop": {"at": "Rome"}}, "go")) == 0


@pytest.mark.parametrize("filled", [{"arguments": None, "parameters": {"to": "Oslo"}},
                                    {"arguments": {"to": "Oslo"}, "function": None}])
def test_a_call_may_have_fields_that_are_null(tmp_path, filled):
    row = go({"to": "Oslo"})
    row["conversations"][-1]["tool_calls"] = [{"name": "go", **filled}]
    example, = load("toolmind", tmp_path / "a.jsonl", [row])
    assert score("toolmind", example, hermes({"to": "Oslo"}, "go")) == 1


def test_turns_and_tools_may_be_texts_of_json():
    row = toolmind_row("q")
    texts = {name: [json.dumps(item) for item in row[name]] for name in ("conversations", "tools")}
    assert tasks.toolmind_example(texts) == tasks.toolmind_example(row)


def test_the_last_line_is_chosen_like_any_other(tmp_path):
    lines = [json.dumps(toolmind_row("q", {"role": "tool", "content": i})) for i in range(20)]
    found = [TASKS["toolmind"].load("train", graphsyn(tmp_path, order))
             for order in (lines, lines[::-1], [*lines, "", " "], [line + " \r" for line in lines])]
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 20


def test_a_row_that_cannot_be_used_is_replaced_by_the_next(tmp_path, monkeypatch, capsys):
    """Broken lines are counted, and all other rows come in the same order."""
    lines = [json.dumps(toolmind_row(f"q{i}")) for i in range(30)]
    order = keys_of(TASKS["toolmind"].load("train", graphsyn(tmp_path, lines)))
    usable = [key for key in order if key not in ("q3", "q5")]
    lines[3], lines[5] = lines[3][:-9], "\\"
    path = graphsyn(tmp_path, [*lines, "[" * 10**5, '{"conversations": 7}'])
    assert keys_of(TASKS["toolmind"].load("train", path)) == usable and len(usable) == 28
    assert "28 examples, 4 rows left out" in capsys.readouterr().err
    monkeypatch.setattr(tasks, "MOST", {"train": 20})
    assert keys_of(TASKS["toolmind"].load("train", path)) == usable[:20]


def test_only_chosen_rows_are_parsed(tmp_path):
    path = graphsyn(tmp_path, [json.dumps(toolmind_row(f"q{i}")) for i in range(3000)])
    with mock.patch.object(json, "loads", wraps=json.loads) as loads:
        assert len(TASKS["toolmind"].load("train", path, 50)) == 50
    assert sum('"conversations"' in str(call) for call in loads.call_args_list) == 50


def test_under_another_name_the_same_file_is_used_whole(tmp_path, capsys):
    """Which is said, for a picture may have been trained on its rows."""
    keys = [f"q{i}" for i in range(3000)]
    rows = [toolmind_row(key) for key in keys]
    assert keys_of(load("toolmind", tmp_path / "mine.jsonl", rows)) == keys
    assert "used whole, since its name is not graphsyn.jsonl" in capsys.readouterr().err


def test_an_interrupted_read_loses_nothing(tmp_path):
    """Ctrl-C amid the hub's file, here a pipe, so that it is still read: no file is left behind, or
    changed, and the next start finds the same rows."""
    path = tmp_path / "graphsyn.jsonl"
    os.mkfifo(path)
    command = [sys.executable, ROOT / "eval.py", "none", "--task", "toolmind", "--model", TINY,
               "--data", path]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while process.poll() is None:
        try:
            pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)   # fails until it is read
            break
        except OSError:
            time.sleep(0.1)
    os.write(pipe, json.dumps(toolmind_row("q")).encode() + b"\n")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(pipe)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.endswith("interrupted\n") and os.listdir(tmp_path) == ["graphsyn.jsonl"]
