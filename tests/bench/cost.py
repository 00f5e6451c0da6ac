"""What a step of ART costs, beside LoRA on the same sequences and beside the bare arithmetic.

    .venv/bin/python tests/bench/cost.py                # all tables
    .venv/bin/python tests/bench/cost.py trainer        # one of them: trainer, engine or rounds

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
import random
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
from eval import (IMAGE, TASKS, Example, Task, key_hash, load_engine, load_processor,   # noqa: E402
                  model_inputs, prepend, render, user_turn)

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
                groups=1, spread=0.0):
    """One batch: random pixels, groups of Completions of random tokens, and random advantages
    (groups, group_size). Prompts have `prompt_tokens`, completions `completion_tokens`, both more
    or less by up to the share `spread`."""
    torch.manual_seed(1)
    generator = random.Random(1)
    vocabulary = model.config.text_config.vocab_size
    pixels = art.PixelLogits(torch.randint(256, (3, 256, 256), dtype=torch.uint8))

    def prompt(digits):
        """A rendered prompt whose question is so many digits, and its token ids."""
        text = render(processor, prepend(IMAGE, Example("", user_turn("7" * digits), None)))
        return text, model_inputs(processor, text, pixels.to_image())["input_ids"][0].tolist()

    def about(tokens):
        return round(tokens * generator.uniform(1 - spread, 1 + spread))

    shortest, batch = len(prompt(0)[1]), []
    for _ in range(groups):
        length = max(shortest, about(prompt_tokens))
        text, prompt_ids = prompt(length - shortest)
        assert len(prompt_ids) == length, "this tokenizer does not write a digit as a token"
        lengths = sorted(about(completion_tokens) for _ in range(group_size))   # as art.rollout
        rows = [torch.randint(10, vocabulary, (count,)).tolist() for count in lengths]
        batch.append([art.Completion(text, prompt_ids, ids, [-7.0] * len(ids), "") for ids in rows])
    return pixels.to(model.device), batch, torch.randn(groups, group_size)


# The ways: each adds the gradient of one step of DAPO over the groups -----------------------------
# `size` is that of a micro-batch: tokens for ours, sequences for the others.


def ours(model, processor, pixels, groups, advantages, size=10**9):
    """art.py's; as the others without importance weights."""
    for group in groups:
        for completion in group:
            completion.old_logps = None                     # each time a first update
    art.backward(model, processor, pixels, groups, advantages, weight_cap=0,
                 tokens_per_microbatch=size)


def whole_sequences(model, processor, image, groups, advantages, size: int):
    """Every sequence brings its own image and prompt, and passes the whole model with `size` - 1
    others of similar length; the logits of the completions only, as in TRL."""
    completions = [completion for group in groups for completion in group]
    samples = list(zip(completions, advantages.flatten().tolist()))
    samples.sort(key=lambda sample: len(sample[0].prompt_ids) + len(sample[0].ids), reverse=True)
    total_tokens = sum(len(c.ids) for c in completions)
    for start in range(0, len(samples), size):
        batch = [completion for completion, _ in samples[start:start + size]]
        advantage = torch.tensor([a for _, a in samples[start:start + size]], device=model.device)
        ids = art.pad([c.ids for c in batch], 0, model.device)
        mask = art.pad([[True] * len(c.ids) for c in batch], False, model.device)
        inputs = processor(text=[c.prompt for c in batch], images=[[image()]] * len(batch),
                           padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        zeros = torch.zeros_like(ids)
        for key, tail in ("input_ids", ids), ("attention_mask", mask), ("mm_token_type_ids", zeros):
            inputs[key] = torch.cat([inputs[key], tail.to(inputs[key].dtype)], dim=1)
        logits = model(**inputs, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits
        # State t - 1 predicts token t.
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        loss, _ = art.dapo_loss(logp, logp.detach(), advantage, mask, total_tokens=total_tokens)
        loss.backward()


def plain(model, processor, pixels, groups, advantages, size=1):
    """ART as its equations read: nothing is shared, every sequence encodes the image again."""
    whole_sequences(model, processor, pixels, groups, advantages, size)


def lora(wrapped, processor, pixels, groups, advantages, size=1):
    """PEFT's LoRA on the same sequences, as TRL runs it."""
    whole_sequences(wrapped, processor, pixels.to_image, groups, advantages, size)


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


# name: (what prepares the model, what runs on it)
WAYS = {
    "ours": (contextlib.nullcontext, ours),
    "plain ART": (contextlib.nullcontext, plain),
    "LoRA": (adapted, lora),
}


# Measuring ----------------------------------------------------------------------------------------


def storages(tree) -> list:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


class Watch(TorchDispatchMode):
    """Counts the operators that make something, and the most bytes that the tensors made inside
    this block held at once. What an operator holds within itself is not seen."""
    operators = live = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators += not operator.is_view
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


def peak_bytes(work) -> tuple[int, int]:
    """(bytes that `work` needs beside what is there already, such as the weights; operators)."""
    before = torch.cuda.memory_allocated() if GPU else 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with Watch() as watch:
        work()
    held = torch.cuda.max_memory_allocated() - before if GPU else watch.peak
    return held, watch.operators


def fitting_size(name, work, groups, most_bytes: int) -> int:
    """The largest micro-batch of a way within so many bytes, or the least that there is. `work`
    takes groups, advantages and a size."""
    if name == "ours":
        tokens = sum(len(g[0].prompt_ids) + len(g) * len(g[-1].ids) for g in groups)
        whole, _ = peak_bytes(partial(work, groups, torch.ones(len(groups), len(groups[0])),
                                      tokens))
        return max(1, int(tokens * most_bytes / whole))
    longest = max(sum(groups, []), key=lambda c: len(c.prompt_ids) + len(c.ids))
    one, two = (peak_bytes(partial(work, [[longest] * n], torch.ones(1, n), n))[0]
                for n in (1, 2))
    return max(1, 1 + int((most_bytes - one) / (two - one)))


def measure(name, model, processor, batch, most_bytes: int | None, repetitions=1) -> dict:
    """One row: a step in the largest micro-batches within `most_bytes` (None: one for all). A way
    that runs out of memory says so."""
    pixels, groups, advantages = batch
    prepare, way = WAYS[name]
    size = 10**9
    with prepare(model) as ready:
        try:
            if most_bytes is not None:
                size = fitting_size(name, partial(way, ready, processor, pixels), groups,
                                    most_bytes)
            passes = []
            hook = model.base_model.language_model.register_forward_pre_hook(
                lambda *_: passes.append(1))
            work = partial(way, ready, processor, pixels, groups, advantages, size)
            held, operators = peak_bytes(work)          # the first turn also warms up
            hook.remove()
            spent = median(seconds(work) for _ in range(repetitions))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return {"way": name, "passes": "out of memory"}
        finally:
            pixels.logits.grad = None
    return {"way": name, "passes": len(passes), "operators": operators, "seconds": spent,
            "GB": held / 1e9}


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


# Table 1: the trainer's pass at equal memory, every way -------------------------------------------


def trainer_rows(model, processor, shape: str, batch, repetitions: int, budgets=None) -> list[dict]:
    """A row for each way and each of the `budgets` in bytes. Without budgets: what ours takes for
    the whole step at once, a half and a quarter of that. Seconds stand beside ours of the same
    budget."""
    rows = []
    if budgets is None:
        whole = measure("ours", model, processor, batch, None)["GB"] * 1e9
        budgets = [whole, whole / 2, whole / 4]
    for budget in budgets:
        found = [measure(name, model, processor, batch, budget, repetitions) for name in WAYS]
        for row in found:
            times = row.get("seconds", float("nan")) / found[0].get("seconds", float("nan"))
            rows.append({"shape": shape, "within GB": budget / 1e9, **row, "times ours": times})
    return rows


def trainer_table(processor, repetitions: int, group_size: int):
    model, rows = make_model(**TWELFTH), []
    for shape, lengths in SHAPES.items():
        batch = make_groups(model, processor, *lengths, group_size, groups=2, spread=0.4)
        floor = 2 * floor_seconds(model, *lengths, group_size)
        print(f"{shape}: the bare arithmetic of ours takes {floor:.2f} s", flush=True)
        rows += trainer_rows(model, processor, shape, batch, repetitions)
    print(f"\nA twelfth of Qwen3.5-0.8B's layers and vocabulary, two groups of {group_size}, whose "
          "lengths differ by up to 40 %")
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


# Table 3: how wide a sampling round is ------------------------------------------------------------


def rounds_table(processor, steps: int):
    """Rounds and seconds of sampling a step, where half of the groups hold right and wrong."""
    llm = load_engine(str(TINY), 512, 256, gpu_memory_utilization=0.5)
    image = art.PixelLogits(art.load_seed(str(ROOT / "seed.png"), 256)).to_image()
    examples = TASKS["gsm8k"].load("train", str(TINY / "gsm8k" / "train.jsonl"))

    def half_hopeless(example, text):
        """Half of the questions are never answered right; of the others, every second text is."""
        is_right = key_hash(example.key) < 0.5 and sum(map(ord, text)) % 2
        return example.target if is_right else None

    task, rows = Task(None, half_hopeless), []
    for width in (1, 2, 3):
        config = art.Config("gsm8k", oversampling=width, max_new_tokens=48, max_model_len=512)
        spent, metrics = [], []
        for step in range(steps + 1):                       # step 0 warms up
            start = time.time()
            _, found = art.sample_groups(llm, processor, task, examples, image, step, config)
            spent.append(time.time() - start)
            metrics.append(found)
        means = pandas.DataFrame(metrics[1:]).mean()
        rows.append({"width": width, "rounds": means["rounds"], "groups": means["groups"],
                     "sampled groups": means["sampled_groups"], "seconds": median(spent[1:])})
    print(f"\nSampling 4 groups of 8 of the tiny model, half of the groups varied, {steps} steps")
    print(pandas.DataFrame(rows).round(2).to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["trainer", "engine", "rounds"])
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (3)")
    parser.add_argument("--group-size", type=int, default=8, help="of the trainer's table (8)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    processor = load_processor(str(TINY))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.table in (None, "trainer"):
        trainer_table(processor, args.repetitions, args.group_size)
    if args.table in (None, "engine"):
        engine_table(processor, 5 * args.repetitions)
    if args.table in (None, "rounds"):
        rounds_table(processor, 10 * args.repetitions)


if __name__ == "__main__":
    main()
