"""The loop of art.py without a model, a step in milliseconds: files, flags and state are real, sampling and gradient are not.

    python tests/quick_loop.py FOLDER        # kills 30 runs at random moments and goes on each time; for test_resume.py
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np                                                                                      # noqa: E402
import torch                                                                                            # noqa: E402
from PIL import Image                                                                                   # noqa: E402
from safetensors import safe_open                                                                       # noqa: E402

import art                                                                                              # noqa: E402
from conftest import ROOT, data                                                                         # noqa: E402


def rollout(llm, prompts, image, group_size, max_new_tokens, seeds, timeout):
    """Right and wrong answers by chance: it depends on the image and on the seeds alone, as the seeded engine does."""
    picture = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "big")
    return [[art.Completion(p, [1], [1, 2, 3], [-1.0] * 3, f"Answer: {random.Random(picture + s + i).choice([p, 'none'])}", False)
             for i in range(group_size)] for p, s in zip(prompts, seeds)]


def backward(model, processor, pixels, groups, advantages, old_logps, *args):
    pixels.logits.grad = torch.sin(pixels.logits.detach() * 7 + advantages.flatten()[:9].cumsum(0).max())
    return {"loss": 0.5, "mismatch": 0.001, "mismatch_max": 0.002, "clip_fraction": 0.0, "ratio": 1.0}, old_logps


def evaluate(llm, processor, task, examples, image, max_new_tokens, timeout):
    return [{"score": np.asarray(image, dtype=float).std() / 255}]


STAND_INS = {"load_engine": lambda *args: None, "load_model": lambda *args: None, "load_processor": lambda *args: None,
             "check_size": lambda *args: None, "fitting": lambda processor, task, examples, *args: examples,
             "prompt_text": lambda processor, task, example: str(example["target"]), "rollout": rollout, "backward": backward,
             "evaluate": evaluate}
FLAGS = ["--task", "gsm8k", "--data", data("gsm8k", "train"), "--seed", str(ROOT / "seed.png"), "--limit", "50", "--validation",
         "5", "--size", "64", "--validate-every", "7"]


def train(out, *flags, steps=30, **stand_ins):
    """`python art.py` with these flags, in this process and without a model. The last of equal flags counts."""
    argv = ["art.py", *FLAGS, "--out", str(out), "--steps", str(steps), *map(str, flags)]
    with mock.patch.multiple(art, **{**STAND_INS, **stand_ins}), mock.patch.object(sys, "argv", argv):
        art.train(art.parse_args())


def whole(out):
    """What a run's folder holds, without the seconds; fails if a file of it is broken."""
    out = Path(out)
    pictures = {p.name: Image.open(p).tobytes() for p in out.glob("*.png")}                     # their notes tell the step, too
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with safe_open(out / "state.safetensors", "pt") as file:
        state = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
    assert [m["step"] for m in metrics] == list(range(len(metrics)))
    return {"metrics": [{k: v for k, v in m.items() if not k.endswith("_s")} for m in metrics], **pictures, **state}


def kill_and_resume(out, kills=30, longest=0.5):
    """Start a run, kill it at a random moment, and go on, `kills` times; then let it end."""
    torch.set_num_threads(1)                            # a forked child has no threads of its parent's
    reached = []
    for kill in range(kills + 1):
        resume = ["--resume"] * (out / "state.safetensors").exists()
        child = os.fork()
        if not child:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            train(out, *resume, steps=200)
            os._exit(0)
        if kill < kills:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, 0), "a resumed run failed"
        if (out / "metrics.jsonl").exists():
            reached.append(len(whole(out)["metrics"]) - 1)
    print("steps at the kills:", reached)


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]))
