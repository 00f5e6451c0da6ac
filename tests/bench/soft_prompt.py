"""What the pixels cost: the same training with 64 free embeddings in the image's place, the soft prompt that the paper omits.

    .venv/bin/python tests/soft_prompt.py gsm8k [learning rate]

Everything is art.py's, and the run is that of tests/demo.sh; only the parameter differs, and its learning rate: it starts as
the seed's image features, whose standard deviation in the tiny model is 35.
Embeddings are no PNG: the server must be told to take them (vLLM's --enable-mm-embeds), and they fit one model only.
"""

import argparse
import functools
import random
import sys
from itertools import chain, repeat
from pathlib import Path

import torch
import vllm
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import art                                                                                              # noqa: E402
import eval as tasks                                                                                    # noqa: E402

STEPS, PROMPTS, ROUNDS, GROUP, MAX_NEW_TOKENS, WARMUP = 15, 8, 4, 8, 48, 5


class SoftPrompt(nn.Module):
    """Free embeddings (tokens, hidden), where PixelLogits has pixels."""

    def __init__(self, model, processor, prompt, seed):
        super().__init__()
        self.seed = art.PixelLogits(seed)
        self.grid = tasks.model_inputs(processor, prompt, self.seed.to_image())["image_grid_thw"]
        with torch.no_grad():
            features, = art.encode_image(model, processor, prompt, self.seed()).pooler_output
        self.logits = nn.Parameter(features.clone())            # `logits`, so that art.backward finds its gradient's place

    def forward(self):
        return BaseModelOutputWithPooling(pooler_output=(self.logits,))

    def to_image(self):
        """Any picture of the right size: art.backward takes the placeholders' number from it, and no pixel."""
        return self.seed.to_image()

    def request(self):
        """What vLLM takes in a picture's place."""
        return {"image_embeds": self.logits.detach().to(torch.bfloat16), "image_grid_thw": self.grid}


def main(name, lr):
    task, folder = tasks.TASKS[name], ROOT / "tests" / "tiny"
    data = lambda split: str(folder / name / (split + (".csv" if name == "gpqa" else ".jsonl")))        # noqa: E731
    processor, model = tasks.load_processor(str(folder)), art.load_model(str(folder), "cpu")
    vllm.LLM = functools.partial(vllm.LLM, enable_mm_embeds=True)            # what a server must be started with for this
    llm = tasks.load_engine(str(folder), 512, 64)
    examples, test = task.load("train", data("train")), task.load("test", data("test"))
    torch.manual_seed(0)
    soft = SoftPrompt(model, processor, tasks.prompt_text(processor, task, examples[0]), art.load_seed(str(ROOT / "seed.png"), 256))
    optimizer = torch.optim.AdamW([soft.logits], lr=lr, weight_decay=0.0)
    order, args = random.Random(0), argparse.Namespace(prompts=PROMPTS, rounds=ROUNDS, group_size=GROUP, overlong_cache=0,
                                                       max_new_tokens=MAX_NEW_TOKENS, timeout=60)
    stream = enumerate(chain.from_iterable(order.sample(examples, len(examples)) for _ in repeat(None)))     # (seed, example)

    def score(when):
        scores = [r["score"] for r in tasks.evaluate(llm, processor, task, test, soft.request())]
        mean, low, high = (100 * x for x in tasks.bootstrap_interval([s[0] for s in scores]))
        print(f"{name}, 64 embeddings, lr {lr}, {when}: {mean:.2f} [{low:.2f}, {high:.2f}], n = {len(test)}", flush=True)

    score("before")
    encode, art.encode_image = art.encode_image, lambda model, processor, prompt, features: features
    for step in range(1, STEPS + 1):
        groups, rewards, metrics = art.sample_groups(llm, processor, task, stream, soft.request(), args, tasks.Ranks())
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / WARMUP)
        optimizer.zero_grad()
        if groups:
            update, _ = art.backward(model, processor, soft, groups, art.group_advantages(rewards))
            optimizer.step()
            print(f"step {step:3d}  reward {metrics['reward']:.3f}  mismatch {update['mismatch']:.4f}", flush=True)
    art.encode_image = encode
    score(f"after {STEPS} steps")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 3.0)
