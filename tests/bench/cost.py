"""What a step of ART costs, beside LoRA on the same sequences and beside the bare arithmetic.

    .venv/bin/python tests/bench/cost.py                # both tables
    .venv/bin/python tests/bench/cost.py trainer        # one of them: trainer or engine

The trainer's weights are random: speed and memory do not depend on them. The ways of a table take
turns, and of each the median of its repetitions counts. Without a GPU a second is one of processor
time, all threads together, which other programs on the machine lengthen little, and memory is that
of the tensors alive at once. With a GPU, for which gpu.py uses this, both are as CUDA has them.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import warnings
import weakref
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # a thread that waits does no work

import pandas                                                                           # noqa: E402
import torch                                                                            # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode                              # noqa: E402
from torch.utils._pytree import tree_leaves                                             # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import art                                                                              # noqa: E402
from eval import (IMAGE, TASKS, Example, load_engine, load_processor, model_inputs,     # noqa: E402
                  prepend, render, user_turn)

TINY = ROOT / "tests" / "tiny"
GPU = torch.cuda.is_available()
SHAPES = {"GSM8K": (164, 250), "ToolMind": (1000, 80)}      # tokens: prompt with image, completion


# Model and sequences ------------------------------------------------------------------------------

LINEAR, FULL = "linear_attention", "full_attention"
WHOLE = {"layers": [LINEAR, LINEAR, LINEAR, FULL] * 6, "vocabulary": 248_320, "vision_layers": 12}
TWELFTH = {"layers": [LINEAR, FULL], "vocabulary": 20_693, "vision_layers": 1}


def make_model(layers: list[str], vocabulary: int, vision_layers: int, device="cpu"):
    """A frozen float32 model with Qwen3.5-0.8B's widths and random weights, drawn on `device`."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
    config = json.loads((TINY / "config.json").read_text())
    text = config["text_config"]
    text |= {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
             "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
             "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "layer_types": layers, "num_hidden_layers": len(layers), "vocab_size": vocabulary,
             "max_position_embeddings": 8192, "mamba_ssm_dtype": "float32"}
    text["rope_parameters"] |= {"mrope_section": [11, 11, 10], "rope_theta": 1e7}
    config["vision_config"] |= {"hidden_size": 768, "intermediate_size": 3072, "num_heads": 12,
                                "depth": vision_layers, "out_hidden_size": 1024,
                                "num_position_embeddings": 2304}
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    return model.eval().requires_grad_(False)


def make_groups(model, processor, prompt_tokens: int, completion_tokens: int, group_size: int,
                groups=1):
    """One batch: random pixels, groups of Completions of random tokens behind a prompt of exactly
    `prompt_tokens`, and random advantages (groups, group_size)."""
    torch.manual_seed(1)
    vocabulary = model.config.text_config.vocab_size
    pixels = art.PixelLogits(torch.randint(256, (3, 256, 256), dtype=torch.uint8))

    def prompt(digits):
        """A rendered prompt whose question is so many digits, and its token ids."""
        text = render(processor, prepend(IMAGE, Example("", user_turn("7" * digits), None)))
        return text, model_inputs(processor, text, pixels.to_image())["input_ids"][0].tolist()

    shortest = len(prompt(0)[1])
    text, prompt_ids = prompt(prompt_tokens - shortest)
    assert len(prompt_ids) == prompt_tokens, "this tokenizer does not write a digit as a token"
    batch = []
    for _ in range(groups):
        rows = torch.randint(10, vocabulary, (group_size, completion_tokens)).tolist()
        batch.append([art.Completion(text, prompt_ids, ids, [-7.0] * len(ids), "") for ids in rows])
    return pixels.to(model.device), batch, torch.randn(groups, group_size)


# The ways: each adds the gradient of one step of DAPO over the groups -----------------------------


def ours(model, processor, pixels, groups, advantages, parts=1):
    """art.py's, each group in so many micro-batches; as the others without importance weights."""
    first = groups[0][0]
    tokens = len(first.prompt_ids) + len(groups[0]) // parts * len(first.ids)
    for group in groups:
        for completion in group:
            completion.old_logps = None                     # each time a first update
    art.backward(model, processor, pixels, groups, advantages, weight_cap=0,
                 tokens_per_microbatch=tokens)


def sequence_loss(model, processor, image, group, advantages, total_tokens: int, **options):
    """DAPO's loss of completions of one length, each behind its own copy of image and prompt, in
    one pass of the whole model. `options` go to the model."""
    inputs = processor(text=[completion.prompt for completion in group],
                       images=[image] * len(group), return_tensors="pt").to(model.device)
    ids = torch.tensor([completion.ids for completion in group], device=model.device)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    for key, tail in ("input_ids", ids), ("attention_mask", ones), ("mm_token_type_ids", zeros):
        inputs[key] = torch.cat([inputs[key], tail], dim=1)
    logits = model(**inputs, use_cache=False, **options).logits
    logits = logits[:, -ids.shape[1] - 1:-1].float()        # state t predicts token t + 1
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss, _ = art.dapo_loss(logp, logp.detach(), advantages.to(model.device), ones.bool(),
                            total_tokens=total_tokens)
    return loss


def count_tokens(groups) -> int:
    return sum(len(completion.ids) for group in groups for completion in group)


def plain(model, processor, pixels, groups, advantages):
    """ART as its equations read: nothing is shared, every sequence encodes the image again, and
    every token has its logits."""
    for group, row in zip(groups, advantages):
        sequence_loss(model, processor, pixels(), group, row, count_tokens(groups)).backward()


def lora_config():
    """The paper's control: rank 16, alpha 32, all matrices of the decoder."""
    from peft import LoraConfig
    decoder = r".*language_model\.layers\..*_(proj|qkv|z|b|a)"
    return LoraConfig(r=16, lora_alpha=32, target_modules=decoder)


@contextlib.contextmanager
def adapted(model):
    """`model` with PEFT's LoRA."""
    from peft import get_peft_model
    wrapped = get_peft_model(model, lora_config())
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.requires_grad_(False)


def lora(wrapped, processor, pixels, groups, advantages):
    """Every sequence whole, as in TRL; logits of the completions only."""
    for group, row in zip(groups, advantages):
        loss = sequence_loss(wrapped, processor, pixels.to_image(), group, row,
                             count_tokens(groups), logits_to_keep=len(group[0].ids) + 1)
        loss.backward()


# name: (what prepares the model, what runs on it)
WAYS = {
    "plain ART": (contextlib.nullcontext, plain),
    "LoRA": (adapted, lora),
    "ours": (contextlib.nullcontext, ours),
    "ours, a quarter at a time": (contextlib.nullcontext, partial(ours, parts=4)),
}


# Measuring ----------------------------------------------------------------------------------------


def storages(tree) -> list:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors made inside this block held at once. What an operator holds
    within itself is not seen."""
    live = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        known = set(map(id, storages((args, kwargs))))      # a view or an in-place result: not new
        for storage in storages(result):
            if id(storage) not in known:
                known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size):
        self.live -= size


def clock() -> float:
    """Seconds: of the wall on a GPU, else of processor time."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work) -> float:
    start = clock()
    work()
    return clock() - start


def peak_bytes(work) -> int:
    """Bytes that `work` needs beside what is there already, such as the weights."""
    if not GPU:
        with LiveTensors() as memory:
            work()
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def measure_ways(names, model, processor, batch, repetitions=3) -> dict[str, tuple[float, int]]:
    """{way: (median seconds, bytes)} of a step. The first turn is for memory, and warms up; a way
    that runs out of memory is left out."""
    spent, held = defaultdict(list), {}
    for repetition in range(repetitions + 1):
        for name in names if repetition == 0 else list(held):
            prepare, way = WAYS[name]
            try:
                with prepare(model) as ready:
                    work = partial(way, ready, processor, *batch)
                    if repetition == 0:
                        held[name] = peak_bytes(work)
                    else:
                        spent[name].append(seconds(work))
            except torch.OutOfMemoryError:
                held.pop(name, None)
                torch.cuda.empty_cache()
            batch[0].logits.grad = None
    return {name: (median(spent[name]), held[name]) for name in held}


def matrix_rate(model, tokens: int) -> float:
    """FLOPs a second of the decoder's own matrix product: tokens x hidden with hidden x MLP."""
    text = model.config.text_config
    options = {"device": model.device, "dtype": model.dtype}
    states = torch.randn(tokens, text.hidden_size, **options)
    matrix = torch.randn(text.hidden_size, text.intermediate_size, **options)

    def multiply():
        for _ in range(times):
            states @ matrix

    times = 1
    while seconds(multiply) < 0.1:                      # one takes a GPU microseconds
        times *= 2
    took = median(seconds(multiply) for _ in range(5))
    return 2 * tokens * matrix.numel() * times / took


def floor_seconds(model, prompt_tokens: int, completion_tokens: int, group_size: int) -> float:
    """Seconds of the arithmetic alone: matrices and full attention of L + G*C tokens, forward and
    backward without weight gradients, at the rate of the decoder's matrix product."""
    text = model.config.text_config
    sampled = group_size * completion_tokens
    linear = [module for module in model.model.language_model.layers.modules()
              if isinstance(module, torch.nn.Linear)]
    matrices = sum(module.weight.numel() for module in linear)
    output = text.hidden_size * text.vocab_size
    # Pairs of query and key: of the prompt with itself, of the completions with what is before them
    pairs = prompt_tokens ** 2 / 2 + sampled * (prompt_tokens + completion_tokens / 2)
    layers = text.layer_types.count(FULL)
    attention = 12 * pairs * text.num_attention_heads * text.head_dim * layers
    flops = 4 * (matrices * (prompt_tokens + sampled) + output * sampled) + attention
    return flops / matrix_rate(model, prompt_tokens + sampled)


# Table 1: the trainer's pass, every way -----------------------------------------------------------


def trainer_table(processor, repetitions: int, group_size: int):
    model, rows = make_model(**TWELFTH), []
    for shape, lengths in SHAPES.items():
        batch = make_groups(model, processor, *lengths, group_size)
        found = measure_ways(WAYS, model, processor, batch, repetitions)
        floor = floor_seconds(model, *lengths, group_size)
        our_time, our_memory = found["ours"]
        for name, (took, held) in found.items():
            rows.append({"shape": shape, "way": name, "seconds": took,
                         "times ours": took / our_time, "times our floor": took / floor,
                         "GB": held / 1e9, "GB, times ours": held / our_memory})
    print(f"\nA twelfth of Qwen3.5-0.8B's layers and vocabulary, one group of {group_size}")
    print(pandas.DataFrame(rows).round(2).to_string(index=False), flush=True)


# Table 2: art.rollout beside vLLM alone -----------------------------------------------------------


def engine_table(processor, repetitions: int):
    from vllm import SamplingParams
    threads = torch.get_num_threads()
    llm = load_engine(str(TINY), 512, 256, gpu_memory_utilization=0.5)
    torch.set_num_threads(threads)                          # vLLM sets another number
    image = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    examples = TASKS["gsm8k"].load("train", str(TINY / "gsm8k" / "train.jsonl"), 32)
    prompts = [render(processor, prepend(IMAGE, example)) for example in examples]
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for prompt in prompts]
    seeds = range(32)
    sampling = [SamplingParams(n=8, max_tokens=64, logprobs=0, seed=seed) for seed in seeds]
    works = {
        "vLLM alone": partial(llm.generate, requests, sampling, use_tqdm=False),
        "art.rollout": partial(art.rollout, llm, prompts, image, 8, 64, random_seeds=seeds),
    }
    spent = defaultdict(list)
    for _ in range(repetitions + 1):
        for name, work in works.items():
            llm.reset_prefix_cache()
            llm.reset_mm_cache()
            spent[name].append(seconds(work))
    # The first turn warms up.
    rows = [{"way": name, "seconds, median": median(found[1:]), "least": min(found[1:]),
             "most": max(found[1:])} for name, found in spent.items()]
    print("\n32 x 8 completions of the tiny model")
    print(pandas.DataFrame(rows).round(2).to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["trainer", "engine"])
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (3)")
    parser.add_argument("--group-size", type=int, default=8, help="of the trainer's table (8)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    processor = load_processor(str(TINY))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.table != "engine":
        trainer_table(processor, args.repetitions, args.group_size)
    if args.table != "trainer":
        engine_table(processor, 5 * args.repetitions)


if __name__ == "__main__":
    main()
