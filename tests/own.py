"""Your own reward, judge, objective, parameter and hook, each in some ten lines.

    .venv/bin/python tests/own.py runs/own              # on the tiny model, two minutes

Copy what you need. README's "Your own" has a task and a loop of one's own. A test runs this file.
"""

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.utils import parametrize

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402

TINY, SEED = str(ROOT / "tests" / "tiny"), str(ROOT / "seed.png")
DATA = str(ROOT / "tests" / "tiny" / "gsm8k" / "train.jsonl")


def short_run(task: str, out, steps=2) -> art.Config:
    return art.Config(task=task, model=TINY, seed=SEED, data=DATA, out=str(out), steps=steps,
                      validation=16, oversampling=1, max_new_tokens=48, max_model_len=512)


# A reward: DAPO's soft overlong punishment (its equation 13). It falls from 0 at 32 tokens to -1 at
# 48. `rewards` sees all completions of a prompt, with their answers and scores.


class Short(tasks.Task):

    def rewards(self, example, completions):
        punishments = [min(1, max(0, (len(c.ids) - 32) / 16)) for c in completions]
        return [c.score - punishment for c, punishment in zip(completions, punishments)]


# A costly judge, here a program for each completion: all of a sampling round are judged at once, by
# threads. Its scores are graded: 1 for the right number, 0.5 for one that is at most 5 away. A
# group of completions is trained on if its scores differ, so this one also learns from groups
# without a right answer.


class Programs(tasks.Task):

    def judge(self, examples, texts):
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.run, examples, texts))

    def run(self, example, text):
        """(answer, score) of one completion."""
        answer = tasks.gsm8k_answer(example, text)
        if answer is None:
            return None, 0.0
        program = "import sys; print(abs(float(sys.argv[1]) - float(sys.argv[2])))"
        numbers = [str(float(number)) for number in (answer, example.target)]
        command = [sys.executable, "-S", "-c", program, *numbers]
        distance = float(subprocess.run(command, capture_output=True, check=True).stdout)
        return answer, 1.0 if distance == 0 else 0.5 if distance <= 5 else 0.0


# An objective takes what dapo_loss takes. Here GSPO's: one ratio for a whole sequence. Losses of
# micro-batches add up, so it divides by the completions of a step: 4 prompts with 8 on one rank.


def gspo_loss(logp, old_logp, advantages, mask, **others):
    ratio = (((logp - old_logp) * mask).sum(1) / mask.sum(1)).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.9997, 1.0004) * advantages)
    loss = -surrogate.sum() / 32
    return loss, {"loss": loss.detach(), "ratio": ratio.detach().sum() / 32}


# An objective that needs to know whose rows these are: DAPO and a KL term to the seed's policy.


def train_with_kl(config, llm, model, beta=0.1):
    processor = tasks.load_processor(config.model)
    seed_pixels = art.PixelLogits(art.load_seed(config.seed, config.size)).to(model.device)

    def loss_with_kl(logp, old_logp, advantages, mask, completions, total_tokens, **others):
        loss, metrics = art.dapo_loss(logp, old_logp, advantages, mask, total_tokens=total_tokens,
                                      **others)
        with torch.no_grad():
            seed_logp, _ = art.completion_logps(model, processor, seed_pixels, completions,
                                                config.temperature)
        gap = seed_logp - logp                          # 0 where the mask is false
        kl = (gap.exp() - gap - 1).sum() / total_tokens
        return loss + beta * kl, {**metrics, "kl": kl.detach()}

    art.train(config, loss_function=loss_with_kl, llm=llm, model=model)


# Supervised training: no rollouts, the likelihood of given answers. Returns it for each step.


def train_supervised(model, processor, examples, steps=10):
    pixels = art.PixelLogits(art.load_seed(SEED, 256))
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.1, weight_decay=0.0)
    prompts = [tasks.render(processor, tasks.prepend(tasks.IMAGE, e)) for e in examples]
    answers = [f"Answer: {example.target}" for example in examples]
    completions = art.given_completions(processor, prompts, answers, pixels.to_image())

    def negative_likelihood(logp, old_logp, advantages, mask, total_tokens, **others):
        loss = -logp.sum() / total_tokens               # in nat a token
        return loss, {"loss": loss.detach()}

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        metrics = art.backward(model, processor, pixels, [completions],
                               torch.ones(1, len(completions)), negative_likelihood)
        optimizer.step()
        losses.append(metrics["loss"])
    return losses


# Parameters: pixels that stay within 32 levels of the seed's; a frame of 16 pixels around a picture
# that stays; and 64 x 64 logits, each of which is a square of 4 x 4 pixels.


class Near(art.PixelLogits):

    def __init__(self, seed):
        super().__init__(seed)
        self.register_buffer("low", torch.logit((seed - 32.0) / 255, eps=1e-3))
        self.register_buffer("high", torch.logit((seed + 32.0) / 255, eps=1e-3))

    def forward(self):
        self.logits.data.clamp_(self.low, self.high)
        return super().forward()


class Frame(art.PixelLogits):

    def __init__(self, seed):
        super().__init__(seed)
        inside = torch.zeros(seed.shape, dtype=torch.bool)
        inside[:, 16:-16, 16:-16] = True
        self.register_buffer("inside", inside)
        self.register_buffer("seed", seed.float())

    def forward(self):
        return torch.where(self.inside, self.seed, super().forward())


class Squares(torch.nn.Module):

    def forward(self, coarse):
        return coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)

    def right_inverse(self, logits):
        return logits[:, ::4, ::4]


def coarse_pixels(seed):
    pixels = art.PixelLogits(seed)
    parametrize.register_parametrization(pixels, "logits", Squares())
    return pixels


# A hook: a log of one's own, the completions kept, and an end as soon as the image is good enough.


def train_until(accuracy, config, llm, model):
    folder = Path(config.out)

    def on_step(metrics, groups):
        with open(folder / "log.csv", "a") as file:
            csv.writer(file).writerow([metrics["step"], metrics.get("validation", "")])
        with open(folder / "completions.jsonl", "a") as file:
            for group in groups:
                file.write(json.dumps([[c.text, c.score] for c in group]) + "\n")
        return metrics.get("validation", 0) >= accuracy         # True: last.png is of this step

    art.train(config, on_step=on_step, llm=llm, model=model)


def main(out):
    out, seed = Path(out), art.load_seed(SEED, 256)
    tasks.TASKS["short"] = Short(tasks.gsm8k_example, tasks.gsm8k_answer)
    tasks.TASKS["programs"] = Programs(tasks.gsm8k_example, tasks.gsm8k_answer)
    llm = tasks.load_engine(TINY, 512, 64, gpu_memory_utilization=0.4)
    model, processor = art.load_model(TINY, "cpu"), tasks.load_processor(TINY)
    parameters = {"near": Near(seed), "frame": Frame(seed), "coarse": coarse_pixels(seed)}
    for task, pixels in zip(("short", "programs", "gsm8k"), parameters):
        art.train(short_run(task, out / pixels), pixels=parameters[pixels], llm=llm, model=model,
                  loss_function=gspo_loss if task == "short" else None)
    train_with_kl(short_run("gsm8k", out / "kl"), llm, model)
    train_until(0.0, short_run("gsm8k", out / "until", steps=9), llm, model)
    examples = tasks.TASKS["gsm8k"].load("train", DATA, 8)
    print("supervised, loss in nat a token:", train_supervised(model, processor, examples))


if __name__ == "__main__":
    main(*sys.argv[1:])
