"""ART, Art-based Reinforcement Training: fine-tune a multimodal LLM by training one picture.

    python art.py --task gsm8k --seed seed.png                               # one GPU
    torchrun --nproc-per-node 4 art.py --task gsm8k --seed seed.png          # four

The model stays frozen; the pixels of one image, put before every question, are trained. The result
is a PNG that any vLLM serves. Method: arXiv 2606.11854, of which no training code was published.
One step, in the order of this file:
  1. load_seed          the picture to start from
  2. PixelLogits        the only parameter; its sigmoid, rounded to 8 bits, is the image
  3. rollout            vLLM samples G completions for each prompt, behind the image
  4. group_advantages   rewards relative to those of the other completions of the same prompt
  5. dapo_loss          the clipped surrogate, token by token (DAPO, arXiv 2503.14476)
  6. backward           its gradient, through the frozen model and its vision tower, to the pixels
  7. train              the loop: dynamic sampling, AdamW, validation, best.png
Not here: reference model and KL term (beta = 0 in the paper), value function, weight gradients.
"""

import signal

if __name__ == "__main__":                      # Ctrl-C during the slow imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import io
import json
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from eval import (IMAGE, TASKS, TEMPLATED, InputError, behind, evaluate, fitting, is_resized,
                  key_hash, load_engine, load_processor, model_inputs, open_picture, png_bytes,
                  positive, render, save)

# --------------------------------------------------------------------------------------------------
# 1. Seed

def load_seed(path, size):
    """Any picture as uint8 (3, size, size), cropped and scaled; no path: logits N(0, 0.1)."""
    if path is None:
        return (255 * torch.sigmoid(0.1 * torch.randn(3, size, size))).round().to(torch.uint8)
    picture = ImageOps.fit(open_picture(path), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

# --------------------------------------------------------------------------------------------------
# 2. Pixels

def logits_of(levels):
    """X_raw = log(p / (1 - p)), p = levels / 255. p = 0 and p = 1 are moved inwards by a quarter of
    a level, so that all 256 values survive the round trip."""
    return torch.logit(levels / 255, eps=0.25 / 255)

class PixelLogits(nn.Module):
    """The trainable image: float32 logits (3, H, W), at first those of a uint8 seed (3, H, W)."""
    def __init__(self, seed, rounding="straight-through"):
        super().__init__()
        self.logits = nn.Parameter(logits_of(seed.float()))
        self.rounding = rounding

    def forward(self):
        """The image as float (3, H, W) in [0, 255]. Rounding "straight-through": it has the 8-bit
        image's value and the sigmoid's gradient, so that what is trained is what is deployed, to
        the bit. "none": the continuous image, as in the paper's backward pass."""
        image = 255 * torch.sigmoid(self.logits)
        return image if self.rounding == "none" else image + (image.round() - image).detach()

    def to_image(self):
        """The 8-bit PIL image: what vLLM sees and what is deployed."""
        levels = self().detach().round().to("cpu", torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).numpy())

    @torch.no_grad()
    def bound(self, seed, max_change):
        """Bring each 8-bit value back to at most `max_change` levels from the seed's."""
        seed = seed.to(self.logits.device, torch.float)
        self.logits.clamp_(logits_of(seed - max_change), logits_of(seed + max_change))

# --------------------------------------------------------------------------------------------------
# 3. Rollout

@dataclass
class Completion:
    prompt: str                     # rendered chat template, with its image placeholder
    prompt_ids: list[int]           # as vLLM ran it: the placeholder expanded to the image's tokens
    ids: list[int]                  # sampled token ids, the end-of-turn token included
    logps: list[float]              # vLLM's logprob of each of them
    text: str
    cut: bool                       # ended by the token limit

def rollout(llm, prompts, image, group_size, max_new_tokens=512, temperature=1.0, rngs=None):
    """Sample G = `group_size` Completions for each of P rendered prompts behind the PIL `image`: P
    lists. No top-p, no top-k: the logprobs are those of the (tempered) policy. `rngs`: a random
    number seed for each prompt, whose samples then do not depend on earlier ones."""
    from vllm import SamplingParams
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for prompt in prompts]
    sampling = [SamplingParams(n=group_size, temperature=temperature, top_p=1.0, top_k=0,
                               max_tokens=max_new_tokens, logprobs=0, seed=rng)
                for rng in rngs or [None] * len(prompts)]
    outputs = llm.generate(requests, sampling, use_tqdm=False, tokenization_kwargs=TEMPLATED)
    groups = []
    for prompt, output in zip(prompts, outputs):
        group = []
        for sample in output.outputs:
            ids, cut = list(sample.token_ids), sample.finish_reason == "length"
            logps = [at[token].logprob for token, at in zip(ids, sample.logprobs)]
            group.append(Completion(prompt, output.prompt_token_ids, ids, logps, sample.text, cut))
        groups.append(sorted(group, key=lambda c: len(c.ids)))      # micro-batches pad little then
    return groups

# --------------------------------------------------------------------------------------------------
# 4. Rewards and advantages

def overlong_penalty(length, max_length, cache_length):
    """DAPO's soft overlong punishment (eq. 13): 0 up to max_length - cache_length tokens, then
    linearly down to -1 at max_length; none for a cache_length of 0."""
    excess = length - (max_length - cache_length)
    return -min(1.0, max(0.0, excess / cache_length)) if cache_length else 0.0

def group_advantages(rewards, eps=1e-4):
    """(P, G) rewards -> (P, G) advantages A_ij = (R_ij - mean_i) / (std_i + eps), std as in TRL and
    verl with Bessel's correction."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)

# --------------------------------------------------------------------------------------------------
# 5. Loss

def dapo_loss(logp, old_logp, advantages, mask, eps_low=0.2, eps_high=0.28, total_tokens=None,
              weight=None):
    """The clipped surrogate of DAPO (eq. 8), negated: a scalar, and metrics.

    logp, old_logp, mask, weight: (N, T), mask true on completion tokens; advantages: (N,). The sum
    over tokens is divided by `total_tokens`, those of the whole step (None: of `mask`), so that the
    micro-batches' losses and metrics add up. `weight`: importance weights trainer / vLLM, or None.
    """
    total_tokens = total_tokens or int(mask.sum())
    advantages = advantages[:, None]                                        # (N, 1)
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))            # (N, T)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    surrogate = torch.min(unclipped, clipped)
    if weight is not None:
        surrogate = surrogate * weight.detach()
    metrics = {"clip_fraction": ((clipped < unclipped) & mask).sum().item() / total_tokens,
               "ratio": (ratio.detach() * mask).sum().item() / total_tokens}
    return -surrogate.masked_fill(~mask, 0.0).sum() / total_tokens, metrics

# --------------------------------------------------------------------------------------------------
# 6. Backward through the frozen model
#   pixels -> vision tower -> image features -> prefix of prompt 1 -> its G completions -> loss
#             once a step     ^              -> prefix of prompt 2 -> its G completions -> loss
#                             gradients         once a group     ^    in micro-batches
#                             meet here                          and here
# All sequences share the image, those of a group its prompt, too: each is computed once. A group
# costs prompt + G * completion tokens, not G * (prompt + completion). The graph is cut at both
# places (`cut_graph`): gradients of what follows add up there, then go on, once, to the front.
# Beware: transformers keeps `rope_deltas`, the offset of positions behind an image, in the model
# object. The prefix sets it, and its completions rely on it.

class GraphLinearAttentionLayer(LinearAttentionLayer):
    """transformers overwrites the recurrent state, which backward still needs: this assigns."""
    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

def graph_cache(model):
    """An empty cache that gradients pass through. Raises InputError for other kinds of layers."""
    cache = DynamicCache(config=model.config.get_text_config())
    for layer in cache.layers:
        if type(layer) is LinearAttentionLayer:
            layer.__class__ = GraphLinearAttentionLayer
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InputError(f"--model: art.py sends no gradient through a {type(layer).__name__}.")
    return cache

def encode_image(model, processor, prompt, image):
    """Features of a float (3, H, W) image in [0, 255], with their graph. The model's own processor
    is differentiable and gives the PNG's values; some need a text beside it: any prompt will do."""
    inputs = model_inputs(processor, prompt, image).to(model.device)
    names = processor.image_processor.model_input_names
    inputs = {name: value for name, value in inputs.items() if name in names}
    return model.get_image_features(**inputs, return_dict=True)

def run_prefix(model, inputs, features):
    """Image and prompt through the language model, once for all completions: (what each cache layer
    holds, last hidden state (1, 1, hidden))."""
    cache = graph_cache(model)
    states = model.base_model(**inputs, mm_encoder_outputs={"image": features},
                              past_key_values=cache, use_cache=True)
    return [vars(layer) for layer in cache.layers], states.last_hidden_state[:, -1:]

def completion_logprobs(model, prefix, ids, mask, temperature=1.0):
    """Logprobs (N, T) of N right-padded completions `ids` (N, T) of one prompt. They run on the
    prefix's cache, repeated N times; their graph leads back to it."""
    def repeat(tensor):
        return tensor.repeat_interleave(len(ids), 0) if tensor.dim() else tensor

    layers, last_state = prefix
    cache = graph_cache(model)
    for layer, held in zip(cache.layers, layers):
        vars(layer).update(tree_map_only(torch.Tensor, repeat, held))
    # Padding stands on the right, where causal attention cannot see it. Without an image in the
    # call, a sampled image placeholder is an ordinary token, as it is to vLLM.
    states = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    # State t - 1 predicts token t.
    hidden = torch.cat([repeat(last_state), states.last_hidden_state[:, :-1]], dim=1)
    logps = TokenLogprobs.apply(hidden[mask], ids[mask], model.get_output_embeddings(), temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logps)

class TokenLogprobs(torch.autograd.Function):
    """Logprobs (M,) of `targets` (M,) from the last hidden states (M, hidden) and the output layer.

    The slope d logp / d hidden = (onehot - p) @ W / temperature is only as large as `hidden`.
    It is kept instead of logits, `chunk` tokens at a time: those of a batch would be gigabytes.
    """
    @staticmethod
    def forward(ctx, hidden, targets, output, temperature=1.0, chunk=512):
        logps, slopes = [], []
        for h, target in zip(hidden.split(chunk), targets[:, None].split(chunk)):
            logp = (output(h).float() / temperature).log_softmax(-1)        # (chunk, vocabulary)
            logps.append(logp.gather(1, target)[:, 0])
            slope = logp.exp_().neg_()
            slope.scatter_add_(1, target, torch.ones_like(target, dtype=slope.dtype))
            slopes.append(slope.to(h.dtype) @ output.weight / temperature)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None, None

def cut_graph(tree):
    """Cut the autograd graph at the tensors of `tree`. Returns (the same tree as the start of a new
    graph, finish). The gradients of any number of backward passes add up at the cut, in float32;
    finish() then sends their sum through the old graph, once."""
    tensors, spec = tree_flatten(tree)
    leaves = {i: tensor.detach().float().requires_grad_() for i, tensor in enumerate(tensors)
              if torch.is_tensor(tensor) and tensor.requires_grad}

    def finish():
        reached = [i for i, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([tensors[i] for i in reached],
                                [leaves[i].grad.to(tensors[i].dtype) for i in reached])

    new = [leaves[i].to(old.dtype) if i in leaves else old for i, old in enumerate(tensors)]
    return tree_unflatten(new, spec), finish

def pad(rows, dtype, device):
    """Lists of different lengths as one tensor (N, T), zeros on the right."""
    width = max(2, *map(len, rows))                     # models take one token for a decoding step
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device)

def backward(model, processor, pixels, groups, advantages, loss=dapo_loss, old_logps=None,
             tokens_per_microbatch=4096, temperature=1.0, weight_cap=2.0, total_tokens=None):
    """Add the gradient of the `loss` over `groups` (P lists of Completions) to `pixels`.

    `advantages`: (P, G). `old_logps`: what the first update of this rollout batch returned; None in
    that first update. `total_tokens`: the completion tokens of the whole step, where `groups` are a
    part of it: gradients and metrics of parts add up. Returns (metrics of the step, old_logps).
    """
    metrics, kept_logps = Counter(), []
    if not groups:
        return metrics, kept_logps
    device, picture = model.device, pixels.to_image()
    total_tokens = total_tokens or sum(len(c.ids) for group in groups for c in group)
    features, finish_image = cut_graph(
        encode_image(model, processor, groups[0][0].prompt, pixels()))
    for group, group_advantage in zip(groups, advantages):
        inputs = model_inputs(processor, group[0].prompt, picture).to(device)
        if inputs["input_ids"][0].tolist() != group[0].prompt_ids:
            raise RuntimeError("vLLM and the processor disagree about the prompt's token ids")
        # One unpadded prompt needs no mask.
        inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "attention_mask")}
        prefix, finish_prefix = cut_graph(run_prefix(model, inputs, features))
        room = tokens_per_microbatch - len(group[0].prompt_ids)
        size = max(1, room // max(1, *(len(c.ids) for c in group)))
        for start in range(0, len(group), size):                            # micro-batches
            part = group[start:start + size]
            ids = pad([c.ids for c in part], torch.long, device)                            # (N, T)
            mask = pad([[True] * len(c.ids) for c in part], torch.bool, device)
            sampled_logp = pad([c.logps for c in part], torch.float, device)
            logp = completion_logprobs(model, prefix, ids, mask, temperature)
            old_logp = logp.detach() if old_logps is None else old_logps[len(kept_logps)]
            kept_logps.append(old_logp)
            gap = (old_logp - sampled_logp).masked_fill(~mask, 0.0)         # trainer against engine
            weight = gap.exp().clamp(max=weight_cap) if weight_cap else None
            part_advantage = group_advantage[start:start + size].to(device)
            value, found = loss(logp, old_logp, part_advantage, mask, total_tokens=total_tokens,
                                weight=weight)
            value.backward()
            metrics.update(found)                                           # adds
            metrics.update(loss=value.item(), entropy=-old_logp.sum().item() / total_tokens,
                           mismatch=gap.abs().sum().item() / total_tokens)
        finish_prefix()
    finish_image()
    return metrics, kept_logps

# --------------------------------------------------------------------------------------------------
# 7. The loop, and what it needs

# torchrun's processes, each with an engine, a frozen model and prompts of its own
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def gather(value):
    """The `value` of every rank, in their order; without torchrun, a list of one."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(values, value)
    return values

def load_model(name, device):
    """The frozen model, float32 on the CPU and bfloat16 on a GPU. Raises InputError."""
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
    model = model.eval().requires_grad_(False).to(device)
    graph_cache(model)
    ids = torch.tensor([[0, 1]], device=device)
    states = model.base_model(input_ids=ids).last_hidden_state
    if not torch.equal(model(input_ids=ids).logits, model.get_output_embeddings()(states)):
        raise InputError(f"--model {name}: it scales or caps its logits; TokenLogprobs does not.")
    return model

def check_size(processor, size):
    """Raise InputError unless the processor takes `size` x `size` pixels as they are."""
    if is_resized(processor, size, size):
        sides = {*range(28, 1025, 28), *range(32, 1025, 32)}                # pairs of patches
        near = sorted(sides, key=lambda side: abs(side - size))[:30]
        works = sorted([side for side in near if not is_resized(processor, side, side)][:5])
        raise InputError(f"--size {size}: the model's image processor would resize or refuse it; "
                         f"sizes that work near it: {', '.join(map(str, works)) or 'none'}.")

def load_examples(args, task, processor, seed_image):
    """(training examples, validation examples); which is which does not depend on their order."""
    examples = task.load("train", args.data, args.limit)
    examples = fitting(processor, examples, args.max_model_len - args.max_new_tokens,
                       [(behind(IMAGE, examples[0]), seed_image)])
    keys = sorted({example["key"] for example in examples})     # rows of one conversation share one
    random.Random(0).shuffle(keys)
    held_out = set(keys[:args.validation])
    validation = [e for e in examples if e["key"] in held_out][:args.validation]
    training = [e for e in examples if e["key"] not in held_out]
    if len(training) < args.prompts:
        raise InputError(f"--prompts {args.prompts}: only {len(training)} examples are left beside "
                         f"--validation {args.validation}; lower one, or give more data.")
    return training, validation

def endless_prompts(examples, rng, used):
    """Yield (random number seed, example) for ever, in random order, less the first `used`."""
    shuffle, number = random.Random(rng), 0
    while True:
        for example in shuffle.sample(examples, len(examples)):
            if number >= used:
                yield random.Random(f"{rng} {number}").getrandbits(62), example
            number += 1

def sample_groups(llm, processor, task, prompts, image, args):
    """Dynamic sampling: roll out until `args.prompts` groups hold both right and wrong answers, at
    most `args.rounds` times; each rank samples its part of a round. Returns the kept groups of all
    ranks, their (P, G) rewards, and metrics over everything that was sampled."""
    kept, rewards, seen = [], [], []
    for _ in range(args.rounds):
        rngs, examples = zip(*(next(prompts) for _ in range(args.prompts - len(kept))))
        texts = [render(processor, behind(IMAGE, e)) for e in examples[RANK::WORLD_SIZE]]
        shares = gather(rollout(llm, texts, image, args.group_size, args.max_new_tokens,
                                args.temperature, rngs[RANK::WORLD_SIZE]))
        for i, example in enumerate(examples):
            group = shares[i % WORLD_SIZE][i // WORLD_SIZE]
            scores = [task.score(example, c.text) for c in group]
            lengths = [len(c.ids) for c in group]
            penalties = [overlong_penalty(length, args.max_new_tokens, args.overlong_cache)
                         for length in lengths]
            reward = task.reward or task.score
            group_rewards = [reward(example, c.text) + p for c, p in zip(group, penalties)]
            seen += zip(scores, group_rewards, lengths, [c.cut for c in group])
            if len(set(scores)) > 1:                    # by the score, not by the shaped reward
                kept.append(group)
                rewards.append(group_rewards)
        if len(kept) == args.prompts:
            break
    metrics = dict(zip(("score", "reward", "length", "cut"), np.mean(seen, axis=0).tolist()))
    metrics.update(groups=len(kept), sampled_groups=len(seen) // args.group_size, skipped=0)
    return kept, torch.tensor(rewards), metrics

def step_pixels(pixels, optimizer, seed, metrics, args):
    """One step of AdamW with the gradients of all ranks. Returns the step's metrics; "skipped" is 1
    if one of them is not finite, and then the pixels stay as they are."""
    pixels.logits.grad = sum(gather(pixels.logits.grad.cpu())).to(pixels.logits.device)
    total = Counter()
    for share in gather(metrics):
        total.update(share)                                 # adds
    total["grad_norm"] = pixels.logits.grad.norm().item()
    if not all(map(math.isfinite, total.values())):
        return {"skipped": 1}
    optimizer.step()
    if args.max_change < 255:
        pixels.bound(seed, args.max_change)
    return total

# Flags that a run may change when it goes on: they do not change what a step computes
FREE = ("out", "resume", "steps", "max_num_seqs", "gpu_memory_utilization", "tokens_per_microbatch")

def load_state(args, settings):
    """The state of the run in `args.out`; None where one begins. Raises InputError."""
    path = Path(args.out, "state.pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = torch.load(path, "cpu", weights_only=True) if path.exists() else None
        before = state["settings"] if state else settings
        others = [name for name in settings if before.get(name) != settings[name]]
    except Exception as error:                          # torch.load raises anything
        raise InputError(f"--out {args.out}: it holds no run ({type(error).__name__}).") from error
    if not args.resume and any(path.parent.iterdir()):
        raise InputError(f"--out {args.out}: it is not empty; go on with the run in it by "
                         "--resume, or name another folder.")
    if others:
        raise InputError(f"--resume: the run in {args.out} has another {', '.join(others)}; give "
                         "its flags again, or another --out.")
    return state

def finish_step(args, settings, history, pixels, optimizer, seed_image):
    """Write what a run leaves after a step, the last of its `history` of metrics; print it."""
    out, image, metrics = Path(args.out), pixels.to_image(), history[-1]
    metrics["moved"] = float(abs(np.subtract(image, seed_image, dtype=int)).mean())
    notes = {"Software": "art.py, ART as of arXiv 2606.11854", "step": metrics["step"]}
    for name, value in settings.items():                        # of local paths, the last part
        notes[name] = Path(str(value)).name if os.path.exists(str(value)) else value
    save(png_bytes(image, notes), out / "last.png")
    if "validation" in metrics:
        save(png_bytes(seed_image), out / "seed.png")           # as cropped and scaled
        save(png_bytes(panel(seed_image, image)), out / "panel.png")
        # The earlier of two equally good images is kept: it is nearer to the seed.
        if all(metrics["validation"] > before.get("validation", -1) for before in history[:-1]):
            notes["accuracy"] = metrics["validation"]
            save(png_bytes(image, notes), out / "best.png")
    state = dict(settings=settings, history=history, logits=pixels.logits.detach(),
                 optimizer=optimizer.state_dict())
    torch.save(state, buffer := io.BytesIO())
    save(buffer.getvalue(), out / "state.pt")
    save("".join(json.dumps(line) + "\n" for line in history).encode(), out / "metrics.jsonl")
    shown = ("reward", "score", "groups", "length", "entropy", "mismatch", "clip_fraction",
             "skipped", "moved", "rollout_s", "trainer_s", "validation")
    found = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
    print(f"step {metrics['step']}", *found, sep="  ", flush=True)

def panel(seed, image):
    """Seed, image and their difference around mid-grey, side by side, as a PIL image."""
    seed, image = np.asarray(seed, dtype=int), np.asarray(image, dtype=int)
    sheet = np.hstack([seed, image, 128 + image - seed])
    return Image.fromarray(sheet.clip(0, 255).astype(np.uint8))

def train(args):
    """Train one image as the flags say; what it makes lies in the folder `args.out`."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    task, processor = TASKS[args.task], load_processor(args.model)
    check_size(processor, args.size)
    seed = load_seed(args.seed, args.size)                                          # 1. Seed
    pixels = PixelLogits(seed, args.rounding).to(device)                            # 2. Pixels
    seed_image, decay = pixels.to_image(), args.weight_decay
    optimizer = torch.optim.AdamW(pixels.parameters(), args.lr, args.betas, weight_decay=decay)
    examples, validation = load_examples(args, task, processor, seed_image)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings["inputs"] = key_hash(f"{examples} {seed_image.tobytes().hex()}")
    history = []                                                # the metrics of each step
    if state := gather(load_state(args, settings) if RANK == 0 else None)[0]:
        history = state["history"]
        pixels.load_state_dict({"logits": state["logits"]})
        optimizer.load_state_dict(state["optimizer"])
    llm = load_engine(args.model, args.max_model_len, args.max_num_seqs,
                      args.gpu_memory_utilization, args.rng)
    model = load_model(args.model, device)
    used = sum(metrics.get("sampled_groups", 0) for metrics in history)
    prompts = endless_prompts(examples, args.rng, used)
    loss = partial(dapo_loss, eps_low=args.eps_low, eps_high=args.eps_high)

    for step in range(len(history), args.steps + 1):            # step 0 only validates the seed
        metrics, start, groups = {"step": step}, time.time(), []
        if step > 0:
            # 3. Rollout, until enough groups hold right and wrong answers
            image = pixels.to_image()
            groups, rewards, found = sample_groups(llm, processor, task, prompts, image, args)
            metrics.update(found, rollout_s=time.time() - start)
        if groups:
            # 4. Advantages
            advantages, old_logps = group_advantages(rewards), None
            total_tokens = sum(len(c.ids) for group in groups for c in group)
            metrics["lr"] = args.lr * min(1.0, step / args.warmup)
            optimizer.param_groups[0]["lr"] = metrics["lr"]
            for _ in range(args.updates):
                # 5. Loss, and 6. its gradient, from this rank's share of the groups
                pixels.logits.grad = torch.zeros_like(pixels.logits)
                found, old_logps = backward(
                    model, processor, pixels, groups[RANK::WORLD_SIZE],
                    advantages[RANK::WORLD_SIZE], loss, old_logps, args.tokens_per_microbatch,
                    args.temperature, args.weight_cap, total_tokens)
                # 7. AdamW
                metrics |= step_pixels(pixels, optimizer, seed, found, args)
                if metrics["skipped"]:
                    break
            metrics["trainer_s"] = time.time() - start - metrics["rollout_s"]
        if step % args.validate_every == 0 or step == args.steps:
            share, image = validation[RANK::WORLD_SIZE], pixels.to_image()
            results = evaluate(llm, processor, task, share, image, args.max_new_tokens)
            scores = gather(sum(result["score"][0] for result in results))
            metrics["validation"] = sum(scores) / len(validation)
        history.append(metrics)
        if RANK == 0:
            finish_step(args, settings, history, pixels, optimizer, seed_image)
        if sum(metrics.get("skipped", 0) for metrics in history[-10:]) == 10:
            raise InputError("--lr: ten steps in a row had a loss or gradient that is not finite; "
                             "lower it.")

FLAGS = {
    # Known from the paper (of --prompts, the product with --group-size)
    "size": (256, "side of the image in pixels: 256 is 64 tokens, the least for Qwen3.5"),
    "steps": (100, "rollout batches, one a step"),
    "lr": (0.1, "AdamW's learning rate, constant after --warmup"),
    "warmup": (5, "steps in which the learning rate rises"),
    "group-size": (8, "completions for each prompt"),
    "prompts": (4, "prompts a step: 32 completions in all"),
    "eps-low": (0.2, "the ratio is clipped below 1 - this"),
    "eps-high": (0.28, "the ratio is clipped above 1 + this"),
    # Not known from the paper, or added to it
    "temperature": (1.0, "of the rollouts"),
    "weight-decay": (0.0, "AdamW's; any pulls the image to grey"),
    "max-change": (255, "most levels that a pixel may differ from the seed's"),
    "updates": (1, "for each rollout batch; the clip works from the second on"),
    "rounds": (4, "sampling rounds a step, to replace groups that are all right or all wrong"),
    "overlong-cache": (0, "last tokens before the limit, over which punishment grows; 0: none"),
    "weight-cap": (2.0, "cap of the importance weight trainer / vLLM; 0: no weight"),
    "max-new-tokens": (512, "a completion is cut off there"),
    "max-model-len": (4096, "tokens of prompt and completion; longer prompts are left out"),
    "max-num-seqs": (256, "sequences that vLLM runs at once"),
    "tokens-per-microbatch": (4096, "in a pass of the trainer: they set its memory"),
    "gpu-memory-utilization": (0.5, "vLLM's share of the GPU; the trainer needs the rest"),
    "validation": (128, "training examples set aside to choose best.png"),
    "validate-every": (10, "steps between validations"),
    "rng": (0, "random number seed"),
}

def parse_args():
    parser = argparse.ArgumentParser("art.py", "art.py --task TASK [--seed PICTURE] [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="the benchmark to train for")
    add("--seed", help="the picture to start from; noise if not given")
    add("--model", default="Qwen/Qwen3.5-0.8B", help="hub name or folder")
    add("--data", help="local file of training rows in the benchmark's own schema")
    add("--limit", type=positive, help="use only so many training examples")
    add("--out", help="folder of the run; runs/TASK if not given")
    add("--resume", action="store_true", help="go on with the run in --out, exactly, or start it; "
        "give its other flags again (--steps may grow)")
    add("--rounding", choices=("straight-through", "none"), default="straight-through",
        help="none: the trainer sees the continuous image, as in the paper")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW's")
    for name, (default, text) in FLAGS.items():
        kind = positive if isinstance(default, int) and default > 0 else type(default)
        add(f"--{name}", type=kind, default=default, help=text)
    return parser, parser.parse_args()

def main():
    parser, args = parse_args()
    args.out = args.out or f"runs/{args.task}"
    if args.group_size < 2 or args.temperature < 0.01:
        parser.error("--group-size must be at least 2, and --temperature at least 0.01.")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(args.rng)
    if WORLD_SIZE > 1:
        distributed.init_process_group("gloo")
    try:
        train(args)
    except InputError as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: lower --tokens-per-microbatch or "
                     "--gpu-memory-utilization; --resume goes on.")
    except KeyboardInterrupt:
        print(f"interrupted: --resume goes on with what {args.out} holds", file=sys.stderr)
        sys.exit(130)
    finally:
        if WORLD_SIZE > 1:
            distributed.destroy_process_group()

if __name__ == "__main__":
    main()
