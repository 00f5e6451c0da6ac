"""Rows in the benchmarks' own schemas, and files of them."""

import json

import pandas
import pyarrow.parquet

from eval import TASKS


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


def gsm8k_row(question, answer="#### 1"):
    return {"question": question, "answer": answer}


def gpqa_row(key, **other):
    return {"Record ID": key, "Question": f"Question {key}?", "Correct Answer": "right",
            **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}, **other}


STOP = [{"function": {"name": "stop", "arguments": None}}]


def toolmind_row(question, *later, **target):
    """A user's question, turns after it, and a call of `stop`, or another target."""
    turns = [{"role": "user", "content": question}, *later,
             {"role": "assistant", "content": "", **(target or {"tool_calls": STOP})}]
    return {"conversations": turns, "tools": [{"function": {"name": "stop"}}]}


def hermes(arguments, name="book"):
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(arguments, name="book"):
    """As Qwen3.5's chat template writes a call."""
    parameters = ""
    for key, value in arguments.items():
        value = value if isinstance(value, str) else json.dumps(value)
        parameters += f"<parameter={key}>\n{value}\n</parameter>\n"
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
