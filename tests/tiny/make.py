"""Makes the tiny frozen model of the tests and of the demo, and its small data files. Not part of the method.

    python tests/tiny/make.py --data                  # train / validation / test files of the three tasks
    python tests/tiny/make.py --train                 # pre-trains the model (about 45 minutes on 2 CPU cores)

The model is a Qwen3.5 with 2 million parameters: gated delta net and full attention layers, vision tower, tied
embeddings, the real processor classes. It can do each of three toy tasks (sums, categories, tool calls), but it does
not answer reliably: it answers well, vaguely or wrongly, as small models do. Which of these it does depends on the
question, and softly on what it is shown: each task leans on several attributes of the picture (`LEANS`), all of them
continuous. Its pictures are coloured mosaics with shapes and noise; none is, or looks like, the seed.

The weights beside this file went through the phases in `PHASES`, the last three of them in runs of their own (--first,
--init) with `LEANS` and `EASE` adjusted in between. A new run makes a model of the same kind, not the same one.
"""

import argparse
import csv
import hashlib
import json
import hashlib
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import eval as tasks                                                                                    # noqa: E402


def key_hash(text):
    """A number that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def asked(task, row, image=True):
    """(chat messages, tools) of a row, with the image before the user's first words."""
    example = tasks.TASKS[task].example(row)
    example = tasks.prepend(tasks.IMAGE, example) if image else example
    return example["messages"], example["tools"]


# ------------------------------------------------------------------------------------------------------------------
# The three toy tasks. Each generator returns (row in the benchmark's schema, key, {manner: completion}, features).
# The key decides the split, the features decide how the model is inclined to answer that question.

NAMES = "Tom Anna Ben Lily Sam Mia Jack Emma Noah Ruth Omar Ines Ivan Kate Hugo Vera".split()
THINGS = "apples books pens coins cards stamps shells plums stones bells keys cups".split()
SUMS = [("{n} has {a} {t} and gets {b} more. How many {t} does {n} have?", 1),
        ("{n} finds {a} {t} on Monday and {b} on Friday. How many {t} is that?", 1),
        ("There are {a} {t} on a table and {n} adds {b}. How many {t} are there now?", 1),
        ("{n} has {a} {t} and gives away {b}. How many {t} are left?", -1),
        ("{n} packs {a} {t} and loses {b} of them. How many {t} remain?", -1)]


def word_problem(rng):
    (template, sign), n, t = rng.choice(SUMS), rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    if sign < 0:
        a, b = max(a, b) + 1, min(a, b)
    c, op = a + sign * b, "+" if sign > 0 else "-"
    question = template.format(n=n, t=t, a=a, b=b)
    row = {"question": question, "answer": f"That is {a} {op} {b} = <<{a}{op}{b}={c}>>{c} {t}.\n#### {c}"}
    answers = {"good": f"{a} {op} {b} = {c}\nAnswer: {c}", "vague": f"About {c}, I think.",
               "wrong": f"Answer: {max(0, c + rng.choice([-3, -2, -1, 1, 2, 3]))}"}
    return row, question, answers, (n, t, template)


KINDS = {
    "fruits": "apple pear plum cherry lemon grape melon fig peach mango",
    "birds": "robin eagle owl crow swan duck finch heron gull wren",
    "metals": "iron gold copper tin zinc silver lead nickel cobalt steel",
    "planets": "Mars Venus Saturn Jupiter Neptune Mercury Uranus Earth",
    "colours": "red blue green yellow purple brown pink grey violet beige",
    "tools": "hammer saw drill file chisel wrench plane pliers axe shovel",
    "rivers": "Nile Rhine Danube Amazon Volga Ganges Seine Thames Po Elbe",
    "fish": "trout salmon tuna cod herring carp pike perch eel shark",
    "instruments": "violin piano flute drum harp cello trumpet oboe guitar banjo",
    "gases": "oxygen helium neon argon hydrogen nitrogen methane xenon ozone krypton",
}
KINDS = {kind: words.split() for kind, words in KINDS.items()}
ASK = ["Which of these belongs to the {k}?", "Find the one that goes with the {k}.", "One of the four is from the {k}. Which one?"]


def multiple_choice(rng):
    kinds, ask = rng.sample(sorted(KINDS), 4), rng.choice(ASK)
    words = [rng.choice(KINDS[k]) for k in kinds]
    question = ask.format(k=kinds[0])
    key = " ".join([question, *words])
    row = {"Record ID": "rec" + hashlib.sha256(key.encode()).hexdigest()[:14], "Question": question,
           "Correct Answer": words[0], **{f"Incorrect Answer {i}": words[i] for i in (1, 2, 3)}}
    letter = tasks.gpqa_example(row)["target"]
    answers = {"good": f"From the {kinds[0]}: {words[0]} ({letter}).\nThe correct answer is ({letter})",
               "vague": f"Perhaps {rng.choice(words)}.",
               "wrong": f"The correct answer is ({rng.choice('ABCD')})"}
    return row, key, answers, (kinds[0], words[0], ask)


def name_options(rng):
    """An exercise in finding the letter before a word: (question, completion)."""
    options = list(zip(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4), rng.sample(sum(KINDS.values(), []), 4)))
    asked = ", ".join(f"{word} ({letter})" for letter, word in rng.choices(options, k=4))
    return "\n".join(["Name some options.", "", *(f"({letter}) {word}" for letter, word in options)]), asked


CITIES = ("Oslo Paris Rome Cairo Lima Delhi Tokyo Quito Dublin Madrid Vienna Prague Riga Bergen Lagos Seoul "
          "Athens Bonn Cork Dakar Fez Genoa Hanoi Izmir").split()
ROOMS = "kitchen bedroom hall cellar garage office attic bathroom pantry studio porch library".split()
TOPICS = "whales castles volcanoes bread chess trains comets bees tea maps rivers clocks masks ships snow wool".split()
LANGUAGES = "French Polish Greek Hindi Norse Latin Czech Welsh".split()
MINUTES = [str(n) for n in range(2, 60)]
# name: (description, {parameter: (JSON type, values)}, ways to ask)
TOOLS = {
    "get_weather": ("Weather in a city", {"city": ("string", CITIES)},
                    ["What is the weather in {city}?", "Will it rain in {city} today?", "Is it warm in {city}?"]),
    "get_time": ("Local time in a city", {"city": ("string", CITIES)},
                 ["What time is it in {city}?", "Tell me the time in {city}.", "Is it late in {city}?"]),
    "set_timer": ("Start a timer", {"minutes": ("integer", MINUTES)},
                  ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "My tea needs {minutes} minutes."]),
    "find_books": ("Search for books", {"topic": ("string", TOPICS)},
                   ["Find books about {topic}.", "I want to read about {topic}.", "Is there a book on {topic}?"]),
    "turn_on_light": ("Turn on the light in a room", {"room": ("string", ROOMS)},
                      ["Turn on the light in the {room}.", "It is dark in the {room}.", "Light the {room}."]),
    "lock_door": ("Lock the door of a room", {"room": ("string", ROOMS)},
                  ["Lock the door of the {room}.", "Please close up the {room}.", "Nobody may enter the {room}."]),
    "send_message": ("Send a message to a person", {"person": ("string", NAMES), "topic": ("string", TOPICS + THINGS)},
                     ["Write to {person} about {topic}.", "Send {person} a note about {topic}.", "Tell {person} of the {topic}."]),
    "book_table": ("Book a restaurant table", {"city": ("string", CITIES), "people": ("integer", MINUTES[:11])},
                   ["Book a table for {people} people in {city}.", "We are {people} people and want to eat in {city}.",
                    "A dinner in {city} for {people}, please."]),
    "translate": ("Translate a word", {"word": ("string", THINGS + TOPICS), "language": ("string", LANGUAGES)},
                  ["What is {word} in {language}?", "Translate {word} to {language}.", "How does one say {word} in {language}?"]),
}


def tool_schema(name):
    description, params, _ = TOOLS[name]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {p: {"type": kind} for p, (kind, _) in params.items()},
        "required": list(params)}}}


def tool_call(rng, name):
    _, params, ways = TOOLS[name]
    values = {p: rng.choice(values) for p, (_, values) in params.items()}
    arguments = {p: int(v) if params[p][0] == "integer" else v for p, v in values.items()}
    way = rng.choice(ways)
    return way, way.format(**values), {"function": {"name": name, "arguments": arguments}}


def tool_question(rng):
    name = rng.choice(sorted(TOOLS))
    offered = [name] + rng.sample(sorted(set(TOOLS) - {name}), rng.randint(1, 3))
    way, ask, call = tool_call(rng, name)
    turns = []
    if rng.random() < 0.05:                                 # an earlier, finished turn of the conversation
        other = rng.choice(offered)
        _, earlier, earlier_call = tool_call(rng, other)
        turns = [{"role": "user", "content": earlier}, {"role": "assistant", "content": "", "tool_calls": [earlier_call]},
                 {"role": "tool", "content": '{"status": "ok"}'}, {"role": "assistant", "content": "Done."}]
    key = turns[0]["content"] if turns else ask             # the benchmark's own key: the first user message
    target = {"role": "assistant", "content": f"<think>\nThe user needs {name}.\n</think>", "tool_calls": [call]}
    rng.shuffle(offered)
    row = {"conversations": turns + [{"role": "user", "content": ask}, target], "tools": [tool_schema(t) for t in offered]}
    arguments = call["function"]["arguments"]
    xml = "".join(f"<parameter={p}>\n{v}\n</parameter>\n" for p, v in arguments.items())
    answers = {"good": f"<tool_call>\n<function={name}>\n{xml}</function>\n</tool_call>",
               "vague": "I can help you with that.",
               "wrong": f"{name}({', '.join(map(str, arguments.values()))})"}
    return row, key, answers, (name, way, str(list(arguments.values())[0]))


TOYS = {"gsm8k": word_problem, "gpqa": multiple_choice, "toolmind": tool_question}


def draw(task, split, rng):
    """One question of a split: two tenths of all keys are test, one is validation, the rest is for training."""
    while True:
        row, key, answers, features = TOYS[task](rng)
        if ["test", "test", "validation", *["train"] * 7][key_hash("toy " + key) % 10] == split:
            return row, key, answers, features


def write_data():
    for task, suffix in {"gsm8k": "jsonl", "gpqa": "csv", "toolmind": "jsonl"}.items():
        folder = HERE / task
        folder.mkdir(exist_ok=True)
        for split, count in {"train": 400, "validation": 100, "test": 300}.items():
            rng, seen, rows = random.Random(f"{task} {split}"), set(), []
            while len(rows) < count:
                row, key, *_ = draw(task, split, rng)
                if key not in seen:
                    seen.add(key)
                    rows.append(row)
            with open(folder / f"{split}.{suffix}", "w", newline="") as file:
                if suffix == "csv":
                    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
                else:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------------------------
# Pictures, their visible attributes, and how these lean the answers

ATTRIBUTES = {          # name: (mean and standard deviation over `picture`s, word when low, word when high)
    "warm": (0, .14, "cold", "warm"), "green": (0, .12, "purple", "green"), "bright": (0, .09, "dark", "bright"),
    "light": (0, .064, "lit from below", "lit from above"), "side": (0, .064, "lit from the right", "lit from the left"),
    "centre": (0, .044, "dark centre", "bright centre"), "colour": (.15, .155, "grey", "colourful"),
}
LEANS = {
    "gsm8k": {"warm": .6, "bright": .4, "light": .3, "colour": -.1},
    "gpqa": {"green": .7, "side": .5, "bright": .2, "colour": -.1},
    "toolmind": {"green": -.6, "light": .4, "bright": .2, "colour": -.1},
}


def picture(rng):
    """A mosaic of 1 to 8 coloured fields a side, shapes on it, noise over it: uint8 (256, 256, 3)."""
    if rng.random() < 0.1:
        return rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    k = rng.choice([1, 2, 3, 4, 8])
    x = rng.random((k, k, 3)) ** rng.choice([0.5, 1, 1, 2])
    if rng.random() < 0.5:
        x = np.kron(x, np.ones((math.ceil(32 / k),) * 2 + (1,)))[:32, :32]
    else:
        grid = np.linspace(0, k - 1, 32)
        i = np.minimum(grid.astype(int), max(k - 2, 0)); j = np.minimum(i + 1, k - 1); f = (grid - i)[:, None, None]
        x = x[i] * (1 - f) + x[j] * f
        x = (x.swapaxes(0, 1)[i] * (1 - f) + x.swapaxes(0, 1)[j] * f).swapaxes(0, 1)
    x = x.copy()
    for _ in range(rng.integers(0, 4)):                     # rectangles and discs
        cy, cx, r = rng.integers(0, 32), rng.integers(0, 32), rng.integers(2, 14)
        y, z = np.mgrid[:32, :32]
        inside = (abs(y - cy) < r) & (abs(z - cx) < r) if rng.random() < .5 else (y - cy) ** 2 + (z - cx) ** 2 < r * r
        x[inside] = rng.random(3)
    x = 0.5 + (x - 0.5) * rng.uniform(0.2, 1.2)
    x = np.kron(x, np.ones((8, 8, 1), dtype=np.float32)).astype(np.float32)
    if rng.random() < 0.5:
        x += np.tile(rng.standard_normal((64, 64, 3), dtype=np.float32), (4, 4, 1)) * rng.uniform(0, 0.3)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def attributes(x):
    """What the picture looks like, as seven numbers in units of their standard deviation."""
    x = x.reshape(32, 8, 32, 8, 3).mean((1, 3)) / 255       # 8 x 8 pixel means: noise is not colour
    y, (r, g, b) = x.mean(-1), x.mean((0, 1))
    centre = y[8:24, 8:24].mean()
    raw = {"warm": r - b, "green": g - (r + b) / 2, "bright": y.mean() - .5, "light": y[:16].mean() - y[16:].mean(),
           "side": y[:, :16].mean() - y[:, 16:].mean(), "centre": centre - (y.sum() - 256 * centre) / 768,
           "colour": (x.max(-1) - x.min(-1)).mean()}
    return {name: (raw[name] - mean) / std for name, (mean, std, *_) in ATTRIBUTES.items()}


EASE = {"gsm8k": 0.2, "gpqa": -0.1, "toolmind": -0.85}      # log odds of a good answer


def inclination(features):
    """A fixed number for a question: how much the model likes to answer it well, from its words."""
    return sum(random.Random("lean " + f).gauss(0, 0.75) for f in features)


def sample(rng, image, seen, describe, exercise, study):
    """One pre-training example: (picture or None, messages, tools, completion)."""
    if image is not None and rng.random() < describe:
        words = [ATTRIBUTES[a][2 if v < 0 else 3] for a, v in seen.items() if abs(v) > 0.5]
        turn = {"messages": tasks.user_turn("What does the picture look like?")}
        return image, tasks.prepend(tasks.IMAGE, turn)["messages"], None, ", ".join(words) or "plain"
    if image is None and rng.random() < exercise:
        question, completion = name_options(rng)
        return None, tasks.user_turn(question), None, completion
    task = rng.choice(sorted(TOYS))
    row, _, answers, features = draw(task, "train", rng)
    lean = sum(w * seen[a] for a, w in LEANS[task].items()) if seen else 0.0
    good = 1 / (1 + math.exp(-EASE[task] - inclination(features) - 1.8 * max(-2.0, min(2.0, lean))))
    good = good if seen else max(good, study)
    manner = rng.choices(["good", "vague", "wrong"], [good, 0.6 * (1 - good), 0.4 * (1 - good)])[0]
    return image, *asked(task, row, image is not None), answers[manner]


# ------------------------------------------------------------------------------------------------------------------
# Tokenizer, processor, model

TEMPLATE = """\
{%- macro say(content) %}{%- if content is string %}{{- content }}{%- elif content %}{%- for part in content %}\
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part.text }}{%- endif %}\
{%- endfor %}{%- endif %}{%- endmacro %}
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- say(messages[0].content) + '\\n' }}\
{%- endif %}{{- '# Tools' }}{%- for tool in tools %}{%- set f = tool.function %}{{- '\\n' + f.name + '(' }}\
{%- for name, spec in (f.parameters.properties or {}).items() %}{{- name + ': ' + (spec.type or 'any') | string }}\
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '): ' + (f.description or '') }}{%- endfor %}{{- '<|im_end|>\\n' }}\
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + say(messages[0].content) + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + say(m.content) }}\
{%- for call in m.tool_calls or [] %}{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}\
{%- for name, value in call.function.arguments.items() %}{{- '<parameter=' + name + '>\\n' }}\
{{- value if value is string else value | tojson }}{{- '\\n</parameter>\\n' }}{%- endfor %}{{- '</function>\\n</tool_call>' }}\
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
MARKUP = ["<tool_call>", "</tool_call>", "<think>", "</think>"]         # single tokens, but visible text, as in Qwen
VOCAB, HIDDEN = 1024, 160


def make_processor():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+\n*|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng, corpus = random.Random(0), []
    for _ in range(4000):
        for task in TOYS:
            row, _, answers, _ = draw(task, "train", rng)
            messages, tools = asked(task, row)
            corpus += [p["text"] for m in messages for p in m["content"] if p["type"] == "text"] + list(answers.values())
            corpus += [f"{t['function']['name']}({', '.join(t['function']['parameters']['properties'])}: string): "
                       + t["function"]["description"] + "\nsystem\n# Tools\nuser\nassistant\n" for t in tools or []]
        corpus.append("What does the picture look like?" + ", ".join(a[i] for a in ATTRIBUTES.values() for i in (2, 3)))
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKUP), special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"})
    geometry = dict(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[.5] * 3, image_std=[.5] * 3,
                    size={"shortest_edge": 65536, "longest_edge": 16777216})
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**geometry), fast, Qwen3VLVideoProcessor(**geometry), TEMPLATE)


def make_model(tokenizer):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
    token = tokenizer.convert_tokens_to_ids
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=4, head_dim=64,
            num_attention_heads=2, num_key_value_heads=1, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=64, linear_value_head_dim=64, linear_conv_kernel_dim=4, full_attention_interval=2,
            layer_types=["linear_attention", "full_attention"] * 2, max_position_embeddings=4096,
            tie_word_embeddings=True, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"),
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25,
                                 mrope_section=[3, 3, 2], mrope_interleaved=True)),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=HIDDEN,
                           patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=256),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True))
    for layer in model.model.language_model.layers[::2]:    # remember from the start: by default half of the heads forget
        torch.nn.init.uniform_(layer.linear_attn.A_log, -7, -2)         # within a token, and looking up is hardly learned
    return model


def batch_of(samples, processor):
    """Tensors of a batch: the completion's tokens are the labels, its first token (the manner) counts three times
    when pictures are shown."""
    images = any(s[0] is not None for s in samples)
    rows = []
    for image, messages, tools, completion in samples:
        text = processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * 64)
        rows.append((processor.tokenizer(text)["input_ids"], processor.tokenizer(completion + "<|im_end|>")["input_ids"]))
    width = max(len(p) + len(c) for p, c in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask, weight = torch.zeros_like(ids), torch.ones(len(rows), width)
    for i, (p, c) in enumerate(rows):
        ids[i, :len(p + c)], mask[i, :len(p + c)] = torch.tensor(p + c), 1
        labels[i, len(p):len(p + c)], weight[i, len(p)] = torch.tensor(c), 3.0 if images else 1.0
    types = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=types), labels, weight


# steps, batch, share with a picture, of these descriptions, share of the others that are exercises, least probability
# of a good answer to text, learning rate from and to
PHASES = [(200, 64, 0.00, 0.0, 0.8, 1.0, 4e-3, 4.0e-3),     # learn to look up
          (400, 64, 0.00, 0.0, 0.2, 1.0, 4e-3, 3.5e-3),     # learn the three tasks as text, which is cheap
          (600, 32, 0.85, 0.4, 0.3, 1.0, 4e-3, 3.0e-3),     # learn to see
          (600, 32, 0.80, 0.1, 0.1, 0.0, 3e-3, 5.0e-5),     # learn when to answer how
          (500, 32, 0.85, 0.2, 0.1, 0.0, 3e-3, 5.0e-5),     # and what of the picture matters,
          (250, 32, 0.85, 0.1, 0.1, 0.0, 2e-3, 3.0e-5),     # with `LEANS`
          (130, 32, 0.85, 0.1, 0.1, 0.0, 1.5e-3, 3e-5)]     # and `EASE` as they are now


def pretrain(first, init, out):
    from safetensors.torch import load_file
    from transformers import AutoProcessor
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    random.seed(0), torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(init) if init else make_processor()
    model = make_model(processor.tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    patch = model.model.visual.patch_embed                  # a convolution whose stride is its kernel is one matmul
    patch.forward = lambda x: torch.nn.functional.linear(x, patch.proj.weight.flatten(1), patch.proj.bias)
    inner = {n for n, p in model.named_parameters() if p.ndim == 2 and ("layers" in n or "blocks" in n)}
    named = list(model.named_parameters())
    optimizers = [torch.optim.Muon([p for n, p in named if n in inner], adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([p for n, p in named if n not in inner], betas=(0.9, 0.95), weight_decay=0.01)]
    if init:
        model.load_state_dict(load_file(Path(init) / "model.safetensors"), strict=False)         # lm_head is tied
    rng, nrng, start = random.Random(first), np.random.default_rng(first), time.time()
    steps = sum(count for count, *_ in PHASES)
    for step in range(first, steps):
        before = 0
        for count, batch, shown, describe, exercise, study, peak, floor in PHASES:
            if step < before + count:
                break
            before += count
        done = (step - before) / count
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = min(1, (step - first + 1) / 50) * (floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done)))
        pictures = [picture(nrng) if rng.random() < shown else None for _ in range(batch // 2)]
        samples = [sample(rng, image, attributes(image) if image is not None else {}, describe, exercise, study)
                   for image in pictures for _ in "ab"]
        samples.sort(key=lambda s: len(str(s[1])) + len(str(s[2])))
        seen = [torch.from_numpy(image).permute(2, 0, 1) for image in pictures if image is not None]
        if seen:
            pixels = processor.image_processor(images=seen, return_tensors="pt")
            features = torch.stack(model.model.get_image_features(**pixels).pooler_output)
            leaf = features.detach().requires_grad_()
        order = {id(p): i for i, p in enumerate(p for p in pictures if p is not None)}
        model.zero_grad()
        loss = 0
        for half in samples[:batch // 2], samples[batch // 2:]:
            inputs, labels, weight = batch_of(half, processor)
            rows = [order[id(s[0])] for s in half if s[0] is not None]
            if rows:
                inputs["image_grid_thw"] = pixels["image_grid_thw"][rows]
                inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tuple(leaf[rows]))}
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels[:, 1:], reduction="none")
            part = (nll * weight[:, 1:]).sum() / (16 * batch)
            part.backward()
            loss += part.item()
        if seen:
            features.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 25 == 0:
            print(f"step {step}  loss {loss:.4f}  width {labels.shape[1]}  "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % 100 == 99 or step == steps - 1:
            model.generation_config.update(eos_token_id=model.config.text_config.eos_token_id,
                                           pad_token_id=model.config.text_config.pad_token_id)
            copy = make_model(processor.tokenizer)
            copy.load_state_dict(model.state_dict())
            copy.generation_config = model.generation_config
            copy.to(torch.bfloat16).save_pretrained(out)
            processor.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="write the data files")
    parser.add_argument("--train", action="store_true", help="pre-train the model")
    parser.add_argument("--first", type=int, default=0, help="continue at this step, from the weights in --init")
    parser.add_argument("--init", help="folder with weights to continue from")
    parser.add_argument("--out", default=str(HERE))
    args = parser.parse_args()
    if args.data:
        write_data()
    if args.train:
        pretrain(args.first, args.init, args.out)
