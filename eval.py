"""Score pictures as ART images: accuracy on GSM8K, GPQA or ToolMind with its bootstrap interval.

    python eval.py best.png --task gsm8k
    python eval.py none random seed.png best.png --task gsm8k      # several arms: one engine, the same questions

An arm is a picture file, `none` (the text alone) or `random` (a fresh random picture for every question).
The defaults are those of the paper's published evaluation (arXiv 2606.11854): greedy, at most 512 new tokens,
presence penalty 1.0, 95 % intervals from 10,000 bootstrap resamples. art.py imports tasks and engine from here.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageOps


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

    def lines(longest=1 << 22):
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
    except Exception as error:                          # of the hub's client: HTTP errors of several libraries
        if not remote and not isinstance(error, OSError):
            raise
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
    """
    files: dict[str, str]
    example: Callable
    messages: Callable
    answer: Callable
    reward: Callable
    columns: tuple[str, ...]
    divide: Callable | None = None          # splits a file that the benchmark publishes undivided
    caps: tuple = ()                        # most examples read from the hub, by split

    def load(self, split, data=None, limit=None):
        """Examples of `split` ("train" or "test"), from the hub or from the file `data`. Raises InputError.

        A local file is used whole, unless it bears the name of a hub file that needs dividing: such a copy is divided
        as the hub's is.
        """
        source = data or "hf://datasets/" + self.files[split]
        named = f"--data {data}" if data else source
        limit = limit or (None if data else dict(self.caps).get(split))
        skipped = Counter()

        def examples():
            for row in read_rows(source):
                if missing := [c for c in self.columns if not isinstance(row, dict) or row.get(c) is None]:
                    has = ", ".join(map(str, row)) if isinstance(row, dict) else f"no columns but a {type(row).__name__}"
                    raise InputError(f"{named}: a row lacks {', '.join(missing)} (it has {has}); "
                                     f"this task reads {', '.join(self.columns)}.")
                try:
                    example = self.example(row)
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                    raise InputError(f"{named}: a row is not in this task's schema "
                                     f"({type(error).__name__}: {first_line(error)}).") from error
                if isinstance(example, str):
                    skipped[example] += 1
                else:
                    yield example

        found = examples()
        if self.divide and Path(source).name == Path(self.files[split]).name:
            found = self.divide(found, split)
        found = list(islice(found, limit))
        for reason, count in skipped.items():
            print(f"{source}: skipped {count} rows: {reason}", file=sys.stderr)
        if not found:
            raise InputError(f"{named}: it holds no example for the {split} split.")
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


# ------------------------------------------------------------------------------------------------------------------
# GSM8K: the number after the last "Answer:" must equal the reference. `\boxed{}` and "####" count as "Answer:".

ANSWER_IS = re.compile(r"\banswer\b[^\n:\uff1a=]{0,20}[:\uff1a=]|\banswer\b[\s*_]*\bis\b|\banswer\b[*_\s]*\n|\\boxed\s*\{|####(?=\s*[-$\d.])",
                       re.I)
NUMBER = re.compile(r"(?P<sign>(?<![\w)])[-\u2212])?\s?\\?[$\u20ac\u00a3]?\s?(?P<minus>[-\u2212]?)"
                    r"(?P<whole>\d{1,3}(?:[,'\u00a0\u202f]\d{3}|[ ]\d{3}(?!-))+(?!\d)|\d{1,400}|(?=(?<![\w.])\.\d))"
                    r"(?P<decimals>\.\d{1,400})?(?:\s?/\s?(?P<below>\d{1,400}))?")
UNFINISHED = re.compile(r"\s*[*_$]*\s*(?:[+*\u00d7x/]|-\s)\s*\\?\$?\d|\s\d+/\d")             # "9 * 2", "1 1/2"


def first_number(text):
    """The first number in `text` as a Fraction, or None: reads `-$7`, `1,080.50`, `1/2`, `5.` and `50%` (as 50)."""
    match = NUMBER.search(plain_numbers(text))
    if match is None:
        return None
    value = Fraction((re.sub(r"\D", "", match["whole"]) or "0") + (match["decimals"] or ""))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return -value if match["sign"] or match["minus"] else value


def plain_numbers(text):
    """LaTeX's ways of writing a number as plain text."""
    text = re.sub(r"\\[td]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\{,\}|\\[,!]", "", text)


def gsm8k_example(row):
    _, marker, target = row["answer"].rpartition("####")
    target = first_number(target) if marker else None
    if target is None:
        return "no number after ####"
    return {"key": row["question"], "question": row["question"].strip(), "target": target}


def gsm8k_messages(example, image=True):
    return user_turn(f"{example['question']}\n\nEnd your response with: Answer: <number>", image), None


def gsm8k_answer(example, text):
    """The number after the last answer marker that one follows: on its line, or else on the next line with a word."""
    text = without_thought(text)
    for marker in reversed(list(ANSWER_IS.finditer(text))):
        lines = [line for line in text[marker.end():][:1000].splitlines() if re.search(r"\w", line)]
        line = plain_numbers(lines[0].strip(" *_:=$[(")) if lines else ""
        line = re.sub(r"^[-*]\s+", "", line)
        line = re.split(r"(?<=\d)\W*\s\(", line)[0]              # "18 (= 9 * 2)"
        line = line.rpartition("=")[2] if NUMBER.search(line.rpartition("=")[2]) else line      # "9 * 2 = 18"
        if match := NUMBER.search(line):
            return None if UNFINISHED.match(line, match.end()) else first_number(line)
    return None


def gsm8k_reward(example, text):
    """The shaped reward of the authors' repository: near misses and readable answers earn a little."""
    value, target = gsm8k_answer(example, text), example["target"]
    if value is None:
        return 0.01 if first_number(text) is not None else 0.0
    error = abs(value - target) / max(abs(target), 1)
    return 1.0 if error == 0 else 0.4 if error <= 0.01 else 0.2 if error <= 0.1 else 0.1


# ------------------------------------------------------------------------------------------------------------------
# GPQA: the letter in "The correct answer is (X)". The order of the choices follows from the record's id.

LETTER_IS = re.compile(r"(?i:answer)\b[\s*_]*+(?i:is\b|:|=)[\s*_:$\"]*+(?i:option|choice)?\s*+(?:\\(?:boxed|text\w*|math\w+)\{)*+"
                       r"[\s*\"]*+(?:[(\[]\s?(?P<round>[A-Da-d])\s?[)\]]|(?P<bare>A(?!\s+[a-z])|[B-D])\b(?![-=+]\w))(?=(?P<rest>.{,30}))")
ANOTHER = re.compile(r"[^\w\n]*(?:or|and)?(?:\smaybe)?[^\w\n]*\([A-Da-d]\)|[\s*]*(?:or|and|/|,|&|\||\+)[\s*]*[A-D]\b|\W*is (?:wrong|incorrect|not)")


def gpqa_example(row):
    order = sorted(range(4), key=lambda i: key_hash(f"{row['Record ID']} {i}"))     # choice 0 is the right one
    choices = [row[column].strip() for column in GPQA_CHOICES]
    return {"key": row["Record ID"], "question": row["Question"].strip(), "choices": [choices[i] for i in order],
            "target": "ABCD"[order.index(0)]}


GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gpqa_messages(example, image=True):
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", example["choices"]))
    return user_turn(f"{example['question']}\n\n{choices}\n\nEnd your response with: The correct answer is (X)", image), None


def gpqa_answer(example, text):
    """The letter after the last "answer is"; None if a second letter is offered beside it."""
    matches = list(LETTER_IS.finditer(without_thought(text)))
    if not matches or ANOTHER.match(matches[-1]["rest"]):
        return None
    return (matches[-1]["round"] or matches[-1]["bare"]).upper()


def gpqa_reward(example, text):
    answer = gpqa_answer(example, text)
    return 1.0 if answer == example["target"] else 0.1 if answer else 0.0


def gpqa_halves(examples, split):
    """Half of the records by the order of their ids' hashes: 273 of the 546 of gpqa_extended, as in the paper."""
    examples = sorted(examples, key=lambda e: key_hash(e["key"]))
    keys = list(dict.fromkeys(e["key"] for e in examples))
    held_out = set(keys[:len(keys) // 2])
    return [e for e in examples if (e["key"] in held_out) == (split == "test")]


# ------------------------------------------------------------------------------------------------------------------
# ToolMind: the next tool call, exactly: the same calls in any order, each with the same arguments

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
    schema = function.get("parameters") or function.get("arguments") or {}
    while isinstance(schema, dict) and isinstance(schema.get("parameters"), dict) and "type" not in schema:
        schema = schema["parameters"]                   # doubly wrapped
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        properties = {k: v for k, v in schema.items() if isinstance(v, dict)} if isinstance(schema, dict) else {}
        schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": str(function["name"]), "parameters": schema,
                                             "description": function.get("description") or ""}}


def calls_of(turn):
    """The calls [(name, arguments)] of a conversation's turn; no arguments are {}."""
    functions = [call.get("function") or call for call in parsed(turn.get("tool_calls")) or []]
    return [(f["name"], {} if parsed(f.get("arguments")) is None else parsed(f["arguments"])) for f in functions]


def toolmind_example(row):
    *history, target = parsed(row["conversations"])
    messages = []
    for turn in history:
        text = text_of(turn.get("content"))
        text = (without_thought(text) if turn["role"] == "assistant" else text).strip()
        messages.append({"role": turn["role"], "content": [{"type": "text", "text": text}] if text else []})
        if calls_of(turn):
            messages[-1]["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": arguments}}
                                          for name, arguments in calls_of(turn)]
    if not any(m["role"] == "user" for m in messages):
        return "no user message before the target"
    if not calls_of(target):
        return "the target makes no tool call"
    if any(not isinstance(arguments, dict) for turn in [*history, target] for _, arguments in calls_of(turn)):
        return "a call's arguments are no object"
    tools = [tool_schema(tool) for tool in parsed(row["tools"])]
    return {"key": next(text_of(t.get("content")) for t in history if t["role"] == "user"), "messages": messages,
            "tools": tools, "target": comparable(calls_of(target), tools)}


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
    kinds = schema.get("type") if isinstance(schema.get("type"), list) else [schema.get("type")]
    if {"string", "str"} & set(map(str, kinds)) and value is not None:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    if isinstance(value, str):
        value = {"True": True, "False": False, "None": None}.get(value, parsed(value))
    if isinstance(value, dict):
        properties = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
        return tuple(sorted((k, canonical(v, properties.get(k))) for k, v in value.items()))
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
        body = body.strip()
        if body.startswith("{"):
            call = parsed(body)
            if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "parameters" in call:
                return None
            name, arguments = call["name"], parsed(call.get("arguments"))
            arguments = {} if arguments is None else arguments
        else:
            head, *parameters = body.removesuffix("</function>").split("<parameter=")
            name, arguments = head.strip().removeprefix("<function=").removesuffix(">"), {}
            closed = closed and body.startswith("<function=") and body.endswith("</function>") and head.strip().endswith(">")
            for parameter in parameters:
                key, _, value = parameter.partition(">")
                value, end, _ = value.rpartition("</parameter>")
                arguments[key], closed = value.removeprefix("\n").removesuffix("\n"), closed and end
        if not closed or not isinstance(arguments, dict) or not re.fullmatch(r"[\w.-]+", name):
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


def toolmind_share(examples, split):
    """Conversations whose first user message hashes into 1 % are held out; the whole file need not be read for it."""
    return (e for e in examples if (key_hash(e["key"]) % 100 == 0) == (split == "test"))


GSM8K_FILE, GPQA_FILE = "openai/gsm8k/main/{}-00000-of-00001.parquet", "Idavidrein/gpqa/gpqa_extended.csv"
TOOLMIND_FILE = "Nanbeige/ToolMind/graph_syn_datasets/graphsyn.jsonl"
TASKS = {
    "gsm8k": Task({s: GSM8K_FILE.format(s) for s in ("train", "test")}, gsm8k_example, gsm8k_messages, gsm8k_answer,
                  gsm8k_reward, columns=("question", "answer")),
    "gpqa": Task(dict.fromkeys(("train", "test"), GPQA_FILE), gpqa_example, gpqa_messages, gpqa_answer,
                 gpqa_reward, columns=("Record ID", "Question", *GPQA_CHOICES), divide=gpqa_halves),
    "toolmind": Task(dict.fromkeys(("train", "test"), TOOLMIND_FILE), toolmind_example, toolmind_messages,
                     toolmind_answer, toolmind_reward, columns=("conversations", "tools"), divide=toolmind_share,
                     caps=(("train", 8192), ("test", 2000))),      # 2.3 GB; the paper holds out 2,000
}


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
            if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, (128, 128, 128, 255)), picture)
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: it cannot be read as a picture ({first_line(error)}).") from error


def random_picture(size, *seed):
    """A picture of independent, uniformly random 8-bit values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def load_processor(model, trust_remote_code=False):
    """The processor of `model`, a hub name or a folder. Raises InputError if it is not to be had, or has no image part."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    local, processor = os.path.exists(model), None
    if local and not os.path.isfile(os.path.join(model, "config.json")):
        raise InputError(f"--model {model}: it is no model folder, for it holds no config.json.")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)      # a single file: fails soon where there is no hub
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        if getattr(processor, "image_processor", None) is not None:
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
    logging.getLogger("vllm").setLevel(logging.ERROR)
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
        options = dict(enforce_eager=True)
        import torch
        torch._dynamo.config.disable = True             # no C++ compiler needed, which trips over a space in the path, too
    # generation_config="vllm": no sampling default of the model's own leaks into rollouts.
    try:
        return LLM(model, dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=seed,
                   generation_config="vllm", use_tqdm_on_load=False, limit_mm_per_prompt={"image": 1, "video": 0},
                   trust_remote_code=trust_remote_code, load_format="safetensors", **options)
    except Exception as error:          # too little memory, unknown architecture, broken weights: vLLM raises anything
        raise InputError(f"--model {model}: vLLM cannot start it ({' '.join(str(error).split())}).") from error


def prompt_text(processor, task, example, image=True):
    """The rendered chat template of an example: with its image placeholder, up to where the model begins to answer."""
    messages, tools = task.messages(example, image)
    return processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=False)


def vllm_prompt(text, picture):
    """vLLM's request for a rendered prompt with a PIL `picture`, or with none."""
    return {"prompt": text, **({"multi_modal_data": {"image": picture}} if picture is not None else {})}


def fitting(processor, task, examples, max_tokens, picture):
    """The examples whose prompt behind `picture` has at most `max_tokens` tokens; says how many were left out."""
    def tokens(example, picture=None):
        text = prompt_text(processor, task, example, picture is not None)
        return len(processor(text=[text], **({"images": [picture]} if picture else {}))["input_ids"][0])
    image_tokens = tokens(examples[0], picture) - tokens(examples[0])
    kept = [e for e in examples if tokens(e) + image_tokens <= max_tokens]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} examples: their prompts are longer than "
              f"{max_tokens} tokens (--max-model-len less --max-new-tokens)", file=sys.stderr)
    if not kept:
        raise InputError(f"every prompt is longer than {max_tokens} tokens, --max-model-len less --max-new-tokens: raise it.")
    return kept


# ------------------------------------------------------------------------------------------------------------------
# Scoring

def evaluate(llm, processor, task, examples, arm, max_new_tokens=512, presence_penalty=1.0, progress=False, rng=0, size=256):
    """Greedy completions of `examples` behind `arm`: a PIL image, "none" or "random". Returns one dict an example:
    {text, tokens, score, readable, cut}."""
    from vllm import SamplingParams
    pictures = (random_picture(size, rng, i) if arm == "random" else None if arm == "none" else arm
                for i in range(len(examples)))
    prompts = [vllm_prompt(prompt_text(processor, task, e, picture is not None), picture)
               for e, picture in zip(examples, pictures)]
    params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, presence_penalty=presence_penalty)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=progress)]
    return [{"text": o.text, "tokens": len(o.token_ids), "score": task.score(e, o.text),
             "readable": task.answer(e, o.text) is not None, "cut": o.finish_reason == "length"}
            for e, o in zip(examples, outputs, strict=True)]


def bootstrap_interval(scores, resamples=10_000, level=0.95, seed=0):
    """Mean of `scores` (n,) and its percentile bootstrap interval, each in the scores' unit."""
    scores, rng = np.asarray(scores, dtype=float), np.random.default_rng(seed)
    means = np.concatenate([scores[rng.integers(0, len(scores), (100, len(scores)))].mean(1)
                            for _ in range(resamples // 100)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return scores.mean(), low, high


def at_least(low, kind=int, high=2**31):
    """An argparse type: a number that is neither below `low` nor above `high`, and not nan."""
    def number(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    # argparse: "invalid number (at least 1) value: '0'"
    number.__name__ = f"number (at least {low})" + f" (at most {high})" * (high != 2**31)
    return number


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="IMAGE", help="a picture file, `none` or `random`")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--model", default="Qwen/Qwen3.5-0.8B", help="hub name or folder")
    parser.add_argument("--data", help="local .jsonl, .json, .csv or .parquet in the benchmark's own schema")
    parser.add_argument("--limit", type=at_least(1), help="score the first LIMIT questions only")
    parser.add_argument("--size", type=at_least(1, high=2048), default=256, help="side of the `random` pictures, in pixels")
    parser.add_argument("--rng", type=at_least(0), default=0, help="random number seed of the `random` pictures")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=512)
    parser.add_argument("--max-model-len", type=at_least(1), default=4096)
    parser.add_argument("--presence-penalty", type=at_least(-2, float, 2), default=1.0, help="1.0 as in the paper's evaluation")
    parser.add_argument("--gpu-memory-utilization", type=at_least(0, float, 1), default=0.9)
    args = parser.parse_args()

    pictures = {arm: arm if arm in ("none", "random") else open_picture(arm) for arm in args.arms}
    task = TASKS[args.task]
    examples = task.load("test", args.data, args.limit)
    processor = load_processor(args.model)
    largest = max([p for p in pictures.values() if isinstance(p, Image.Image)] or [random_picture(args.size, 0)],
                  key=lambda p: p.width * p.height)
    examples = fitting(processor, task, examples, args.max_model_len - args.max_new_tokens, largest)
    llm = load_engine(args.model, args.max_model_len, gpu_memory_utilization=args.gpu_memory_utilization)

    width = max(map(len, args.arms))
    print(f"{args.task}, n = {len(examples)}, {args.model}, greedy, presence penalty {args.presence_penalty}")
    print(f"{'image':{width}}  accuracy %  95 % interval     n  unreadable %  cut %  tokens  PNG bytes")
    for arm, picture in pictures.items():
        results = evaluate(llm, processor, task, examples, picture, args.max_new_tokens, args.presence_penalty,
                           progress=sys.stderr.isatty(), rng=args.rng, size=args.size)
        mean, low, high = (100 * x for x in bootstrap_interval([r["score"] for r in results]))
        unreadable, cut, tokens = (np.mean([r[k] for r in results]) for k in ("readable", "cut", "tokens"))
        size = os.path.getsize(arm) if isinstance(picture, Image.Image) else "-"
        print(f"{arm:{width}}  {mean:10.2f}  [{low:5.2f}, {high:6.2f}] {len(results):5d}  {100 * (1 - unreadable):12.1f}  "
              f"{100 * cut:5.1f}  {tokens:6.1f}  {size:>9}", flush=True)


if __name__ == "__main__":
    exit_with(main)
