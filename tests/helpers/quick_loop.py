"""The loop of art.py without a model, a step in milliseconds: files, flags and state are real,
sampling and gradient are not."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import art
from conftest import SEED, config, data


def rollout(llm, prompts, image, group_size, max_new_tokens, temperature, random_seeds):
    """Right and wrong answers by chance: it depends on the image and on the random seeds alone, as
    the engine does."""
    picture = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "big")
    groups = []
    for prompt, random_seed in zip(prompts, random_seeds):
        answers = [random.Random(picture + random_seed + i).choice([prompt, "none"])
                   for i in range(group_size)]
        groups.append([art.Completion(prompt, [1], [1, 2, 3], [-1.0] * 3, f"Answer: {answer}")
                       for answer in answers])
    return groups


def backward(model, processor, pixels, groups, advantages, *others):
    if groups:
        change = torch.sin(pixels.logits.detach() * 7 + advantages.flatten()[:9].sum())
        pixels.logits.grad += change
    return Counter({"loss": 0.5, "mismatch": 0.001, "clip_fraction": 0.0, "ratio": 1.0})


def evaluate(llm, processor, task, examples, image, max_new_tokens):
    return [{"score": float(np.asarray(image, dtype=float).std()) / 255}]


FILES = {"best.png", "last.png", "panel.png", "seed.png", "metrics.jsonl", "state.pt"}
STAND_INS = {
    "load_processor": lambda name: None, "check_size": lambda *sizes: None,
    "drop_long": lambda processor, examples, *others: examples,
    "render": lambda processor, example: str(example.target),
    "rollout": rollout, "backward": backward, "evaluate": evaluate}
FLAGS = ["--task", "gsm8k", "--data", data("gsm8k", "train"), "--seed", SEED, "--validation", "5",
         "--size", "64", "--validate-every", "7"]


def train(out, *flags, steps=30, on_step=None, **stand_ins):
    """`python art.py --out OUT FLAGS` in this process, without an engine and a model."""
    with mock.patch.multiple(art, **{**STAND_INS, **stand_ins}):
        art.train(config(out, *FLAGS, "--steps", steps, *flags), on_step=on_step, llm="none",
                  model="none")


def timeless(lines):
    """Metrics without the seconds."""
    return [{name: value for name, value in line.items() if not name.endswith("_s")}
            for line in lines]


def whole(out):
    """What a run's folder holds, without the seconds; fails if a file of it is broken."""
    out, found = Path(out), {}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            found[path.name], found[f"{path.name} notes"] = picture.tobytes(), picture.text
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    state = torch.load(out / "state.pt", weights_only=True)
    found.update(metrics=timeless(metrics), history=timeless(state["history"]))
    found["logits"] = state["pixels"]["logits"].numpy().tobytes()
    for name, value in state["optimizer"]["state"].get(0, {}).items():
        found[name] = value.numpy().tobytes()
    return found
