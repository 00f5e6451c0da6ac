"""What a step of ART costs, beside LoRA on the same sequences and beside what the arithmetic alone would take.

    python tests/bench.py                      # all tables; without a GPU some 40 minutes of processor time
    python tests/bench.py trainer --full       # only the trainer, with the whole of Qwen3.5-0.8B's shape: for a GPU

The trainer's weights are random, for speed and memory do not depend on them. Every table is of one run: the ways take turns, and of each
the median of its repetitions counts. Without a GPU a second is one of processor time, all threads together (other programs on
the machine lengthen it little), and memory is that of the tensors alive at once; with one, both are as CUDA has them.
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
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")             # a thread that waits must not count as one that works
import torch                                                                                            # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode                                          # noqa: E402
from torch.utils._pytree import tree_leaves                                                            # noqa: E402
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration                                # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import art                                                                                              # noqa: E402
import eval as tasks                                                                                    # noqa: E402

TINY = ROOT / "tests" / "tiny"
GPU = torch.cuda.is_available()
# Prompt tokens (64 of them the image's) and completion tokens.
SHAPES = {"GSM8K": (164, 250), "ToolMind, 1,000": (1000, 80), "ToolMind, 4,000": (4000, 80)}


# ------------------------------------------------------------------------------------------------------------------
# Models and sequences

def make_model(share=None, **changes):
    """The tiny model's configuration, or with `share` one of Qwen3.5-0.8B's shape with `share` of its layers and vocabulary."""
    config = json.loads((TINY / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    if share:
        layers = round(24 * share)
        kinds = ["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)]
        text |= dict(hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
                     linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
                     num_hidden_layers=layers, layer_types=kinds, vocab_size=round(248320 * share), max_position_embeddings=8192)
        text["rope_parameters"] |= dict(mrope_section=[11, 11, 10], rope_theta=1e7)
        vision |= dict(hidden_size=768, intermediate_size=3072, num_heads=12, depth=round(12 * share), out_hidden_size=1024,
                       num_position_embeddings=2304)
    text |= changes
    if "layer_types" in changes:
        text["num_hidden_layers"] = len(changes["layer_types"])
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config)).eval().requires_grad_(False)
    return model.to("cuda", torch.bfloat16) if GPU else model


def make_groups(model, processor, prompt_tokens, completion_tokens, group_size, groups=1, size=256):
    """Pixels, groups of Completions of random tokens behind a prompt of exactly `prompt_tokens`, and advantages."""
    pixels = art.PixelLogits(torch.randint(256, (3, size, size), dtype=torch.uint8)).to(model.device)
    prompt = lambda n: tasks.render(processor, tasks.user_turn("7" * n, True), None)                    # noqa: E731
    ids = lambda n: tasks.model_inputs(processor, prompt(n), pixels.to_image())["input_ids"][0].tolist()        # noqa: E731
    length = prompt_tokens - len(ids(0))
    if len(ids(length)) != prompt_tokens:
        raise SystemExit(f"a prompt of {prompt_tokens} tokens cannot be written with this tokenizer")
    sample = lambda: torch.randint(10, model.config.text_config.vocab_size, (completion_tokens,)).tolist()      # noqa: E731
    made = [[art.Completion(prompt(length), ids(length), sample(), [-7.0] * completion_tokens, "", False)
             for _ in range(group_size)] for _ in range(groups)]
    return pixels, made, torch.randn(groups, group_size)


# ------------------------------------------------------------------------------------------------------------------
# The ways: each adds the gradient of one DAPO step over the groups

def ours(model, processor, pixels, groups, advantages, share=1):
    """`share`: micro-batches of so much of a group's completions."""
    group = groups[0]
    tokens = len(group[0].prompt_ids) + int(len(group) * share) * len(group[0].ids)
    art.backward(model, processor, pixels, groups, advantages, tokens=tokens)


def sequence_loss(model, processor, image, part, advantages, total, **options):
    """DAPO loss of completions of one length, each behind its own copy of image and prompt, in one pass of the whole model."""
    inputs = processor(text=[c.prompt for c in part], images=[image] * len(part), return_tensors="pt").to(model.device)
    ids = torch.tensor([c.ids for c in part], device=model.device)
    for key, more in dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.zeros_like(ids)).items():
        inputs[key] = torch.cat([inputs[key], more], dim=1)
    logits = model(**inputs, use_cache=False, **options).logits[:, -ids.shape[1] - 1:-1]
    logp = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return art.dapo_loss(logp, logp.detach(), advantages.to(model.device), torch.ones_like(ids).bool(), total_tokens=total)[0]


def plain(model, processor, pixels, groups, advantages):
    """ART as its equations read: nothing shared, the image encoded for every sequence, logits of every token."""
    total = sum(len(c.ids) for g in groups for c in g)
    for group, row in zip(groups, advantages):
        sequence_loss(model, processor, pixels(), group, row, total).backward()


@contextlib.contextmanager
def adapted(model, recompute=False):
    """`model` with PEFT's LoRA of rank 16 on all matrices of the decoder, as in the paper's control."""
    from peft import LoraConfig, get_peft_model
    decoder = r".*language_model\.layers\..*_(proj|qkv|z|b|a)"
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=decoder))
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
    """Every sequence whole, as in TRL: logits of the completions only."""
    total = sum(len(c.ids) for g in groups for c in g)
    for group, row in zip(groups, advantages):
        sequence_loss(wrapped, processor, pixels.to_image(), group, row, total, logits_to_keep=len(group[0].ids) + 1).backward()


WAYS = {"plain ART": (contextlib.nullcontext, plain), "LoRA": (adapted, lora),
        "LoRA, recomputing": (lambda model: adapted(model, recompute=True), lora),      # gradient checkpointing, TRL's default
        "ours": (contextlib.nullcontext, ours),
        "ours, a quarter at a time": (contextlib.nullcontext, lambda *batch: ours(*batch, share=1 / 4))}


# ------------------------------------------------------------------------------------------------------------------
# Measuring

class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors made inside this block held at once; what an operator holds within itself is not seen."""
    live = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and id(storage := tensor.untyped_storage()) not in known:
                known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size):
        self.live -= size


def clock():
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    start = clock()
    work()
    return clock() - start


def peak_bytes(work):
    """Bytes that `work` needs beside what is there already (the weights)."""
    if not GPU:
        with LiveTensors() as memory:
            work()
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def matrix_rate(model, tokens):
    """FLOPs a second of the decoder's own matrix product: tokens x hidden with hidden x MLP."""
    text = model.config.text_config
    a, b = (torch.randn(*s, device=model.device, dtype=model.dtype) for s in ((tokens, text.hidden_size),
                                                                              (text.hidden_size, text.intermediate_size)))
    a @ b
    times = 1 + int(1e10 / (a.numel() * b.shape[1]))
    return 2 * a.numel() * b.shape[1] * times / median(seconds(lambda: [a @ b for _ in range(times)]) for _ in range(5))


def floor_flops(model, prompt_tokens, completion_tokens, group_size):
    """FLOPs of the matrices and of full attention for P + G*C tokens, forward and backward without weight gradients."""
    text, everything = model.config.text_config, prompt_tokens + group_size * completion_tokens
    matrices = sum(m.weight.numel() for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear))
    output = text.hidden_size * text.vocab_size * group_size * completion_tokens
    pairs = prompt_tokens ** 2 / 2 + group_size * completion_tokens * (prompt_tokens + completion_tokens / 2)
    attention = 12 * pairs * text.num_attention_heads * text.head_dim * text.layer_types.count("full_attention")
    return 4 * (matrices * everything + output) + attention


# ------------------------------------------------------------------------------------------------------------------
# Tables

def group_bytes(way, model, processor, batch, group_size):
    """Memory of a pass of `group_size` sequences that share nothing, from those of one and two: each further one adds as much."""
    pixels, groups, advantages = batch
    one, two = (peak_bytes(lambda: way(model, processor, pixels, [groups[0][:n]], advantages[:, :n])) for n in (1, 2))
    return one + (group_size - 1) * (two - one)


def trainer_table(name, model, processor, shapes, repetitions, alone=False):
    """`alone`: the ways that share nothing run one sequence a time, which counts G times; the memory is `group_bytes`."""
    print(f"\n{name}\n\n| shape | G | way | seconds | times ours | memory, GB | times ours | floor, s | times floor |\n"
          + "|---" * 9 + "|", flush=True)
    for shape, group_size, names in shapes:
        ways = {way: WAYS[way] for way in names}
        P, C = SHAPES[shape]
        batch = make_groups(model, processor, P, C, group_size)
        spent, held = {way: [] for way in ways}, {}
        for repetition in range(repetitions + 1):
            for way, (prepared, run) in ways.items():
                split = alone and not way.startswith("ours")
                chosen = (batch[0], [batch[1][0][:1]], batch[2][:, :1]) if split else batch
                try:
                    with prepared(model) as ready:
                        work = lambda: run(ready, processor, *chosen)                                   # noqa: E731
                        if repetition == 0:                 # the first is for memory, and warms up
                            held[way] = group_bytes(run, ready, processor, batch, group_size
                                                     ) if split else peak_bytes(work)
                        elif way in held:
                            spent[way].append(seconds(work) * (group_size if split else 1))
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                batch[0].logits.grad = None
        least = floor_flops(model, P, C, group_size) / matrix_rate(model, P + group_size * C)
        for way in ways:
            if way not in held or not spent[way]:
                print(f"| {shape} | {group_size} | {way} | out of memory | | | | | |", flush=True)
                continue
            took, mine = median(spent[way]), median(spent["ours"])
            print(f"| {shape} | {group_size} | {way} | {took:.2f} | {took / mine:.2f} | {held[way] / 1e9:.2f} | "
                  f"{held[way] / held['ours']:.2f} | "
                  + (f"{least:.2f} | {mine / least:.2f} |" if way == "ours" else "| |"), flush=True)


def floor_table(processor, repetitions, share):
    """How far ours is from the floor with and without transformers' reference kernel of the gated delta net: GSM8K's shape, G = 8."""
    print("\n| layers | seconds | floor, s | times floor |\n|---|---|---|---|")
    for kinds in ["linear_attention", "full_attention"], ["full_attention"] * 2:
        model = make_model(share, layer_types=kinds)
        batch = make_groups(model, processor, 164, 250, 8)
        took = median([seconds(lambda: ours(model, processor, *batch)) for _ in range(repetitions + 1)][1:])
        least = floor_flops(model, 164, 250, 8) / matrix_rate(model, 164 + 2000)
        print(f"| {' and '.join(dict.fromkeys(kinds))} | {took:.2f} | {least:.2f} | {took / least:.2f} |", flush=True)


def growth_table(processor, repetitions):
    """Ours on the tiny model, one thing varied at a time around GSM8K's shape."""
    base = dict(P=164, C=250, G=8, image=256, vocabulary=1024)
    varied = [{}, *({"G": g} for g in (2, 4, 16)), *({"P": p} for p in (1000, 4000)), *({"C": c} for c in (125, 500)),
              {"image": 512, "P": 164 + 192}, *({"vocabulary": v} for v in (16384, 65536))]
    cases = []
    for change in varied:
        case = base | change
        model = make_model(vocab_size=case["vocabulary"])
        batch = make_groups(model, processor, case["P"], case["C"], case["G"], size=case["image"])
        cases.append((case, lambda model=model, batch=batch: ours(model, processor, *batch), []))
    for repetition in range(repetitions + 1):
        for _, work, spent in cases:
            spent.append(seconds(work))
    print("\nOurs on the tiny model\n\n| G | P | C | image | vocabulary | P + G*C | seconds | ms for each of 1,000 tokens |\n"
          "|---|---|---|---|---|---|---|---|")
    for case, _, spent in cases:
        tokens, took = case["P"] + case["G"] * case["C"], median(spent[1:])
        print(f"| {case['G']} | {case['P']} | {case['C']} | {case['image']} | {case['vocabulary']:,} | {tokens:,} | {took:.2f} | "
              f"{1e6 * took / tokens:.0f} |", flush=True)


def engine_tables(processor, repetitions, folder):
    """A whole step, art.py's generation against vLLM alone, and eval.py's feeding against the authors', on one engine."""
    from vllm import SamplingParams
    task, threads = tasks.TASKS["gsm8k"], torch.get_num_threads()
    llm = tasks.load_engine(str(TINY), max_model_len=512, max_num_seqs=256, gpu_memory_utilization=0.5)
    torch.set_num_threads(threads)
    model = art.load_model(str(TINY), "cuda" if GPU else "cpu")
    examples = task.load("train", str(TINY / "gsm8k" / "train.jsonl"))
    pixels = art.PixelLogits(art.load_seed(ROOT / "seed.png", 256)).to(model.device)
    optimizer, image = torch.optim.AdamW(pixels.parameters(), lr=0.0), pixels.to_image()

    spent = {part: [] for part in ("rendering", "generation", "rewards and advantages", "trainer's pass", "optimiser and PNG")}
    for step in range(repetitions + 1):
        marks, chosen = [clock()], examples[4 * step:4 * step + 4]
        mark = lambda: marks.append(clock())                                                            # noqa: E731
        prompts = [tasks.prompt_text(processor, task, e) for e in chosen]
        mark()
        groups = art.rollout(llm, prompts, image, 8, 64)
        mark()
        rewards = torch.tensor([[task.reward(e, c.text) for c in group] for e, group in zip(chosen, groups)])
        advantages = art.group_advantages(rewards)
        mark()
        art.backward(model, processor, pixels, groups, advantages)
        mark()
        optimizer.step()
        tasks.save(tasks.png_bytes(pixels.to_image()), Path(folder) / "last.png")
        mark()
        for part, a, b in zip(spent, marks, marks[1:]):
            spent[part].append(b - a)
    total = sum(median(s[1:]) for s in spent.values())
    print("\nA step of the tiny model, 4 prompts x 8 completions\n\n| part | ms | share |\n|---|---|---|")
    for part, s in spent.items():
        print(f"| {part} | {1e3 * median(s[1:]):.1f} | {100 * median(s[1:]) / total:.1f} % |")

    def fresh(work):
        """(seconds by the wall, seconds by `clock`, result) with nothing in the engine's caches."""
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        start, spent = time.perf_counter(), clock()
        result = work()
        return time.perf_counter() - start, clock() - spent, result

    params = SamplingParams(n=8, temperature=1.0, max_tokens=64, logprobs=0)
    prompts = [tasks.prompt_text(processor, task, e) for e in examples[:32]]
    requests = [{"prompt": p, "multi_modal_data": {"image": image}} for p in prompts]
    questions = [(*task.messages(e), image) for e in examples[:300]]
    ask = lambda part: sum(n for _, samples in tasks.ask_engine(                                        # noqa: E731
        llm, processor, part, {**tasks.GREEDY, "max_tokens": 64}) for _, n, _ in samples)
    works = {
        "32 x 8 completions, vLLM alone": lambda: sum(len(o.token_ids) for r in llm.generate(requests, params, use_tqdm=False)
                                                      for o in r.outputs),
        "32 x 8 completions, art.rollout": lambda: sum(len(c.ids) for g in art.rollout(llm, prompts, image, 8, 64) for c in g),
        "300 questions, 100 at a time, as the authors": lambda: sum(ask(questions[i:i + 100]) for i in range(0, 300, 100)),
        "300 questions at once, as eval.py": lambda: ask(questions)}
    rates = {name: [] for name in works}
    for repetition in range(5 * repetitions + 1):
        for name, work in works.items():
            wall, spent_here, tokens = fresh(work)
            rates[name].append((tokens / wall, tokens / spent_here))
    print("\nThe engine, tiny model\n\n| requests | tokens a second | tokens a second of processor time | to the row above: wall | "
          "processor time |\n|---|---|---|---|---|")
    before = ()
    for i, (name, found) in enumerate(rates.items()):
        wall, spent_here = (median(values) for values in zip(*found[1:]))
        # Of each repetition the two were neighbours in time: the median of their ratios bears a busy machine better.
        ratios = [f"{100 * median(a[k] / b[k] for a, b in zip(found[1:], before)):.1f} %" if i % 2 else "" for k in (0, 1)]
        print(f"| {name} | {wall:.0f} | {spent_here:.0f} | {ratios[0]} | {ratios[1]} |", flush=True)
        before = found[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["trainer", "floor", "growth", "engine"], metavar="trainer | floor | growth | engine")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="all of Qwen3.5-0.8B's layers and vocabulary, not a twelfth of them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    processor = tasks.load_processor(str(TINY))
    print(f"{torch.cuda.get_device_name() if GPU else f'{platform.machine()}, {torch.get_num_threads()} threads'}, "
          f"torch {torch.__version__}")
    if "trainer" in args.parts:
        every, short = list(WAYS), ["plain ART", "LoRA", "ours"]
        short_shapes = [("GSM8K", 8, every), ("ToolMind, 1,000", 8, every), ("GSM8K", 16, short), ("ToolMind, 1,000", 16, short)]
        shapes = [*short_shapes, ("ToolMind, 4,000", 8, every if GPU else short)]
        trainer_table("The tiny model, whole groups in one pass", make_model(), processor, short_shapes, args.repetitions)
        share = 1 if args.full else 1 / 12
        model = make_model(share)
        trainer_table(f"Qwen3.5-0.8B's shape, {model.config.text_config.num_hidden_layers} of 24 layers, "
                      f"{model.config.text_config.vocab_size:,} of 248,320 tokens", model, processor, shapes, args.repetitions,
                      alone=not GPU)
    if "floor" in args.parts:
        floor_table(processor, args.repetitions, 1 if args.full else 1 / 12)
    if "growth" in args.parts:
        growth_table(processor, args.repetitions)
    if "engine" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            engine_tables(processor, args.repetitions, folder)
