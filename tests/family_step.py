"""One step of art.py and one evaluation of eval.py with a tiny model of a family, and the step's
gradient in the plain way.

    python tests/family_step.py                     # a table of every family
    python tests/family_step.py "Gemma 3"           # of one of them
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402
from conftest import ONE_RANK, SEED, art_args, data, eval_main, prompt                  # noqa: E402
from families import FAMILIES, ID, make                                                 # noqa: E402

# Kept: an engine that ends would take the others' process group with it.
ENGINES = []
TAKEN = [name for name, family in FAMILIES.items() if family[-1]]


def far(found, expected):
    """The distance of two gradients, as a share of the second."""
    return ((found - expected).norm() / expected.norm()).item()


def gradient(model, processor, pixels, groups, advantages, **options):
    """The gradient that art.py takes."""
    pixels.logits.grad = None
    art.backward(model, processor, pixels, groups, advantages, **options)
    return pixels.logits.grad.clone()


def plain_gradient(model, processor, pixels, groups, advantages, weight_cap=2.0, causal=False):
    """(gradient, loss, mean gap to vLLM) the slow way: each sequence alone, pixels through the
    whole model, all logits, autograd all through."""
    total, loss, gaps = sum(len(c.ids) for group in groups for c in group), 0.0, []
    for group, row in zip(groups, advantages):
        for completion, advantage in zip(group, row):
            inputs = tasks.model_inputs(processor, completion.prompt, pixels())
            start, tail = inputs["input_ids"].shape[1], torch.tensor([completion.ids])
            if causal:                                  # Gemma 3 marks what attends both ways
                inputs.pop("token_type_ids", None)
            longer = {"input_ids": tail, "attention_mask": torch.ones_like(tail),
                      "token_type_ids": torch.zeros_like(tail),
                      "mm_token_type_ids": torch.zeros_like(tail)}
            for key in set(longer) & set(inputs):
                inputs[key] = torch.cat([inputs[key], longer[key]], dim=1)
            logits = model(**inputs, use_cache=False).logits[0, start - 1:-1]
            logp = logits.log_softmax(-1).gather(1, tail[0, :, None])[:, 0]
            gaps.append(logp.detach() - torch.tensor(completion.logps))
            weight = gaps[-1].exp().clamp(max=weight_cap)
            loss = loss - (weight * advantage * (logp - logp.detach()).exp()).sum() / total
    slope, = torch.autograd.grad(loss, pixels.logits)
    return slope, loss.item(), torch.cat(gaps).abs().mean().item()


def lucky(text):
    """Random weights answer nothing right: every second text counts as right instead."""
    return sum(map(ord, text)) % 2


def pixels_of(logits):
    pixels = art.PixelLogits(torch.zeros(logits.shape, dtype=torch.uint8))
    pixels.logits.data.copy_(logits)
    return pixels


def measure(name, folder):
    """Train one step and evaluate through vLLM; then the step's gradient again in the plain way."""
    size, folder = FAMILIES[name][-1], Path(folder)
    make(name, folder / "model")
    processor = tasks.load_processor(folder / "model")
    started, steps = [], []

    def load_engine(*args, **options):
        with mock.patch.dict(os.environ, ONE_RANK):
            started.extend([] if started else [engine(*args, **options)])
        ENGINES.extend(started)
        return started[0]

    def spy(model, processor, pixels, groups, advantages, *others):
        steps.append((model, pixels.logits.detach().clone(), groups, advantages))
        return backward(model, processor, pixels, groups, advantages, *others)

    engine, backward = tasks.load_engine, art.backward
    task = replace(tasks.TASKS["gsm8k"], reward=lambda example, text: float(lucky(text)),
                   answer=lambda example, text: example["target"] if lucky(text) else None)
    flags = ["--task", "gsm8k", "--model", folder / "model", "--data", data("gsm8k", "train"),
             "--size", size, "--max-new-tokens", 8]
    with (mock.patch.dict(tasks.TASKS, gsm8k=task),
          mock.patch.object(tasks, "load_engine", load_engine),
          mock.patch.multiple(art, load_engine=load_engine, backward=spy)):
        art.train(art_args(folder / "run", *flags, "--seed", SEED, "--steps", 1, "--prompts", 2,
                           "--group-size", 4, "--limit", 40, "--validation", 4,
                           "--max-num-seqs", 32))
        eval_main("none", "random", folder / "run" / "last.png", *flags, "--limit", 4,
                  "--out", folder / "results.jsonl")

    (model, logits, groups, advantages), = steps
    # transformers refuses an image placeholder that was sampled, where it has no cache
    image_token, kept, rows = model.config.image_token_id, [], []
    for group, row in zip(groups, advantages):
        usable = torch.tensor([image_token not in completion.ids for completion in group])
        kept.append([completion for completion, use in zip(group, usable) if use])
        rows.append(row[usable])
    pixels, blind = pixels_of(logits), pixels_of(torch.randn_like(logits))
    expected, _, gap = plain_gradient(model, processor, pixels, kept, rows)
    if name == "Gemma 3":                   # vLLM's CPU attention is causal within the image, too
        _, _, gap = plain_gradient(model, processor, pixels, kept, rows, causal=True)
    first = groups[0][0]
    tasks.save(tasks.png_bytes(pixels.to_image()), folder / "image.png")
    png, tensor = (tasks.model_inputs(processor, first.prompt, image)["pixel_values"]
                   for image in (tasks.open_picture(folder / "image.png"), pixels()))
    return {"size": size, "image_tokens": first.prompt_ids.count(image_token),
            "bos": first.prompt_ids.count(ID("<bos>")), "apart": (png - tensor).abs().max().item(),
            "gap": gap, "blind_gap": plain_gradient(model, processor, blind, kept, rows)[2],
            "gradient": expected.norm().item(), "reached": (expected != 0).float().mean().item(),
            "shared": far(gradient(model, processor, pixels, kept, rows), expected),
            "metrics": [json.loads(line) for line in open(folder / "run" / "metrics.jsonl")],
            "arms": list(tasks.read_results(folder / "results.jsonl", "gsm8k"))}


if __name__ == "__main__":
    print("| family | `--size` | image tokens | PNG == policy | trainer-engine gap, nat | "
          "shared prefix: gradient's distance from plain |\n|---|---|---|---|---|---|")
    for family in sys.argv[1:] or TAKEN:
        with tempfile.TemporaryDirectory() as folder, mock.patch("builtins.print"):
            found = measure(family, folder)
        same = "yes" if found["apart"] == 0 else "no"
        print(f"| {family} | {found['size']} | {found['image_tokens']} | {same} | "
              f"{found['gap']:.3f} | {found['shared']:.0e} |", flush=True)
