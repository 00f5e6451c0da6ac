"""Score pictures as ART images: accuracy on GSM8K, GPQA or ToolMind, with intervals.

    python eval.py none random string:64 seed.png best.png --task gsm8k --out completions.jsonl
    python eval.py none best.png --task gsm8k --server http://localhost:8000/v1

All arms answer the same questions. An arm is a picture file, `none` (the text alone), `random` (a
fresh random picture for each question) or `string:N` (N fresh random text tokens for each).
Sampling and token limits are by default those of the paper's published evaluation (arXiv
2606.11854). Its splits are not published. Prompts that are too long are left out here; there they
count as wrong.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial, reduce
from operator import getitem
from pathlib import Path
from types import NoneType

import numpy as np
import pandas
import pyarrow.parquet
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


class InputError(Exception):
    """A wrong input. The message is one sentence: what was given, what is wrong, what to do."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".:") or type(error).__name__


@contextmanager
def explained(fact: str, remedy: str):
    """Turn any error inside into an InputError: "fact (the error's text): remedy."."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{fact} ({one_line(error)}): {remedy}.") from error


def check_range(name: str, value, low: float, high: float):
    """Raise InputError for a flag's number outside of its range, or nan."""
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise InputError(f"--{name.replace('_', '-')} {value}: give a number from {low} to {high}.")


# Tasks --------------------------------------------------------------------------------------------

HUB = "connect to the Hugging Face hub or, if it is gated, ask for access there and set HF_TOKEN"
# So many rows of a divided file are used at most. The paper tests ToolMind on 2,000.
MOST = {"train": 8192, "test": 2000}


@dataclass(frozen=True)
class Example:
    """One question.

    key: what names it; rows of one key, such as those of one conversation, never cross a split
    messages: chat messages, without the image; `user_turn` makes those of a plain question
    target: what `Task.answer` returns for a right answer
    tools: the tools that the chat template is given
    """
    key: str
    messages: list[dict]
    target: object
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark: how a row becomes a question, and how a completion is judged. For another way
    of judging, or other training rewards, override `judge` or `rewards`.

    example: row -> Example; any error that it raises leaves the row out
    answer: (example, text of a completion) -> the answer that it gives, or None if none is readable
    hub: "repository file" on the Hugging Face hub; {split} in it becomes "train" or "test"
    paper_answer: text -> the answer by the authors' own rule, reported beside ours
    divide: (path, split) -> the rows of the split, where the hub has one file for all
    """
    example: Callable[[dict], Example]
    answer: Callable[[Example, str], object]
    hub: str = ""
    paper_answer: Callable[[str], object] | None = None
    divide: Callable[[str, str], Iterator[dict]] | None = None

    def load(self, split: str, data: str | None = None, limit: int | None = None) -> list[Example]:
        """The first `limit` Examples of `split`, "train" or "test". A local file `data` is used
        whole, unless it is named like the hub's file of a task with `divide`. Raises InputError."""
        from huggingface_hub import hf_hub_download
        name = self.hub.format(split=split)
        if not (name or data):
            raise InputError("--data: this task has no file on the hub; give a local one.")
        with explained(f"{name} cannot be read", f"{HUB}, or give --data"):
            path = hf_hub_download(*name.split(), repo_type="dataset") if data is None else data
        rows, whole = read_rows(path), ""
        if self.divide and Path(path).name in re.split("[ /]", name):
            rows, limit = self.divide(path, split), min(limit or MOST[split], MOST[split])
        elif self.divide:
            whole = (f"; it is used whole, since its name is not {Path(name).name.split()[-1]}: "
                     "it may hold rows of the other split")
        examples, errors = [], []
        remedy = "mend it, or give a .jsonl, .csv or .parquet file"
        with explained(f"--data {path}: it cannot be read", remedy), closing(rows):
            for row in rows:
                try:
                    if not isinstance(row, dict):
                        raise TypeError("a row is one JSON object in one line")
                    examples.append(self.example(row))
                except Exception as error:              # a row may lack anything, in any form
                    errors.append(f"{type(error).__name__}: {one_line(error)}")
                if len(examples) == limit:
                    break
        print(f"{path}: {len(examples)} examples, {len(errors)} rows left out{whole}",
              file=sys.stderr)
        if not examples:
            raise InputError(f"--data {path}: no row is usable ({[*errors, 'empty split'][0]}).")
        return examples

    def check(self, processor):
        """Raise InputError if completions of the model with this processor cannot be judged."""

    def judge(self, examples: list[Example], texts: list[str]) -> list[tuple[object, float]]:
        """(answer, score) of each text, a completion of the example at its place. Strict, and what
        is reported: 1.0 if the answer equals the target, else 0.0. It is called once for all
        completions of a sampling round or an arm, so that a subclass may judge them at once, by
        threads or by a model, or may give graded scores."""
        answers = [self.answer(example, text) for example, text in zip(examples, texts)]
        return [(answer, float(answer == example.target))
                for example, answer in zip(examples, answers)]

    def rewards(self, example: Example, completions: list) -> list[float]:
        """Training rewards of a group of completions of one example: art.Completions, which have
        their `text`, `ids`, `answer` and `score` by now. Here the reward is the score."""
        return [completion.score for completion in completions]


def without_none(struct: dict) -> dict:
    """Without the fields that are None. Parquet gives all structs of a column the same fields, and
    so has JSON that was exported from it: those that a row lacks are null."""
    return {name: value for name, value in struct.items() if value is not None}


def read_json(text: str):
    """A row of JSON. NaN and Infinity, which JSON does not have, are null, and null is no field."""
    return json.loads(text, object_hook=without_none, parse_constant=lambda name: None)


def read_rows(path: str) -> Iterator[dict]:
    """The rows of a .jsonl, .csv or .parquet file. Raises an error that names the broken line."""
    if str(path).lower().endswith(".csv"):
        yield from read_csv(path)
    elif str(path).lower().endswith(".parquet"):
        yield from read_parquet(path)
    else:
        yield from read_jsonl(path)


def read_jsonl(path: str) -> Iterator[dict]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            text = line.decode("utf-8-sig").strip()
            rows = [read_json(text)] if text else []
        except json.JSONDecodeError as error:           # its own line number is always 1
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        yield from rows


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, beside a bar that shows how much of it is read."""
    bar = tqdm(desc=Path(path).name, total=os.path.getsize(path), unit="B", unit_scale=True,
               disable=None)
    with open(path, "rb") as file, bar:
        for line in file:
            yield line
            bar.update(len(line))


def read_csv(path: str) -> Iterator[dict]:
    csv.field_size_limit(10**9)                         # a conversation with its tools is long
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise csv.Error("it has more fields than the header")
                yield row
        except csv.Error as error:
            raise ValueError(f"line {rows.reader.line_num}: {error}; quotes in a CSV field are "
                             "doubled") from error


def read_parquet(path: str) -> Iterator[dict]:
    table = pyarrow.parquet.read_table(path)
    kind = pyarrow.struct(table.schema)                 # of a row
    for column in kind:
        if pyarrow.types.is_nested(column.type) and "timestamp[" in str(column.type):
            raise ValueError(f"its column {column.name} holds timestamps: how they were written "
                             "before is lost; write them as text, or leave the column out")
    for batch in table.to_batches():
        rows = [decoded(row, kind) for row in batch.to_pylist(maps_as_pydicts="strict")]
        yield from read_json(json.dumps(rows, default=json_value))


def decoded(value, kind):
    """A value of the Arrow type `kind`, with what this marks as JSON decoded, at any depth. (The
    library datasets stores a field so if it is a text in one row and a number in another.)"""
    if isinstance(value, str):
        return json.loads(value) if isinstance(kind, pyarrow.JsonType) else value
    if isinstance(value, list):
        return [decoded(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        is_map = pyarrow.types.is_map(kind)
        return {name: decoded(item, kind.item_type if is_map else kind.field(name).type)
                for name, item in value.items()}
    return value


def json_value(value) -> str | None:
    """What Parquet has and JSON has not: bytes of UTF-8 are text; dates and decimals become it."""
    with suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else str(value)


def field_text(value) -> str:
    """A row's field as text. Raises ValueError unless it is a text or a finite number."""
    if isinstance(value, str):
        return value
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"a field is neither text nor a number: {str(value)[:40]}")
    return str(value)


def key_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: splits survive any order of the rows."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def user_turn(text: str) -> list[dict]:
    """The messages of a question without a history."""
    text.encode()                                       # raises for lone surrogates, and for bytes
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


# What a completion gives as its answer ------------------------------------------------------------
# Marks in the format that the prompt asks for are read first: for GSM8K "Answer: 18", for GPQA "The
# correct answer is (B)". Only without a readable one do the other marks count, and of one kind the
# last one counts. tests/test_scorers.py has an answer for each part of the patterns.

VERB = r"""
    (?: (?!n[o']t\b) [^\n:=.?!\d] ){0,45}?          # "answer to the question is"
    \b(?:is|be)\b (?!\W*(?:not|neither)\b)          # but "answer is not" is no mark
    """
CORRECT = re.compile(r"""(?ix)
    (?<!what\sthe\s)(?<!which\s)                   # but "see what the correct answer is" is no mark
    \b correct\s(?:answer|option|choice)\b""" + VERB)
COLON = re.compile(r"""(?mx)
    (?<![A-Za-z])(?:Answer|ANSWER)(?:\s\([^()\n]*\))?           # "Answer (in dollars): 18"
    [*_\s]* (?:[:=]|[-\u2014][*\s])                 # "**Answer**: 18", "Answer - 18"
    | <(?i:(?:final_)?answer)>                      # "<answer>18</answer>"
    | ^[#*_ ]{0,9} (?:\w+\ )?(?i:answer) [*_ \r]*$  # "## Final answer", and 18 below it
    """)
OTHER = re.compile(r"(?imx) (?<![a-z])(?:answer|correct\s(?:option|choice))\b (?:" + VERB + r"""
        | (?:\s(?:in|to)\s[\w ]{1,30})? [*_\s]* : ) # "the answer: 18", "answer in dollars: 18"
    | (?<!-)(?=-?\\boxed\b)                         # "\boxed{18}", "-\boxed{18}"
    | <\|begin_of_box\|>                            # "<|begin_of_box|>18<|end_of_box|>", as GLM's
    | ^\#{4}(?=[^\w\n]*\d)                          # "#### 18", as GSM8K's own solutions end
    """)

TYPOGRAPHY = str.maketrans("\u2010\u2011\u2012\u2013\u2212\u2019\uff1a", "-----':")
FRACTION = re.compile(r"""(?x)                      # "\dfrac{1}{2}", "\frac12"; not "3\frac12"
    (?<!\d)\\[cdt]?frac\s* (?:\{\s*(-?[\d.,]+)\s*\}|(\d)) \s*(?:\{\s*(\d+)\s*\}|(\d))
    """)
MARKUP = re.compile(r"""(?imx)
    \\(?:text|math|bold)[a-z]*\b                    # "18\text{ m}", "\boldsymbol{18}"
    | \\(?:[fhm]?box|boxed|left|right|q?quad|degree)\b          # "18\quad", "18\mbox{ m}"
    | \\(?:displaystyle|underline|color|large|huge|emph|bf|bm|rm)\b     # "\bf 18"
    | </?(?-i:b|i|em|strong|span)>                  # "<b>18</b>", but not "<B>"
    | <\|(?:begin|end)_of_box\|>                    # the same box after "Answer:"
    | \\[][] | \\(?:begin|end)\{[^{}\n]*\}          # "\[ 18 \]", "\begin{align*}"
    | \^\s*\{?\s*\\circ\b                           # "60^\circ"
    | ```\w*$ | [*`]                                # "```text", and 18 below it; "**18**"
    | (?<=\n)[ \t]*(?:[-\u2022]\s|1[.)]\s(?=[*_]*\w))        # "- 18", "1. **Eggs**" in a list below
    """)
INVISIBLE = re.compile(r'(?i)\\[,!;: ]|\\(?![a-z])|[{}"$\u20ac\u00a3\u00a5%_]')  # "1\,080", "50\%"


def without_thought(text: str) -> str:
    """What stands after the last </think> and before a thought that was cut off."""
    text = text.strip().removesuffix("</think>")        # some close a thought again at the very end
    return text.rpartition("</think>")[2].partition("<think>")[0]


def opened_thought(prompt: str) -> str:
    """"<think>" if the chat template opens a thought, as that of Qwen3-VL-Thinking does. It belongs
    to the completion, so that one which is cut off within the thought gives no answer."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def claims(text: str, mark: re.Pattern) -> Iterator[tuple[int, str]]:
    """(position, claim) of each mark, the last one first: its claim is the first line with a letter
    or digit in the 300 characters after it, without markup."""
    text = without_thought(text).translate(TYPOGRAPHY)
    for found in reversed(list(mark.finditer(text))):
        claim = FRACTION.sub(r"\1\2/\3\4 ", text[found.end():found.end() + 300])
        claim = INVISIBLE.sub("", MARKUP.sub(" ", claim))
        lines = [line for line in claim.splitlines() if re.search(r"\w", line)]
        yield found.start(), (lines or [""])[0]


# GSM8K --------------------------------------------------------------------------------------------
# What counts is the first run of digits and signs, right of the line's last "=" and up to a bracket
# or the sentence's end. It must be one number: "18 + 2", "18-20" and "18^2" are none. From the last
# "Answer:" on, a line that begins with one number counts before the others: "Answer: She sells
# 16 - 7 = 9 eggs", more steps, and "\boxed{18}" below give 18. So does the text's last line if it
# concludes: "Therefore she makes 18."

REMARK = re.compile(r"""(?x) ^(\D*\d.*?)           # what stands before a remark
    (?: (?<=\w)\s+\( | [.!?;](?:\s|$)               # "18 (= 9 * 2)", "18. So", "18; that is"
        | \s(?:because|since)\b                     # "18 because 3 + 4 = 7"
        | \s-\s(?=[A-Za-z]{3}) ) .*                 # "18 - She has 3 + 4 = 7"
    """)
EQUALS = re.compile(r"(?i)=|\u2248|\u2192|\u21d2|\\(?:approx|to|implies|rightarrow)\b|\bequals?\b")
NEGATIVE = re.compile(r"(?i)\b(?:negative|minus)\s(?=\d)")                  # "minus 7"
ROUGHLY = re.compile(r"(?i)\b(?:about|around|approximately|roughly)\s(?=\W?\d)")        # "about 18"
CONCLUSION = re.compile(r"""(?imx) ^[^\w\n]*            # "**Therefore**, she makes 18."
    (?:so|thus|hence|therefore|consequently|finally|altogether|overall|in\ (?:total|conclusion)
        |(?:the\ )?(?:final\ )?(?:total|result))\b (?=[^\n]*\d[^\n]*\Z)
    | ^(?=[^\w\n]*-?[\d.,]+\W*\Z)                  # "**18**"
    """)
RUN = re.compile(r"""(?ix)
    (?: (?:^\s*-\s* | (?<![\w)])-) (?=\.?\d)        # "- 7", "a loss of -7", but not "5-7"
        | \d | (?<!\w)\.\d | [\^\u221a] | \\[a-z]+ | sqrt )                 # "18", "\sqrt{324}"
    (?: (?:x|e|times|plus|(?:divided|multiplied)\ by)(?=\s?\d)              # "18e3", "9 times 2"
        | \\[a-z]+                                  # "18 \times 2"
        | (?!\\)[\W\d\u00b2\u00b3\u00bc-\u00be\u2070-\u209f\u2150-\u218f] )*  # "18-20", "18\u00b2"
    """)
NUMBER = re.compile(r"""(?x)
    ( -?\s* (?=\.?\d) (?:\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+ | \d{0,400})         # "-1,080"
      (?:\.\d{1,400})? (?:\s?/\s?[1-9]\d{0,399})? )                         # ".5", "36/2"
    [^\w^]*                                         # "18."
    """)


def gsm8k_example(row: dict) -> Example:
    """A row {"question", "answer": "... #### 18"}."""
    question, answer = field_text(row["question"]), field_text(row["answer"])
    number = answer.rpartition("####")[2].strip()       # of "He pays 2 * 540.\n#### 1,080"
    if "," in number and not re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", number):
        raise ValueError(f"a comma that does not part thousands: {number}")
    if not question.strip():
        raise ValueError("it lacks its question")
    prompt = f"{question.strip()}\n\nEnd your response with: Answer: <number>"
    return Example(question, user_turn(prompt), Fraction(number.replace(",", "")))


def to_fraction(number: str) -> Fraction:
    """The value of a text such as "-1,080.50" or "36/2"."""
    above, _, below = re.sub(r"[^-\d./]", "", number).partition("/")
    return Fraction(above) / int(below or 1)


def gsm8k_answer(example: Example | None, text: str) -> Fraction | None:
    """The number that a completion gives as its answer, or None."""
    colon, other = ([(at, plain_line(line)) for at, line in claims(text, mark)]
                    for mark in (COLON, OTHER))
    # What stands before the last readable "Answer:" is an intermediate result.
    last = next((at for at, line in colon if RUN.search(line)), 0)
    direct = [line for at, line in colon + other if at >= last and starts_with_number(line)]
    marked = [line for _, line in colon + other]
    conclusions = [plain_line(line) for _, line in claims(text, CONCLUSION)] if marked else []
    for line in [*direct, *conclusions, *marked]:
        if run := RUN.search(EQUALS.split(line)[-1]):
            number = NUMBER.fullmatch(run[0].strip())
            return to_fraction(number[1]) if number else None
    return None


def plain_line(line: str) -> str:
    """"approximately minus 7 (that is, a loss)" -> "-7"."""
    return REMARK.sub(r"\1", ROUGHLY.sub("", NEGATIVE.sub("-", line))).lstrip(" :=(['~+<")


def starts_with_number(line: str) -> bool:
    """Whether a line begins with one number, or is nothing but a calculation: "9 * 2 = 18"."""
    run = RUN.match(line)
    value = EQUALS.split(line)[-1] if run and run[0] == line else run and run[0]
    return bool(value and NUMBER.fullmatch(value.strip()))


def gsm8k_paper_answer(text: str) -> Fraction | None:
    """By the authors' published rule, which made the paper's figures; it reads over line ends."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    numbers = re.findall(r"answer:\s*\$?\s*(-?[\d,\s]+(?:\.\d+)?)", text, re.IGNORECASE)
    number = re.sub(r"[,\s]", "", numbers[-1]) if numbers else ""
    return Fraction(number[:400]) if re.search(r"\d", number) else None


# GPQA ---------------------------------------------------------------------------------------------
# What counts is the letter that the line begins with, or else the first one in brackets.

BEGINS = re.compile(r"""(?x)
    \W* (?:(?i:clearly|indeed|therefore|thus|definitely|probably|(?:most\ )?likely)\W+)?
    (?:(?i:(?:answer\ )?(?:option|choice)|(?:the\ )?letter|statement)\W+)?        # "option (B)"
    ( [A-D]\b (?![-+=^']\w)                         # "B. copper", but not "D-glucose"
    | [a-d](?=\)\s) )                               # "b) copper"
    """)
BRACKETED = re.compile(r"""(?x)
    (?: [(\[]\s?(?=[A-Da-d]\s?[)\]])                 # "copper (B)"
        | \b(?:[Oo]ption|[Cc]hoice)\s+(?=[A-D]\b) )  # "copper, which is option B"
    ([A-Da-d])
    """)
ALONE = re.compile(r"""(?ix)
    (?:\W*(?:therefore|thus|hence|so)\b)?          # "Therefore, (B) is correct."
    \W* (?:option\W+)? ([A-D]) \W*                  # "b", "Option B"
    (?:is\ (?:the\ )?(?:correct|right|best|answer).*)?$     # "B is the best choice."
    """)
GPQA_FIELDS = ("Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in "123"))


def gpqa_example(row: dict) -> Example:
    """A row with GPQA_FIELDS. The order of its choices depends on its id alone."""
    key, question, *texts = values = [field_text(row[name]).strip() for name in GPQA_FIELDS]
    if "" in values or texts[0] in texts[1:]:
        raise ValueError("it lacks its Record ID, question or a choice, or has the right one twice")
    order = sorted(range(4), key=lambda i: key_hash(f"{key} {i}"))      # choice 0 is the right one
    choices = "\n".join(f"({letter}) {texts[i]}" for letter, i in zip("ABCD", order))
    prompt = f"{question}\n\n{choices}\n\nEnd your response with: The correct answer is (X)"
    return Example(key, user_turn(prompt), "ABCD"[order.index(0)])


def gpqa_answer(example: Example | None, text: str) -> str | None:
    """The letter that a completion gives as its answer, or None."""
    for marks in (CORRECT, COLON), (OTHER,):
        lines = [line for mark in marks for _, line in claims(text, mark)]
        for read in BEGINS.match, BRACKETED.search, ALONE.match:
            for letter in filter(None, map(read, lines)):
                return letter[1].upper()
    # Without any mark, the last line may be nothing but the letter.
    letter = ALONE.match(without_thought(text).strip().rpartition("\n")[2])
    return letter[1].upper() if letter else None


class Gpqa(Task):

    def rewards(self, example: Example, completions: list) -> list[float]:
        """1 for the right letter, 0.1 for another one. The paper shapes it by unknown values."""
        return [1.0 if c.score else 0.1 if c.answer else 0.0 for c in completions]


def gpqa_half(path: str, split: str) -> Iterator[dict]:
    """Half of gpqa_extended's 546 records by their ids' hashes: 273 held out, as in the paper."""
    rows = sorted(read_rows(path), key=lambda row: key_hash(str(row.get("Record ID")).strip()))
    middle = len(rows) // 2
    yield from rows[:middle] if split == "test" else rows[middle:]


# ToolMind: the next tool call ---------------------------------------------------------------------
# A completion is right if it makes exactly the reference's calls, in any order, in either dialect:
# Hermes JSON or Qwen3.5's XML. The tool's schema tells whether "5" is a text or the number. A null
# argument is one that is not given, as in OpenAI's "strict" schemas. XML is read as the parser of
# vLLM 0.32 reads it: True is true, but a Python list is a text.

# How a schema combines others.
COMBINED = ("allOf", "anyOf", "oneOf")
# Chat templates print these in XML as Python does.
PYTHON = {"True": "true", "False": "false", "None": "null"}


def unique(pairs: list[tuple]) -> dict:
    """A dict of pairs (name, value), without null. Raises ValueError if a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a parameter is given twice")
    return without_none(dict(pairs))


def parsed(value):
    """What a string holds as JSON, or as Python's True, False or None; anything else as it is."""
    with suppress(TypeError, ValueError, RecursionError):
        return json.loads(PYTHON.get(value, value), object_pairs_hook=unique)
    return value


NO_PARAMETERS = {"type": "object", "properties": {}}


def tool_schema(tool: dict) -> dict:
    """A tool as chat templates expect it, in the order of keys in which vLLM's server prints it."""
    tool = tool.get("function") or tool
    names = ("parameters", "input_schema", "inputSchema", "arguments")
    schema = parsed(next((tool[name] for name in names if tool.get(name)), {}))
    while "parameters" in schema and "type" not in schema:
        schema = schema["parameters"]                   # some tools wrap their schema twice
    is_schema = not schema.keys().isdisjoint(("properties", "$ref", *COMBINED))
    if not is_schema and str(schema.get("type")).lower() not in ("object", "dict"):
        properties = {k: v if isinstance(v, dict) else {"type": v} for k, v in schema.items()}
        schema = {**NO_PARAMETERS, "properties": properties}
    return {"type": "function", "function": {
        "name": tool["name"], "description": tool.get("description") or "", "parameters": schema}}


def call_of(call: dict) -> tuple[str, dict]:
    """(name, arguments) of a call in JSON. Raises an error where its arguments are no object."""
    call, arguments = call.get("function") or call, {}
    if not isinstance(call["name"], str):
        raise TypeError("the name of a tool is no text")
    if call.keys() != {"name"}:                         # a call may have a name and nothing else
        arguments = parsed(call["arguments" if "arguments" in call else "parameters"]) or {}
    return call["name"], {**arguments}


def calls_of(turn: dict) -> list[tuple[str, dict]]:
    """The calls of a turn of a conversation."""
    calls = parsed(turn.get("tool_calls") or turn.get("function_call")) or []
    return [call_of(call) for call in (calls if isinstance(calls, list) else [calls])]


def toolmind_example(row: dict) -> Example:
    """A row {"conversations": turns, of which the last one makes calls, "tools": [...]}."""
    *history, target = map(parsed, parsed(row["conversations"]))
    roles, messages = [turn["role"] for turn in history], []
    is_chat = {*roles} <= {"system", "user", "assistant", "tool"} and "user" in roles
    if not is_chat or "system" in roles[1:] or not calls_of(target):
        raise ValueError("no call at its end, or a history that chat templates refuse")
    for turn in history:
        text = text_of(turn)
        text = (without_thought(text) if turn["role"] == "assistant" else text).strip()
        message = {"role": turn["role"], "content": user_turn(text)[0]["content"] if text else []}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}
                 for name, arguments in calls_of(turn)]
        messages.append({**message, "tool_calls": calls} if calls else message)
    tools = [tool_schema(tool) for tool in map(parsed, parsed(row["tools"]))]
    shown = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for name, arguments in calls_of(target):
        if name not in shown:
            raise ValueError("its call is of a tool that it does not offer")
        if arguments and shown[name] == NO_PARAMETERS:
            raise ValueError("its call has arguments, but no known field of its tool shows any")
    if not (key := first_user_message(history)).strip():
        raise ValueError("its first user message has no text in the field content")
    return Example(key, messages, comparable(calls_of(target), tools), tools)


def text_of(turn: dict) -> str:
    """The text of a turn. Parts of text are joined; a tool's result may be any data, as JSON."""
    content = "" if turn.get("content") is None else turn["content"]
    if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(field_text(part["text"]) for part in content)
    if turn["role"] == "tool" and not isinstance(content, str):
        return json.dumps(content, ensure_ascii=False)
    return field_text(content)


# What the type of a value is called in schemas: "integer", "int", "number", "List[str]".
TYPES = {bool: ("bool",), int: ("int", "num", "float"), float: ("num", "float"),
         list: ("list", "arr"), dict: ("dict", "obj")}


def schemas_of(schema, root: dict) -> Iterator[dict]:
    """A schema, and those that it combines or refers to ("#/$defs/City", from `root` on)."""
    if isinstance(schema, dict):
        yield schema
        inner = [part for name in COMBINED for part in schema.get(name) or ()]
        if "$ref" in schema:
            inner.append(reduce(getitem, schema["$ref"].split("/")[1:], root))
        for part in inner:
            yield from schemas_of(part, root)


def canonical(value, schema, root: dict):
    """A tool's argument in one form, so that equal ones compare equal. A string is decoded as JSON
    ("5" -> 5), unless its schema allows strings and not the decoded type: then a decoded value is
    turned into a text (5 -> "5"). `root` is the tool's whole schema, to which "$ref" points."""
    schemas, inner = list(schemas_of(schema, root)), parsed(value)
    named = [type(item).__name__ for schema in schemas for item in schema.get("enum") or ()]
    # All names of types are one text, in which "num" is found as a part of "number".
    named = str([*named, *(schema.get("type") for schema in schemas)]).lower()
    is_json = inner is None or any(name in named for name in TYPES.get(type(inner), ()))
    if "str" in named and not is_json:
        is_plain = isinstance(value, str) and not isinstance(inner, (dict, list))
        return value if is_plain else json.dumps(inner, sort_keys=True)
    if isinstance(inner, dict):
        properties = [schema.get("properties") or {} for schema in schemas]
        other = [schema.get("additionalProperties") for schema in schemas]
        found = {}
        for name, item in inner.items():
            own = [schema[name] for schema in properties if name in schema]
            found[name] = canonical(item, {"anyOf": own or other}, root)
        return without_none(found)
    if isinstance(inner, list):
        items = {"anyOf": [schema.get("items") for schema in schemas]}
        return [canonical(item, items, root) for item in inner]
    return int(inner) if isinstance(inner, float) and inner.is_integer() else inner


def comparable(calls: list[tuple[str, dict]], tools: list[dict]) -> Counter:
    """Calls (name, arguments) as a multiset; equal to another if both ask for the same."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    texts = []
    for name, arguments in calls:
        schema = schemas.get(name)
        texts.append((name, json.dumps(canonical(arguments, schema, schema), sort_keys=True)))
    return Counter(texts)


CALL = re.compile(r"""(?sx)
    <think>.*?(?:</think>|$) | </think>             # a thought, or the end of one
    | <tool_call>\s*(?:<function=([^<>]+)>)?        # '<tool_call>{', "<tool_call><function=book>"
    """)
PARAMETER = re.compile(r"""(?sx)
    \s*<parameter=([^<>]+)>\n?(.*?)\n?</parameter>  # "<parameter=city>Oslo</parameter>"
    (?=\s*(?:<parameter=|</function>))              # where the next tag follows
    """)
CALL_END = re.compile(r"\s*(</function>\s*)?</tool_call>")


def read_call(text: str, start: re.Match) -> tuple[str, dict, int]:
    """(name, arguments, end) of the call that begins at `start`. JSON is decoded, so that it may
    hold any delimiter; a parameter ends where another tag follows. Raises an error otherwise."""
    name, pairs, position = start[1], [], start.end()
    if name:
        while parameter := PARAMETER.match(text, position):
            pairs.append(parameter.groups())
            position = parameter.end()
        arguments = unique(pairs)
    else:
        call, position = json.JSONDecoder(object_pairs_hook=unique).raw_decode(text, position)
        name, arguments = call_of(call)
    end = CALL_END.match(text, position)
    if not end or bool(end[1]) != bool(start[1]):
        raise ValueError("the call is not closed")
    return name, arguments, end.end()


def read_calls(text: str) -> list[tuple[str, dict]]:
    """The calls (name, arguments) after the last thought. Raises an error if one is unreadable."""
    calls, position = [], 0
    while start := CALL.search(text, position):
        if not start[0].startswith("<tool_call>"):      # a thought, or the end of one
            calls, position = [], start.end()
            continue
        try:
            name, arguments, position = read_call(text, start)
            calls.append((name, arguments))
        except Exception:
            # The model may have thought aloud here: go on after its thought. Where none ends,
            # `index` raises ValueError.
            position = text.index("</think>", start.end())
    return calls


def toolmind_answer(example: Example, text: str) -> Counter | None:
    """The calls that a completion makes, comparable with the target, or None."""
    with suppress(Exception):                           # of an unreadable call or schema
        return comparable(read_calls(text), example.tools) or None
    return None


def tool_names(calls: Counter) -> list[str]:
    return sorted(name for name, _ in calls.elements())


class ToolMind(Task):

    def check(self, processor):
        """Raise InputError unless a call can be read that the model's own chat template has written
        and its tokenizer has decoded as vLLM does, without the special tokens."""
        tool = tool_schema({"name": "visit", "parameters": {"city": {"type": "string"}}})
        call = {"type": "function", "function": {"name": "visit", "arguments": {"city": "Oslo"}}}
        said = [*user_turn("Where?"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        with explained("--model: its chat template writes no tool call", "give another model"):
            before, text = (processor.apply_chat_template(turns, tools=[tool])
                            for turns in (said[:1], said))
            turn = text[len(os.path.commonprefix([before, text])):]
            ids = processor.tokenizer.encode(turn, **TEMPLATED)
            written = processor.tokenizer.decode(ids, skip_special_tokens=True)
        calls = None
        with suppress(Exception):                       # of a call in another form
            calls = read_calls(written)
        if calls != [("visit", {"city": "Oslo"})]:
            raise InputError(f"--model: it writes a call as {written.strip()!r}, but eval.py reads "
                             "Hermes JSON and Qwen's XML: give a model that writes one of these.")

    def rewards(self, example: Example, completions: list) -> list[float]:
        """1 for the exact calls, 0.3 for calls of the right tools, 0.1 for readable ones. The paper
        shapes it by unknown values."""
        rewards = []
        for c in completions:
            if c.score or not c.answer:
                rewards.append(c.score)
            else:
                same_tools = tool_names(c.answer) == tool_names(example.target)
                rewards.append(0.3 if same_tools else 0.1)
        return rewards


def toolmind_rows(path: str, split: str) -> Iterator[dict]:
    """The rows of a split of the hub's file, whose 2.3 GB are hashed, but parsed only as far as the
    rows are used: conversations whose first user message hashes into 3 % are held out, and the rows
    of a split come in the order of their lines' hashes. The file has 163,180 rows (arXiv
    2511.15718): in 3 % there are 2,000 usable ones, if two in five can be used."""
    places, position = [], 0
    for line in read_lines(path):
        text = line.decode("utf-8-sig", "replace").strip()
        if text and is_held_out(text) == (split == "test"):
            places.append((key_hash(text), position))
        position += len(line)
    with open(path, "rb") as file:
        for _, position in sorted(places):
            file.seek(position)
            row = {}                                    # what a broken line leaves is no example
            with suppress(ValueError, RecursionError):
                row = read_json(file.readline().decode("utf-8-sig"))
            yield row


def is_held_out(line: str) -> bool:
    try:
        return key_hash(first_user_message(first_turns(line))) < 0.03
    except Exception:                                   # it is no example: either split may have it
        return False


BEGINNING = re.compile(r'\{\s*"conversations"\s*:\s*\[')            # {"conversations": [
DECODER = json.JSONDecoder()                            # to make one costs as much as to use it


def first_turns(line: str) -> Iterator[dict]:
    """The turns of a row, of which no more is parsed than is asked for; a row that begins with
    another field is parsed whole."""
    start = BEGINNING.match(line)
    if not start:
        yield from parsed(json.loads(line)["conversations"])
        return
    position = start.end()
    while True:
        turn, position = DECODER.raw_decode(line, line.index("{", position))
        yield turn


def first_user_message(turns: Iterable[dict]) -> str:
    """What tells a conversation from others: all of its rows have it."""
    return next(text_of(turn) for turn in turns if turn["role"] == "user")


TASKS = {
    "gsm8k": Task(gsm8k_example, gsm8k_answer, paper_answer=gsm8k_paper_answer,
                  hub="openai/gsm8k main/{split}-00000-of-00001.parquet"),
    "gpqa": Gpqa(gpqa_example, gpqa_answer, divide=gpqa_half,
                 hub="Idavidrein/gpqa gpqa_extended.csv"),
    "toolmind": ToolMind(toolmind_example, toolmind_answer, divide=toolmind_rows,
                         hub="Nanbeige/ToolMind graph_syn_datasets/graphsyn.jsonl"),
}


# Pictures -----------------------------------------------------------------------------------------


def open_picture(path: str) -> Image.Image:
    """Any picture as RGB, rotated by its EXIF, on mid-grey where transparent. Raises InputError."""
    with explained(f"{path}: it is no readable picture", "give another, or save it as PNG"):
        picture = Image.open(path)
        # PIL reads a PNG's values of 2, 4 or 16 bits as 8 bits, but not its transparent colour.
        raw_mode = str(picture.tile[0].args) if picture.tile else ""
        colour = picture.info.get("transparency")
        if colour is not None and raw_mode in ("L;2", "L;4"):
            picture.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[raw_mode]
        if colour is not None and raw_mode == "RGB;16B":
            picture.info["transparency"] = tuple(value // 256 for value in colour)
        with suppress(Exception):                       # with broken EXIF data it stays as it lies
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("F", "I"):
            raise ValueError("32 bits a value")
        if picture.mode.startswith("I;16"):             # 16-bit grey, which PIL would clip
            values, transparent = np.asarray(picture), picture.info.get("transparency")
            picture = Image.fromarray((values / 257).round().astype(np.uint8))
            picture.putalpha(Image.fromarray(values != transparent))
        if picture.has_transparency_data:
            grey = Image.new("RGBA", picture.size, (128, 128, 128, 255))
            picture = Image.alpha_composite(grey, picture.convert("RGBA"))
        return picture.convert("RGB")


def png_bytes(picture: Image.Image, notes: dict = {}) -> bytes:
    """A PNG file with `notes` in its text chunks. The sizes in eval.py's table are without them."""
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for keyword, text in notes.items():
        chunks.add_text(keyword, str(text))
    picture.save(buffer, "PNG", optimize=True, pnginfo=chunks, icc_profile=None)
    return buffer.getvalue()


def random_picture(width: int, height: int, *random_seed: int) -> Image.Image:
    """A picture of independent, uniformly random 8-bit values."""
    values = np.random.default_rng(random_seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# Processor, prompts, engine -----------------------------------------------------------------------

IMAGE = {"type": "image"}
# A chat template writes the special tokens itself; the tokenizer must not add a second <bos>.
TEMPLATED = {"add_special_tokens": False}


def load_processor(model: str):
    """The processor of `model`, a hub name or a folder. Raises InputError if it takes no image."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MULTIMODAL
    from transformers import AutoConfig, AutoProcessor, logging
    logging.set_verbosity_error()
    cannot, remedy = f"--model {model} cannot be loaded", f"correct the name, or {HUB}"
    with explained(cannot, remedy):
        config = AutoConfig.from_pretrained(model)      # a small file: without a hub it fails soon
    if type(config) not in MULTIMODAL:
        raise InputError(f"--model {model} takes no image ({type(config).__name__}): give a "
                         "multimodal model, such as Qwen/Qwen3.5-0.8B.")
    with explained(cannot, remedy):
        processor = AutoProcessor.from_pretrained(model)
    if end := endless_turn(processor, model, config):
        print(f"--model {model}: its chat template ends a turn with {end}, but no completion ends "
              "there: what follows is judged, too. Add it to eos_token_id in "
              "generation_config.json", file=sys.stderr)
    return processor


def special_tokens(processor) -> dict[int, str]:
    """{id: "<|image_pad|>"} of the tokens that vLLM leaves out of a text."""
    tokens = processor.tokenizer.added_tokens_decoder
    return {number: str(token) for number, token in tokens.items() if token.special}


def endless_turn(processor, model: str, config) -> str | None:
    """The token with which the chat template ends an assistant's turn, if vLLM does not end a
    completion there, as in some base models."""
    from transformers import GenerationConfig
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:                                     # the file may be missing
        generation = GenerationConfig.from_model_config(config)
    ends = {processor.tokenizer.eos_token_id, *np.atleast_1d(generation.eos_token_id)}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Therefore"}]}
    after = []
    with suppress(Exception):                           # of a template that refuses such turns
        text = processor.apply_chat_template([*user_turn("Why?"), answer])
        after = processor.tokenizer.encode(text.rpartition("Therefore")[2], **TEMPLATED)
    special = special_tokens(processor)
    after = [number for number in after if number in special]
    return None if ends.intersection(after) or not after else special[after[0]]


def prepend(part: dict, example: Example) -> Example:
    """A copy of an example with `part`, IMAGE or a text, at the start of the first user turn."""
    messages = [dict(message) for message in example.messages]
    first = next(message for message in messages if message["role"] == "user")
    said = first["content"]                             # parts, or a string
    first["content"] = [part, *(user_turn(said)[0]["content"] if isinstance(said, str) else said)]
    return replace(example, messages=messages)


def render(processor, example: Example) -> str:
    """The chat template's text, with the image's placeholder, up to where the answer begins."""
    return processor.apply_chat_template(example.messages, tools=example.tools, tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)


def model_inputs(processor, text: str, image=None):
    """The processor's tensors for a prompt and its image: PIL, or float (3, H, W) in [0, 255]."""
    images = None if image is None else [image]
    return processor(text=[text], images=images, return_tensors="pt", **TEMPLATED)


def tokenized(processor, example: Example, image=None) -> list[int]:
    """The token ids of an example's prompt, the image's included."""
    return model_inputs(processor, render(processor, example), image)["input_ids"][0].tolist()


OTHER_THOUGHTS = re.compile(r"""(?ix)
    <(?!/?think>)[^<>\s]*think[^<>\s]*>             # "<mm:think>", "<|START_THINKING|>"
    | \[THINK\] | \u25c1think\u25b7 | to=self         # Mistral's, Kimi's, Muse's
    | reasoning\ steps: | \[BEGIN\ FINAL\ RESPONSE\]                 # Apriel's
    """)
NOT_SHOWN = ("--model: its chat template does not show {}: give a model whose template does, or "
             "mend its chat_template.jinja.")


def drop_long(processor, examples: list, max_tokens: int, arms: dict, size=256) -> list[Example]:
    """The examples whose prompts the model takes, of at most `max_tokens` tokens with what the
    longest of `arms` adds, {name: arm as in arm_requests}. Raises InputError if none is left."""
    examples, prompts = sound_prompts(processor, examples)
    counts = []
    for start in tqdm(range(0, len(prompts), 256), "counting tokens", disable=None):
        ids = processor.tokenizer(prompts[start:start + 256], **TEMPLATED)["input_ids"]
        counts.extend(len(prompt_ids) for prompt_ids in ids)
    longest = 0
    for name, arm in arms.items():
        (example, picture), = arm_requests(processor, examples[:1], arm, size=size)
        with explained(f"{name}: the model's processor refuses it", "give another picture"):
            count = len(tokenized(processor, example, picture))
        if picture is not None and count == counts[0]:
            raise InputError(NOT_SHOWN.format("the image"))
        if not all(parts_shown(example, render(processor, example)).values()):
            raise InputError(NOT_SHOWN.format(f"the question beside {name}"))
        longest = max(longest, count)
        if picture is not None and is_resized(processor, *picture.size):
            print(f"{name}: the processor resizes it: other pixels are scored", file=sys.stderr)
    # A random string may be tokenised with what follows it: two tokens are kept free for that.
    more = longest - counts[0] + 2
    fit = [e for e, count in zip(examples, counts) if count + more <= max_tokens]
    print(f"{len(fit)} of {len(examples)} prompts fit into {max_tokens} tokens", file=sys.stderr)
    if not fit:
        raise InputError("--max-model-len: it has no room for any prompt; raise it.")
    return fit


def sound_prompts(processor, examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The examples that the model's chat template shows whole, and their prompts; the others are
    left out and counted. Raises InputError if none is left, or if a part is often hidden."""
    special = [*special_tokens(processor).values()]
    other = OTHER_THOUGHTS.search(f"{processor.chat_template} {special}")
    if other or "</think>" in special:
        tag = other[0] if other else "</think> as a special token, without which vLLM gives a text"
        print(f"--model: it knows thoughts in {tag}. eval.py leaves out thoughts in <think> only, "
              "as plain text: an answer within another one is judged like any", file=sys.stderr)
    kept, prompts, faults, held, hidden = [], [], [], Counter(), Counter()
    for example in tqdm(examples, "rendering prompts", disable=None):
        texts = json.dumps([example.messages, example.tools], ensure_ascii=False)
        if found := [token for token in special if token in texts]:
            faults.append(f"it holds {found[0]}, a special token of the model")
            continue
        try:
            prompt = render(processor, example)
            prompt.encode()                             # raises for lone surrogates
            # A template may refuse an image beside a system message, or show no text beside it.
            beside = parts_shown(example, render(processor, prepend(IMAGE, example)))
        except Exception as error:                      # a template may raise any error
            faults.append(f"the model's chat template refuses it ({one_line(error)})")
            continue
        shown = parts_shown(example, prompt)
        shown.update({f"{part} beside an image": beside[part] for part in shown if shown[part]})
        lost = [part for part in shown if not shown[part]]
        held.update(shown.keys())
        hidden.update(lost)
        if lost:
            faults.append(f"the model's chat template does not show its {lost[0]}")
        else:
            kept.append(example)
            prompts.append(prompt)
    # A single odd row is left out, but where more than a tenth lose a part, the template is wrong.
    often = [f"the {part} of {count} out of {held[part]} rows"
             for part, count in hidden.items() if count > held[part] / 10]
    if often:
        raise InputError(NOT_SHOWN.format(", ".join(often)))
    said = f"{len(faults)} of {len(examples)} rows left out, of the first one: {[*faults, ''][0]}"
    if not kept:
        raise InputError(f"--model: {said}: give another model, or other --data.")
    if faults:
        print(said, file=sys.stderr)
    return kept, prompts


def parts_shown(example: Example, prompt: str) -> dict[str, bool]:
    """Whether the prompt shows each part that the example has: {"tools": True, "calls": False}.
    A name must stand there as often as the example has it: once for a tool, once for each call."""
    said = [("tools", str(tool["function"]["name"])) for tool in example.tools or ()]
    for message in example.messages:
        calls, content = message.get("tool_calls") or (), message.get("content") or ()
        said += [("earlier calls", str(call["function"]["name"])) for call in calls]
        # Beside an assistant's calls some templates do not show its text.
        if message["role"] != "assistant":
            texts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
            said += [(f"{message['role']} messages", text.strip()) for text in texts]
    shown, times = {}, Counter()
    for part, text in said:
        times[text] += 1
        # The text may stand there as it is or within JSON, but not within a list of parts that the
        # template prints as Python or JSON.
        quoted = json.dumps(text, ensure_ascii=False)
        forms = {text, quoted[1:-1]}
        count = sum(prompt.count(form) for form in forms)
        count -= prompt.count(f"'text': {text!r}") + prompt.count(f'"text": {quoted}')
        shown[part] = shown.get(part, True) and count >= times[text]
    return shown


@lru_cache(maxsize=256)
def is_resized(processor, width: int, height: int) -> bool:
    """Whether the processor scales, or refuses, pictures of this size. Scaling rounds 8-bit values,
    but not floats: the two results then differ. A size is tried once, since art.py asks at every
    update."""
    picture = random_picture(width, height)
    floats = np.array(picture, dtype=np.float32).transpose(2, 0, 1)
    with explained("--model: its chat template refuses a picture and a word", "mend it"):
        text = render(processor, prepend(IMAGE, Example("", user_turn("Why?"), None)))
    with suppress(ValueError, RuntimeError):            # raised where patches do not fit
        inputs = [model_inputs(processor, text, image) for image in (picture, floats)]
        return not inputs[0]["pixel_values"].equal(inputs[1]["pixel_values"])
    return True


def check_size(processor, width: int, height: int):
    """Raise InputError, naming sides that work, unless the processor leaves such a size as is."""
    if is_resized(processor, width, height):
        # The sizes that the processor names may hold None, or an area such as 65,536.
        named = dict(processor.image_processor.size).values()
        sides = {224, 256, 336, 384, 448, 512, 672, 768, 896, *named} & {*range(1025)}
        works = [str(side) for side in sorted(sides) if not is_resized(processor, side, side)]
        raise InputError(f"--size {width}: the model's image processor would resize or refuse it; "
                         f"found to work: {', '.join(works) or 'none'}.")


def load_engine(model: str, max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.9,
                random_seed=0, **options):
    """A vLLM engine for one image a prompt; vLLM's `options` override ours. Raises InputError."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")               # GiB
    # The engine runs inside this process, so that it never outlives it.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    print("starting vLLM: it loads the model and sets memory aside; on a GPU the first start "
          "compiles for minutes", file=sys.stderr)
    with explained(f"--model {model}: vLLM cannot start it", "change --gpu-memory-utilization, set "
                   "VLLM_LOGGING_LEVEL=INFO to see more, or without a GPU see tests/cpu/setup.sh"):
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform
        ours = dict(
            dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 1, "video": 0}, mm_processor_cache_gb=0.2,
            seed=random_seed, load_format="safetensors", use_tqdm_on_load=False,
            generation_config="vllm",           # the model's own sampling defaults stay out
            logprobs_mode="processed_logprobs")         # these are divided by the temperature
        if current_platform.is_cpu():
            torch._dynamo.config.disable = True         # else a C++ compiler is needed
            # On a CPU vLLM draws other samples where it runs a prompt in pieces.
            ours.update(enforce_eager=True, enable_prefix_caching=False,
                        enable_chunked_prefill=False,
                        max_num_batched_tokens=max(4096, max_model_len))
        else:
            # On Hopper vLLM 0.32 would compile FlashInfer's delta rule with an nvcc that pip does
            # not put on the PATH. Prefix caching is safe: its keys hold the image's hash.
            ours.update(gdn_prefill_backend="triton", gpu_memory_utilization=gpu_memory_utilization)
        if torch.distributed.is_torchelastic_launched():        # each of torchrun's ranks has one
            ours["distributed_executor_backend"] = "external_launcher"
        return LLM(model, **{**ours, **options})


# Asking -------------------------------------------------------------------------------------------
# A request is (Example, picture or None). A reply is (text, number of tokens, whether the token
# limit ended it).

# The paper's published evaluation samples so.
GREEDY = {"temperature": 0.0, "max_tokens": 512, "presence_penalty": 1.0}


def arm_requests(processor, examples: list[Example], arm, random_seed=0, size=256) -> list[tuple]:
    """The examples as requests of an arm: a PIL picture, "none" (or None), "random", "string:N"."""
    requests = []
    for i, example in enumerate(examples):
        picture = random_picture(size, size, random_seed, i) if arm == "random" else arm
        if isinstance(picture, Image.Image):
            requests.append((prepend(IMAGE, example), picture))
        elif arm in (None, "none"):
            requests.append((example, None))
        else:
            text = random_string(processor.tokenizer, int(arm.partition(":")[2]), random_seed, i)
            requests.append((prepend({"type": "text", "text": f"{text}\n\n"}, example), None))
    return requests


def random_string(tokenizer, count: int, *random_seed: int) -> str:
    """A text of `count` random ordinary tokens that is tokenised into the same ones again."""
    generator = np.random.default_rng(random_seed)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = []
    while len(ids) < count:
        longer = [*ids, int(generator.integers(len(tokenizer)))]
        again = tokenizer.encode(tokenizer.decode(longer), **TEMPLATED)
        if longer[-1] not in special and again == longer:
            ids = longer
    return tokenizer.decode(ids)


def ask_engine(llm, processor, requests: list[tuple], sampling=GREEDY) -> list[tuple]:
    """vLLM's reply to each request."""
    from vllm import SamplingParams
    prompts = []
    for example, picture in requests:
        images = {} if picture is None else {"multi_modal_data": {"image": picture}}
        prompts.append({"prompt": render(processor, example), **images})
    outputs = llm.generate(prompts, SamplingParams(**sampling), tokenization_kwargs=TEMPLATED,
                           use_tqdm=sys.stderr.isatty())
    for request, output in zip(requests[:1], outputs):  # the others are made in the same way
        if tokenized(processor, *request) != list(output.prompt_token_ids):
            raise InputError("--model: vLLM's prompt has other tokens than the processor's: look "
                             "for another tokenizer in the model's folder.")
    return [(opened_thought(output.prompt) + sample.text, len(sample.token_ids),
             sample.finish_reason == "length")
            for output in outputs for sample in output.outputs]


class Server:
    """The model `name`, or the first one, of an OpenAI-compatible server such as vLLM's."""
    shows_prompts = True                                # whether its replies hold the prompt's ids

    def __init__(self, url: str, name: str | None = None):
        import openai
        os.environ.setdefault("NO_PROXY", "localhost,127.0.0.1")    # this machine needs no proxy
        os.environ.setdefault("OPENAI_API_KEY", "none")
        with explained(f"--server {url}: it lists no model", "correct it, or set OPENAI_API_KEY"):
            self.client = openai.OpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1")
            models = {model.id: model for model in self.client.models.list().data}
            self.name = name or next(iter(models))
            length = getattr(models.get(self.name), "max_model_len", None)
            self.max_model_len = int(length or 10**9)   # some servers give a text, some nothing
        if self.name not in models:
            raise InputError(f"--served-model-name {name}: {url} serves {', '.join(models)}.")

    def ask(self, processor, requests: list[tuple], sampling=GREEDY) -> list[tuple]:
        """As `ask_engine`. A failed question's text is None; if more than one in ten fail, it
        raises InputError."""
        replies = thread_map(partial(self.ask_one, processor, sampling), requests, max_workers=64,
                             unit=" questions", disable=None)
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors:
            said = f"{len(errors)} of {len(requests)} questions failed ({one_line(errors[0])})"
            if len(errors) > len(requests) / 10:
                raise InputError(f"--server: {said}: look into its log.")
            print(said, file=sys.stderr)
        if not self.shows_prompts:
            print("the server does not show its prompts' tokens: only their number was compared, "
                  "not whether the picture stands first. If it is not vLLM, its presence penalty "
                  "may be another, too (llama.cpp's counts the prompt)", file=sys.stderr)
        return [(None, 0, False) if isinstance(reply, Exception) else reply for reply in replies]

    def ask_one(self, processor, sampling: dict, request: tuple) -> tuple | Exception:
        """The reply to one request, or the error with which it failed."""
        reply = "nothing"
        try:
            reply = self.client.chat.completions.create(
                model=self.name, **sampling, **openai_request(*request))
            message, reason = reply.choices[0].message, reply.choices[0].finish_reason
            prompt_tokens, tokens = reply.usage.prompt_tokens, reply.usage.completion_tokens
            text, is_whole = message.content, reason in ("stop", "length", "tool_calls")
            if type(text) not in (str, NoneType) or type(tokens) is not int or not is_whole:
                kind = type(text).__name__
                raise ValueError(f"a completion of kind {kind}, {tokens} tokens, ended by {reason}")
        except Exception as error:                      # of the client, or no whole completion
            return ValueError(f"{one_line(error)}; its reply: {str(reply)[:80]}")
        if reply.model and reply.model != self.name:
            raise InputError(f"--server: asked for {self.name}, {reply.model} answered: look for a "
                             "router's fallback, or give --served-model-name what answers.")
        expected = tokenized(processor, *request)
        found = getattr(reply, "prompt_token_ids", None)        # of a vLLM server
        self.shows_prompts = found is not None
        if prompt_tokens != len(expected) or found not in (None, expected):
            raise InputError(f"--server: its prompt, of {prompt_tokens} tokens, is not that of the "
                             f"chat template, of {len(expected)}: look for another model, "
                             "--chat-template, --mm-processor-kwargs or "
                             "--exclude-tools-when-tool-choice-none there.")
        thought = getattr(message, "reasoning", "") or getattr(message, "reasoning_content", "")
        if text is None or message.tool_calls or (thought and not text.strip()):
            raise InputError("--server: it withholds the text of a completion: start it without "
                             "--tool-call-parser and --reasoning-parser.")
        if reason == "length" and tokens < sampling["max_tokens"]:
            return ValueError(f"the server cut a reply off after {tokens} of "
                              f"{sampling['max_tokens']} tokens: raise its own limits")
        opened = opened_thought(render(processor, request[0]))
        text = f"<think>{thought}</think>{text}" if thought else opened + text
        truncated = tokens >= sampling["max_tokens"]
        # A reply's text may lack special tokens, and the one that ends it. But where many lack half
        # of their tokens, or the end of a thought, the server withholds something.
        shown = len(processor.tokenizer.encode(text, **TEMPLATED))
        is_open = "<think>" in text and "</think>" not in text
        if 2 * shown < tokens - 1 or (is_open and not truncated):
            return ValueError(f"a reply of {tokens} tokens shows {shown}, or no end of its thought:"
                              " --tool-call-parser or --reasoning-parser may withhold the others")
        return text, tokens, truncated


def openai_request(example: Example, picture: Image.Image | None) -> dict:
    """A request in the OpenAI protocol: the picture is a data URL, calls' arguments are text."""
    messages = json.loads(json.dumps(example.messages))
    for message in messages:
        content = message.get("content")                # a string, parts or nothing
        if content and content[0] == IMAGE:
            url = f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"
            content[0] = {"type": "image_url", "image_url": {"url": url}}
        for call in message.get("tool_calls", ()):
            call["id"] = "call"                         # the protocol wants an id, templates do not
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    # Calls are read from the text, as in process: the server must not parse them.
    tools = {"tools": example.tools, "tool_choice": "none"} if example.tools else {}
    # A server takes what a request leaves out from the model's own generation_config.
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True,
             "chat_template_kwargs": {"enable_thinking": False}}
    return {"messages": messages, "top_p": 1.0, "extra_body": plain, **tools}


# Scores -------------------------------------------------------------------------------------------


def judged_results(task: Task, examples: list[Example], replies: list[tuple]) -> list[dict]:
    """What is kept of each reply: its text, tokens and scores. A question that failed has no text,
    and counts as wrong."""
    results = []
    judged = task.judge(examples, [text or "" for text, _, _ in replies])
    for example, (text, tokens, truncated), (answer, score) in zip(examples, replies, judged):
        result = {"key": example.key, "text": text, "tokens": tokens, "truncated": truncated,
                  "failed": text is None, "score": score, "readable": answer is not None}
        if task.paper_answer:
            result["paper_score"] = float(task.paper_answer(text or "") == example.target)
        results.append(result)
    return results


def evaluate(llm, processor, task: Task, examples, picture, max_new_tokens=512) -> list[dict]:
    """For art.py's validation: the results of greedy completions after a PIL picture."""
    requests = arm_requests(processor, examples, picture)
    replies = ask_engine(llm, processor, requests, {**GREEDY, "max_tokens": max_new_tokens})
    return judged_results(task, examples, replies)


def interval(scores: np.ndarray, keys: list[str]) -> tuple[float, float, float]:
    """Mean of `scores` (n,) and the 95 % interval of 10,000 bootstrap resamples, in %. Rows with
    one of `keys` (n,), of one conversation, are drawn together."""
    _, cluster = np.unique(keys, return_inverse=True)
    totals, sizes = np.bincount(cluster, scores), np.bincount(cluster)
    drawn = np.random.default_rng(0).integers(0, len(totals), (10_000, len(totals)))
    low, high = np.quantile(totals[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return 100 * np.mean(scores), 100 * low, 100 * high


COLUMNS = ["score", "paper_score", "readable", "truncated", "failed", "tokens"]


def table(records: dict[str, dict]) -> pandas.DataFrame:
    """A row for each arm of {name: {"bytes": its size as PNG, "results": by `judged_results`}}. The
    differences are to the first one."""
    rows, first = {}, next(iter(records))
    numbers = {name: pandas.DataFrame(record["results"], columns=COLUMNS).dropna(axis=1)
               for name, record in records.items()}
    keys = [result["key"] for result in records[first]["results"]]
    for name, record in records.items():
        results = numbers[name]
        scores = {"accuracy %  [95 % interval]": results["score"],
                  f"less {first}": results["score"] - numbers[first]["score"]}
        if "paper_score" in results:
            scores["paper_score %  [95 %]"] = results["paper_score"]
        rows[name] = {column: "{:.2f}  [{:6.2f}, {:6.2f}]".format(*interval(values, keys))
                      for column, values in scores.items()}
        for column in ("readable", "truncated", "failed"):
            rows[name][f"{column} %"] = f"{100 * results[column].mean():.1f}"
        rows[name].update(tokens=f"{results['tokens'].mean():.1f}", bytes=record["bytes"])
    return pandas.DataFrame(rows).T


# The command line ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("eval.py", "eval.py ARM ... --task TASK [flags]", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("arms", nargs="+", metavar="ARM", help="a picture file, `none`, `random` or `string:N`")
    add("--task", choices=TASKS, required=True, help="the benchmark")
    add("--model", help="hub name or folder of the model (the server's, or Qwen/Qwen3.5-0.8B)")
    add("--data", help="a local .jsonl, .csv or .parquet file in the benchmark's own schema")
    add("--server", metavar="URL", help="ask http://HOST:8000/v1, with the key OPENAI_API_KEY")
    add("--served-model-name", help="the model's name on the server, if it is not --model")
    add("--out", help="a file to which each arm adds its completions, as one line of JSON")
    add("--limit", type=int, help="ask only the first so many questions (all)")
    add("--temperature", type=float, default=0.0, help="the sampling temperature; 0 is greedy (0)")
    add("--presence-penalty", type=float, default=1.0, help="vLLM's; 1 as in the paper (1)")
    add("--size", type=int, default=256, help="the side of the `random` pictures in pixels (256)")
    add("--random-seed", type=int, default=0, help="seeds `random`, `string` and the engine (0)")
    add("--max-new-tokens", type=int, default=512, help="most tokens of a completion (512)")
    add("--max-model-len", type=int, default=4096, help="most tokens with the prompt (4096)")
    add("--max-num-seqs", type=int, default=256, help="sequences that vLLM runs at once (256)")
    add("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's share of the GPU (0.9)")
    return parser, parser.parse_args(argv)


RANGES = {"temperature": (0, 100), "presence_penalty": (-2, 2), "random_seed": (0, 10**9),
          "gpu_memory_utilization": (0, 1), "size": (1, 4096)}


def score_arms(args, llm=None):
    """Ask each arm's questions, keep the completions, print the table."""
    task, records = TASKS[args.task], {}
    word = r"none|random|string:[1-9]\d{0,2}"
    for name in args.arms:
        if name.startswith("string:") and not re.fullmatch(word, name):
            raise InputError(f"{name}: give string:N, with N from 1 to 999.")
    arms = {name: name if re.fullmatch(word, name) else open_picture(name) for name in args.arms}
    server = Server(args.server, args.served_model_name or args.model) if args.server else None
    if server and args.max_model_len > server.max_model_len:
        raise InputError(f"--max-model-len: the server's is {server.max_model_len}; give that.")
    args.model = args.model or (server.name if server else "Qwen/Qwen3.5-0.8B")
    processor = load_processor(args.model)
    requests = partial(arm_requests, processor, random_seed=args.random_seed, size=args.size)
    task.check(processor)
    examples = task.load("test", args.data, args.limit)
    max_tokens = args.max_model_len - args.max_new_tokens
    examples = drop_long(processor, examples, max_tokens, arms, args.size)
    sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens,
                "presence_penalty": args.presence_penalty}
    with open(os.devnull if args.out is None else args.out, "a") as out:
        if not llm and not server:
            llm = load_engine(args.model, args.max_model_len, args.max_num_seqs,
                              args.gpu_memory_utilization, args.random_seed)
        ask = server.ask if server else partial(ask_engine, llm)
        for name, arm in arms.items():
            replies = ask(processor, requests(examples, arm), sampling)
            results = judged_results(task, examples, replies)
            size = 0 if isinstance(arm, str) else len(png_bytes(arm))
            records[name] = dict(arm=name, bytes=size, settings=vars(args), results=results)
            print(json.dumps(records[name]), file=out, flush=True)
            print(f"{name}: {np.mean([r['score'] for r in results]):.2%}", file=sys.stderr)
    print(f"\n{args.model}, {args.task}, n = {len(examples)}, {sampling}")
    print(table(records).to_string())


def main(argv: list[str] | None = None, llm=None):
    """The command line, of `argv` or of the process; `llm`: an engine that is there already."""
    parser, args = parse_args(argv)
    try:
        for name, value in vars(args).items():
            check_range(name, value, *RANGES.get(name, (1, 10**9)))
        score_arms(args, llm)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
