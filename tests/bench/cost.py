"""What a step of ART costs, beside LoRA on the same sequences and beside the bare arithmetic.

    .venv/bin/python tests/bench/cost.py                    # all tables
    .venv/bin/python tests/bench/cost.py floor growth       # some of them
    python tests/bench/cost.py trainer --full               # Qwen3.5-0.8B's whole shape: for a GPU

Without a GPU all tables take some 40 minutes of processor time.

The trainer's weights are random: speed and memory do not depend on them. The ways of a table take
turns, and of each the median of its repetitions counts. Without a GPU a second is one of processor
time, all threads together, which other programs on the machine lengthen little. Memory is then that
of the tensors alive at once. With a GPU, both are as CUDA has them.

From top to bottom: models and sequences, the ways, measuring, the four tables.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
import weakref
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # a thread that waits does no work

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import art
from eval import (GREEDY, IMAGE, TASKS, ask_engine, behind, load_engine, load_processor,
                  model_inputs, png_bytes, render, save, user_turn)

TINY = ROOT / "tests" / "tiny"
GPU = torch.cuda.is_available()
SHAPES = {                      # prompt tokens, 64 of them the image's, and completion tokens
    "GSM8K": (164, 250),
    "ToolMind, 1,000": (1000, 80),
    "ToolMind, 4,000": (4000, 80),
}
RANDOM_LOGP = -7.0              # of a random token, said to be vLLM's


# --------------------------------------------------------------------------------------------------
# Models and sequences

def make_model(share=None, **changes):
    """A frozen model with random weights: the tiny model's configuration, or with `share` that of
    Qwen3.5-0.8B with `share` of its layers and vocabulary; `changes` go to its text_config."""
    config = json.loads((TINY / "config.json").read_text())
    text = config["text_config"]
    if share:
        layers = round(24 * share)
        kinds = ["linear_attention"] * layers
        kinds[3::4] = ["full_attention"] * len(kinds[3::4])
        kinds[-1] = "full_attention"
        text |= {
            "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
            "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "num_hidden_layers": layers, "layer_types": kinds,
            "vocab_size": round(248320 * share), "max_position_embeddings": 8192}
        text["rope_parameters"] |= {"mrope_section": [11, 11, 10], "rope_theta": 1e7}
        config["vision_config"] |= {
            "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12,
            "depth": round(12 * share), "out_hidden_size": 1024, "num_position_embeddings": 2304}
    text |= changes
    text["num_hidden_layers"] = len(text["layer_types"])
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    model = model.eval().requires_grad_(False)
    return model.to("cuda", torch.bfloat16) if GPU else model


def make_groups(model, processor, prompt_tokens, completion_tokens, group_size, groups=1, size=256):
    """One batch: random pixels, groups of Completions of random tokens behind a prompt of exactly
    `prompt_tokens`, and random advantages (groups, group_size)."""
    seed = torch.randint(256, (3, size, size), dtype=torch.uint8)
    pixels = art.PixelLogits(seed).to(model.device)
    vocabulary = model.config.text_config.vocab_size

    def prompt(digits):
        """A rendered prompt whose question is so many digits, and its token ids."""
        example = {"messages": user_turn("7" * digits), "tools": None}
        text = render(processor, behind(IMAGE, example))
        return text, model_inputs(processor, text, pixels.to_image())["input_ids"][0].tolist()

    _, shortest = prompt(0)
    text, prompt_ids = prompt(prompt_tokens - len(shortest))
    if len(prompt_ids) != prompt_tokens:
        raise SystemExit(f"this tokenizer cannot write a prompt of {prompt_tokens} tokens")
    made = []
    for _ in range(groups):
        group = []
        for _ in range(group_size):
            ids = torch.randint(10, vocabulary, (completion_tokens,)).tolist()
            logps = [RANDOM_LOGP] * completion_tokens
            group.append(art.Completion(text, prompt_ids, ids, logps, "", False))
        made.append(group)
    return pixels, made, torch.randn(groups, group_size)


# --------------------------------------------------------------------------------------------------
# The ways: each adds the gradient of one step of DAPO over the groups

def ours(model, processor, pixels, groups, advantages, share=1):
    """art.py's. `share`: a micro-batch takes so much of a group's completions."""
    first = groups[0][0]
    at_once = int(len(groups[0]) * share)
    tokens = len(first.prompt_ids) + at_once * len(first.ids)
    art.backward(model, processor, pixels, groups, advantages, tokens_per_microbatch=tokens)


def sequence_loss(model, processor, image, group, advantages, total_tokens, **options):
    """DAPO's loss of completions of one length, each behind its own copy of image and prompt, in
    one pass of the whole model. `options` go to the model."""
    texts = [completion.prompt for completion in group]
    inputs = processor(text=texts, images=[image] * len(group), return_tensors="pt")
    inputs = inputs.to(model.device)
    ids = torch.tensor([completion.ids for completion in group], device=model.device)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    tails = {"input_ids": ids, "attention_mask": ones, "mm_token_type_ids": zeros}
    for key, tail in tails.items():
        inputs[key] = torch.cat([inputs[key], tail], dim=1)
    logits = model(**inputs, use_cache=False, **options).logits
    logits = logits[:, -ids.shape[1] - 1:-1].float()                # state t predicts token t + 1
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss, _ = art.dapo_loss(logp, logp.detach(), advantages.to(model.device), ones.bool(),
                            total_tokens=total_tokens)
    return loss


def count_tokens(groups):
    return sum(len(completion.ids) for group in groups for completion in group)


def plain(model, processor, pixels, groups, advantages):
    """ART as its equations read: nothing is shared, every sequence encodes the image again, and
    every token has its logits."""
    for group, row in zip(groups, advantages):
        image = pixels()
        loss = sequence_loss(model, processor, image, group, row, count_tokens(groups))
        loss.backward()


def lora_config():
    """The paper's control: rank 16, alpha 32, all matrices of the decoder."""
    from peft import LoraConfig
    decoder = r".*language_model\.layers\..*_(proj|qkv|z|b|a)"
    return LoraConfig(r=16, lora_alpha=32, target_modules=decoder)


@contextlib.contextmanager
def adapted(model, recompute=False):
    """`model` with PEFT's LoRA of rank 16 on all matrices of the decoder, as in the paper's
    control. `recompute`: with gradient checkpointing, TRL's default."""
    from peft import get_peft_model
    wrapped = get_peft_model(model, lora_config())
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.train()
    try:
        yield wrapped
    finally:
        model.gradient_checkpointing_disable()
        wrapped.unload()
        model.eval().requires_grad_(False)


def lora(wrapped, processor, pixels, groups, advantages):
    """Every sequence whole, as in TRL; logits of the completions only."""
    image = pixels.to_image()
    for group, row in zip(groups, advantages):
        kept = len(group[0].ids) + 1
        loss = sequence_loss(wrapped, processor, image, group, row, count_tokens(groups),
                             logits_to_keep=kept)
        loss.backward()


# name: (what prepares the model, what runs on it)
WAYS = {
    "plain ART": (contextlib.nullcontext, plain),
    "LoRA": (adapted, lora),
    "LoRA, recomputing": (partial(adapted, recompute=True), lora),
    "ours": (contextlib.nullcontext, ours),
    "ours, a quarter at a time": (contextlib.nullcontext, partial(ours, share=1 / 4)),
}


# --------------------------------------------------------------------------------------------------
# Measuring

class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors made inside this block held at once. What an operator holds
    within itself is not seen."""
    live = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        known = set()                                   # a view or an in-place result is not new
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor):
                known.add(id(tensor.untyped_storage()))
        for tensor in tree_leaves(result):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size):
        self.live -= size


def clock():
    """Seconds: of the wall on a GPU, else of processor time."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    start = clock()
    work()
    return clock() - start


def peak_bytes(work):
    """Bytes that `work` needs beside what is there already, such as the weights."""
    if not GPU:
        with LiveTensors() as memory:
            work()
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def group_bytes(way, model, processor, batch, group_size):
    """Bytes of a pass of `group_size` sequences that share nothing, from those of one and of two:
    each further sequence adds as much as the second."""
    pixels, groups, advantages = batch
    found = []
    for count in (1, 2):
        group = groups[0][:count]
        work = partial(way, model, processor, pixels, [group], advantages[:, :count])
        found.append(peak_bytes(work))
    one, two = found
    return one + (group_size - 1) * (two - one)


def matrix_rate(model, tokens):
    """FLOPs a second of the decoder's own matrix product: tokens x hidden with hidden x MLP."""
    text = model.config.text_config
    options = {"device": model.device, "dtype": model.dtype}
    states = torch.randn(tokens, text.hidden_size, **options)
    matrix = torch.randn(text.hidden_size, text.intermediate_size, **options)
    flops = 2 * tokens * text.hidden_size * text.intermediate_size
    times = 1 + int(2e10 / flops)

    def multiply():
        for _ in range(times):
            states @ matrix

    states @ matrix                                     # warms up
    found = [seconds(multiply) for _ in range(5)]
    return flops * times / median(found)


def floor_flops(model, prompt_tokens, completion_tokens, group_size):
    """FLOPs of the matrices and of full attention for P + G*C tokens, forward and backward, without
    weight gradients."""
    text = model.config.text_config
    sampled = group_size * completion_tokens
    matrices = 0
    for module in model.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            matrices += module.weight.numel()
    output = text.hidden_size * text.vocab_size
    # Pairs of query and key: of the prompt with itself, of the completions with what is before them
    pairs = prompt_tokens ** 2 / 2 + sampled * (prompt_tokens + completion_tokens / 2)
    layers = text.layer_types.count("full_attention")
    attention = 12 * pairs * text.num_attention_heads * text.head_dim * layers
    return 4 * (matrices * (prompt_tokens + sampled) + output * sampled) + attention


def floor_seconds(model, prompt_tokens, completion_tokens, group_size):
    """Seconds that the arithmetic alone takes at the rate of the decoder's matrix product."""
    flops = floor_flops(model, prompt_tokens, completion_tokens, group_size)
    return flops / matrix_rate(model, prompt_tokens + group_size * completion_tokens)


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(title, *columns):
    print(f"\n{title}\n", flush=True)
    print_row(*columns)
    print_row(*["---"] * len(columns))


# --------------------------------------------------------------------------------------------------
# Table 1: the trainer's step, every way

def measure_ways(names, model, processor, batch, repetitions, one_by_one):
    """({way: seconds of each repetition}, {way: bytes}) of one step; a way that runs out of memory
    is in neither. The first turn is for memory, and warms up.

    `one_by_one`: ways that share nothing run one sequence, which counts G times; their memory is
    `group_bytes`.
    """
    pixels, groups, advantages = batch
    group_size = len(groups[0])
    first_alone = (pixels, [groups[0][:1]], advantages[:, :1])
    spent, held = {}, {}
    for repetition in range(repetitions + 1):
        for name in names:
            if repetition > 0 and name not in held:
                continue                                # out of memory in the first turn
            alone = one_by_one and not name.startswith("ours")
            prepare, way = WAYS[name]
            try:
                with prepare(model) as ready:
                    work = partial(way, ready, processor, *(first_alone if alone else batch))
                    if repetition > 0:
                        took = seconds(work) * (group_size if alone else 1)
                        spent.setdefault(name, []).append(took)
                    elif alone:
                        held[name] = group_bytes(way, ready, processor, batch, group_size)
                    else:
                        held[name] = peak_bytes(work)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            pixels.logits.grad = None
    return spent, held


def trainer_table(title, model, processor, cases, repetitions, one_by_one=False):
    """`cases`: [(shape, G, names of ways, "ours" among them)]."""
    print_head(title, "shape", "G", "way", "seconds", "times ours", "memory, GB", "times ours",
               "floor, s", "times floor")
    for shape, group_size, names in cases:
        batch = make_groups(model, processor, *SHAPES[shape], group_size)
        spent, held = measure_ways(names, model, processor, batch, repetitions, one_by_one)
        least = floor_seconds(model, *SHAPES[shape], group_size)
        for name in names:
            if name not in spent or "ours" not in spent:
                found = f"{median(spent[name]):.2f}" if name in spent else "out of memory"
                print_row(shape, group_size, name, found, "", "", "", "", "")
                continue
            took, our_time = median(spent[name]), median(spent["ours"])
            floor = ["", ""]
            if name == "ours":
                floor = [f"{least:.2f}", f"{took / least:.2f}"]
            print_row(shape, group_size, name, f"{took:.2f}", f"{took / our_time:.2f}",
                      f"{held[name] / 1e9:.2f}", f"{held[name] / held['ours']:.2f}", *floor)


def trainer_tables(processor, repetitions, full):
    every = list(WAYS)
    short = ["plain ART", "LoRA", "ours"]
    cases = [("GSM8K", 8, every), ("ToolMind, 1,000", 8, every),
             ("GSM8K", 16, short), ("ToolMind, 1,000", 16, short)]
    trainer_table("The tiny model, whole groups in one pass", make_model(), processor, cases,
                  repetitions)
    cases.append(("ToolMind, 4,000", 8, every if GPU else short))
    model = make_model(1 if full else 1 / 12)
    text = model.config.text_config
    title = (f"Qwen3.5-0.8B's shape, {text.num_hidden_layers} of 24 layers, "
             f"{text.vocab_size:,} of 248,320 tokens")
    trainer_table(title, model, processor, cases, repetitions, one_by_one=not GPU)


# --------------------------------------------------------------------------------------------------
# Table 2: how far ours is from the floor

def floor_table(processor, repetitions, full):
    """Ours in GSM8K's shape, G = 8, with and without a layer of the gated delta net, which runs on
    transformers' reference kernel."""
    shape = (*SHAPES["GSM8K"], 8)
    print_head("Ours and the floor", "layers", "seconds", "floor, s", "times floor")
    for first_layer in ("linear_attention", "full_attention"):
        kinds = [first_layer, "full_attention"]
        model = make_model(1 if full else 1 / 12, layer_types=kinds)
        batch = make_groups(model, processor, *shape)
        spent = []
        for _ in range(repetitions + 1):
            spent.append(seconds(partial(ours, model, processor, *batch)))
        took = median(spent[1:])                        # the first warms up
        least = floor_seconds(model, *shape)
        print_row(" and ".join(kinds), f"{took:.2f}", f"{least:.2f}", f"{took / least:.2f}")


# --------------------------------------------------------------------------------------------------
# Table 3: how ours grows

GROWTH = [                      # what differs from GSM8K's shape
    {}, {"G": 2}, {"G": 4}, {"G": 16}, {"P": 1000}, {"P": 4000}, {"C": 125}, {"C": 500},
    {"image": 512, "P": 164 + 192},                     # 256 tokens of image, not 64
    {"vocabulary": 16384}, {"vocabulary": 65536},
]

def growth_table(processor, repetitions):
    """Ours on the tiny model, one thing varied at a time around GSM8K's shape."""
    cases = []
    for change in GROWTH:
        case = {"G": 8, "P": 164, "C": 250, "image": 256, "vocabulary": 1024, **change}
        model = make_model(vocab_size=case["vocabulary"])
        batch = make_groups(model, processor, case["P"], case["C"], case["G"], size=case["image"])
        cases.append((case, partial(ours, model, processor, *batch), []))
    for _ in range(repetitions + 1):
        for _, work, spent in cases:
            spent.append(seconds(work))
    print_head("Ours on the tiny model", "G", "P", "C", "image", "vocabulary", "P + G*C", "seconds",
               "ms for each of 1,000 tokens")
    for case, _, spent in cases:
        tokens = case["P"] + case["G"] * case["C"]
        took = median(spent[1:])
        print_row(case["G"], case["P"], case["C"], case["image"], f"{case['vocabulary']:,}",
                  f"{tokens:,}", f"{took:.2f}", f"{1e6 * took / tokens:.0f}")


# --------------------------------------------------------------------------------------------------
# Table 4: a whole step, and the engine

PARTS = ("rendering", "generation", "rewards and advantages", "trainer's pass", "optimiser and PNG")

def step_table(llm, processor, task, examples, repetitions):
    """A step of the tiny model, part by part."""
    model = art.load_model(str(TINY), "cuda" if GPU else "cpu")
    pixels = art.PixelLogits(art.load_seed(ROOT / "seed.png", 256)).to(model.device)
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.0)
    reward = task.reward or task.score
    spent = {part: [] for part in PARTS}
    folder = tempfile.TemporaryDirectory()
    for step in range(repetitions + 1):
        chosen = examples[4 * step:4 * step + 4]
        marks = [clock()]

        prompts = [render(processor, behind(IMAGE, example)) for example in chosen]
        marks.append(clock())

        groups = art.rollout(llm, prompts, pixels.to_image(), 8, 64)
        marks.append(clock())

        rewards = torch.zeros(4, 8)
        for i, example in enumerate(chosen):
            for j, completion in enumerate(groups[i]):
                rewards[i, j] = reward(example, completion.text)
        advantages = art.group_advantages(rewards)
        marks.append(clock())

        art.backward(model, processor, pixels, groups, advantages)
        marks.append(clock())

        optimizer.step()
        save(png_bytes(pixels.to_image()), Path(folder.name, "last.png"))
        marks.append(clock())
        for i, part in enumerate(PARTS):
            spent[part].append(marks[i + 1] - marks[i])
    folder.cleanup()
    took = {part: median(found[1:]) for part, found in spent.items()}
    total = sum(took.values())
    print_head("A step of the tiny model, 4 prompts x 8 completions", "part", "ms", "share")
    for part in PARTS:
        print_row(part, f"{1e3 * took[part]:.1f}", f"{100 * took[part] / total:.1f} %")


def count_answers(answers):
    """Tokens of what ask_engine returns."""
    return sum(tokens for samples in answers for _, tokens, _ in samples)


def engine_works(llm, processor, examples):
    """{name: a function that asks the engine and returns the tokens it generated}: two pairs, of
    which the second is ours."""
    from vllm import SamplingParams
    image = art.PixelLogits(art.load_seed(ROOT / "seed.png", 256)).to_image()
    prompts = [render(processor, behind(IMAGE, example)) for example in examples[:32]]
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for prompt in prompts]
    sampling = SamplingParams(n=8, temperature=1.0, max_tokens=64, logprobs=0)
    questions = [(behind(IMAGE, example), image) for example in examples[:300]]
    greedy = {**GREEDY, "max_tokens": 64}

    def vllm_alone():
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    def art_rollout():
        return count_tokens(art.rollout(llm, prompts, image, 8, 64))

    def hundreds():
        tokens = 0
        for start in range(0, 300, 100):
            part = questions[start:start + 100]
            tokens += count_answers(ask_engine(llm, processor, part, greedy))
        return tokens

    def at_once():
        return count_answers(ask_engine(llm, processor, questions, greedy))

    return {"32 x 8 completions, vLLM alone": vllm_alone,
            "32 x 8 completions, art.rollout": art_rollout,
            "300 questions, 100 at a time, as the authors": hundreds,
            "300 questions at once, as eval.py": at_once}


def rate_table(llm, processor, examples, repetitions):
    """art.py's generation against vLLM alone, and eval.py's feeding against the authors'."""
    works = engine_works(llm, processor, examples)
    rates = {name: [] for name in works}        # tokens a second: of the wall, of processor time
    for _ in range(repetitions + 1):
        for name, work in works.items():
            llm.reset_prefix_cache()
            llm.reset_mm_cache()
            wall, start = time.perf_counter(), clock()
            tokens = work()
            wall, spent = time.perf_counter() - wall, clock() - start
            rates[name].append((tokens / wall, tokens / spent))
    print_head("The engine, tiny model", "requests", "tokens a second",
               "tokens a second of processor time", "to the row above: wall", "processor time")
    names = list(works)
    for i, name in enumerate(names):
        rate, shares = [], ["", ""]
        for kind in (0, 1):
            rate.append(median(found[kind] for found in rates[name][1:]))
            if i % 2 == 1:
                # The two of a repetition were neighbours in time. The median of their ratios
                # bears a busy machine better than the ratio of the medians.
                pairs = zip(rates[name][1:], rates[names[i - 1]][1:])
                share = median(mine[kind] / other[kind] for mine, other in pairs)
                shares[kind] = f"{100 * share:.1f} %"
        print_row(name, f"{rate[0]:.0f}", f"{rate[1]:.0f}", *shares)


def engine_tables(processor, repetitions):
    task, threads = TASKS["gsm8k"], torch.get_num_threads()
    llm = load_engine(str(TINY), 512, 256, gpu_memory_utilization=0.5)
    torch.set_num_threads(threads)                      # vLLM sets another number
    examples = task.load("train", str(TINY / "gsm8k" / "train.jsonl"))
    step_table(llm, processor, task, examples, repetitions)
    rate_table(llm, processor, examples, 5 * repetitions)


# --------------------------------------------------------------------------------------------------

TABLES = ("trainer", "floor", "growth", "engine")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=TABLES, metavar=" | ".join(TABLES))
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (3)")
    parser.add_argument("--full", action="store_true",
                        help="all of Qwen3.5-0.8B's layers and vocabulary, not a twelfth of them")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"{', '.join(unknown)}: there is no such table; name some of "
                     f"{', '.join(TABLES)}.")
    warnings.simplefilter("ignore")
    processor = load_processor(str(TINY))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if GPU:
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}", flush=True)
    if "trainer" in args.tables:
        trainer_tables(processor, args.repetitions, args.full)
    if "floor" in args.tables:
        floor_table(processor, args.repetitions, args.full)
    if "growth" in args.tables:
        growth_table(processor, args.repetitions)
    if "engine" in args.tables:
        engine_tables(processor, args.repetitions)


if __name__ == "__main__":
    main()
