"""Score pictures as ART images: accuracy on GSM8K, GPQA or ToolMind, with intervals.

    python eval.py none random string:64 seed.png best.png --task gsm8k --out completions.jsonl
    python eval.py none best.png --task gsm8k --server http://localhost:8000/v1

All arms answer the same questions. An arm is a picture file, `none` (the text alone), `random` (a
fresh random picture for every question) or `string:N` (N fresh random text tokens for every
question). The defaults are those of the paper's published evaluation (arXiv 2606.11854).
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm.contrib.concurrent import thread_map


class InputError(Exception):
    """A wrong input. The message is one sentence: what was given, what is wrong, what to do."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def check_range(name: str, value, least: float, most: float):
    """Raise InputError for a flag's number out of its range (nan is out of all), or empty text."""
    if value == "":
        raise InputError(f"--{name.replace('_', '-')}: it is empty; give a value, or leave it out.")
    if type(value) in (int, float) and not least <= value <= most:
        flag = f"--{name.replace('_', '-')} {value}"
        raise InputError(f"{flag}: give a number from {least} to {most}.")


# Tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    key: str                            # rows of one key, of one conversation, never cross a split
    messages: list[dict]                # chat messages, without the image
    target: Any                         # what `Task.answer` returns for a right answer
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Task:
    """One benchmark: `example` makes an Example of a row (an error leaves the row out), `answer`
    reads a completion (None: there is no answer in it), `reward` trains (None: the score), `hub` is
    the data's "repository file", `paper_answer` the authors' own reading, and `divide` takes the
    split's part of data that are published as one file."""
    example: Callable[[dict], Example]
    answer: Callable[[Example, str], Any]
    reward: Callable[[Example, str], float] | None = None
    hub: str = ""
    paper_answer: Callable[[str], Any] | None = None
    divide: Callable[[Iterable[Example], str], list[Example]] | None = None

    def load(self, split: str, data: str | None = None, limit: int | None = None) -> list[Example]:
        """The Examples of `split`, "train" or "test". A local file is used whole, unless it has the
        name of the hub's file that needs dividing. Raises InputError."""
        path, left_out = data or hub_file(self.hub.format(split=split)), []
        examples = self.usable(path, left_out)
        if self.divide and Path(path).name == re.split("[ /]", self.hub)[-1]:
            examples = self.divide(examples, split)
        examples = list(islice(examples, limit))
        if not examples:
            reason = left_out[0] if left_out else "it has no row"
            raise InputError(f"--data {path}: no row of it can be used ({reason}).")
        print(f"{path}: {len(examples)} examples, {split} split; {len(left_out)} rows left out",
              file=sys.stderr)
        return examples

    def usable(self, path: str, left_out: list[str]) -> Iterator[Example]:
        """The Examples of the rows of a file; `left_out` gets the errors of the other rows."""
        for row in read_rows(path):
            try:
                example = self.example(row)
                # Bytes and half characters are no text.
                json.dumps([example.messages, example.tools], ensure_ascii=False).encode()
                yield example
            except Exception as error:                  # rows are as irregular as their authors
                left_out.append(f"{type(error).__name__}: {first_line(error)}")

    def score(self, example: Example, text: str) -> float:
        """1.0 if the completion's answer equals the target, else 0.0: strict, what is reported."""
        return float(self.answer(example, text) == example.target)

    def rewards(self, example: Example, completions: list) -> list[float]:
        """Training rewards of a group of completions, which have a `text`, of one prompt."""
        return [(self.reward or self.score)(example, c.text) for c in completions]


def hub_file(name: str) -> str:
    """The path of "repository file" on the Hugging Face hub, downloaded once. Raises InputError."""
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(*name.split(), repo_type="dataset")
    except Exception as error:                          # the hub's client raises many kinds
        raise InputError(f"{name or 'this task'} cannot be read ({first_line(error)}): {HUB}, or "
                         "give --data.") from error


HUB = "connect to the Hugging Face hub or, if it is gated, ask for access there and set HF_TOKEN"


def read_rows(path: str) -> Iterator[dict]:
    """Rows of a .jsonl, .json, .csv or .parquet file. Raises InputError."""
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from map(without_none, batch.to_pylist())
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            elif suffix == ".csv":
                yield from csv.DictReader(file, strict=True)
            elif suffix == ".json":
                yield from json.load(file)
            else:
                raise ValueError("its name must end in .jsonl, .json, .csv or .parquet")
    except (OSError, TypeError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"--data {path}: it cannot be read ({first_line(error)}).") from error


def without_none(value):
    """Parquet gives all structs of a column the same keys: those that a row lacks are None."""
    if isinstance(value, list):
        return [without_none(item) for item in value]
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return value


def key_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: splits survive any order of the rows."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def user_turn(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


# What a completion claims: the line behind the last "Answer:" or its like -------------------------

MARK = re.compile(r"""
    (?P<wrong> \b(?:wrong|incorrect)\s(?:\w+\s)? )?
    (?<![a-z]) (?: answers? | correct\ (?:option|choice) )
    (?: [*_\s]*\n                                                   # a heading above the answer
      | (?: (?!n[o'\u2019]t\b) [^\n:=.?!\d] ){0,20}?                # "answer in dollars: 18"
        (?: \b(?:is|are|be)\b | [:\uff1a=>] ) (?! \s (?:\w+\s)? (?:not|neither)\b ) )
    | \\boxed\s*\{ | \#{4}(?=\s*[-\u2010-\u2013\u2212$\d.])         # as in GSM8K's own solutions
    """, re.IGNORECASE | re.VERBOSE)
FRACTION = re.compile(r"(?<!\d)\\[cdt]?frac\s*(?:\{\s*([-\u2212]?[\d.,]+)\s*\}|(\d))"
                      r"\s*(?:\{\s*(\d+)\s*\}|(\d))")
INVISIBLE = re.compile(r'\{,\}|\\[,!;\ ]|\\(?![a-z])|["$\u20ac\u00a3\u00a5%_]')
MARKUP = re.compile(r"\\(?:text|math)[a-z]*\b|\\(?:boxed|left|right)\b|[*`{}]")


def without_thought(text: str) -> str:
    """What stands after the last </think> and before a thought that was cut off."""
    text = text.strip().removesuffix("</think>")        # closed once too often, after the answer
    return text.rpartition("</think>")[2].partition("<think>")[0]


def claims(text: str) -> Iterator[str]:
    """The lines behind "Answer:" and its like, the last first, without Markdown and LaTeX."""
    text = without_thought(text)
    for mark in reversed([mark for mark in MARK.finditer(text) if not mark["wrong"]]):
        claim = FRACTION.sub(r"\1\2/\3\4 ", text[mark.end():mark.end() + 500])
        claim = MARKUP.sub(" ", INVISIBLE.sub("", claim))
        claim = re.sub(r"^[\s:]*\n\s*[-\u2022]\s", "", claim)                       # a bullet below
        yield claim.strip(": \t\r\n").partition("\n")[0]


# GSM8K: the first number right of the last "=", up to a bracket or the end of its sentence. A part
# of something longer (a root, a power, a range) is none.

NUMBER = re.compile(r"""
    (?P<sign> ^\s*[-\u2010-\u2013\u2212]\s* | (?<![\w)])[-\u2010-\u2013\u2212]
              | \b(?:negative|minus)\s )?
    (?P<value> (?: \d{1,3}(?:[,'\u2019\u00a0\u2009\u202f]\d{3})+(?!\d) | \d{1,400}
               | (?<!\w)(?=\.\d) ) (?:\.\d{1,400})? (?:\s?/\s?[1-9]\d{0,399})? )
    (?P<more> \s*[\d^\\\u00b2\u00b3\u00bc-\u00be\u2070-\u209f\u2150-\u218f]
              | \s*[-\u2010-\u2013\u2212+/x\u00d7\u00f7\u2044]\s*\d | [.,:e]\d )?
    """, re.IGNORECASE | re.VERBOSE)


def gsm8k_example(row: dict) -> Example:
    question, number = row["question"].strip(), row["answer"].split("####")[1]
    prompt = f"{question}\n\nEnd your response with: Answer: <number>"
    return Example(row["question"], user_turn(prompt), Fraction(number.replace(",", "")))


def gsm8k_answer(example: Example | None, text: str) -> Fraction | None:
    for claim in claims(text):
        claim = re.sub(r"(\d.*?)(?:(?<=\w)\s+\(|[.!?](?:\s|$)).*", r"\1", claim)
        claim = re.split(r"=|\u2248|\\approx", claim)[-1]
        if number := NUMBER.search(claim):
            is_part = number["more"] or re.search(r"[\\^\u221a]|sqrt", claim[:number.start()])
            above, _, below = re.sub(r"[^\d./]", "", number["value"]).partition("/")
            value = Fraction(above) / int(below or 1) * (-1 if number["sign"] else 1)
            return None if is_part else value
    return None


def gsm8k_paper_answer(text: str) -> Fraction | None:
    """The answer by the rule in the authors' repository, which made the paper's figures: behind the
    last "Answer:" that a number follows; its white space may be line ends."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    found = re.findall(r"answer:\s*\$?\s*(-?[\d,\s]+(?:\.\d+)?)", text, re.IGNORECASE)
    number = re.sub(r"[,\s]", "", found[-1]) if found else ""
    return Fraction(number[:400]) if re.search(r"\d", number) else None


# GPQA: the bare letter that the line begins with, or else the first one in brackets ---------------

BARE = re.compile(r"""
    \W* (?:(?i:option|choice|letter)\W+)? ([A-D])\b (?![-\u2010-\u2013+=^\u2019]\w) | \W*([a-d])\W*$
    """, re.VERBOSE)
BRACKETED = re.compile(r"[(\[]\s?([A-Da-d])\s?[)\]]")
ALONE = re.compile(r"""
    \W* (?:option\W+)? ([A-D]) (?: \W* | \W*\ is\ (?:the\ )?(?:correct|right|best)\b.* )$
    """, re.IGNORECASE | re.VERBOSE)
GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gpqa_example(row: dict) -> Example:
    names = ("Record ID", "Question", *GPQA_CHOICES)
    key, question, *texts = ("" if row[name] is None else str(row[name]).strip() for name in names)
    if "" in (key, question, *texts):
        raise ValueError("it lacks its Record ID, its question or a choice")
    order = sorted(range(4), key=lambda i: key_hash(f"{key} {i}"))                  # 0 is right
    choices = [f"({letter}) {texts[i]}" for letter, i in zip("ABCD", order)]
    prompt = "\n\n".join([question, "\n".join(choices),
                          "End your response with: The correct answer is (X)"])
    return Example(key, user_turn(prompt), "ABCD"[order.index(0)])


def gpqa_answer(example: Example | None, text: str) -> str | None:
    for claim in claims(text):
        found = BARE.match(claim) or BRACKETED.search(claim)
        if found:
            return found[found.lastindex].upper()
    found = ALONE.match(without_thought(text).strip().rpartition("\n")[2])      # without a mark
    return found[1].upper() if found else None


def gpqa_reward(example: Example, text: str) -> float:
    """1 for the right letter, 0.1 for another one: shaped by us."""
    answer = gpqa_answer(example, text)
    return 1.0 if answer == example.target else 0.1 if answer else 0.0


def gpqa_halves(examples: Iterable[Example], split: str) -> list[Example]:
    """Half of gpqa_extended's 546 records by their ids' hashes: 273 held out, as in the paper."""
    examples = sorted(examples, key=lambda example: key_hash(example.key))
    middle = len(examples) // 2
    return examples[:middle] if split == "test" else examples[middle:]


# ToolMind: the next tool call ---------------------------------------------------------------------
# Right are exactly the reference's calls, in any order and in either dialect (Hermes JSON, Qwen3.5
# XML); text around them is free. Arguments are equal if they are so under the tool's schema, which
# tells whether "5" is a text; elsewhere "5" is 5, and 1 is 1.0.


def parsed(value):
    """`value` if it is no string, else what it holds as JSON, else the string itself."""
    try:
        return json.loads(value, object_pairs_hook=unique) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def text_of(content) -> str:
    """The text of a message's `content`: a string, a list of parts or of tool results, or None."""
    parts = content if isinstance(content, list) else [content or ""]
    parts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)


def tool_schema(tool: dict) -> dict:
    """A tool as chat templates expect it, however its parameters were written down; some templates
    print it, so its keys are in the order of vLLM's server."""
    tool = tool.get("function") or tool
    schema = parsed(tool.get("parameters") or tool.get("input_schema") or tool.get("arguments"))
    schema = schema if isinstance(schema, dict) else {}
    while isinstance(schema.get("parameters"), dict) and "type" not in schema:
        schema = schema["parameters"]                   # doubly wrapped
    if not isinstance(schema.get("properties"), dict):
        properties = {name: spec if isinstance(spec, dict) else {"type": spec}
                      for name, spec in schema.items()
                      if isinstance(spec, (dict, str)) and (name, spec) != ("type", "object")}
        schema = {"type": "object", "properties": properties}
    function = {"name": str(tool["name"]), "description": str(tool.get("description") or ""),
                "parameters": schema}
    return {"type": "function", "function": function}


def calls_of(turn: dict) -> list[tuple[str, dict]]:
    """The calls (name, arguments) of a turn. Raises an error where arguments are no object."""
    functions = [call.get("function") or call for call in parsed(turn.get("tool_calls")) or []]
    return [(call["name"], dict(parsed(call.get("arguments")) or {})) for call in functions]


def toolmind_example(row: dict) -> Example:
    *history, target = parsed(row["conversations"])
    roles, messages = [turn["role"] for turn in history], []
    is_chat = {*roles} <= {"system", "user", "assistant", "tool"} and "user" in roles
    if not is_chat or "system" in roles[1:] or not calls_of(target):
        raise ValueError("no call at its end, or a history that chat templates refuse")
    for turn in history:
        text = text_of(turn.get("content")).strip()
        text = without_thought(text).strip() if turn["role"] == "assistant" else text
        message = {"role": turn["role"], "content": user_turn(text)[0]["content"] if text else []}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}
                 for name, arguments in calls_of(turn)]
        messages.append({**message, "tool_calls": calls} if calls else message)
    tools = [tool_schema(tool) for tool in parsed(row["tools"])]
    key = text_of(history[roles.index("user")].get("content"))
    return Example(key, messages, comparable(calls_of(target), tools), tools)


def canonical(value, schema):
    """A tool argument in comparable form under its JSON schema."""
    schema = schema if isinstance(schema, dict) else {}
    branches = schema.get("anyOf") or schema.get("oneOf")
    for branch in branches if isinstance(branches, list) else ():
        if isinstance(branch, dict) and branch.get("type") != "null":
            return canonical(value, branch)
    python = {"True": "true", "False": "false", "None": "null"}
    inner = parsed(python.get(value, value) if isinstance(value, str) else value)
    is_text = re.match(r"(\[.*')?str(ing)?\b", str(schema.get("type")), re.IGNORECASE)   # or a list
    if is_text and inner is not None:
        is_plain = isinstance(value, str) and not isinstance(inner, (dict, list))
        return value if is_plain else json.dumps(inner, sort_keys=True)
    if isinstance(inner, dict):
        named, other = schema.get("properties"), schema.get("additionalProperties")
        named = named if isinstance(named, dict) else {}
        return {name: canonical(item, named.get(name, other)) for name, item in inner.items()}
    if isinstance(inner, list):
        return [canonical(item, schema.get("items")) for item in inner]
    return int(inner) if isinstance(inner, float) and inner.is_integer() else inner


def comparable(calls: list[tuple[str, dict]], tools: list[dict]) -> Counter:
    """Calls (name, arguments) as a multiset; equal to another if both ask for the same."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    return Counter((name, json.dumps(canonical(arguments, schemas.get(name)), sort_keys=True))
                   for name, arguments in calls)


CALL = re.compile(r"<tool_call>\s*(?:<function=([^<>]+)>)?")
PARAMETER = re.compile(r"\s*<parameter=([^<>]+)>\n?(.*?)\n?</parameter>(?=\s*</?[pf])", re.DOTALL)
CALL_END = re.compile(r"\s*(</function>\s*)?</tool_call>")


def unique(pairs: list[tuple]) -> dict:
    """A dict of pairs (name, value). Raises ValueError if a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a parameter is given twice")
    return dict(pairs)


def read_call(text: str, start: re.Match) -> tuple[str, dict, int]:
    """(name, arguments, end) of the call that begins at `start`, read from its start to its end: no
    delimiter is looked for in an argument. Raises ValueError if it is unreadable."""
    name, pairs, position = start[1], [], start.end()
    if name:
        while parameter := PARAMETER.match(text, position):
            pairs.append(parameter.groups())
            position = parameter.end()
        arguments = unique(pairs)
    else:
        decoder = json.JSONDecoder(object_pairs_hook=unique)
        call, position = decoder.raw_decode(text, position)
        call = call if isinstance(call, dict) and "parameters" not in call else {}
        name, arguments = call.get("name"), parsed(call.get("arguments")) or {}
    end = CALL_END.match(text, position)
    is_closed = end and bool(end[1]) == bool(start[1])
    if not is_closed or not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("not closed, or without a name or arguments")
    return name, arguments, end.end()


def read_calls(text: str) -> list[tuple[str, dict]]:
    """The calls (name, arguments) in a completion; those in a thought, up to the last </think> that
    stands outside of a call, are none. Raises ValueError if one is unreadable."""
    calls, position = [], 0
    if text.lstrip().startswith("<think>"):
        position = text.find("</think>") % (len(text) + 1)          # -1: all of it is a thought
    while start := CALL.search(text, position):
        if "</think>" in text[position:start.start()]:
            calls = []
        try:
            name, arguments, position = read_call(text, start)
            calls.append((name, arguments))
        except (ValueError, RecursionError):            # brackets in brackets in brackets
            position = text.find("</think>", start.end())
            if position < 0:
                raise ValueError("a call is unreadable") from None
    return [] if "</think>" in text[position:] else calls


def toolmind_answer(example: Example, text: str) -> Counter | None:
    try:
        return comparable(read_calls(text), example.tools) or None
    except (ValueError, RecursionError):
        return None


def toolmind_reward(example: Example, text: str) -> float:
    """1 for the exact calls, 0.3 for the right tools, 0.1 for readable calls: shaped by us."""
    answer = toolmind_answer(example, text)
    if not answer or answer == example.target:
        return float(answer == example.target)
    names = [sorted(name for name, _ in calls.elements()) for calls in (answer, example.target)]
    return 0.3 if names[0] == names[1] else 0.1


def toolmind_share(examples: Iterable[Example], split: str) -> list[Example]:
    """Conversations whose first user message hashes into 1 % are held out. Of a split the rows of
    the smallest hashes are used, sorted: 2,000 to test, as in the paper, 8,192 to train."""
    own = (e for e in examples if (key_hash(e.key) < 0.01) == (split == "test"))
    most = 2000 if split == "test" else 8192
    return nsmallest(most, own, key=lambda example: key_hash(str(example.messages)))


TASKS = {
    "gsm8k": Task(gsm8k_example, gsm8k_answer, None,
                  "openai/gsm8k main/{split}-00000-of-00001.parquet", gsm8k_paper_answer),
    "gpqa": Task(gpqa_example, gpqa_answer, gpqa_reward, "Idavidrein/gpqa gpqa_extended.csv",
                 divide=gpqa_halves),
    "toolmind": Task(toolmind_example, toolmind_answer, toolmind_reward,
                     "Nanbeige/ToolMind graph_syn_datasets/graphsyn.jsonl", divide=toolmind_share),
}


# Pictures -----------------------------------------------------------------------------------------


def open_picture(path: str) -> Image.Image:
    """Any picture as RGB, rotated by its EXIF, on mid-grey where transparent. Raises InputError."""
    try:
        picture = Image.open(path)
        with suppress(TypeError, ValueError):           # broken EXIF data: the picture as it lies
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("F", "I"):
            raise ValueError("32 bits a value; save it with 8 or 16")
        if picture.mode.startswith("I;16"):             # 16-bit grey, which PIL would clip
            values = np.asarray(picture) / 257
            picture = Image.fromarray(values.round().astype(np.uint8))
        if picture.has_transparency_data:
            grey = Image.new("RGBA", picture.size, (128, 128, 128, 255))
            picture = Image.alpha_composite(grey, picture.convert("RGBA"))
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, NotImplementedError,
            Image.DecompressionBombError) as error:
        raise InputError(f"{path}: it is no readable picture ({first_line(error)}).") from error


def png_bytes(picture: Image.Image, notes: dict = {}) -> bytes:
    """A PNG file with `notes` in its text chunks; the paper measures the bytes without."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for keyword, text in notes.items():
        chunks.add_text(keyword, str(text))
    picture.save(buffer, "PNG", optimize=True, pnginfo=chunks)
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
    from transformers import AutoConfig, AutoProcessor, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(model)               # one file: fails soon where there is no hub
        processor = AutoProcessor.from_pretrained(model)
    except Exception as error:                          # a broken folder makes it raise anything
        raise InputError(f"--model {model} cannot be loaded ({first_line(error)}): correct the "
                         f"name, or {HUB}.") from error
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"--model {model} has no image processor, which ART needs.")
    return processor


def behind(part: dict, example: Example) -> Example:
    """A copy of an example with `part`, IMAGE or a text, at the start of the first user turn."""
    messages = [dict(message) for message in example.messages]
    first = next(message for message in messages if message["role"] == "user")
    content = first["content"]
    content = user_turn(content)[0]["content"] if isinstance(content, str) else content
    first["content"] = [part, *content]
    return replace(example, messages=messages)


def render(processor, example: Example) -> str:
    """The chat template's text, with the image's placeholder, up to where the answer begins."""
    return processor.apply_chat_template(example.messages, tools=example.tools, tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)


def model_inputs(processor, text: str, image=None):
    """The processor's tensors for a prompt and its image: PIL, or float (3, H, W) in [0, 255]."""
    images = None if image is None else [image]
    return processor(text=[text], images=images, return_tensors="pt", **TEMPLATED)


def count_tokens(processor, example: Example, image=None) -> int:
    """Tokens of an example's prompt, the image's included."""
    return model_inputs(processor, render(processor, example), image)["input_ids"].shape[1]


def fitting(processor, examples: list[Example], max_tokens: int, first_requests) -> list[Example]:
    """The examples whose prompts have at most `max_tokens` tokens, with what an arm adds to the
    first one's; says how many are left out. Raises InputError if all are."""
    longest = max(count_tokens(processor, *request) for request in first_requests)
    more = longest - count_tokens(processor, examples[0]) + 2           # 2: where a string ends
    kept = [e for e in examples if count_tokens(processor, e) + more <= max_tokens]
    if not kept:
        raise InputError("--max-model-len: less --max-new-tokens it has no room for any prompt; "
                         "raise it.")
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} examples: longer than "
              f"{max_tokens} tokens, --max-model-len less --max-new-tokens", file=sys.stderr)
    return kept


@cache
def is_resized(processor, width: int, height: int) -> bool:
    """Whether the processor scales, or refuses, pictures of this size. One that scales rounds 8-bit
    values but not floats, so that the two results differ."""
    import torch
    picture = random_picture(width, height)
    floats = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    text = render(processor, behind(IMAGE, Example("", user_turn(""), None)))
    try:
        inputs = [model_inputs(processor, text, image) for image in (picture, floats)]
        return not torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
    except (ValueError, RuntimeError):                  # no whole number of patches
        return True


def check_size(processor, width: int, height: int):
    """Raise InputError, naming sides that work, unless the processor leaves such a size as is."""
    if not is_resized(processor, width, height):
        return
    own = [value for value in dict(processor.image_processor.size).values() if value]
    works, start = [], time.time()
    for side in sorted({224, 256, 336, 384, 448, 512, 672, 768, 896, *own}):
        if time.time() < start + 3 and side <= 1024 and not is_resized(processor, side, side):
            works.append(str(side))
    raise InputError(f"--size {width}: the model's image processor would resize or refuse it; "
                     f"found to work: {', '.join(works) or 'none'}.")


def load_engine(model: str, max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.9,
                random_seed=0, **options):
    """A vLLM engine for one image a prompt; `options` of vLLM go before ours. Raises InputError."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")               # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")       # nothing is left behind
    print("starting vLLM (on a GPU the first start compiles for minutes)", file=sys.stderr)
    try:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform
        if current_platform.is_cpu():
            torch._dynamo.config.disable = True         # no C++ compiler is needed
            # A prompt in pieces would make vLLM rewind its sampler's generator: not on a CPU.
            own = dict(enforce_eager=True, enable_prefix_caching=False,
                       enable_chunked_prefill=False,
                       max_num_batched_tokens=max(4096, max_model_len))
        else:
            # On Hopper vLLM 0.32 would compile FlashInfer's delta rule with an nvcc that pip does
            # not put on the PATH. Prefix caching stays as vLLM has it: its keys hold the image's
            # hash, so that the image of a new step never meets the cache of an old one.
            own = dict(gdn_prefill_backend="triton", gpu_memory_utilization=gpu_memory_utilization)
        if torch.distributed.is_torchelastic_launched():        # torchrun: each rank has its own
            own["distributed_executor_backend"] = "external_launcher"
        own.update(
            dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 1, "video": 0}, mm_processor_cache_gb=0.2,
            seed=random_seed, load_format="safetensors", use_tqdm_on_load=False,
            generation_config="vllm",                   # no sampling default of the model's own
            logprobs_mode="processed_logprobs")         # of the tempered policy
        return LLM(model, **{**own, **options})
    except Exception as error:                          # vLLM raises anything
        reason = " ".join(str(error).split())
        remedy = "VLLM_LOGGING_LEVEL=INFO says more; without a GPU, see tests/cpu/setup.sh"
        if "memory" in reason.lower():
            remedy = "change --gpu-memory-utilization, lower --max-model-len or free the GPU"
        raise InputError(f"--model {model}: vLLM cannot start it ({reason}); {remedy}.") from error


# Asking -------------------------------------------------------------------------------------------
# A request is (Example, picture or None), a reply (text, tokens, cut off by the token limit).

GREEDY = {"temperature": 0.0, "max_tokens": 512, "presence_penalty": 1.0}              # the paper's


def arm_requests(processor, examples: list[Example], arm, random_seed=0, size=256) -> list[tuple]:
    """Requests behind a PIL picture, "none" (or None), "random" or "string:N"."""
    requests = []
    for i, example in enumerate(examples):
        picture = arm if isinstance(arm, Image.Image) else None
        if arm == "random":
            picture = random_picture(size, size, random_seed, i)
        if picture is not None:
            example = behind(IMAGE, example)
        elif arm not in (None, "none"):
            count = int(arm.removeprefix("string:"))
            text = random_string(processor.tokenizer, count, random_seed, i)
            example = behind({"type": "text", "text": text + "\n\n"}, example)
        requests.append((example, picture))
    return requests


def random_string(tokenizer, count: int, *random_seed: int) -> str:
    """Text of `count` random ordinary tokens that is tokenised into these again."""
    generator = np.random.default_rng(random_seed)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = []
    while len(ids) < count:
        longer = [*ids, int(generator.integers(len(tokenizer)))]
        again = tokenizer.encode(tokenizer.decode(longer), **TEMPLATED)
        if longer[-1] not in special and again == longer:
            ids = longer
    return tokenizer.decode(ids)


def ask_engine(llm, processor, requests: list[tuple], sampling=GREEDY,
               progress=False) -> list[tuple]:
    """vLLM's reply to each request."""
    from vllm import SamplingParams
    prompts = []
    for example, picture in requests:
        images = {} if picture is None else {"multi_modal_data": {"image": picture}}
        prompts.append({"prompt": render(processor, example), **images})
    outputs = llm.generate(prompts, SamplingParams(**sampling), tokenization_kwargs=TEMPLATED,
                           use_tqdm=progress and sys.stderr.isatty())
    samples = [output.outputs[0] for output in outputs]
    return [(s.text, len(s.token_ids), s.finish_reason == "length") for s in samples]


class Server:
    """The model `name`, or the first one, of an OpenAI-compatible server such as vLLM's."""

    def __init__(self, url: str, name: str | None = None, timeout=600):
        import openai
        os.environ.setdefault("NO_PROXY", "localhost,127.0.0.1")    # no proxy to this machine
        os.environ.setdefault("OPENAI_API_KEY", "none")
        try:
            self.client = openai.OpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1",
                                        timeout=timeout)
            models = {str(model.id): model for model in self.client.models.list().data if model.id}
            self.name = name or next(iter(models))
        except Exception as error:
            raise InputError(f"--server {url}: it lists no model ({first_line(error)}): start vllm "
                             "serve, correct the address or set OPENAI_API_KEY.") from error
        if self.name not in models:
            raise InputError(f"--served-model-name {name}: {url} serves {', '.join(models)}.")
        self.max_model_len = int(getattr(models[self.name], "max_model_len", None) or 10**9)

    def ask(self, processor, requests: list[tuple], sampling=GREEDY) -> list[tuple]:
        """As `ask_engine`; the text of a question that fails is None. Raises InputError if more
        than one in ten do."""
        replies = thread_map(partial(self.ask_one, processor, sampling), requests, max_workers=64,
                             unit=" questions", disable=None)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if failed:
            said = f"{len(failed)} of {len(requests)} questions failed ({first_line(failed[0])})"
            print(said, file=sys.stderr)
        if len(failed) > len(requests) / 10:
            raise InputError(f"--server: {said}: look into its log, or raise --timeout.")
        return [(None, 0, False) if isinstance(reply, Exception) else reply for reply in replies]

    def ask_one(self, processor, sampling: dict, request: tuple) -> tuple | Exception:
        example, picture = request
        # Calls are read from the text, as in process: the server must not parse them.
        tools = {"tools": example.tools, "tool_choice": "none"} if example.tools else {}
        try:
            reply = self.client.chat.completions.create(
                model=self.name, messages=wire(example, picture), **sampling, **tools, **PLAIN)
            if not (getattr(reply, "choices", None) and reply.usage):
                raise ValueError(f"no chat completion: {' '.join(str(reply).split())[:100]}")
            choice, usage = reply.choices[0], reply.usage
            text, is_cut = choice.message.content, choice.finish_reason == "length"
            found, tokens = int(usage.prompt_tokens), int(usage.completion_tokens)
            is_text = isinstance(text, str) and choice.finish_reason in ("stop", "length")
            if text is not None and not is_text:
                raise ValueError(f"no text, or not ended: {choice.finish_reason}")
        except Exception as error:                      # of the client, or no chat completion
            return error
        if found != (expected := count_tokens(processor, example, picture)):
            raise InputError(f"--server: its prompt has {found} tokens, not {expected}: look for "
                             "another model, --chat-template, --mm-processor-kwargs or "
                             "--exclude-tools-when-tool-choice-none there.")
        if text is None:
            raise InputError("--server: it withholds the text of a completion: start it without "
                             "--tool-call-parser and --reasoning-parser.")
        return text, tokens, is_cut


# A server takes what is not said from the model's own generation_config.
PLAIN = {"top_p": 1.0, "extra_body": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
                                      "chat_template_kwargs": {"enable_thinking": False}}}


def wire(example: Example, picture: Image.Image | None) -> list[dict]:
    """Messages of the OpenAI protocol: the picture is a data URL, calls' arguments are text."""
    messages = json.loads(json.dumps(example.messages))
    for message in messages:
        content = message.get("content")                # a string, parts or nothing
        if content and content[0] == IMAGE:
            data = base64.b64encode(png_bytes(picture)).decode()
            content[0] = {"type": "image_url",
                          "image_url": {"url": f"data:image/png;base64,{data}"}}
        for call in message.get("tool_calls", ()):
            call["id"] = "call"                         # the protocol wants one, templates do not
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


# Scores -------------------------------------------------------------------------------------------


def judge(task: Task, example: Example, reply: tuple) -> dict:
    """What is kept of a reply."""
    text, tokens, is_cut = reply
    said = text or ""                                   # a question that failed has no text
    result = {"key": example.key, "text": text, "tokens": tokens, "cut": is_cut,
              "failed": text is None, "score": task.score(example, said),
              "readable": task.answer(example, said) is not None}
    if task.paper_answer:
        result["paper_score"] = float(task.paper_answer(said) == example.target)
    return result


def evaluate(llm, processor, task: Task, examples, picture, max_new_tokens=512) -> list[dict]:
    """Greedy completions of `examples` behind a PIL picture, and their scores, by `judge`."""
    requests = arm_requests(processor, examples, picture)
    replies = ask_engine(llm, processor, requests, {**GREEDY, "max_tokens": max_new_tokens})
    return [judge(task, example, reply) for example, reply in zip(examples, replies)]


def interval(scores: np.ndarray, keys: list[str]) -> tuple[float, float, float]:
    """Mean of `scores` (n,) and the 95 % interval of 10,000 bootstrap resamples, in %. Rows with
    one of `keys` (n,), of one conversation, are drawn together."""
    _, cluster = np.unique(keys, return_inverse=True)
    totals, sizes = np.bincount(cluster, scores), np.bincount(cluster)
    drawn = np.random.default_rng(0).integers(0, len(totals), (10_000, len(totals)))
    low, high = np.quantile(totals[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return 100 * np.mean(scores), 100 * low, 100 * high


def table(records: dict[str, dict], baseline: str) -> pandas.DataFrame:
    """A row for each arm, {name: {"bytes": of its pixels, "results": by `judge`}}, with its paired
    difference to the arm `baseline`."""
    rows, base = {}, pandas.DataFrame(records[baseline]["results"])
    for name, record in records.items():
        results = pandas.DataFrame(record["results"])
        cells = ["{:.2f}  [{:6.2f}, {:6.2f}]".format(*interval(scores, base["key"]))
                 for scores in (results["score"], results["score"] - base["score"])]
        rows[name] = {"accuracy %  [95 % interval]": cells[0], f"less {baseline}": cells[1]}
        for column in ("paper_score", "readable", "cut", "failed"):
            if column in results:
                rows[name][f"{column} %"] = f"{100 * results[column].mean():.1f}"
        rows[name].update(tokens=f"{results['tokens'].mean():.1f}", bytes=record["bytes"])
    return pandas.DataFrame(rows).T


# Files and the command line -----------------------------------------------------------------------


def save(data: bytes, path):
    """Write bytes whole or not at all, whatever is killed or full. Raises InputError."""
    unfinished = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error


def parse_args(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("eval.py", "eval.py ARM ... --task TASK [flags]", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("arms", nargs="+", metavar="ARM", help="a picture file, `none`, `random` or `string:N`")
    add("--task", choices=TASKS, required=True, help="the benchmark")
    add("--model", help="hub name or folder (the server's, or Qwen/Qwen3.5-0.8B)")
    add("--data", help="local .jsonl, .json, .csv or .parquet in the benchmark's own schema")
    add("--server", metavar="URL", help="ask http://HOST:8000/v1, with the key OPENAI_API_KEY")
    add("--served-model-name", help="the model's name there, if it is not --model")
    add("--timeout", type=int, default=600, help="seconds for a request to the server (600)")
    add("--out", help="new file that keeps every completion")
    add("--baseline", metavar="ARM", help="the arm to compare with (the first)")
    add("--limit", type=int, help="score so many questions only (all)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    add("--presence-penalty", type=float, default=1.0, help="(1, as in the paper)")
    add("--size", type=int, default=256, help="side of the `random` pictures in pixels (256)")
    add("--random-seed", type=int, default=0, help="of `random` and `string` (0)")
    add("--max-new-tokens", type=int, default=512, help="a completion is cut off there (512)")
    add("--max-model-len", type=int, default=4096, help="of prompt and completion (4096)")
    add("--max-num-seqs", type=int, default=256, help="sequences that vLLM runs at once (256)")
    add("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's share (0.9)")
    return parser, parser.parse_args(argv)


RANGES = {"temperature": (0, 100), "presence_penalty": (-2, 2), "random_seed": (0, 10**9),
          "gpu_memory_utilization": (0, 1), "size": (1, 4096)}


def check(args):
    """Raise InputError for flags that mean nothing, before the work begins."""
    for name, value in vars(args).items():
        check_range(name, value, *RANGES.get(name, (1, 10**9)))
    if args.baseline not in args.arms:
        raise InputError(f"--baseline {args.baseline}: it is none of the arms.")
    try:
        if args.out:                                    # can it be made? Said before the work
            open(args.out, "x").close()
            os.remove(args.out)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}; name a new file.") from error


def check_picture(processor, name: str, example: Example, picture: Image.Image | None):
    """Say that the processor resizes an arm's picture; raise InputError if it refuses it."""
    try:
        count_tokens(processor, example, picture)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = first_line(error)
        raise InputError(f"{name}: the model's processor refuses it ({reason}).") from error
    if picture is not None and is_resized(processor, *picture.size):
        print(f"{name}: the processor resizes it: other pixels are scored", file=sys.stderr)


def score_arms(args, llm=None):
    """Ask the questions behind each arm, keep the completions, print the table."""
    task, arms, server, records = TASKS[args.task], {}, None, {}
    for name in args.arms:
        words = re.fullmatch(r"none|random|string:[1-9]\d{0,3}", name)
        arms[name] = name if words else open_picture(name)
    if args.server:
        server = Server(args.server, args.served_model_name or args.model, args.timeout)
        if args.max_model_len > server.max_model_len:
            raise InputError(f"--max-model-len {args.max_model_len}: the server's is "
                             f"{server.max_model_len}; give that, or start it with more.")
    args.model = args.model or (server.name if server else "Qwen/Qwen3.5-0.8B")
    processor = load_processor(args.model)
    ask_as = partial(arm_requests, processor, random_seed=args.random_seed, size=args.size)
    examples = task.load("test", args.data, args.limit)
    first_requests = {name: ask_as(examples[:1], arm)[0] for name, arm in arms.items()}
    for name, request in first_requests.items():
        check_picture(processor, name, *request)
    examples = fitting(processor, examples, args.max_model_len - args.max_new_tokens,
                       first_requests.values())
    if not llm and not server:
        llm = load_engine(args.model, args.max_model_len, args.max_num_seqs,
                          args.gpu_memory_utilization)
    sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens,
                "presence_penalty": args.presence_penalty}
    try:
        for name, arm in arms.items():
            ask = server.ask if server else partial(ask_engine, llm, progress=True)
            replies = ask(processor, ask_as(examples, arm), sampling)
            results = [judge(task, example, reply) for example, reply in zip(examples, replies)]
            size = 0 if isinstance(arm, str) else len(png_bytes(arm))
            records[name] = {"arm": name, "bytes": size, "settings": vars(args), "results": results}
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(records[name]) + "\n")
    finally:                                            # of the arms that were scored
        if args.baseline in records:
            print(f"\n{args.model}, {args.task}, n = {len(examples)}, {sampling}")
            print(table(records, args.baseline).to_string())


def main(argv: list[str] | None = None, llm=None):
    """The command line, of `argv` or of the process; `llm`: an engine that is there already."""
    parser, args = parse_args(argv)
    args.baseline = args.baseline or args.arms[0]
    try:
        check(args)
        score_arms(args, llm)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
