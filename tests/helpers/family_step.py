"""One step of art.py with a tiny model of a family, and the gradient in the plain way.

    python tests/helpers/family_step.py             # a table of every family
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ONE_RANK, SEED, config, data, keep                                       # noqa: E402
import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402
from families import FAMILIES, ID, make                                                 # noqa: E402

# Kept: an engine that ends would take the others' process group with it.
ENGINES = []
TAKEN = [name for name, family in FAMILIES.items() if family[-1]]


def far(found, expected):
    """The distance of two gradients, as a share of the second."""
    return ((found - expected).norm() / expected.norm()).item()


def fresh(groups):
    """The same Completions, as sampled: no update has seen them."""
    return [[replace(completion, old_logps=None) for completion in group] for group in groups]


def gradient(model, processor, pixels, groups, advantages, **options):
    """The gradient that art.py takes in the first update."""
    pixels.logits.grad = None
    art.backward(model, processor, pixels, fresh(groups), advantages, **options)
    return pixels.logits.grad.clone()


def plain_logps(model, processor, completion, image, causal=False):
    """Logprobs (T,) of a Completion the slow way: alone, the image (or None) through the whole
    model, all logits, autograd all through, no cache."""
    inputs = tasks.model_inputs(processor, completion.prompt, image)
    start, tail = inputs["input_ids"].shape[1], torch.tensor([completion.ids])
    if causal:                                          # Gemma 3 marks what attends both ways
        inputs.pop("token_type_ids", None)
    longer = {"input_ids": tail, "attention_mask": torch.ones_like(tail),
              "token_type_ids": torch.zeros_like(tail),
              "mm_token_type_ids": torch.zeros_like(tail)}
    for key in set(longer) & set(inputs):
        inputs[key] = torch.cat([inputs[key], longer[key]], dim=1)
    if hasattr(model.base_model, "rope_deltas"):        # what an earlier call may have left there
        model.base_model.rope_deltas = None
    logits = model(**inputs, use_cache=False).logits[0, start - 1:-1]
    return logits.log_softmax(-1).gather(1, tail[0, :, None])[:, 0]


def plain_gradient(model, processor, pixels, groups, advantages, weight_cap=2.0, causal=False):
    """(gradient, loss, mean gap to vLLM) by `plain_logps`. A completion whose advantage is 0 is
    left out."""
    total, loss, gaps = sum(len(c.ids) for group in groups for c in group), 0.0, []
    completions = [completion for group in groups for completion in group]
    for completion, advantage in zip(completions, advantages.flatten().tolist(), strict=True):
        if advantage == 0:
            continue
        logp = plain_logps(model, processor, completion, pixels(), causal)
        gaps.append(logp.detach() - torch.tensor(completion.vllm_logps))
        weight = gaps[-1].exp().clamp(max=weight_cap)
        loss = loss - (weight * advantage * (logp - logp.detach()).exp()).sum() / total
    slope, = torch.autograd.grad(loss, pixels.logits)
    return slope, loss.item(), torch.cat(gaps).abs().mean().item()


def lucky(text):
    """Random weights answer nothing right: every second text counts as right instead."""
    return sum(map(ord, text)) % 2


def measure(name, folder):
    """Train one step and evaluate through vLLM; then the step's logprobs again in the plain way."""
    size, folder = FAMILIES[name][-1], Path(folder)
    make(name, folder / "model")
    rows = Path(data("gsm8k", "train")).read_text().splitlines(keepends=True)[:40]
    (folder / "train.jsonl").write_text("".join(rows))
    processor, lines = tasks.load_processor(folder / "model"), []
    model = art.load_model(folder / "model", "cpu")
    with mock.patch.dict(os.environ, ONE_RANK):
        llm = tasks.load_engine(str(folder / "model"), max_num_seqs=32)
    ENGINES.append(llm)
    update_pixels = mock.Mock(wraps=art.update_pixels)
    task = replace(tasks.TASKS["gsm8k"],
                   answer=lambda example, text: example.target if lucky(text) else None)
    flags = ["--task", "gsm8k", "--model", folder / "model", "--data", folder / "train.jsonl",
             "--size", size, "--max-new-tokens", 8]
    with (mock.patch.dict(tasks.TASKS, gsm8k=task),
          mock.patch.object(art, "update_pixels", update_pixels)):
        art.train(config(folder / "run", *flags, "--seed", SEED, "--steps", 1, "--prompts", 2,
                         "--group-size", 4, "--validation", 4),
                  on_step=keep(lines), llm=llm, model=model)

    groups = update_pixels.call_args.args[4]            # sampled behind the seed
    rewards = torch.tensor([[completion.reward for completion in group] for group in groups])
    advantages = art.group_advantages(rewards)
    # transformers refuses an image placeholder that was sampled, where it has no cache
    image_token = model.config.image_token_id
    odd = [[image_token in completion.ids for completion in group] for group in groups]
    advantages = advantages.masked_fill(torch.tensor(odd), 0.0)
    part = groups[:1], advantages[:1]
    pixels, blind = (art.PixelLogits(art.load_seed(SEED, size)) for _ in range(2))
    torch.nn.init.normal_(blind.logits)
    causal = name == "Gemma 3"              # vLLM's CPU attention is, within the image too
    first = groups[0][0]
    art.save(tasks.png_bytes(pixels.to_image()), folder / "image.png")
    png, tensor = (tasks.model_inputs(processor, first.prompt, image)["pixel_values"]
                   for image in (tasks.open_picture(folder / "image.png"), pixels()))
    return {"image_tokens": first.prompt_ids.count(image_token),
            "bos": first.prompt_ids.count(ID("<bos>")), "apart": (png - tensor).abs().max().item(),
            "gap": plain_gradient(model, processor, pixels, *part, causal=causal)[2],
            "blind_gap": plain_gradient(model, processor, blind, *part, causal=causal)[2],
            "metrics": lines}


if __name__ == "__main__":
    print("| family | `--size` | image tokens | PNG == policy | trainer-engine gap, nat |\n"
          "|---|---|---|---|---|")
    for family in TAKEN:
        with tempfile.TemporaryDirectory() as folder, mock.patch("builtins.print"):
            found = measure(family, folder)
        print(f"| {family} | {FAMILIES[family][-1]} | {found['image_tokens']} | "
              f"{found['apart'] == 0} | {found['gap']:.3f} |", flush=True)
