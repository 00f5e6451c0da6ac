"""What the pixels cost: 64 free embeddings in the image's place, the soft prompt that the paper
omits. Everything else is art.py's, and the run is that of tests/demo.sh.

    .venv/bin/python tests/bench/soft_prompt.py gsm8k                       # or toolmind, gpqa
    .venv/bin/python tests/bench/soft_prompt.py gsm8k --lr 10 --steps 2

The embeddings start as the seed's image features, whose standard deviation in the tiny model is 35:
hence another learning rate than the pixels'. They are no PNG. They fit one model only, and a server
must be told to take them (vLLM's --enable-mm-embeds).
"""

import argparse
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import vllm
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import art
from eval import (IMAGE, TASKS, behind, bootstrap_interval, evaluate, load_engine, load_processor,
                  model_inputs, render)

TINY = ROOT / "tests" / "tiny"
WARMUP = 5
SAMPLING = Namespace(prompts=8, rounds=4, group_size=8, max_new_tokens=48, temperature=1.0,
                     overlong_cache=0)


class SoftPrompt(nn.Module):
    """Free embeddings (tokens, hidden) in the place of PixelLogits' pixels."""

    def __init__(self, model, processor, prompt, seed):
        super().__init__()
        self.seed = art.PixelLogits(seed)
        self.grid = model_inputs(processor, prompt, self.to_image())["image_grid_thw"]
        with torch.no_grad():
            features, = art.encode_image(model, processor, prompt, self.seed()).pooler_output
        self.logits = nn.Parameter(features.clone())

    def forward(self):
        return BaseModelOutputWithPooling(pooler_output=(self.logits,))

    def to_image(self):
        """A picture of the right size. art.backward takes the number of image tokens from it, and
        no pixel."""
        return self.seed.to_image()

    def request(self):
        """What vLLM takes in a picture's place."""
        embeddings = self.logits.detach().to(torch.bfloat16)
        return {"image_embeds": embeddings, "image_grid_thw": self.grid}


def take_features(model, processor, prompt, features):
    """art.encode_image, where SoftPrompt's forward has given the features already."""
    return features


def print_score(llm, processor, task, examples, soft, label):
    results = evaluate(llm, processor, task, examples, soft.request())
    scores = [result["score"][0] for result in results]
    keys = [result["key"] for result in results]
    mean, low, high = bootstrap_interval(scores, keys)
    print(f"{label}: {100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}], n = {len(scores)}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--lr", type=float, default=3.0, help="AdamW's learning rate (3)")
    parser.add_argument("--steps", type=int, default=15, help="(15)")
    args = parser.parse_args()
    name = f"{args.task}, 64 embeddings, lr {args.lr:g}"

    task = TASKS[args.task]
    ending = "csv" if args.task == "gpqa" else "jsonl"
    training = task.load("train", str(TINY / args.task / f"train.{ending}"))
    test = task.load("test", str(TINY / args.task / f"test.{ending}"))
    processor = load_processor(str(TINY))
    model = art.load_model(str(TINY), "cpu")
    vllm.LLM = partial(vllm.LLM, enable_mm_embeds=True)         # load_engine takes it from there
    llm = load_engine(str(TINY), 512, 64)

    torch.manual_seed(0)
    prompt = render(processor, behind(IMAGE, training[0]))
    soft = SoftPrompt(model, processor, prompt, art.load_seed(ROOT / "seed.png", 256))
    art.encode_image = take_features
    optimizer = torch.optim.AdamW([soft.logits], args.lr, weight_decay=0.0)
    prompts = art.endless_prompts(training, 0, skip=0)
    print_score(llm, processor, task, test, soft, f"{name}, before")

    for step in range(1, args.steps + 1):
        groups, rewards, sampled = art.sample_groups(llm, processor, task, prompts, soft.request(),
                                                     SAMPLING)
        if not groups:
            continue
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / WARMUP)
        optimizer.zero_grad()
        advantages = art.group_advantages(rewards)
        found, _ = art.backward(model, processor, soft, groups, advantages)
        optimizer.step()
        print(f"step {step:3d}  reward {sampled['reward']:.3f}  mismatch {found['mismatch']:.4f}",
              flush=True)
    print_score(llm, processor, task, test, soft, f"{name}, after {args.steps} steps")


if __name__ == "__main__":
    main()
