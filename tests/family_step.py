"""One step of art.py and one evaluation of eval.py with a tiny model of a family, and the step's gradient in other ways.

    python tests/family_step.py                    # the README's table: every family, each in a process of its own
    python tests/family_step.py "Gemma 3" FOLDER   # one of them, as JSON; the model and the run stay in FOLDER
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import art                                                                                              # noqa: E402
import eval as tasks                                                                                    # noqa: E402
from families import FAMILIES, ID, make                                                                 # noqa: E402

DATA = str(ROOT / "tests" / "tiny" / "gsm8k" / "train.jsonl")


def command_line(module, main, *arguments):
    """Run `python MODULE.py ARGUMENTS` in this process."""
    argv, sys.argv = sys.argv, [f"{module}.py", *map(str, arguments)]
    try:
        return main()
    finally:
        sys.argv = argv


def plain_gradient(model, processor, pixels, groups, advantages, weight_cap=2.0, causal=False):
    """(gradient, loss, mean gap to vLLM) the slow way: each sequence alone, pixels through the whole model, all logits,
    autograd all through."""
    total, loss, gaps = sum(len(c.ids) for g in groups for c in g), 0.0, []
    for group, row in zip(groups, advantages):
        for completion, advantage in zip(group, row):
            inputs = tasks.model_inputs(processor, completion.prompt, pixels())
            start, tail = inputs["input_ids"].shape[1], torch.tensor([completion.ids])
            if causal:                                  # Gemma 3 marks what attends in both directions
                inputs.pop("token_type_ids", None)
            for key in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & set(inputs):
                more = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}.get(key, torch.zeros_like(tail))
                inputs[key] = torch.cat([inputs[key], more], dim=1)
            logits = model(**inputs, use_cache=False).logits[0, start - 1:-1]
            logp = logits.log_softmax(-1).gather(1, tail[0, :, None])[:, 0]
            gaps.append(logp.detach() - torch.tensor(completion.logps))
            weight = gaps[-1].exp().clamp(max=weight_cap)
            loss = loss - (weight * advantage * (logp - logp.detach()).exp()).sum() / total
    return torch.autograd.grad(loss, pixels.logits)[0], loss.item(), torch.cat(gaps).abs().mean().item()


def measure(name, folder):
    """Train one step and evaluate through vLLM; then the step's gradient again in other ways. Returns facts as JSON has them."""
    size, folder = FAMILIES[name][-1], Path(folder)
    make(name, folder / "model")
    processor = tasks.load_processor(folder / "model")
    try:
        refused = art.check_size(processor, (size or 512) + 6)
    except tasks.InputError as error:
        refused = str(error)
    if size is None:
        return {"family": name, "size": None, "refused": refused}
    # Random weights answer nothing right: every second text counts as right, so that there is something to learn.
    lucky = lambda text: float(sum(map(ord, text)) % 2)                                                 # noqa: E731
    tasks.TASKS["gsm8k"] = replace(tasks.TASKS["gsm8k"], reward=lambda example, text: lucky(text),
                                   answer=lambda example, text: example["target"] if lucky(text) else None)
    engine, step, backward = [], [], art.backward

    def first_engine(*args, **options):
        engine.extend([] if engine else [load_engine(*args, **options)])
        return engine[0]

    def spy(model, processor, pixels, groups, advantages, *rest):
        step.extend([model, pixels.logits.detach().clone(), groups, advantages])
        return backward(model, processor, pixels, groups, advantages, *rest)

    load_engine, tasks.load_engine, art.load_engine, art.backward = tasks.load_engine, first_engine, first_engine, spy
    common = ["--task", "gsm8k", "--model", folder / "model", "--data", DATA, "--max-new-tokens", 8]
    command_line("art", lambda: art.train(art.parse_args()), "--seed", ROOT / "seed.png", "--size", size, "--steps", 1,
                 "--prompts", 2, "--rounds", 4, "--group-size", 4, "--limit", 40, "--validation", 4, "--max-num-seqs", 32,
                 "--out", folder / "run", *common)
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        command_line("eval", lambda: tasks.main(tasks.parse_args()), "none", "random", folder / "run" / "last.png",
                     "--size", size, "--limit", 4, *common)

    model, logits, groups, advantages = step
    image_token = model.config.image_token_id           # transformers refuses one that was sampled, where it has no cache
    keep = [torch.tensor([image_token not in c.ids for c in group]) for group in groups]
    groups = [[c for c, kept in zip(group, row) if kept] for group, row in zip(groups, keep)]
    advantages = [advantage[row] for advantage, row in zip(advantages, keep)]

    def pixels_of(logits):
        pixels = art.PixelLogits(torch.zeros(3, size, size, dtype=torch.uint8))
        pixels.logits.data.copy_(logits)
        return pixels

    def gradient(logits):
        pixels = pixels_of(logits)
        metrics, _ = backward(model, processor, pixels, groups, advantages)
        return pixels.logits.grad, metrics["mismatch"]

    expected, _, _ = plain_gradient(model, processor, pixels_of(logits), groups, advantages)
    shared, gap = gradient(logits)
    _, blind_gap = gradient(torch.randn_like(logits))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        art.SHAREABLE = set()
        alone, _ = gradient(logits)
    _, _, causal_gap = plain_gradient(model, processor, pixels_of(logits), groups, advantages, causal=True)
    far = lambda found: ((found - expected).norm() / expected.norm()).item()                            # noqa: E731
    pixels, prompt = pixels_of(logits), groups[0][0]
    tasks.save(tasks.png_bytes(pixels.to_image()), folder / "image.png")
    png, tensor = (tasks.model_inputs(processor, prompt.prompt, image)["pixel_values"]
                   for image in (tasks.open_picture(folder / "image.png"), pixels()))
    return {"family": name, "size": size, "image_tokens": prompt.prompt_ids.count(image_token), "refused": refused,
            "bos": prompt.prompt_ids.count(ID("<bos>")), "apart": (png - tensor).abs().max().item(),
            "gap": gap, "blind_gap": blind_gap, "causal_gap": causal_gap, "gradient": expected.norm().item(),
            "reached": (expected != 0).float().mean().item(), "shared": far(shared), "alone": far(alone),
            "said": len([w for w in said if "shared prefix" in str(w.message)]), "table": table.getvalue(),
            "metrics": [json.loads(line) for line in open(folder / "run" / "metrics.jsonl")]}


def facts(name):
    """`measure` in a process of its own, which takes its vLLM engine with it."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
        sys.exit()
    print("| family | `--size` | image tokens | PNG == policy | trainer-engine gap, nat | "
          "shared prefix: gradient's distance from plain |\n"
          "|---|---|---|---|---|---|")
    for found in map(facts, sys.argv[1:] or FAMILIES):
        if found["size"] is None:
            cells = ["none works", "-", "no", "-", "-"]
        else:
            attention = f" ({found['causal_gap']:.3f} if causal)" if abs(found["causal_gap"] - found["gap"]) > 1e-3 else ""
            cells = [found["size"], found["image_tokens"], "yes" if found["apart"] == 0 else "no",
                     f"{found['gap']:.3f}{attention}", f"{found['shared']:.0e}"]
        print(" | ".join(["| " + found["family"], *map(str, cells)]) + " |", flush=True)
