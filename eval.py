"""Score pictures as ART images: accuracy on GSM8K, GPQA or ToolMind, with intervals and paired differences.

    python eval.py best.png --task gsm8k
    python eval.py none random string:64 seed.png best.png --task gsm8k --out results.json
    python eval.py none best.png --task gsm8k --server http://localhost:8000/v1       # over the server where it will live

All arms answer the same questions, which one engine gets at once. An arm is a picture file, `none` (the text alone),
`random` (a fresh random picture for every question) or `string:N` (N fresh random text tokens for every question).
The defaults are those of the paper's published evaluation (arXiv 2606.11854): greedy, at most 512 new tokens,
presence penalty 1.0, 95 % intervals from 10,000 bootstrap resamples. art.py imports tasks and engine from here.
"""

import argparse
import atexit
import base64
import csv
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import queue
import re
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import partial
from heapq import nsmallest
from itertools import islice, repeat
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm


class InputError(Exception):
    """A wrong input. The message is one sentence: what was given, what is wrong with it, what would work."""


# ------------------------------------------------------------------------------------------------------------------
# Data: rows of a benchmark, from the hub or from a local file in the benchmark's own schema

def read_rows(path):
    """Yield the rows of a JSONL, JSON, CSV or Parquet file as dicts, one at a time. Raises InputError.

    `path` is a local file, or `hf://datasets/OWNER/NAME/FILE`, which is streamed from the Hugging Face hub.
    """
    suffix, remote = Path(path).suffix.lower(), path.startswith("hf://")
    if suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        raise InputError(f"--data {path}: the name must end in .jsonl, .json, .csv or .parquet.")
    if not remote and not os.path.isfile(path):
        raise InputError(f"--data {path}: there is no such file.")

    def lines():
        longest = 1 << 22
        while line := file.readline(longest):
            if len(line) == longest:
                raise ValueError(f"a line is longer than {longest >> 20} MiB")
            yield line.decode("utf-8-sig")

    def parsed_json(text):
        value = json.loads(text)
        if "\\u" in text:                                # a half of a surrogate pair is no text: raises a ValueError
            json.dumps(value, ensure_ascii=False).encode()
        return value
    try:
        if remote:
            from huggingface_hub import HfFileSystem
            file = io.BufferedReader(HfFileSystem().open(path, "rb"))       # its own readline() knows no limit
        else:
            file = open(path, "rb")
        with file:
            if suffix == ".parquet":
                import pyarrow.parquet
                table = pyarrow.parquet.ParquetFile(file)
                groups = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
                if table.metadata.num_columns > 1000 or max(groups, default=0) > 1 << 29:
                    raise ValueError("more than 1000 columns, or 512 MiB in a row group: write it as .jsonl")
                for batch in table.iter_batches(16):
                    if batch.nbytes > 1 << 26:              # a value that is written once may fill every row
                        raise ValueError("16 rows of more than 64 MiB")
                    yield from map(without_nulls, batch.to_pylist())
            elif suffix == ".csv":
                yield from csv.DictReader(lines(), strict=True)
            elif suffix == ".json" and file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                if file.seek(0, os.SEEK_END) > 1 << 26:
                    raise ValueError("a list of more than 64 MiB: write it as .jsonl, one object a line")
                file.seek(0)
                yield from parsed_json(file.read().decode("utf-8-sig"))
            else:                                       # many a .json holds one object a line, too
                file.seek(0)
                yield from (parsed_json(line) for line in lines() if line.strip())
    except (ValueError, RecursionError, csv.Error) as error:        # JSON, UTF-8 and most Arrow errors are ValueErrors
        raise InputError(f"--data {path}: it cannot be read as {suffix[1:]} ({first_line(error)}).") from error
    except (Exception if remote else OSError) as error:             # the hub's client: HTTP errors of several libraries
        raise hub_error(path, error) if remote else InputError(f"--data {path}: {first_line(error)}.") from error


def without_nulls(value):
    """Parquet gives all structs of a column the same keys; the ones that a row did not have are null."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def hub_error(name, error):
    """The InputError for what the Hugging Face hub or transformers raised while `name` was fetched."""
    kinds = {type(e).__name__ for e in (error, error.__cause__, error.__context__) if e is not None}
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return InputError(f"{name} is gated: ask for access on its page on the Hugging Face hub, then set HF_TOKEN.")
    if "RepositoryNotFoundError" in kinds or "is not a local folder" in str(error) or "Repo id must" in str(error):
        return InputError(f"{name} is neither a local path nor a public repository of the Hugging Face hub.")
    return InputError(f"{name} could not be fetched from the Hugging Face hub ({first_line(error)}): "
                      "connect, or give local files with --model and --data.")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def key_hash(text):
    """A number in [0, 2^64) that depends on `text` alone, so that splits survive any reordering of the rows."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True)
class Task:
    """One benchmark: where it is, how a row becomes an example, how an example is asked and judged.

    example(row)           -> dict with `key` (rows with one key never cross a split) and `target`, or why it is skipped
    messages(example)      -> (chat messages with the image first, tools or None)
    answer(example, text)  -> the answer read from a completion, comparable with `target`, or None if unreadable
    reward(example, text)  -> training reward in [0, 1], at most 0.5 for a wrong answer
    divide(examples, split, name, limit) -> the split's own examples of a file that the benchmark publishes undivided
    """
    file: str                               # on the hub
    example: Callable
    messages: Callable
    answer: Callable
    reward: Callable
    columns: tuple[str, ...]
    divide: Callable = lambda examples, split, name, limit: examples

    def load(self, split, data=None, limit=None):
        """Examples of `split` ("train" or "test"), from the hub or from the file `data`. Raises InputError.

        A local file is used whole, unless it is named as a file of the hub that needs dividing: such a copy is divided
        as the hub's is. A row that cannot be used is skipped; how many there were and why goes to stderr.
        """
        source = data or "hf://datasets/" + self.file.format(split=split)
        rows = Counter()                                            # why they are skipped, or "" -> how many

        def examples():
            for row in tqdm(read_rows(source), source, unit=" rows", disable=True if data else None):
                has = ", ".join(map(str, row)) if isinstance(row, dict) else f"no columns but a {type(row).__name__}"
                missing = [c for c in self.columns if not isinstance(row, dict) or row.get(c) in (None, "", [])]
                try:
                    example = self.example(row) if not missing else (
                        f"a row lacks {', '.join(missing)} (it has {has}); this task reads {', '.join(self.columns)}")
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                    example = f"a row is not in this task's schema ({type(error).__name__}: {first_line(error)})"
                rows[example if isinstance(example, str) else ""] += 1
                if not isinstance(example, str):
                    yield example

        found = list(islice(self.divide(examples(), split, Path(source).stem, limit), limit))
        read, others = rows.total(), rows.pop("", 0) - len(found)
        why = "".join(f"; skipped {count}: {reason}" for reason, count in rows.most_common())
        if not found:
            raise InputError(f"{'--data ' * bool(data)}{source}: it holds no example for the {split} split{why}.")
        rest = f"; {others} are not of the {split} split or over its limit" if others else ""
        print(f"{source}: used {len(found)} of {read} rows{rest}{why}", file=sys.stderr)
        return found

    def score(self, example, text):
        """1.0 if the completion's answer equals the target, else 0.0: strict, and what is reported."""
        return float(self.answer(example, text) == example["target"])


def user_turn(text, image):
    """One user turn with the image before the text, as messages for `apply_chat_template`."""
    return [{"role": "user", "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}]


def without_thought(text):
    """What stands after the last </think>; a thought that was cut off hides everything after its start."""
    text = text.strip().removesuffix("</think>")                # closed once too often, after the answer
    return text.rpartition("</think>")[2].partition("<think>")[0]


ANSWER_IS = re.compile(r"\b(?:answer|correct (?:option|choice))\b(?:[*_\s]*\n|[^\n:\uff1a=.?!\d]{0,20}?(?:\bis\b|[:\uff1a=]))"
                       r"|\\boxed\s*\{|####(?=\s*[-$\d.])", re.I)


def answers(text):
    r"""Yield what follows each "Answer:", "answer is", "\boxed{" or "####", last first, without Markdown, LaTeX and currency:
    the rest of its line, or else the next line with a word."""
    text = without_thought(text)
    end = len(text)
    for marker in reversed(list(ANSWER_IS.finditer(text))):
        tail, end = text[marker.end():min(end, marker.end() + 500)], marker.start()
        line = next((line for line in tail.splitlines() if re.search(r"\w", line)), "")
        line = re.sub(r"\\(times|cdot|div)\b", "*", re.sub(r"\{,\}|\\[,!; ]", "", line))            # 1{,}080
        line = re.sub(r"\\[td]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", line)
        yield re.sub(r"(?<!\d)\*\*(?=\S)|(?<=\S)\*\*(?!\d)|\\[a-z]+|[\\{}$\u20ac\u00a3%`\"]", "", line)


# ------------------------------------------------------------------------------------------------------------------
# GSM8K. Right is a completion whose last answer (see `answers`) is the reference number, written in digits: with or
# without currency, unit, percent sign, thousands separators, Markdown or LaTeX; 5.0 and 10/2 are 5, "9 * 2 = 18" is 18.
# Two numbers (18 or 20, 10-20, 5 dollars and 50 cents), sums not worked out, numbers in words and "not 18" are no answer.

NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-\u2212]\s?)?(?P<whole>\d{1,3}(?:[,'\u2019_\u00a0\u2009\u202f]\d{3}|[ ]\d{3}(?![-/]))+(?!\d)"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d{1,400}|(?=(?<![\w.])\.\d))(?P<decimals>\.\d{1,400})?(?:\s?/\s?(?P<below>[1-9]\d{,399}))?")
SECOND = re.compile(                                    # after a number: a sum, a range, another number
    r"[\s)]*(?:[+*\u00d7\u00f7x/^]|[-\u2013]\s)\s*\(?\d|[.'\u2019:_\u2013-](?!00\b)\d|,\s*\d|\d|e[+-]?\d|\s?[\xb2\xb3\xbc-\xbe]|"
    r"\s\d+(?:/\d|(?!\S))|\s[a-z]+,?\s\d+\s(?:min|sec|cent|inch)|[\s),]*(?:[a-z]+,?\s+)?(?:and|or|to)\s+(?:maybe\s+)?\d", re.I)


def gsm8k_example(row):
    _, marker, target = row["answer"].rpartition("####")
    target = gsm8k_answer(None, "Answer:" + target) if marker else None
    if target is None:
        return "no number after ####"
    return {"key": row["question"], "question": row["question"].strip(), "target": target}


def gsm8k_messages(example, image=True):
    return user_turn(f"{example['question']}\n\nEnd your response with: Answer: <number>", image), None


def gsm8k_answer(example, text):
    """The last answer as a Fraction; None if there is none or it is no single number."""
    for line in answers(text):
        line = re.sub(r"(\d(?:[^()]*\w)?)\s+\([^()]*\)?", r"\1", re.sub(r"^[\s*_:]*-\s+", "", line))   # no bullet, no "18 (eggs)"
        line = re.sub(r"(\d[^.;!?]*)[.;!?]\s.*", r"\1", line)                               # 18. Check: 9 * 2
        found = [number for part in reversed(re.split("[=\u2248]", line)) if (number := NUMBER.search(part))]
        for n in found:
            if not SECOND.match(n.string, n.end()) and not re.search(r"\bnot\b|n't\b", n.string[:n.start()]):
                value = Fraction((re.sub(r"\D", "", n["whole"]) or "0") + (n["decimals"] or "")) / int(n["below"] or 1)
                return -value if n["sign"] else value
        if found:
            return None


def gsm8k_reward(example, text):
    """The shaped reward of the authors' repository: near misses and readable answers earn a little."""
    value, target = gsm8k_answer(example, text), example["target"]
    if value is None:
        return 0.01 if re.search(r"\d", text) else 0.0
    error = abs(value - target) / max(abs(target), 1)
    return 1.0 if error == 0 else 0.4 if error <= 0.01 else 0.2 if error <= 0.1 else 0.1


# ------------------------------------------------------------------------------------------------------------------
# GPQA. Right is a completion whose last answer (see `answers`) names the right letter and no other: in brackets, or bare
# where the answer begins. "not (A)" names none. Without such words, a last line of nothing but the letter is an answer.
# The option's text without its letter is none, as the prompt asks for the letter.

LETTER = r"(?:[(\[]\s?[A-Da-d]\s?[)\]](?!-)|(?:A(?!\s[a-z])|[B-D])\b(?![-+=^(\u2013\u2019\u2212\u2261]\w))"
LETTERS = re.compile(rf"(?<!\w)\(\s?[A-Da-d]\s?\)(?!-)|^\W*(?i:option|choice)?\W*{LETTER}|^\W*[a-d]\W*$"
                     rf"|(?:(?<=\b[A-D])|(?<=\b[A-D][)\]]))\s*(?:[,/&+]|or|and)+\s*(?:maybe\s)?{LETTER}")
DENIED = re.compile(rf"(?:\b(?:not|neither|nor|unlike|than|instead of)|n't)\s+(?:option\s+)?{LETTER}"
                    rf"|{LETTER}\W*(?:is|are)\s(?:wrong|incorrect|not)\b")
GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gpqa_example(row):
    order = sorted(range(4), key=lambda i: key_hash(f"{row['Record ID']} {i}"))     # choice 0 is the right one
    choices = [row[column].strip() for column in GPQA_CHOICES]
    return {"key": row["Record ID"], "question": row["Question"].strip(), "choices": [choices[i] for i in order],
            "target": "ABCD"[order.index(0)]}


def gpqa_messages(example, image=True):
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", example["choices"]))
    return user_turn(f"{example['question']}\n\n{choices}\n\nEnd your response with: The correct answer is (X)", image), None


def gpqa_answer(example, text):
    """The letter of the last answer; None if there is none or more than one."""
    for line in answers(text):
        claim = re.split(r"[.;]\s|\b(?:because|since|(?<!well )as(?! well)|while|whereas|which)\b", re.sub("[*_]", "", line))[0]
        kept = DENIED.sub("", claim)                                # "not (A) but (B)"
        letters = {letter for found in LETTERS.findall(kept) for letter in re.findall(r"\b[A-D]\b", found.upper())}
        if letters or kept != claim:
            return letters.pop() if len(letters) == 1 else None
    alone = re.fullmatch(r"\W*([A-D])\W*", without_thought(text).strip().rpartition("\n")[2])
    return alone and alone[1]


def gpqa_reward(example, text):
    answer = gpqa_answer(example, text)
    return 1.0 if answer == example["target"] else 0.1 if answer else 0.0


def gpqa_halves(examples, split, name, limit):
    """Half of the records by their ids' hashes, so that 273 of gpqa_extended's 546 are held out, as in the paper.

    Only the whole file shows the middle hash. Of gpqa_main and gpqa_diamond, which are parts of it, a record is used if its
    hash is clear of every middle that 546 ids may have: 0.5 +- 0.1 is 4.7 standard deviations.
    """
    if name not in ("gpqa_extended", "gpqa_main", "gpqa_diamond"):
        return examples
    examples = sorted(examples, key=lambda e: key_hash(e["key"]))
    hashes = sorted({key_hash(e["key"]) for e in examples}) or [0]
    low, high = [hashes[len(hashes) // 2]] * 2 if name == "gpqa_extended" else (0.4 * 2**64, 0.6 * 2**64)
    return [e for e in examples if (key_hash(e["key"]) < low if split == "test" else key_hash(e["key"]) >= high)]


# ------------------------------------------------------------------------------------------------------------------
# ToolMind: the next tool call. Right are exactly the reference's calls, in any order and either dialect, closed and readable;
# text around them is free. Each has the same name and arguments: none more, none less, be it optional. The tool's schema
# decides whether "5" is a text; elsewhere "5" is 5 and 1 is 1.0. Lists keep their order. Text counts to the letter.

def text_of(content):
    """The text of a message's `content`, which is a string, a list of parts or of results, or None."""
    parts = content if isinstance(content, list) else [content or ""]
    return "\n".join(p if isinstance(p, str) else p["text"] or "" if isinstance(p, dict) and "text" in p else json.dumps(p)
                     for p in parts)


def parsed(value):
    """`value` if it is no string, else what it holds as JSON, else the string itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def tool_schema(tool):
    """A tool in the form that chat templates expect, whatever way its parameters were written down."""
    function = tool.get("function") or tool
    schema = function.get("parameters") or function.get("arguments")
    schema = schema if isinstance(schema, dict) else {}
    while isinstance(schema.get("parameters"), dict) and "type" not in schema:
        schema = schema["parameters"]                   # doubly wrapped
    if not isinstance(schema.get("properties"), dict):
        schema = {"type": "object", "properties": {k: v for k, v in schema.items() if isinstance(v, dict)}}
    return {"type": "function", "function": {"name": str(function["name"]), "parameters": schema,
                                             "description": function.get("description") or ""}}


def calls_of(turn):
    """The calls [(name, arguments)] of a conversation's turn; no arguments are {}. ValueError if they are no object."""
    functions = [call.get("function") or call for call in parsed(turn.get("tool_calls")) or []]
    return [(f["name"], dict(parsed(f.get("arguments")) or {})) for f in functions]


def toolmind_example(row):
    *history, target = parsed(row["conversations"])
    roles, messages = [turn["role"] for turn in history], []
    if "user" not in roles or "system" in roles[1:] or set(roles) - {"system", "user", "assistant", "tool"}:
        return "no user's turn, a late system message or an unknown role, which chat templates refuse"
    if not calls_of(target):
        return "the target makes no tool call"
    for turn in history:
        text = text_of(turn.get("content"))
        text = (without_thought(text) if turn["role"] == "assistant" else text).strip()
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls_of(turn)]
        messages.append({"role": turn["role"], "content": [{"type": "text", "text": text}] if text else [],
                         **({"tool_calls": calls} if calls else {})})
    tools = [tool_schema(tool) for tool in parsed(row["tools"])]
    return {"key": text_of(history[roles.index("user")].get("content")), "messages": messages, "tools": tools,
            "target": comparable(calls_of(target), tools)}


def toolmind_messages(example, image=True):
    messages = [dict(m) for m in example["messages"]]
    first = next(m for m in messages if m["role"] == "user")
    first["content"] = [{"type": "image"}] * image + first["content"]
    return messages, example["tools"]


def canonical(value, schema):
    """A tool argument in comparable form. The tool's schema decides whether "5" is a string or a number; 1 is 1.0."""
    schema = schema if isinstance(schema, dict) else {}
    for branch in schema.get("anyOf") or schema.get("oneOf") or ():
        if isinstance(branch, dict) and branch.get("type") != "null":
            return canonical(value, branch)
    if value not in (None, "None", "null") and re.match(r"(\[.*')?str(ing)?\b", str(schema.get("type")), re.I):   # or a list
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    if isinstance(value, str):
        value = {"True": True, "False": False, "None": None}.get(value, parsed(value))
    if isinstance(value, dict):
        properties = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
        return tuple(sorted((k, canonical(v, properties.get(k, schema.get("additionalProperties")))) for k, v in value.items()))
    if isinstance(value, list):
        return ("list", *(canonical(v, schema.get("items")) for v in value))
    return repr(value) if isinstance(value, bool) or value is None else value


def comparable(calls, tools):
    """Calls [(name, arguments)] as a multiset that equals another exactly when both ask for the same."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    return Counter((name, canonical(arguments, schemas.get(name))) for name, arguments in calls)


def read_calls(text):
    """The calls [(name, arguments)] in a completion, in Hermes' JSON or Qwen3.5's XML; None if one is unreadable."""
    calls = []
    for block in without_thought(text).split("<tool_call>")[1:]:
        body, closed, _ = block.partition("</tool_call>")
        xml = re.fullmatch(r"\s*<function=([^<>]+)>\s*(?:<parameter=(.*)</parameter>\s*)?</function>\s*", body, re.S)
        if xml:
            pairs = [pair.partition(">") for pair in re.split(r"</parameter>\s*<parameter=", xml[2])] if xml[2] else []
            name, arguments = xml[1], {key: value.removeprefix("\n").removesuffix("\n") for key, _, value in pairs}
            closed = closed and len(arguments) == len(pairs)                # none given twice
        else:
            call = parsed(body)
            if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "parameters" in call:
                return None
            name, arguments = call["name"], parsed(call.get("arguments")) or {}
        if not closed or not isinstance(arguments, dict):
            return None
        calls.append((name, arguments))
    return calls or None


def toolmind_answer(example, text):
    calls = read_calls(text)
    try:
        return calls and comparable(calls, example["tools"])
    except RecursionError:                                          # brackets in brackets in brackets
        return None


def toolmind_reward(example, text):
    """1 for the exact calls; else 0.1 for readable ones, 0.2 more for the right tools, up to 0.2 for right arguments."""
    answer, target = toolmind_answer(example, text), example["target"]
    if not answer or answer == target:
        return float(answer == target)
    right_tools = Counter(name for name, _ in answer.elements()) == Counter(name for name, _ in target.elements())
    pairs = [Counter((name, arg) for name, args in calls.elements() for arg in args) for calls in (answer, target)]
    overlap = (pairs[0] & pairs[1]).total() / max(1, pairs[0].total(), pairs[1].total())
    return 0.1 + (0.2 + 0.2 * overlap if right_tools else 0.0)


def toolmind_share(examples, split, name, limit):
    """Conversations whose first user message hashes into 1 % are held out. Of them the 2,000 rows with the smallest hashes
    are scored, as many as in the paper, so all of the file (2.3 GB) is read; for training, only until there are 8,192, and
    with a smaller `limit` only until it is reached."""
    if name != "graphsyn":
        return examples
    examples = (e for e in examples if (key_hash(e["key"]) % 100 == 0) == (split == "test"))
    if split == "train" or limit and limit < 2000:
        return islice(examples, 8192)
    return nsmallest(2000, examples, lambda e: key_hash(str(e["messages"])))


TASKS = {
    "gsm8k": Task("openai/gsm8k/main/{split}-00000-of-00001.parquet", gsm8k_example, gsm8k_messages, gsm8k_answer, gsm8k_reward,
                  columns=("question", "answer")),
    "gpqa": Task("Idavidrein/gpqa/gpqa_extended.csv", gpqa_example, gpqa_messages, gpqa_answer, gpqa_reward,
                 columns=("Record ID", "Question", *GPQA_CHOICES), divide=gpqa_halves),
    "toolmind": Task("Nanbeige/ToolMind/graph_syn_datasets/graphsyn.jsonl", toolmind_example, toolmind_messages, toolmind_answer,
                     toolmind_reward, columns=("conversations", "tools"), divide=toolmind_share),
}


# ------------------------------------------------------------------------------------------------------------------
# Processes: what to do when one hangs, and how several share the work

KEPT = "what was kept is whole: art.py goes on with --resume, eval.py with the same --out"


@contextmanager
def deadline(seconds, sentence):
    """End the program with `sentence` and exit code 2, whatever hangs in this block, after `seconds` of silence, or at once if a
    child process dies, which vLLM may not notice. The block gets a list, to set its only item, the silent seconds so far."""
    done, children, silent = threading.Event(), multiprocessing.active_children(), [0]

    def watch():
        while not done.wait(1):                         # counted, for a program that was suspended has not hung
            silent[0] += 1
            dead = [child.name for child in children if not child.is_alive()]
            if dead or silent[0] > seconds:
                reason = f"the process {dead[0]} died; {KEPT}." if dead else sentence
                print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr, flush=True)
                for child in children:
                    child.kill()
                os._exit(2)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield silent
    finally:
        done.set()


class Ranks:
    """The processes that torchrun started, each with a GPU, an engine and a model of its own; without torchrun, this one.

    `mine` is the part of a list that falls to this rank. Rank 0 writes and prints. They have a gloo group of their own, since
    vLLM makes torch.distributed's default group in each process. Raises InputError if a rank has no GPU, where there are some.
    """
    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.mine = slice(self.rank, None, self.size)
        if self.size > 1:
            import torch
            from torch import distributed
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if gpus:
                if local >= gpus:
                    raise InputError(f"torchrun: rank {local} of this machine has no GPU of its own, for it has {gpus}.")
                visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(gpus)))
                os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local]
            store, _, _ = next(distributed.rendezvous("env://"))
            self.group = distributed.ProcessGroupGloo(store, self.rank, self.size, timedelta(days=7))
            atexit.register(delattr, self, "group")     # its threads end before Python does, or it may abort
        if self.rank:
            sys.stdout = open(os.devnull, "w")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
            os.environ.pop(name, None)                  # vLLM would take them for its own

    def add_up(self, tensor):
        """Sum `tensor` over the ranks, in place."""
        if self.size > 1:
            total = tensor.cpu()
            self.group.allreduce([total]).wait()
            tensor.copy_(total)

    def gather(self, value):
        """The `value` of every rank, in their order."""
        if self.size == 1:
            return [value]
        import torch
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.long)
        sizes[self.rank] = len(mine)
        self.add_up(sizes)
        parts = [mine if rank == self.rank else torch.empty(size, dtype=torch.uint8) for rank, size in enumerate(sizes.tolist())]
        for rank, part in enumerate(parts):
            self.group.broadcast(part, rank).wait()
        return [pickle.loads(part.numpy().tobytes()) for part in parts]


# ------------------------------------------------------------------------------------------------------------------
# Pictures, processor, engine

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")     # EPS, for one, would run a program


def open_picture(path):
    """Any picture file as an RGB PIL image: EXIF rotation applied, transparency laid on mid-grey. Raises InputError."""
    if not os.path.isfile(path):                        # a pipe would wait for ever
        raise InputError(f"{path}: there is no such picture file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = ImageOps.exif_transpose(Image.open(path, formats=PICTURES))
            if max(picture.size) > 200 * min(picture.size):             # what processors refuse, too
                raise ValueError("one side is more than 200 times as long as the other")
            if picture.mode.startswith("I") or picture.mode == "F":         # 16-bit and float grey: PIL would clip
                grey = np.asarray(picture, dtype=np.float32)
                if not np.isfinite(grey).all():
                    raise ValueError("some of its values are not finite")
                top = 65535 if picture.mode.startswith("I;16") or grey.max() > 255 else 255 if grey.max() > 1 else 1
                picture = Image.fromarray((grey.clip(0, top) * (255 / top)).round().astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, (128, 128, 128, 255)), picture)
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: it cannot be read as a picture ({first_line(error)}).") from error


def png_bytes(picture, notes={}):
    """A PNG file, with `notes` in its text chunks. Without, it is the losslessly compressed pixels: the paper's measure of what
    they store."""
    chunks = PngInfo()
    for keyword, text in notes.items():
        chunks.add_text(keyword, str(text))
    picture.save(buffer := io.BytesIO(), "PNG", optimize=True, pnginfo=chunks)
    return buffer.getvalue()


def png_notes(path):
    """What is written in a picture file's text chunks, as printable strings by keyword; art.py writes `model`, `task` and more."""
    try:
        with Image.open(path) as picture:
            picture.load()                              # chunks may stand behind the pixels
            clean = lambda text: "".join(c if c.isprintable() else " " for c in str(text)[:10_000])         # noqa: E731
            return {clean(k): clean(v) for k, v in getattr(picture, "text", {}).items()}
    except (OSError, ValueError, SyntaxError):
        return {}


def random_picture(size, *seed):
    """A picture of independent, uniformly random 8-bit values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def load_processor(model, trust_remote_code=False):
    """The processor of `model`, a hub name or a folder. Raises InputError if it is not to be had, or has no image part."""
    from transformers import AutoConfig, AutoProcessor, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local, processor = os.path.exists(model), None
    if local and not os.path.isfile(os.path.join(model, "config.json")):
        raise InputError(f"--model {model}: it is no model folder, for it holds no config.json.")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)      # a single file: fails soon where there is no hub
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        if getattr(processor, "image_processor", None) is not None:
            with deadline(10, f"--model {model}: its chat template does not come to an end."):
                texts = [processor.apply_chat_template(user_turn("", image), tokenize=False) for image in (True, False)]
            if texts[0] == texts[1]:
                raise ValueError("the template leaves the image out")
            processor(text=texts[:1], images=[random_picture(256, 0)])
    except Exception as error:                          # a broken folder makes transformers raise anything
        if "trust_remote_code" in str(error):
            raise InputError(f"--model {model}: it brings code of its own, which art.py runs by --trust-remote-code only.") from error
        if not local:
            raise hub_error(f"--model {model}", error) from error
        if processor is not None:
            raise InputError(f"--model {model}: it cannot put an image before a text ({first_line(error)}).") from error
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"--model {model}: no image processor can be loaded from it, and ART needs a model that takes images.")
    if local and not any(name.endswith(".safetensors") for name in os.listdir(model)):
        raise InputError(f"--model {model}: it holds no .safetensors weights; pickled ones are refused, for loading them can run code.")
    return processor


def load_engine(model, max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.9, seed=0, trust_remote_code=False):
    """A vLLM engine for one image a prompt, on the GPU or, with a CPU build of vLLM, on the CPU. Raises InputError."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")               # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")       # one process: nothing is left behind when it ends
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"vLLM cannot be imported ({first_line(error)}): install requirements.txt on a machine with a "
                         "GPU, or let tests/setup.sh install a CPU build.") from error
    if current_platform.is_unspecified():
        raise InputError("this vLLM finds no device: it is a GPU build on a machine without a GPU; "
                         "let tests/setup.sh install a CPU build.")
    options = dict(gpu_memory_utilization=gpu_memory_utilization)
    if current_platform.is_cpu():
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        # In pieces, a prompt would make vLLM rewind its sampler's generator, which it cannot on a CPU.
        options = dict(enforce_eager=True, enable_prefix_caching=False, enable_chunked_prefill=False,
                       max_num_batched_tokens=max(4096, max_model_len))
        import torch
        # No C++ compiler needed, which trips over a space in the path, too: here and in the processes to come.
        torch._dynamo.config.disable = True
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    # generation_config="vllm": no sampling default of the model's own leaks into rollouts.
    try:
        return LLM(model, dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=seed,
                   generation_config="vllm", use_tqdm_on_load=False, limit_mm_per_prompt={"image": 1, "video": 0},
                   mm_processor_cache_gb=0.2,           # of the last images; each step has a new one, and 4 are the default
                   trust_remote_code=trust_remote_code, load_format="safetensors", **options)
    except Exception as error:          # too little memory, unknown architecture, broken weights: vLLM raises anything
        raise InputError(f"--model {model}: vLLM cannot start it ({' '.join(str(error).split())}).") from error


def render(processor, messages, tools):
    """The chat template's text: with the image's placeholder, up to where the model begins to answer."""
    return processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def prompt_text(processor, task, example, image=True):
    """The rendered prompt of an example."""
    return render(processor, *task.messages(example, image))


# A chat template writes the special tokens itself: a second <bos>, which a chat server's prompt has not, must not be added.
TEMPLATED = {"add_special_tokens": False}


def generate(llm, prompts, pictures, params, timeout=60):
    """Yield (i, vLLM's output) for rendered prompts, each with its PIL picture or None, as they end; all are handed over at once.
    Raises InputError if the engine fails; if it makes no step for `timeout` seconds, the program ends."""
    from vllm.sampling_params import RequestOutputKind
    engine, added = llm.llm_engine, []
    try:
        with deadline(timeout, f"vLLM hangs: it made no step in {timeout} seconds (--timeout); {KEPT}.") as silent:
            for i, (prompt, picture, each) in enumerate(zip(prompts, pictures, params, strict=True)):
                each.output_kind = RequestOutputKind.FINAL_ONLY
                image = {} if picture is None else {"multi_modal_data": {"image": picture}}
                added.append(engine.add_request(str(i), {"prompt": prompt, **image}, each, tokenization_kwargs=TEMPLATED))
                silent[0] = 0
            while engine.has_unfinished_requests():
                ended, silent[0] = engine.step(), -math.inf             # what the caller does with them takes its time
                yield from ((int(output.request_id), output) for output in ended)
                silent[0] = 0
    except Exception as error:                          # its process died, the GPU's memory is full: vLLM raises anything
        raise InputError(f"vLLM ended in the middle of its work ({first_line(error)}); {KEPT}.") from error
    finally:
        with suppress(Exception):                       # after an interrupt, nothing may be left for the next call
            engine.abort_request(added, internal=True)


def model_inputs(processor, text, image):
    """The processor's tensors for a rendered prompt with its image (PIL, or float (3, H, W) in [0, 255])."""
    return processor(text=[text], images=[image], return_tensors="pt", **TEMPLATED)


def fitting(processor, task, examples, max_tokens, picture, string=0):
    """The examples whose prompt has at most `max_tokens` tokens behind `picture`, or behind `string` random tokens if these
    are more, and does not hold the image's placeholder itself; says how many were left out."""
    tokenizer = processor.tokenizer
    ids = lambda text: tokenizer(text, **TEMPLATED)["input_ids"]                                        # noqa: E731
    bare, behind = (render(processor, user_turn("", image), None) for image in (False, True))
    expanded = model_inputs(processor, behind, picture or random_picture(256, 0))["input_ids"][0].tolist()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    placeholder = special & {*ids(behind), *expanded} - {*ids(bare)} | {
        getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    more = max(string, len(expanded) - len(ids(bare)) if picture else 0)
    prompts = [ids(prompt_text(processor, task, e, image=False)) for e in examples]
    marked, long = [not placeholder.isdisjoint(p) for p in prompts], [len(p) + more > max_tokens for p in prompts]
    kept = [e for e, *wrong in zip(examples, marked, long) if not any(wrong)]
    for left_out, why in ((marked, "their text holds the image's placeholder"), (long, "their prompts are longer than "
                          f"{max_tokens} tokens (--max-model-len less --max-new-tokens)")):
        if any(left_out):
            print(f"left out {sum(left_out)} of {len(examples)} examples: {why}", file=sys.stderr)
    if not kept:
        raise InputError(f"every prompt is longer than {max_tokens} tokens, --max-model-len less --max-new-tokens: raise it."
                         if any(long) else "every question holds the image's placeholder.")
    return kept


# ------------------------------------------------------------------------------------------------------------------
# Asking: an engine in this process, or a server

GREEDY = dict(temperature=0.0, max_tokens=512, presence_penalty=1.0, n=1)          # of the paper's published evaluation


def arm_requests(processor, task, examples, arm, rng=0, size=256):
    """What is asked for each example behind `arm`: (chat messages, tools, PIL picture or None).

    An arm is a PIL picture, "none" (the text alone), "random" (a fresh random picture for every question) or "string:N"
    (N fresh random text tokens in the picture's place, the paper's control).
    """
    requests = []
    for i, example in enumerate(examples):
        picture = random_picture(size, rng, i) if arm == "random" else None if isinstance(arm, str) else arm
        messages, tools = task.messages(example, picture is not None)
        if isinstance(arm, str) and arm.startswith("string:"):
            first = next(m for m in messages if m["role"] == "user")
            first["content"].insert(0, {"type": "text", "text": random_string(processor.tokenizer, int(arm[7:]), rng, i) + "\n\n"})
        requests.append((messages, tools, picture))
    return requests


def random_string(tokenizer, count, *seed):
    """Text of `count` random ordinary tokens that is tokenised into these again."""
    rng, ids, special = np.random.default_rng(seed), [], {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    while len(ids) < count:
        more = [*ids, int(rng.integers(len(tokenizer)))]
        if more[-1] not in special and tokenizer.encode(tokenizer.decode(more), add_special_tokens=False) == more:
            ids = more
    return tokenizer.decode(ids)


def ask_engine(llm, processor, requests, sampling=GREEDY, timeout=60):
    """Ask vLLM in this process, which gets all requests at once. Yields (i, [(text, tokens, cut)] of its samples) as they end."""
    from vllm import SamplingParams
    prompts = [render(processor, messages, tools) for messages, tools, _ in requests]
    for i, output in generate(llm, prompts, [picture for *_, picture in requests], [SamplingParams(**sampling)] * len(requests), timeout):
        yield i, [(o.text, len(o.token_ids), o.finish_reason == "length") for o in output.outputs]


def wire(messages, picture):
    """Chat messages as the OpenAI protocol has them: `picture` is a data URL, the arguments of calls are JSON text, calls and
    their results bear ids."""
    wired, ids = [], iter(())
    for message in messages:
        content = [{"type": "image_url", "image_url": {"url": picture}} if part["type"] == "image" else part
                   for part in message["content"]]
        calls = [{**call, "id": f"call-{len(wired)}-{i}",
                  "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                 for i, call in enumerate(message.get("tool_calls", []))]
        ids = iter([call["id"] for call in calls]) if calls else ids
        wired.append({"role": message["role"], "content": content, **({"tool_calls": calls} if calls else {}),
                      **({"tool_call_id": next(ids, "call")} if message["role"] == "tool" else {})})
    return wired


def connect(url, **options):
    """A client of the OpenAI-compatible server at `url`, which may neither send it elsewhere nor answer without end."""
    import openai

    def read(response):
        body = bytearray()
        for piece in response.iter_bytes():             # unpacked
            body += piece
            if len(body) > 1 << 24:
                raise ValueError("an answer of more than 16 MiB")
        response._content = bytes(body)                 # where response.read() keeps it
    client = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [read]})
    return openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), http_client=client, **options)


def ask_server(url, model, requests, sampling=GREEDY, timeout=60):
    """Ask an OpenAI-compatible server, such as vLLM's, likewise, 64 requests at a time.

    Failures are retried five times with growing pauses. The tokens of several samples are their mean. Raises InputError if
    an answer is none, or if none comes for `timeout` seconds.
    """
    client, jobs, done = connect(url, max_retries=5, timeout=600), enumerate(requests), queue.SimpleQueue()
    links = {id(p): "data:image/png;base64," + base64.b64encode(png_bytes(p)).decode() for _, _, p in requests if p is not None}

    def ask(messages, tools, picture):
        # Calls are read from the text, as in process: the server is not to parse them.
        response = client.chat.completions.create(
            model=model, messages=wire(messages, links.get(id(picture))), top_p=1.0, **sampling,
            **({"tools": tools, "tool_choice": "none"} if tools else {}),
            # The server would take what is not said from the model's generation_config.
            extra_body={"chat_template_kwargs": {"enable_thinking": False}, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0})
        if len(response.choices) != sampling["n"]:
            raise ValueError(f"{len(response.choices)} choices for {sampling['n']}")
        return [(c.message.content or "", response.usage.completion_tokens / sampling["n"], c.finish_reason == "length")
                for c in response.choices]

    def work():
        for i, request in jobs:                         # which the threads share: each takes the next
            try:
                done.put((i, ask(*request)))
            except Exception as error:
                done.put((i, error))
    for _ in range(64):                                 # daemons, which no request that hangs can keep from ending
        threading.Thread(target=work, daemon=True).start()
    for _ in requests:
        try:
            i, samples = done.get(timeout=timeout)
        except queue.Empty:
            raise InputError(f"--server {url}: no request was done in {timeout} seconds (--timeout); {KEPT}.") from None
        if isinstance(samples, Exception):              # answers of another shape make anything of a client
            raise InputError(f"--server {url}: it gives no completions of {model} ({first_line(samples)}); {KEPT}.") from samples
        yield i, samples


def served_model(url):
    """The name of the model that an OpenAI-compatible server serves. Raises InputError."""
    try:
        with deadline(25, f"--server {url}: it does not say in 25 seconds which model it serves."):
            return connect(url, max_retries=2, timeout=6).models.list().data[0].id
    except Exception as error:                          # answers of another shape make anything of a client
        raise InputError(f"--server {url}: no OpenAI-compatible server answers there ({first_line(error)}).") from error


# ------------------------------------------------------------------------------------------------------------------
# Scores

def judge(task, example, samples):
    """{key, text, tokens, cut, score, readable} of the completions [(text, tokens, cut)] of an example: lists of one value a sample."""
    texts, tokens, cut = map(list, zip(*samples))
    return {"key": example["key"], "text": texts, "tokens": tokens, "cut": cut, "score": [task.score(example, t) for t in texts],
            "readable": [task.answer(example, t) is not None for t in texts]}


def evaluate(llm, processor, task, examples, arm, max_new_tokens=512, timeout=60):
    """Greedy completions of `examples` behind `arm` and their scores, as `judge` gives them."""
    asked = ask_engine(llm, processor, arm_requests(processor, task, examples, arm), {**GREEDY, "max_tokens": max_new_tokens}, timeout)
    return [judge(task, examples[i], samples) for i, samples in sorted(asked, key=lambda each: each[0])]


def bootstrap_interval(scores, keys=None):
    """Mean of `scores` (n,), and the 95 % percentile interval of 10,000 bootstrap resamples; rows with one of `keys` are drawn
    together."""
    scores, rng, index = np.asarray(scores, dtype=float), np.random.default_rng(0), {}
    cluster = [index.setdefault(key, len(index)) for key in (range(len(scores)) if keys is None else keys)]
    totals, sizes = np.bincount(cluster, scores), np.bincount(cluster)
    draws = (rng.integers(0, len(totals), (100, len(totals))) for _ in range(100))
    means = np.concatenate([totals[d].sum(1) / sizes[d].sum(1) for d in draws])
    return scores.mean(), *np.quantile(means, [0.025, 0.975])


def mcnemar(scores, baseline, keys):
    """Exact two-sided p-value of two arms' scores (0 or 1) on the same questions: the sign test of those that differ. Rows with
    the same key count as one, by the sign of their summed difference."""
    difference = Counter()
    for key, score, other in zip(keys, scores, baseline):
        difference[key] += score - other
    won, lost = sum(d > 0 for d in difference.values()), sum(d < 0 for d in difference.values())
    return min(1.0, 2 * sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1)) / 2 ** (won + lost))


def report(task, arms, baseline=None):
    """Print the table of a task's `arms`, {name: {"bytes": of its pixels or None, "results": by `judge`}}, and their paired
    differences to `baseline` (None: the first)."""
    first = baseline if baseline in arms else next(iter(arms))
    keys, samples = [r["key"] for r in arms[first]["results"]], len(arms[first]["results"][0]["score"])
    mean = {arm: [float(np.mean(r["score"])) for r in a["results"]] for arm, a in arms.items()}
    width = max(map(len, [*arms, f"less {first}"]))
    print(f"\n{f'{task}, n = {len(keys)}':{width}}  accuracy %  95 % interval   " + f"pass@{samples} %  " * (samples > 1)
          + "tokens  unreadable %  cut %  PNG bytes")
    for arm, a in arms.items():
        accuracy, low, high = (100 * x for x in bootstrap_interval(mean[arm], keys))
        passed = f"{100 * np.mean([max(r['score']) for r in a['results']]):8.2f}  " if samples > 1 else ""
        tokens, readable, cut = (np.mean([r[k] for r in a["results"]]) for k in ("tokens", "readable", "cut"))
        print(f"{arm:{width}}  {accuracy:10.2f}  [{low:6.2f}, {high:6.2f}]  {passed}{tokens:6.1f}  {100 * (1 - readable):12.1f}  "
              f"{100 * cut:5.1f}  {a['bytes'] or '-':>9}")
    others = [arm for arm in arms if arm != first]
    if others:
        print(f"{f'less {first}':{width}}      points  95 % interval     McNemar p")
    for arm in others:
        points, low, high = (100 * x for x in bootstrap_interval(np.subtract(mean[arm], mean[first]), keys))
        print(f"{arm:{width}}  {points:+10.2f}  [{low:+6.2f}, {high:+6.2f}]  "
              + (f"{mcnemar(mean[arm], mean[first], keys):10.2g}" if samples == 1 else f"{'-':>10}"))


# ------------------------------------------------------------------------------------------------------------------
# Files and the command line

def save(data, path):
    """Write bytes whole or not at all: no kill or full disk leaves a broken file. Raises InputError."""
    unfinished = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: it cannot be written ({error.strerror}); what was there before is whole.") from error


def at_least(low, kind=int, high=2**31):
    """An argparse type: a number that is neither below `low` nor above `high`, and not nan."""
    def number(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    # argparse: "invalid number (at least 1) value: '0'"
    number.__name__ = f"number (at least {low})" + f" (at most {high})" * (high != 2**31)
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def exit_with(main):
    """Run a command line: a wrong input ends it with one sentence and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")       # a path may hold what the terminal cannot show
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def read_results(path):
    """What an earlier call with --out `path` kept, or an empty frame. Raises InputError."""
    try:
        saved = json.loads(Path(path).read_text()) if path and Path(path).exists() else {"settings": {}, "tasks": {}}
        saved["settings"] = dict(saved["settings"])
        if not all(a["results"] and "questions" in a for arms in saved["tasks"].values() for a in arms.values()):
            raise ValueError("an arm without results")
        return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--out {path}: it is no file of results ({first_line(error)}); name another.") from error


def keep_results(saved, path):
    if path:
        save(json.dumps(saved).encode(), path)


def score_arms(args, arms, pictures, saved, ranks):
    """Ask what `saved` does not hold yet of all `arms`, all at once, and add it; --out gets what is done every ten seconds.

    Other ranks than the first keep theirs in files beside it, until it holds all; what they held when they were killed counts.
    """
    def own_files():
        files = Path(args.out).parent.glob(glob.escape(Path(args.out).name) + ".rank*") if args.out else ()
        return [file for file in files if (rank := file.suffix[5:]).isdecimal() and int(rank) % ranks.size == ranks.rank]
    parts = [part for own in ranks.gather([*map(read_results, own_files())]) for part in own if part["settings"] == saved["settings"]]
    keep = partial(keep_results, saved, args.out and args.out + (f".rank{ranks.rank}" if ranks.rank else ""))
    if not saved["tasks"] and not parts:
        keep()                                          # that it cannot be written is said before the work
    sampling = dict(temperature=args.temperature, max_tokens=args.max_new_tokens, presence_penalty=args.presence_penalty,
                    n=args.samples)
    served = args.server and served_model(args.server)
    processor = load_processor(args.model or served, args.trust_remote_code)
    pictures_seen = [random_picture(args.size, 0) if arm == "random" else arm for arm in arms.values()]
    largest = max((p for p in pictures_seen if isinstance(p, Image.Image)), key=lambda p: p.width * p.height, default=None)
    string = max(int(name[7:]) + 2 if name.startswith("string:") else 0 for name in arms)
    examples, todo = {}, []
    for task, data in zip(args.task, args.data or repeat(None)):
        examples[task] = fitting(processor, TASKS[task], TASKS[task].load("test", data, args.limit),
                                 args.max_model_len - args.max_new_tokens, largest, string)
        held, questions = saved["tasks"].setdefault(task, {}), f"{key_hash(repr(examples[task])):x}"
        if len({*ranks.gather(questions)}) > 1:
            raise InputError(f"--task {task}: the ranks have different questions; give all of them the same data and flags.")
        if any(a["questions"] != questions for a in held.values()):
            raise InputError(f"--out {args.out}: its arms answered other questions of {task} (other data, or other prompts that were "
                             "too long): name another file.")
        for name in arms:
            if name not in held or held[name]["sha256"] != pictures[name]["sha256"]:
                held[name] = {**pictures[name], "questions": questions, "results": [None] * len(examples[task])}
            for other in (part["tasks"].get(task, {}).get(name, {}) for part in parts):
                if {**other, "results": 0} == {**held[name], "results": 0}:         # the same picture and questions
                    held[name]["results"] = [a or b for a, b in zip(held[name]["results"], other["results"])]
            if None in held[name]["results"]:
                requests = arm_requests(processor, TASKS[task], examples[task], arms[name], args.rng, args.size)
                todo += [(task, name, i, request) for i, request in enumerate(requests) if held[name]["results"][i] is None]
    mine, completions, kept_at, fresh = todo[ranks.mine], (), time.monotonic(), False
    ask = [request for *_, request in mine], sampling, args.timeout
    if args.server:
        completions = ask_server(args.server, served, *ask)
    elif mine:
        llm = load_engine(args.model, args.max_model_len, gpu_memory_utilization=args.gpu_memory_utilization,
                          trust_remote_code=args.trust_remote_code)
        completions = ask_engine(llm, processor, *ask)
    try:
        for place, samples in tqdm(completions, total=len(mine), unit=" questions", disable=ranks.rank > 0 or not mine or None):
            task, name, i, _ = mine[place]
            saved["tasks"][task][name]["results"][i] = judge(TASKS[task], examples[task][i], samples)
            fresh = True
            if time.monotonic() > kept_at + 10:
                keep()
                kept_at = time.monotonic()
    finally:
        if fresh:
            keep()
    for part in ranks.gather([(task, name, i, saved["tasks"][task][name]["results"][i]) for task, name, i, _ in mine]):
        for task, name, i, result in part:
            saved["tasks"][task][name]["results"][i] = result
    if not ranks.rank and (parts or ranks.size > 1):
        keep()
    ranks.gather("the first has kept all")
    for file in own_files():
        file.unlink()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("arms", nargs="*", metavar="ARM", help="a picture file, `none`, `random` or `string:N`")
    add("--task", nargs="+", choices=TASKS, help="default: the one written in the first picture")
    add("--model", help="hub name or folder (default: the server's, or the one in the first picture, or Qwen/Qwen3.5-0.8B)")
    add("--data", nargs="+", help="local .jsonl, .json, .csv or .parquet in the benchmark's own schema, one for each task")
    add("--server", metavar="URL", help="score over an OpenAI-compatible server, for instance http://localhost:8000/v1")
    add("--out", help="JSON file that keeps every completion; what it holds is not asked again")
    add("--baseline", metavar="ARM", help="the arm that the others are compared with (default: the first)")
    add("--info", action="store_true", help="only show what is written in the pictures")
    add("--limit", type=at_least(1), help="score the first LIMIT questions only")
    add("--samples", type=at_least(1), default=1, help="completions of each question; more than one need a --temperature")
    add("--temperature", type=at_least(0, float, 2), default=0.0, help="0 is greedy")
    add("--size", type=at_least(1, high=2048), help="side of the `random` pictures in pixels (default: the first picture's, or 256)")
    add("--rng", type=at_least(0), default=0, help="random number seed of the `random` and `string` arms")
    add("--max-new-tokens", type=at_least(1), default=512, help="tokens after which a completion is cut off")
    add("--max-model-len", type=at_least(1), default=4096, help="most tokens of prompt and completion; longer prompts are left out")
    add("--presence-penalty", type=at_least(-2, float, 2), default=1.0, help="1.0 as in the paper's evaluation")
    add("--gpu-memory-utilization", type=at_least(0, float, 1), default=0.9, help="vLLM's share of the GPU")
    add("--timeout", type=at_least(1), default=60, help="seconds without a step of the engine or an answer of the server that end "
        "the program; give a large model on a CPU more")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser.parse_args()


def main(args):
    ranks = Ranks()
    saved = ranks.gather(None if ranks.rank else read_results(args.out))[0]
    arms = {name: name if re.fullmatch(r"none|random|string:[1-9]\d{0,3}", name) else open_picture(name) for name in args.arms}
    # Of each arm: bytes and hash of its pixels, None where it has none of its own
    of_pixels = {name: {"bytes": len(png_bytes(arm)), "sha256": hashlib.sha256(arm.tobytes()).hexdigest()}
                 if isinstance(arm, Image.Image) else {"bytes": None, "sha256": None} for name, arm in arms.items()}
    files = [name for name, arm in arms.items() if isinstance(arm, Image.Image)]
    if args.info:
        for name in files:
            print(f"{name}: {arms[name].width} x {arms[name].height}, {os.path.getsize(name)} bytes, "
                  f"{of_pixels[name]['bytes']} of them pixels")
            for key, value in png_notes(name).items():
                print(f"  {key}: {value}")
        return
    if args.baseline and args.baseline not in set(arms).union(*saved["tasks"].values()):
        raise InputError(f"--baseline {args.baseline}: it is none of the arms.")
    if arms:
        notes = next(map(png_notes, files), {})
        args.task = args.task or [notes.get("task")]
        if args.task[0] not in TASKS:
            raise InputError(f"--task is missing, and no picture tells its task: choose among {', '.join(TASKS)}.")
        if len({*args.task}) < len(args.task):
            raise InputError(f"--task {' '.join(args.task)}: one is named twice.")
        if args.data and len(args.data) != len(args.task):
            raise InputError(f"--data: {len(args.data)} files for {len(args.task)} tasks; give one for each task, in their order.")
        if args.samples > 1 and not args.temperature:
            raise InputError("--samples: greedy completions are all the same; give a --temperature, for instance 1.")
        args.model = args.model or (None if args.server else notes.get("model") or "Qwen/Qwen3.5-0.8B")
        args.size = args.size or min(2048, next((arms[name].width for name in files), 256))
        settings = {k: getattr(args, k) for k in ("model", "server", "samples", "temperature", "size", "rng", "max_new_tokens",
                                                  "max_model_len", "presence_penalty")}
        if saved["tasks"] and saved["settings"] != settings:
            raise InputError(f"--out {args.out}: its scores were made with other settings ({saved['settings']}): name another file.")
        saved["settings"] = settings
        score_arms(args, arms, of_pixels, saved, ranks)
    if not saved["tasks"]:
        raise InputError("no arm is given: name a picture file, none, random or string:N, or an --out file with scores.")
    print(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in saved["settings"].items() if v is not None))
    for name in files:
        if notes := png_notes(name):
            print(f"{name}: " + ", ".join(f"{k} {notes[k]}" for k in ("model", "task", "step", "validation") if k in notes))
    for task, held in saved["tasks"].items():
        for name in [name for name, a in held.items() if None in a["results"]]:
            print(f"{task}, {name}: {held.pop(name)['results'].count(None)} questions have no answer yet: repeat the call that asked them",
                  file=sys.stderr)
        if held:
            report(task, held, args.baseline or next(iter(arms), None))


if __name__ == "__main__":
    exit_with(lambda: main(parse_args()))
