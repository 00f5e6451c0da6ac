"""Score pictures as ART images: accuracy on GSM8K, GPQA or ToolMind, with intervals.

    python eval.py none random string:64 seed.png best.png --task gsm8k --out results.jsonl
    python eval.py none best.png --task gsm8k --server http://localhost:8000/v1

All arms answer the same questions. An arm is a picture file, `none` (the text alone), `random` (a
fresh random picture for every question) or `string:N` (N fresh random text tokens for every
question). The defaults are those of the paper's published evaluation (arXiv 2606.11854).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends it without a traceback

import argparse
import base64
import fcntl
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Callable
from urllib.parse import urlsplit

import numpy as np
import pandas
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

class InputError(Exception):
    """A wrong input. The message is one sentence: what was given, what is wrong, what to do."""

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

# --------------------------------------------------------------------------------------------------
# Data: rows of a benchmark, from the hub or from a local file in the benchmark's own schema
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
REMEDY = ("correct the name, connect to the Hugging Face hub or, if it is gated there, ask for "
          "access on its page and set HF_TOKEN")

def read_rows(hub, split, data=None):
    """Rows of a data set on the hub, "repository:configuration" or "repository:file", or of a local
    file. Nested columns must be JSON, in CSV and Parquet as text. Raises InputError."""
    import datasets
    repository, _, part = hub.partition(":")
    options, columns = {"path": repository, "name": part, "split": split}, ()
    if part.endswith(".jsonl"):
        options, columns = {**options, "name": None, "data_files": part}, ("conversations", "tools")
    if data:
        reader = READERS.get(Path(data).suffix.lower())
        if reader is None or not os.path.isfile(data):
            raise InputError(f"--data {data}: there is no such {', '.join(READERS)} file.")
        options, columns = {"path": reader, "split": "train", "data_files": str(data)}, ()
        if reader == "csv":
            options["keep_default_na"] = False          # "None" and "NA" are answers, too
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if options["path"] == "json":
            columns = next(iter(datasets.load_dataset(**options, streaming=True)), {})
        # Json keeps each value's own keys; Arrow's structs would give all of them the same.
        features = datasets.Features({name: datasets.Json() for name in columns})
        return datasets.load_dataset(**options, features=features or None)
    except Exception as error:                          # pyarrow, pandas and the hub raise anything
        reason = first_line(error.__cause__ or error)
        if data:
            raise InputError(f"--data {data}: it cannot be read as {reader} ({reason}).") from error
        raise InputError(f"{repository} cannot be read ({reason}): {REMEDY}.") from error

def key_hash(text):
    """A number in [0, 1) that depends on `text` alone: splits survive any order of the rows."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

@dataclass(frozen=True)
class Task:
    """One benchmark.

    example(row)          -> {"key", "messages", "tools", "target"}; None or an error leaves it out.
                             Rows of one key never cross a split; the messages hold no image.
    answer(example, text) -> what is read from a completion, comparable with `target`, or None
    reward(example, text) -> training reward, 1 only for the right answer; None: the score
    divide(examples, split, name) -> for data published as one file, `name`: the split's part of it
    """
    hub: str
    example: Callable
    answer: Callable
    reward: Callable | None = None
    paper_answer: Callable | None = None                # `answer` by the authors' published rule
    divide: Callable | None = None

    def load(self, split, data=None, limit=None):
        """Examples of `split` ("train" or "test"). A local file is used whole, unless it has the
        name of the hub's file that needs dividing. Raises InputError."""
        rows = read_rows(self.hub, "train" if self.divide else split, data)
        examples = filter(None, map(self.usable, rows))
        if self.divide:
            examples = self.divide(examples, split, Path(data or self.hub).stem.split(":")[-1])
        examples, source = list(islice(examples, limit)), data or self.hub
        if not examples:
            raise InputError(f"--data {source}: none of its {len(rows)} rows, of the columns "
                             f"{', '.join(rows.column_names)}, is as those of {self.hub}.")
        print(f"{source}: {len(examples)} of {len(rows)} rows, {split} split", file=sys.stderr)
        return examples

    def usable(self, row):
        try:
            return self.example(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def score(self, example, text):
        """1.0 if the completion's answer equals the target, else 0.0: strict, what is reported."""
        return float(self.answer(example, text) == example["target"])

def user_turn(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]

def without_thought(text):
    """What stands after the last </think> and before a thought that was cut off."""
    text = text.strip().removesuffix("</think>")        # closed once too often, after the answer
    return text.rpartition("</think>")[2].partition("<think>")[0]

ANSWER_MARK = re.compile(r"""
    (?<![a-z]) (?: answers? | correct\ (?:option|choice) )
    (?: [*_\s]*\n                                       # a heading above the answer
      | [^\n:\uff1a=.?!\d]{0,20}?                       # "answer in dollars: 18"
        (?: \b(?:is|are|(?:should|must|would)\ be)\b | [:\uff1a=] )
      | > )                                             # <answer>18</answer>
    | \\boxed\s*\{ | \#{4}(?=\s*[-$\d.])                # #### as in GSM8K's own solutions
    """, re.IGNORECASE | re.VERBOSE)

def answer_lines(text):
    r"""Yield the rest of the line, or else the next one with a word, behind each "Answer:" or its
    like, last first; without Markdown, LaTeX and currency."""
    text = without_thought(text)
    end = len(text)
    for mark in reversed(list(ANSWER_MARK.finditer(text))):
        first, *others = text[mark.end():min(end, mark.end() + 500)].split("\n")
        end = mark.start()
        lines = [first] + [re.sub(r"^\s*[-*\u2022]\s+", "", line) for line in others]    # bullets
        line = next((line for line in lines if re.search(r"\w", line)), "")
        line = re.sub(r"\{,\}|\\[,!; ]", "", line)                              # 1{,}080
        line = re.sub(r"\\(times|cdot|div)\b", "*", line)
        line = re.sub(r"\\[td]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", line)
        line = re.sub(r"(?<!\d)\*\*(?=\S)|(?<=\S)\*\*(?!\d)", "", line)         # **18**
        yield re.sub(r"\\[a-z]+|[\\{}$\u20ac\u00a3%`\"]|^[*_\s:]+", "", line)

# --------------------------------------------------------------------------------------------------
# GSM8K. An answer is the line behind the last "Answer:" (or "answer is", "\boxed{", "####"), up to
# the full stop behind its number; of it, the part behind the last "=", "is" or ": " that holds a
# single number counts. Brackets behind a number, what follows "not" or "because", numbers in words
# (20-year) and, beside another one, a number behind a preposition (in 5 years) say nothing. Right
# is the reference alone; two numbers (18 or 20, 3 x 6, 5 dollars and 50 cents) are no answer.
NUMBER = re.compile(r"""
    (?P<aside> \b(?:in|of|for|per|after|every|each)\s+(?:(?:the|all|his|her|their|its)\s+)? )?
    (?P<sign> (?<![\w)])[-\u2212]\s? )?                             # -7, - 7; but not 18-20
    (?P<whole> \d{1,3}(?:[,'\u2019_\u00a0\u2009\u202f]\d{3}|\ \d{3}(?![-/]))+(?!\d)    # 1,080
      | \d{1,2}(?:,\d\d)+,\d{3}(?!\d)                               # 1,00,000 as in India
      | \d{1,400} | (?=(?<![\w.])\.\d) )                            # 18, .5
    (?P<decimals> \.\d{1,400} )?
    (?: \s?/\s?(?P<below>[1-9]\d{0,399})                            # 5/2
      | \s(?P<over>\d{1,9})/(?P<under>[1-9]\d{0,8}) )?              # 2 1/2
    (?! \d*-[a-z] )                                                 # no 20-year
    (?: \s?(?P<unit>K|thousand|million|billion)\b )?
    """, re.IGNORECASE | re.VERBOSE)
UNITS = {"": 1, "k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SIGNS = str.maketrans({"\xb2": "^2", "\xb3": "^3", "\xbc": " 1/4", "\xbd": " 1/2", "\xbe": " 3/4"})

def gsm8k_example(row):
    target = gsm8k_answer(None, "Answer:" + row["answer"].rpartition("####")[2])
    if "####" not in row["answer"] or target is None:
        return None
    prompt = f"{row['question'].strip()}\n\nEnd your response with: Answer: <number>"
    return {"key": row["question"], "messages": user_turn(prompt), "tools": None, "target": target}

def gsm8k_answer(example, text):
    """The answer as a Fraction, by the rule above; None if there is none."""
    for line in answer_lines(text):
        line = re.sub(r"(\d[^.!?]*)[.!?]\s.*", r"\1", line.translate(SIGNS))    # 18. Check: 9 * 2
        line = re.sub(r"(\d(?:[^()]*\w)?)\s+\((?!or\b)[^()]*\)?", r"\1", line)  # 18 (eggs)
        line = re.sub(r"(?:\bnot\b|n't\b)[^,]*|\bbecause\b.*", "", line)
        for part in reversed(re.split(r"[=\u2248]|\b(?:is|are)\b|:\s", line)):
            found = list(NUMBER.finditer(part))
            numbers = [number for number in found if not number["aside"]] or found
            if len(numbers) == 1:
                return number_value(numbers[0])
        if NUMBER.search(line):                         # else the marker before counts
            return None

def number_value(match):
    """The Fraction that a match of NUMBER stands for."""
    digits = re.sub(r"\D", "", match["whole"]) or "0"
    value = Fraction(digits + (match["decimals"] or "")) / int(match["below"] or 1)
    value += Fraction(int(match["over"] or 0), int(match["under"] or 1))
    return value * UNITS[(match["unit"] or "").lower()] * (-1 if match["sign"] else 1)

def gsm8k_paper_answer(text):
    """The answer by the rule in the authors' repository, which made the paper's figures: behind the
    last "Answer:" that a number follows; its white space may be line ends."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    found = re.findall(r"answer:\s*\$?\s*(-?[\d,\s]+(?:\.\d+)?)", text, re.IGNORECASE)
    number = re.sub(r"[,\s]", "", found[-1]) if found else ""
    return Fraction(number[:400]) if re.search(r"\d", number) else None

# --------------------------------------------------------------------------------------------------
# GPQA. An answer is the letter in brackets that follows the last "answer is" (or as above), or a
# bare one that directly follows it, stands before "is the correct answer" or alone on the last
# line. Two letters in brackets, or joined by "or" and its like, are no answer, and neither is one
# behind "not"; letters in an option's text that is repeated do not count. The option's text without
# its letter is none, as the prompt asks for the letter.
BRACKETED = r"\(\s?[A-Da-d]\s?\)(?!-)"                                      # not (D)-glucose
BARE = r"(?:A(?!\s[a-z])|[B-D])\b(?![-+=^(\u2013\u2019\u2212\u2261]\w)"     # not "A photon", B12
LETTER = rf"(?:{BRACKETED}|\[[A-Da-d]\]|{BARE})"
LEADING = re.compile(rf"\W*(?:(?:option|choice|letter)\W*)?({LETTER})|\W*([a-d])\W*$")
JOINED = re.compile(rf"(?:{BRACKETED}|^\W*{LETTER})\s*"
                    rf"(?:(?:[,/&+]|or|and)\s*)+(?:maybe\s)?{LETTER}")
DENIED = re.compile(rf"(?:\b(?:not|neither|nor|unlike|than|instead of)|n't)\s(?:option\s)?{LETTER}"
                    rf"|{LETTER}\W*(?:is|are)\s(?:wrong|incorrect|not)\b")
BECAUSE = re.compile(r"[.;]\s|\b(?:because|since|(?<!well )as(?! well)|while|whereas|which)\b")
IS_CORRECT = re.compile(rf"({LETTER}) is (?:the )?(?:correct|right|best) (?:answer|option|choice)")
GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

def gpqa_example(row):
    order = sorted(range(4), key=lambda i: key_hash(f"{row['Record ID']} {i}"))     # 0 is right
    choices = [f"({letter}) {str(row[GPQA_CHOICES[i]]).strip()}"
               for letter, i in zip("ABCD", order)]
    ending = "End your response with: The correct answer is (X)"
    prompt = "\n\n".join([row["Question"].strip(), "\n".join(choices), ending])
    return {"key": row["Record ID"], "messages": user_turn(prompt), "tools": None,
            "target": "ABCD"[order.index(0)]}

def gpqa_answer(example, text):
    """The letter of the last answer, by the rule above; None if there is none or more than one."""
    for line in answer_lines(text):
        claim = BECAUSE.split(re.sub(r"[*_]", "", line))[0]
        kept = DENIED.sub("", claim)                                    # "not (A) but (B)"
        found = re.findall(rf"(?<!\w){BRACKETED}", kept)
        leading = LEADING.match(kept)
        if leading and not found:
            found = [leading[1] or leading[2]]
        letters = {re.sub(r"\W", "", letter).upper() for letter in found}
        if letters or kept != claim:
            return letters.pop() if len(letters) == 1 and not JOINED.search(kept) else None
    text = without_thought(text).strip()
    found = IS_CORRECT.findall(text) or re.findall(r"^\W*([A-D])\W*$", text.rpartition("\n")[2])
    return re.sub(r"\W", "", found[-1]).upper() if found else None

def gpqa_reward(example, text):
    """1 for the right letter, 0.1 for another one: shaped by us."""
    answer = gpqa_answer(example, text)
    return 1.0 if answer == example["target"] else 0.1 if answer else 0.0

def gpqa_halves(examples, split, name):
    """Half of gpqa_extended's 546 records by their ids' hashes: 273 held out, as in the paper."""
    if name != "gpqa_extended":
        return examples
    examples = sorted(examples, key=lambda example: key_hash(example["key"]))
    middle = len(examples) // 2
    return examples[:middle] if split == "test" else examples[middle:]

# --------------------------------------------------------------------------------------------------
# ToolMind: the next tool call. Right are exactly the reference's calls, in any order and in either
# dialect (Hermes JSON, Qwen3.5 XML), closed and readable; text around them is free. Each has the
# same name and arguments: none, be it optional, is added or left out. The tool's schema tells if
# "5" is a text; elsewhere "5" is 5 and 1 is 1.0. Lists keep their order; text counts to the letter.
def parsed(value):
    """`value` if it is no string, else what it holds as JSON, else the string itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value

def text_of(content):
    """The text of a message's `content`: a string, a list of parts or of tool results, or None."""
    parts = content if isinstance(content, list) else [content or ""]
    parts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)

def tool_schema(tool):
    """A tool as chat templates expect it, however its parameters were written down; some templates
    print it, so its keys are in the order of vLLM's server."""
    function = tool.get("function") or tool
    schema = function.get("parameters") or function.get("arguments")
    schema = schema if isinstance(schema, dict) else {}
    while isinstance(schema.get("parameters"), dict) and "type" not in schema:
        schema = schema["parameters"]                   # doubly wrapped
    if not isinstance(schema.get("properties"), dict):
        properties = {name: spec for name, spec in schema.items() if isinstance(spec, dict)}
        schema = {"type": "object", "properties": properties}
    return {"type": "function",
            "function": {"name": str(function["name"]),
                         "description": function.get("description") or "", "parameters": schema}}

def calls_of(turn):
    """The calls [(name, arguments)] of a turn. Raises an error where arguments are no object."""
    functions = [call.get("function") or call for call in parsed(turn.get("tool_calls")) or []]
    return [(call["name"], dict(parsed(call.get("arguments")) or {})) for call in functions]

def toolmind_example(row):
    *history, target = parsed(row["conversations"])
    roles, messages = [turn["role"] for turn in history], []
    if "user" not in roles or "system" in roles[1:] or not calls_of(target):
        return None                                     # chat templates refuse the former
    for turn in history:
        text = text_of(turn.get("content")).strip()
        text = without_thought(text).strip() if turn["role"] == "assistant" else text
        message = {"role": turn["role"], "content": user_turn(text)[0]["content"] if text else []}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}
                 for name, arguments in calls_of(turn)]
        messages.append({**message, "tool_calls": calls} if calls else message)
    tools = [tool_schema(tool) for tool in parsed(row["tools"])]
    return {"key": text_of(history[roles.index("user")].get("content")), "messages": messages,
            "tools": tools, "target": comparable(calls_of(target), tools)}

def canonical(value, schema):
    """A tool argument in comparable form. The schema says whether "5" is a text; 1.0 is 1."""
    schema = schema if isinstance(schema, dict) else {}
    branches = schema.get("anyOf") or schema.get("oneOf")
    for branch in branches if isinstance(branches, list) else ():
        if isinstance(branch, dict) and branch.get("type") != "null":
            return canonical(value, branch)
    inner = parsed({"True": "true", "False": "false", "None": "null"}.get(value, value)
                   if isinstance(value, str) else value)
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

def comparable(calls, tools):
    """Calls [(name, arguments)] as a multiset; equal to another if both ask for the same."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    return Counter((name, json.dumps(canonical(arguments, schemas.get(name)), sort_keys=True))
                   for name, arguments in calls)

CALL = re.compile(r"<tool_call>\s*(?:<function=([^<>]+)>)?")
PARAMETER = re.compile(r"\s*<parameter=([^<>]+)>\n?(.*?)\n?</parameter>(?=\s*</?[pf])", re.DOTALL)
CALL_END = re.compile(r"\s*(</function>\s*)?</tool_call>")

def read_calls(text):
    """The calls [(name, arguments)] in a completion, each read from its start to its end: no
    delimiter is looked for in an argument. Raises ValueError if one is unreadable."""
    while text.lstrip().startswith("<think>"):          # calls in a thought are none
        text = text.partition("</think>")[2]
    calls, position = [], 0
    while start := CALL.search(text, position):
        name, arguments, position = start[1], {}, start.end()
        if name:
            while parameter := PARAMETER.match(text, position):
                if parameter[1] in arguments:
                    raise ValueError("a parameter is given twice")
                arguments[parameter[1]], position = parameter[2], parameter.end()
        else:
            call, position = json.JSONDecoder().raw_decode(text, position)
            if not isinstance(call, dict) or "parameters" in call:
                raise ValueError("no call")
            name, arguments = call.get("name"), parsed(call.get("arguments")) or {}
        end = CALL_END.match(text, position)
        if not end or bool(end[1]) != bool(start[1]):
            raise ValueError("not closed")
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("no name or no arguments")
        calls.append((name, arguments))
        position = end.end()
    return calls

def toolmind_answer(example, text):
    """The calls as a multiset; None if there is none or one is unreadable."""
    try:
        return comparable(read_calls(text), example["tools"]) or None
    except (ValueError, RecursionError):                # brackets in brackets in brackets
        return None

def toolmind_reward(example, text):
    """1 for the exact calls, 0.3 for the right tools, 0.1 for readable calls: shaped by us."""
    answer, target = toolmind_answer(example, text), example["target"]
    if not answer or answer == target:
        return float(answer == target)
    names = [sorted(name for name, _ in calls.elements()) for calls in (answer, target)]
    return 0.3 if names[0] == names[1] else 0.1

def toolmind_share(examples, split, name):
    """Conversations whose first user message hashes into 1 % are held out. Of a split the rows of
    the smallest hashes are used, sorted: 2,000 to test, as in the paper, 8,192 to train."""
    if name != "graphsyn":
        return examples
    own = (e for e in examples if (key_hash(e["key"]) < 0.01) == (split == "test"))
    most = 2000 if split == "test" else 8192
    return nsmallest(most, own, key=lambda e: key_hash(str(e["messages"])))

TASKS = {
    "gsm8k": Task("openai/gsm8k:main", gsm8k_example, gsm8k_answer, None, gsm8k_paper_answer),
    "gpqa": Task("Idavidrein/gpqa:gpqa_extended", gpqa_example, gpqa_answer, gpqa_reward,
                 divide=gpqa_halves),
    "toolmind": Task("Nanbeige/ToolMind:graph_syn_datasets/graphsyn.jsonl", toolmind_example,
                     toolmind_answer, toolmind_reward, divide=toolmind_share),
}

# --------------------------------------------------------------------------------------------------
# Pictures
def open_picture(path):
    """Any picture as RGB, rotated by its EXIF, on mid-grey where transparent. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such picture file.")
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I;16"):             # 16-bit grey, which PIL would clip
            values, clear = np.asarray(picture), picture.info.get("transparency")
            picture = Image.fromarray((values / 257).round().astype(np.uint8))
            if clear is not None:
                alpha = np.where(values == clear, 0, 255).astype(np.uint8)
                picture.putalpha(Image.fromarray(alpha))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            grey = Image.new("RGBA", picture.size, (128, 128, 128, 255))
            picture = Image.alpha_composite(grey, picture)
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: it is no readable picture ({first_line(error)}).") from error

def png_bytes(picture, notes={}):
    """A PNG file with `notes` in its text chunks; the paper measures the bytes without."""
    chunks = PngInfo()
    for keyword, text in notes.items():
        chunks.add_text(keyword, str(text))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, pnginfo=chunks)
    return buffer.getvalue()

def random_picture(width, height, *rng):
    """A picture of independent, uniformly random 8-bit values."""
    values = np.random.default_rng(rng).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)

# --------------------------------------------------------------------------------------------------
# Processor, prompts, engine
IMAGE = {"type": "image"}
# A chat template writes the special tokens itself; the tokenizer must not add a second <bos>.
TEMPLATED = {"add_special_tokens": False}

def load_processor(model):
    """The processor of `model`, a hub name or a folder. Raises InputError if it takes no image."""
    from transformers import AutoConfig, AutoProcessor, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(model)               # one file: fails soon where there is no hub
        processor = AutoProcessor.from_pretrained(model)
    except Exception as error:                          # a broken folder makes it raise anything
        reason = first_line(error)
        raise InputError(f"--model {model} cannot be loaded ({reason}): {REMEDY}.") from error
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"--model {model} has no image processor, which ART needs.")
    return processor

def behind(part, example):
    """A copy of an example with `part`, IMAGE or a text, at the start of the first user turn."""
    messages = [dict(message) for message in example["messages"]]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = [part, *first["content"]]
    return {**example, "messages": messages}

def render(processor, example):
    """The chat template's text, with the image's placeholder, up to where the answer begins."""
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return processor.apply_chat_template(example["messages"], tools=example["tools"], **options)

def model_inputs(processor, text, image=None):
    """The processor's tensors for a prompt and its image: PIL, or float (3, H, W) in [0, 255]."""
    images = None if image is None else [image]
    return processor(text=[text], images=images, return_tensors="pt", **TEMPLATED)

def count_tokens(processor, example, image=None):
    """Tokens of an example's prompt, the image's included."""
    return model_inputs(processor, render(processor, example), image)["input_ids"].shape[1]

def fitting(processor, examples, max_tokens, first_requests):
    """The examples whose prompts have at most `max_tokens` tokens, with what an arm adds to the
    first one's; says how many are left out. Raises InputError if all are."""
    longest = max(count_tokens(processor, *request) for request in first_requests)
    more = longest - count_tokens(processor, examples[0]) + 2           # 2: where a string ends
    kept = [e for e in examples if count_tokens(processor, e) + more <= max_tokens]
    if not kept:
        raise InputError("--max-model-len: every prompt is longer; raise it.")
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} examples: longer than "
              f"{max_tokens} tokens, --max-model-len less --max-new-tokens", file=sys.stderr)
    return kept

def is_resized(processor, width, height):
    """Whether the processor scales, or refuses, pictures of this size. What it scales it rounds,
    but not the same values given as floats."""
    import torch
    picture = random_picture(width, height)
    floats = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    text = render(processor, behind(IMAGE, {"messages": user_turn(""), "tools": None}))
    try:
        inputs = [model_inputs(processor, text, image) for image in (picture, floats)]
        return not torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
    except (ValueError, RuntimeError):                  # no whole number of patches
        return True

def load_engine(model, max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.9, rng=0):
    """A vLLM engine for one image a prompt, on a GPU or on the CPU. Raises InputError."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")               # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")       # nothing is left behind
    try:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform
        options = dict(gpu_memory_utilization=gpu_memory_utilization)
        if current_platform.is_cpu():
            torch._dynamo.config.disable = True         # no C++ compiler is needed
            # A prompt in pieces would make vLLM rewind its sampler's generator: not on a CPU.
            options = dict(enforce_eager=True, enable_prefix_caching=False,
                           enable_chunked_prefill=False,
                           max_num_batched_tokens=max(4096, max_model_len))
        if torch.distributed.is_torchelastic_launched():        # torchrun: each rank has its own
            options["distributed_executor_backend"] = "external_launcher"
        return LLM(
            model, dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            seed=rng, load_format="safetensors", limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_cache_gb=0.2, use_tqdm_on_load=False,     # each step has a new image
            generation_config="vllm",                   # no sampling default of the model's own
            logprobs_mode="processed_logprobs", **options)         # of the tempered policy
    except Exception as error:                          # vLLM raises anything
        raise InputError(f"--model {model}: vLLM cannot start it ({' '.join(str(error).split())}); "
                         "without a GPU, tests/cpu/setup.sh installs a CPU build.") from error

# --------------------------------------------------------------------------------------------------
# Arms: what stands before the question
def arm_requests(processor, examples, arm, rng=0, size=256):
    """[(example, PIL picture or None)] behind a PIL picture, "none", "random" or "string:N"."""
    requests = []
    for i, example in enumerate(examples):
        picture = None if isinstance(arm, str) else arm
        if arm == "random":
            picture = random_picture(size, size, rng, i)
        if picture is not None:
            example = behind(IMAGE, example)
        elif arm != "none":
            text = random_string(processor.tokenizer, int(arm.removeprefix("string:")), rng, i)
            example = behind({"type": "text", "text": text + "\n\n"}, example)
        requests.append((example, picture))
    return requests

def random_string(tokenizer, count, *rng):
    """Text of `count` random ordinary tokens that is tokenised into these again."""
    rng = np.random.default_rng(rng)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = []
    while len(ids) < count:
        longer = [*ids, int(rng.integers(len(tokenizer)))]
        again = tokenizer.encode(tokenizer.decode(longer), **TEMPLATED)
        if longer[-1] not in special and again == longer:
            ids = longer
    return tokenizer.decode(ids)

# --------------------------------------------------------------------------------------------------
# Asking: an engine in this process, or a server
GREEDY = {"temperature": 0.0, "max_tokens": 512, "presence_penalty": 1.0, "n": 1}      # the paper's

def ask_engine(llm, processor, requests, sampling=GREEDY, progress=False):
    """For each of `arm_requests` vLLM's samples: [(text, tokens, cut off by the token limit)]."""
    from vllm import SamplingParams
    prompts = [{"prompt": render(processor, example)} for example, _ in requests]
    for prompt, (_, picture) in zip(prompts, requests):
        prompt.update({} if picture is None else {"multi_modal_data": {"image": picture}})
    outputs = llm.generate(prompts, SamplingParams(**sampling), tokenization_kwargs=TEMPLATED,
                           use_tqdm=progress and sys.stderr.isatty())
    return [[(sample.text, len(sample.token_ids), sample.finish_reason == "length")
             for sample in output.outputs] for output in outputs]

SERVER_REMEDIES = {"AuthenticationError": "set OPENAI_API_KEY to the key that it was started with",
                   "APITimeoutError": "give a request more seconds with --timeout",
                   "APIConnectionError": "start vllm serve, or correct the address"}

class Server:
    """An OpenAI-compatible server such as vLLM's, and the `model` it serves. Raises InputError."""

    def __init__(self, url, timeout=600):
        import openai
        # A proxy in the environment is not for this machine.
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self.url = url
        self.client = openai.OpenAI(
            base_url=url.rstrip("/").removesuffix("/v1") + "/v1", timeout=timeout,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            http_client=openai.DefaultHttpxClient(trust_env=not local))
        self.model = self.call(self.client.models.list).data[0].id

    def call(self, function, **options):
        try:
            return function(**options)
        except Exception as error:
            remedy = SERVER_REMEDIES.get(type(error).__name__, "look into its log")
            raise InputError(f"--server {self.url}: {first_line(error)}: {remedy}.") from error

    def ask(self, processor, requests, sampling=GREEDY):
        """As `ask_engine`, 64 requests at a time; refuses a server that prompts in another way."""
        with ThreadPoolExecutor(64) as pool:
            answers = pool.map(partial(self.ask_one, processor, sampling), requests)
            return list(tqdm(answers, total=len(requests), unit=" questions", disable=None))

    def ask_one(self, processor, sampling, request):
        example, picture = request
        # Calls are read from the text, as in process: the server must not parse them. It would take
        # what is not said here from the model's own generation_config.
        tools = {"tools": example["tools"], "tool_choice": "none"} if example["tools"] else {}
        more = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 0, "min_p": 0.0,
                "repetition_penalty": 1.0}
        response = self.call(self.client.chat.completions.create, model=self.model, top_p=1.0,
                             messages=wire(example, picture), extra_body=more, **sampling, **tools)
        expected, found = count_tokens(processor, example, picture), response.usage.prompt_tokens
        if found != expected:
            raise InputError(f"--server {self.url}: its prompt has {found} tokens, not {expected}: "
                             "look for another model, --chat-template, --mm-processor-kwargs or "
                             "--exclude-tools-when-tool-choice-none there.")
        if any(choice.message.content is None for choice in response.choices):
            raise InputError(f"--server {self.url}: it withholds the text of a completion: start "
                             "it without --tool-call-parser and --reasoning-parser.")
        tokens = response.usage.completion_tokens / len(response.choices)
        return [(choice.message.content, tokens, choice.finish_reason == "length")
                for choice in response.choices]

def wire(example, picture):
    """Messages of the OpenAI protocol: the picture is a data URL, calls' arguments are text."""
    messages = json.loads(json.dumps(example["messages"]))
    for message in messages:
        if IMAGE in message["content"]:
            data = base64.b64encode(png_bytes(picture)).decode()
            link = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
            message["content"][message["content"].index(IMAGE)] = link
        for call in message.get("tool_calls", ()):
            call["id"] = "call"                         # the protocol wants one, templates do not
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages

# --------------------------------------------------------------------------------------------------
# Scores
def judge(task, example, samples):
    """What is kept of an example's samples: a dict of columns, with one value a sample."""
    texts, tokens, cut = zip(*samples)
    result = {"key": example["key"], "text": texts, "tokens": tokens, "cut": cut,
              "score": [task.score(example, text) for text in texts],
              "readable": [task.answer(example, text) is not None for text in texts]}
    if task.paper_answer:
        answers = map(task.paper_answer, texts)
        result["paper_score"] = [float(answer == example["target"]) for answer in answers]
    return result

def evaluate(llm, processor, task, examples, picture, max_new_tokens=512):
    """Greedy completions of `examples` behind a PIL picture, and their scores, by `judge`."""
    requests = arm_requests(processor, examples, picture)
    answers = ask_engine(llm, processor, requests, {**GREEDY, "max_tokens": max_new_tokens})
    return [judge(task, example, samples) for example, samples in zip(examples, answers)]

def bootstrap_interval(scores, keys):
    """Mean of `scores` (n,) and the 95 % interval of 10,000 bootstrap resamples. Rows with one of
    `keys` (n,), of one conversation, are drawn together."""
    _, cluster = np.unique(keys, return_inverse=True)
    totals, sizes = np.bincount(cluster, scores), np.bincount(cluster)
    drawn = np.random.default_rng(0).integers(0, len(totals), (10_000, len(totals)))
    means = totals[drawn].sum(1) / sizes[drawn].sum(1)
    return np.mean(scores), *np.quantile(means, [0.025, 0.975])

def interval(scores, keys):
    mean, low, high = (100 * value for value in bootstrap_interval(scores, keys))
    return f"{mean:.2f}  [{low:6.2f}, {high:6.2f}]"

def report(task, arms, baseline):
    """Print a row for each of a task's `arms`, {name: {"bytes": of its pixels, "results": by
    `judge`}}, with its paired difference to the arm `baseline`."""
    rows, keys = {}, [result["key"] for result in arms[baseline]["results"]]
    base = np.mean([result["score"] for result in arms[baseline]["results"]], axis=1)
    for name, arm in arms.items():
        results = pandas.DataFrame(arm["results"])
        scores = np.array(results["score"].tolist())                    # (questions, samples)
        percent = {column: f"{100 * np.mean(results[column].tolist()):.1f}"
                   for column in ("readable", "cut", "paper_score") if column in results}
        rows[name] = {"accuracy %  [95 % interval]": interval(scores.mean(1), keys),
                      f"less {baseline}": interval(scores.mean(1) - base, keys),
                      "by the paper's rule %": percent.get("paper_score", "-"),
                      f"pass@{scores.shape[1]} %": f"{100 * scores.max(1).mean():.2f}",
                      "readable %": percent["readable"], "cut %": percent["cut"],
                      "tokens": f"{np.mean(results['tokens'].tolist()):.1f}", "bytes": arm["bytes"]}
    print(f"\n{task}, n = {len(keys)}\n{pandas.DataFrame(rows).T.to_string()}")

# --------------------------------------------------------------------------------------------------
# Files and the command line
def save(data, path):
    """Write bytes whole or not at all, whatever is killed or full. Raises InputError."""
    unfinished = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error

def read_results(path, task):
    """What earlier calls kept in `path` for a task: {arm: its record}. Raises InputError."""
    held = {}
    try:
        for line in open(path) if os.path.exists(path) else ():
            if line.strip() and not line.startswith('{"task": '):
                raise ValueError("it holds other lines")
            try:
                record = json.loads(line)
            except ValueError:
                continue                                # empty, or cut off by a kill
            if record["task"] == task:
                held[record["arm"]] = record
    except (OSError, ValueError) as error:
        raise InputError(f"--out {path} is no file of results ({first_line(error)}).") from error
    return held

def keep_result(path, line):
    """Append a line, whoever else does so at the same time. Raises InputError."""
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror}).") from error

def positive(text):
    """An argparse type: a whole number from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)

def score_arms(args, arms, held):
    """Ask the questions behind the arms that `held` lacks, and add their records to it."""
    task, llm = TASKS[args.task], None
    server = Server(args.server, args.timeout) if args.server else None
    args.model = args.model or (server.model if server else "Qwen/Qwen3.5-0.8B")
    processor = load_processor(args.model)
    ask_as = partial(arm_requests, processor, rng=args.rng, size=args.size)
    examples = task.load("test", args.data, args.limit)
    examples = fitting(processor, examples, args.max_model_len - args.max_new_tokens,
                       [ask_as(examples[:1], arm)[0] for arm in arms.values()])
    sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens,
                "presence_penalty": args.presence_penalty, "n": args.samples}
    settings = {"model": args.model, "server": args.server, **sampling, "size": args.size,
                "rng": args.rng, "questions": key_hash(repr(examples))}
    if any(record["settings"] != settings for record in held.values()):
        raise InputError(f"--out {args.out}: its arms were scored with other settings, or on other "
                         "questions: name another file.")
    for name, arm in arms.items():
        record = {"task": args.task, "arm": name, "settings": settings, "pixels": None, "bytes": 0}
        if isinstance(arm, Image.Image):
            pixels = key_hash(f"{arm.size} {arm.tobytes().hex()}")
            record.update(pixels=pixels, bytes=len(png_bytes(arm)))
            if is_resized(processor, *arm.size):
                print(f"{name}: the model's processor resizes it, so that other pixels are scored",
                      file=sys.stderr)
        if name in held and held[name]["pixels"] == record["pixels"]:
            continue
        requests = ask_as(examples, arm)
        if server:
            answers = server.ask(processor, requests, sampling)
        else:
            llm = llm or load_engine(args.model, args.max_model_len,
                                     gpu_memory_utilization=args.gpu_memory_utilization)
            answers = ask_engine(llm, processor, requests, sampling, progress=True)
        record["results"] = [judge(task, e, samples) for e, samples in zip(examples, answers)]
        held[name] = record
        if args.out:
            keep_result(args.out, "\n" + json.dumps(record) + "\n")

def parse_args():
    parser = argparse.ArgumentParser("eval.py", "eval.py ARM ... --task TASK [flags]", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("arms", nargs="+", metavar="ARM", help="a picture file, `none`, `random` or `string:N`")
    add("--task", choices=TASKS, required=True, help="the benchmark")
    add("--model", help="hub name or folder (the server's, or Qwen/Qwen3.5-0.8B)")
    add("--data", help="local .jsonl, .json, .csv or .parquet in the benchmark's own schema")
    add("--server", metavar="URL", help="ask http://HOST:8000/v1, with the key OPENAI_API_KEY")
    add("--timeout", type=positive, default=600, help="seconds for a request to the server (600)")
    add("--out", help="file that keeps every completion; what it holds is not asked again")
    add("--baseline", metavar="ARM", help="the arm to compare with (the first)")
    add("--limit", type=positive, help="score so many questions only (all)")
    add("--samples", type=positive, default=1, help="completions of each question (1)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    add("--presence-penalty", type=float, default=1.0, help="(1, as in the paper)")
    add("--size", type=positive, default=256, help="side of the `random` pictures in pixels (256)")
    add("--rng", type=int, default=0, help="random number seed of `random` and `string` (0)")
    add("--max-new-tokens", type=positive, default=512, help="a completion is cut off there (512)")
    add("--max-model-len", type=positive, default=4096, help="of prompt and completion (4096)")
    add("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's share (0.9)")
    return parser, parser.parse_args()

def main(args):
    if args.samples > 1 and not args.temperature:
        raise InputError("--samples: greedy completions are all the same; give a --temperature.")
    arms = {}
    for name in args.arms:
        is_picture = not re.fullmatch(r"none|random|string:[1-9]\d{0,3}", name)
        arms[name] = open_picture(name) if is_picture else name
    held = {}
    if args.out:
        held = read_results(args.out, args.task)
        keep_result(args.out, "")                       # that it cannot be is said before the work
    baseline = args.baseline or args.arms[0]
    if baseline not in {**arms, **held}:
        raise InputError(f"--baseline {baseline}: it is none of the arms.")
    score_arms(args, arms, held)
    print(f"\n{held[baseline]['settings']}")
    report(args.task, held, baseline)

if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    try:
        main(ARGS)
    except InputError as error:
        PARSER.error(str(error))
