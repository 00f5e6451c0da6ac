"""The loop of art.py without a model, a step in milliseconds: files, flags and state are real,
sampling and gradient are not.

    python tests/quick_loop.py FOLDER       # kills 10 runs at random moments; for test_resume.py
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from functools import cache
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np                                                                      # noqa: E402
import torch                                                                            # noqa: E402
from PIL import Image                                                                   # noqa: E402

import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402
from conftest import SEED, art_args, data                                               # noqa: E402


def rollout(llm, prompts, image, group_size, max_new_tokens, temperature, rngs):
    """Right and wrong answers by chance: it depends on the image and on the random number seeds
    alone, as the engine does."""
    picture = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "big")
    groups = []
    for prompt, rng in zip(prompts, rngs):
        answers = [random.Random(picture + rng + i).choice([prompt, "none"])
                   for i in range(group_size)]
        groups.append([art.Completion(prompt, [1], [1, 2, 3], [-1.0] * 3, f"Answer: {answer}",
                                      False) for answer in answers])
    return groups


def backward(model, processor, pixels, groups, advantages, loss, old_logps, *others):
    pixels.logits.grad += torch.sin(pixels.logits.detach() * 7 + advantages.flatten()[:9].sum())
    return {"loss": 0.5, "mismatch": 0.001, "clip_fraction": 0.0, "ratio": 1.0}, old_logps


def evaluate(llm, processor, task, examples, image, max_new_tokens):
    return [{"score": [float(np.asarray(image, dtype=float).std()) / 255]}]


def nothing(*args, **options):
    return None


STAND_INS = {
    "load_engine": nothing, "load_model": nothing, "load_processor": nothing,
    "check_size": nothing, "fitting": lambda processor, examples, *others: examples,
    "render": lambda processor, example: str(example["target"]),
    "rollout": rollout, "backward": backward, "evaluate": evaluate}
FLAGS = ["--task", "gsm8k", "--data", data("gsm8k", "train"), "--seed", SEED, "--limit", "50",
         "--validation", "5", "--size", "64", "--validate-every", "7"]
read_rows = cache(tasks.read_rows)


def train(out, *flags, steps=30, **stand_ins):
    """`python art.py --out OUT FLAGS` in this process, without a model."""
    with (mock.patch.multiple(art, **{**STAND_INS, **stand_ins}),
          mock.patch.object(tasks, "read_rows", read_rows)):
        art.train(art_args(out, *FLAGS, "--steps", steps, *flags))


def whole(out):
    """What a run's folder holds, without the seconds; fails if a file of it is broken."""
    out = Path(out)
    found = {path.name: Image.open(path).tobytes() for path in out.glob("*.png")}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    found["metrics"] = [{name: value for name, value in line.items() if not name.endswith("_s")}
                        for line in metrics]
    state = torch.load(out / "state.pt", weights_only=True)
    found["logits"] = state["logits"].numpy().tobytes()
    for name, value in state["optimizer"]["state"].get(0, {}).items():
        found[name] = value.numpy().tobytes()
    return found


def kill_and_resume(out, kills=10, longest=0.5):
    """Start a run, kill it at a random moment, and go on, `kills` times; then let it end."""
    torch.set_num_threads(1)                    # a forked child has no threads of its parent's
    read_rows(tasks.TASKS["gsm8k"].hub, "train", data("gsm8k", "train"))
    reached = []
    for kill in range(kills + 1):
        child = os.fork()
        if not child:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            train(out, "--resume", steps=200)
            os._exit(0)
        if kill < kills:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (-signal.SIGKILL, 0), "a resumed run failed"
        if (out / "metrics.jsonl").exists():
            reached.append(len(whole(out)["metrics"]) - 1)
    print("steps at the kills:", reached)


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]))
