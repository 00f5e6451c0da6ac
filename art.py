"""ART, Art-based Reinforcement Training: fine-tune a multimodal LLM by training one picture.

    python art.py --task gsm8k --seed seed.png                               # one GPU
    torchrun --nproc-per-node 4 art.py --task gsm8k --seed seed.png          # four

The model (Qwen3.5-0.8B by default) stays frozen. One image stands before every question, and
reinforcement learning moves its pixels. The result is a PNG: any vLLM serves it as an ordinary
image request. Method: arXiv 2606.11854, which published no training code.

One step, in the order of this file:
  1. load_seed          the picture to start from
  2. PixelLogits        the only parameter; its sigmoid, rounded to 8 bits, is the image
  3. rollout            vLLM samples G completions for each prompt, behind the image
  4. group_advantages   rewards relative to those of the other completions of the same prompt
  5. dapo_loss          the clipped surrogate, token by token (DAPO, arXiv 2503.14476)
  6. backward           its gradient, through the frozen model and its vision tower, to the pixels
  7. train              the loop: dynamic sampling, AdamW, validation, best.png
Left out of the textbook: reference model and KL term (beta = 0 in the paper), value function,
gradients of any weight.
"""

import signal

if __name__ == "__main__":                      # Ctrl-C during the slow imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import io
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from eval import (IMAGE, TASKS, TEMPLATED, InputError, behind, count_tokens, evaluate, fitting,
                  is_resized, load_engine, load_processor, model_inputs, open_picture, png_bytes,
                  positive, render, save)

__version__ = "2.0"


# --------------------------------------------------------------------------------------------------
# 1. Seed

def load_seed(path, size):
    """Any picture as uint8 (3, size, size), cropped and scaled; transparency lies on mid-grey.

    No path gives noise: sigmoids of N(0, 0.1) logits (0.1 read as the deviation).
    """
    if path is None:
        noise = torch.sigmoid(0.1 * torch.randn(3, size, size))
        return (255 * noise).round().to(torch.uint8)
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
        """The image as float (3, H, W) in [0, 255].

        "straight-through": its value is the 8-bit image's and its gradient the sigmoid's, so that
        the policy that is trained is the one that is deployed, to the bit. "none": the continuous
        image, as in the paper's backward pass.
        """
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
    """Sample `group_size` completions for each rendered prompt (str) behind the PIL `image`.

    Returns P lists of G Completions. No top-p and no top-k, so that the logprobs are those of the
    (tempered) policy. `rngs`: a random number seed for each prompt, so that its samples do not
    depend on what the engine has sampled before; vLLM counts on from it for each completion.
    """
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
            ids = list(sample.token_ids)
            logps = [at[token].logprob for token, at in zip(ids, sample.logprobs)]
            group.append(Completion(prompt, list(output.prompt_token_ids), ids, logps, sample.text,
                                    cut=sample.finish_reason == "length"))
        groups.append(group)
    return groups


# --------------------------------------------------------------------------------------------------
# 4. Rewards and advantages

def overlong_penalty(length, max_length, cache_length):
    """DAPO's soft overlong punishment (eq. 13): 0 up to max_length - cache_length tokens, then
    linearly down to -1 at max_length."""
    excess = (length - (max_length - cache_length)) / cache_length
    return -min(1.0, max(0.0, excess))


def group_advantages(rewards, eps=1e-4):
    """(P, G) rewards -> (P, G) advantages: A_ij = (R_ij - mean_i) / (std_i + eps).

    The standard deviation is Bessel-corrected, as in TRL and verl. An equal group gives zeros.
    """
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + eps)


# --------------------------------------------------------------------------------------------------
# 5. Loss

def dapo_loss(logp, old_logp, advantages, mask, eps_low=0.2, eps_high=0.28, total_tokens=None,
              weight=None):
    """The clipped surrogate of DAPO (eq. 8), negated: a scalar, and metrics.

    logp, old_logp, mask, weight: (N, T), mask true on completion tokens; advantages: (N,). The sum
    over tokens is divided by `total_tokens`, the completion tokens of the whole step (None: those of
    `mask`), so that the losses and the metrics of micro-batches add up to the step's. `weight`
    corrects for the sampler's slightly different policy; it takes no gradient.
    """
    total_tokens = int(mask.sum()) if total_tokens is None else total_tokens
    advantages = advantages[:, None]                                        # (N, 1)
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))            # (N, T)
    clipped_ratio = ratio.clamp(1 - eps_low, 1 + eps_high)
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)
    if weight is not None:
        surrogate = surrogate * weight.detach()
    too_low = (ratio < 1 - eps_low) & (advantages < 0)
    too_high = (ratio > 1 + eps_high) & (advantages > 0)
    clipped = (too_low | too_high) & mask                                   # no gradient there
    metrics = {"clip_fraction": clipped.sum().item() / total_tokens,
               "ratio": (ratio.detach() * mask).sum().item() / total_tokens}
    return -surrogate.masked_fill(~mask, 0.0).sum() / total_tokens, metrics


# --------------------------------------------------------------------------------------------------
# 6. Backward through the frozen model
#
#   pixels --> vision tower --> image features --> prefix of prompt 1 --> its G completions --> loss
#              once a step            |            once a group       --> in micro-batches  --> loss
#                                     +---------> prefix of prompt 2 --> its G completions --> loss
#                                     A                           A
#                                     gradients meet here, and here
#
# The trained image stands at the front of every sequence. So what sequences share is computed once:
# a group costs P + G*C tokens, not G*(P + C). The graph is cut at both places (`cut_graph`): the
# gradients of all that follows add up there before they go on, once, to what lies in front.
#
# Hidden state: transformers keeps `rope_deltas`, the offset between a token's place and its
# position behind an image, in the model. The prefix sets it, and its completions rely on it.

class GraphLinearAttentionLayer(LinearAttentionLayer):
    """transformers' cache layer of linear attention copies its state in place, over what the
    backward pass needs: this one assigns."""

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def graph_cache(model):
    """An empty cache that gradients pass through. Raises InputError for layers that write over."""
    cache = DynamicCache(config=model.config.get_text_config())
    for layer in cache.layers:
        if type(layer) is LinearAttentionLayer:
            layer.__class__ = GraphLinearAttentionLayer
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InputError(f"--model: its cache has layers of {type(layer).__name__}, through "
                             "which art.py sends no gradient; take another model.")
    return cache


def encode_image(model, processor, prompt, image):
    """Features of a float (3, H, W) image in [0, 255], with their graph, from the vision tower.

    The processor is the model's own; given a float tensor it is differentiable, and its values are
    those of the PNG. It is called with a prompt, any, as some set the image's options only then.
    """
    inputs = model_inputs(processor, prompt, image).to(model.device)
    names = set(processor.image_processor.model_input_names) & set(inputs)
    return model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True)


def run_prefix(model, prompt_inputs, features):
    """Image and prompt (P tokens) through the language model, once for all completions.

    Returns (what each cache layer holds, last hidden state (1, 1, hidden)).
    """
    cache = graph_cache(model)
    states = model.base_model(**prompt_inputs, mm_encoder_outputs={"image": features},
                              past_key_values=cache, use_cache=True)
    return [vars(layer) for layer in cache.layers], states.last_hidden_state[:, -1:]


def completion_logprobs(model, prefix, ids, mask, temperature=1.0):
    """Logprobs (N, T) of N right-padded completions `ids` (N, T) of one prompt.

    They run on the prefix's cache, repeated N times, and their graph leads back to it.
    """
    def repeat(tensor):
        return tensor.repeat_interleave(len(ids), 0) if tensor.dim() else tensor

    layers, last_state = prefix
    cache = graph_cache(model)
    for layer, held in zip(cache.layers, layers):
        vars(layer).update(tree_map_only(torch.Tensor, repeat, held))
    # Padding stands on the right, where causal attention cannot see it. Without an image in the
    # call, a sampled image placeholder is an ordinary token, as it is to vLLM.
    states = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    hidden = torch.cat([repeat(last_state), states.last_hidden_state[:, :-1]], dim=1)  # t predicts t
    output = model.get_output_embeddings()
    logps = TokenLogprobs.apply(hidden[mask], ids[mask], output, temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logps)


class TokenLogprobs(torch.autograd.Function):
    """Logprobs (M,) of `targets` (M,) from the last hidden states (M, hidden) and the frozen output
    layer, of the policy at `temperature`.

    The slope of a logprob, (onehot - p) @ W / temperature, is as large as the hidden state and known
    as soon as p is. So it is kept instead of logits, `chunk` tokens at a time: the (tokens,
    vocabulary) matrix of a batch would be gigabytes.
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
    """Cut the autograd graph at the tensors of `tree`. Returns (leaves, finish).

    `leaves` is the same tree as the start of a new graph. The gradients of any number of backward
    passes add up on it, in float32; finish() then sends their sum through the old graph, once.
    """
    tensors, spec = tree_flatten(tree)
    leaves = {i: tensor.detach().float().requires_grad_() for i, tensor in enumerate(tensors)
              if torch.is_tensor(tensor) and tensor.requires_grad}

    def finish():
        reached = [i for i, leaf in leaves.items() if leaf.grad is not None]
        gradients = [leaves[i].grad.to(tensors[i].dtype) for i in reached]
        torch.autograd.backward([tensors[i] for i in reached], gradients)

    new = [leaves[i].to(tensor.dtype) if i in leaves else tensor for i, tensor in enumerate(tensors)]
    return tree_unflatten(new, spec), finish


def micro_batches(lengths, room):
    """Indices of completions of such `lengths` in batches of at most `room` tokens, padding
    included, at least one completion each; sorted by length, so that little is padded."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= room:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(rows, dtype, device):
    """Lists of different lengths as one tensor (N, T), zeros on the right. T is at least 2: a model
    takes a single token for a step of decoding."""
    width = max(2, *map(len, rows), 2)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype, device=device)


def backward(model, processor, pixels, groups, advantages, loss=dapo_loss, old_logps=None,
             tokens_per_microbatch=4096, temperature=1.0, weight_cap=2.0, total_tokens=None):
    """Add the gradient of the `loss` over `groups` (P lists of Completions) to `pixels`.

    `advantages`: (P, G). `old_logps`: what the first update of this rollout batch returned; None in
    that first update, where the policy is the old policy. `total_tokens`: the completion tokens of
    the whole step, where `groups` are a part of it: gradients and metrics of parts add up.
    Returns (metrics of the step, old_logps).
    """
    names = ("loss", "ratio", "clip_fraction", "entropy", "mismatch", "mismatch_max")
    metrics, new_old_logps = dict.fromkeys(names, 0.0), []
    if not groups:
        return metrics, new_old_logps
    device, picture = model.device, pixels.to_image()
    total_tokens = total_tokens or sum(len(c.ids) for group in groups for c in group)
    features = encode_image(model, processor, groups[0][0].prompt, pixels())
    features, finish_image = cut_graph(features)
    for group, group_advantage in zip(groups, advantages):
        inputs = model_inputs(processor, group[0].prompt, picture).to(device)
        if inputs["input_ids"][0].tolist() != group[0].prompt_ids:
            raise RuntimeError("vLLM and the processor disagree about the prompt's token ids")
        inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "attention_mask")}
        prefix, finish_prefix = cut_graph(run_prefix(model, inputs, features))
        room = tokens_per_microbatch - len(group[0].prompt_ids)
        for rows in micro_batches([len(c.ids) for c in group], room):
            ids = pad([group[i].ids for i in rows], torch.long, device)                     # (N, T)
            mask = pad([[True] * len(group[i].ids) for i in rows], torch.bool, device)
            sampled_logp = pad([group[i].logps for i in rows], torch.float, device)
            logp = completion_logprobs(model, prefix, ids, mask, temperature)
            old_logp = logp.detach() if old_logps is None else old_logps[len(new_old_logps)]
            new_old_logps.append(old_logp)
            # The trainer against the engine, before any update
            gap = (old_logp - sampled_logp).masked_fill(~mask, 0.0)
            weight = gap.exp().clamp(max=weight_cap) if weight_cap else None
            value, found = loss(logp, old_logp, group_advantage[rows].to(device), mask,
                                total_tokens=total_tokens, weight=weight)
            value.backward()
            found |= {"loss": value.item(), "entropy": -old_logp.sum().item() / total_tokens,
                      "mismatch": gap.abs().sum().item() / total_tokens}
            for name in found:
                metrics[name] += found[name]
            metrics["mismatch_max"] = max(metrics["mismatch_max"], gap.abs().max().item())
        finish_prefix()
    finish_image()
    return metrics, new_old_logps


# --------------------------------------------------------------------------------------------------
# 7. The loop, and what it needs

# The processes that torchrun started, each with an engine, a frozen model and prompts of its own.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """The `value` of every rank, in their order; without torchrun, a list of one."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(values, value)
    return values


def load_model(name, device):
    """The frozen model: float32 on the CPU, bfloat16 on a GPU, no gradient for any weight.

    Raises InputError, also for a model that scales or caps its logits, as TokenLogprobs does not.
    """
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: it is no image-text model ({error}).") from error
    model = model.eval().requires_grad_(False).to(device)
    graph_cache(model)
    ids = torch.tensor([[0, 1]], device=device)
    states = model.base_model(input_ids=ids).last_hidden_state
    if not torch.equal(model(input_ids=ids).logits, model.get_output_embeddings()(states)):
        raise InputError(f"--model {name}: it scales or caps its logits, which art.py does not.")
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
    """(training examples, validation examples), whatever the order of the rows. Raises InputError."""
    examples = task.load("train", args.data, args.limit)
    first_tokens = count_tokens(processor, behind(IMAGE, examples[0]), seed_image)
    room = args.max_model_len - args.max_new_tokens
    examples = fitting(processor, examples, room, first_tokens)
    keys = sorted({example["key"] for example in examples})     # rows of one conversation share one
    random.Random(0).shuffle(keys)
    held_out = set(keys[:args.validation])
    validation = [e for e in examples if e["key"] in held_out][:args.validation]
    training = [e for e in examples if e["key"] not in held_out]
    if len(training) < args.prompts:
        raise InputError(f"--task {args.task}: {len(training)} training examples are left beside "
                         f"{len(validation)} for --validation, fewer than --prompts {args.prompts}.")
    return training, validation


def endless_prompts(examples, rng, skip):
    """Yield (random number seed, example) for ever, less the first `skip`: all, then all again."""
    order, number = random.Random(rng), 0
    while True:
        for example in order.sample(examples, len(examples)):
            if number >= skip:
                yield random.Random(f"{rng} {number}").getrandbits(62), example
            number += 1


def reward_of(task, example, completion, args):
    """The training reward of a completion, less the overlong punishment if there is one."""
    reward = task.reward(example, completion.text)
    if args.overlong_cache:
        length = len(completion.ids)
        reward += overlong_penalty(length, args.max_new_tokens, args.overlong_cache)
    return reward


def sample_groups(llm, processor, task, prompts, image, args):
    """Dynamic sampling: roll out prompts until `args.prompts` groups hold right and wrong answers.

    `prompts` yields the same (rng, example) in all ranks, which share the prompts of each of at most
    `args.rounds` rounds. Returns the kept groups of all ranks, their (P, G) rewards, and metrics
    over everything that was sampled.
    """
    kept, rewards, seen = [], [], []
    for _ in range(args.rounds):
        asked = [next(prompts) for _ in range(args.prompts - len(kept))]
        mine = asked[RANK::WORLD_SIZE]
        texts = [render(processor, behind(IMAGE, example)) for _, example in mine]
        shares = gather(rollout(llm, texts, image, args.group_size, args.max_new_tokens,
                                args.temperature, [rng for rng, _ in mine]))
        for i, (_, example) in enumerate(asked):
            group = shares[i % WORLD_SIZE][i // WORLD_SIZE]
            scores = [task.score(example, c.text) for c in group]
            group_rewards = [reward_of(task, example, c, args) for c in group]
            seen += zip(scores, group_rewards, [len(c.ids) for c in group], [c.cut for c in group])
            if len(set(scores)) > 1:                    # by the score, not by the shaped reward
                kept.append(group)
                rewards.append(group_rewards)
        if len(kept) == args.prompts:
            break
    metrics = dict(zip(("score", "reward", "length", "cut"), np.mean(seen, axis=0).tolist()))
    metrics |= {"groups": len(kept), "sampled_groups": len(seen) // args.group_size, "skipped": 0}
    return kept, torch.tensor(rewards), metrics


def step_pixels(pixels, optimizer, seed, metrics, args):
    """One step of AdamW with the gradients of all ranks. Returns the step's metrics; "skipped" is 1
    if one of them is not finite, and then the pixels stay as they are."""
    pixels.logits.grad = sum(gather(pixels.logits.grad.cpu())).to(pixels.logits.device)
    shares = gather(metrics)
    metrics = {name: sum(share[name] for share in shares) for name in metrics}
    metrics["mismatch_max"] = max(share["mismatch_max"] for share in shares)
    max_norm = args.max_grad_norm or math.inf
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(pixels.parameters(), max_norm).item()
    if not all(map(math.isfinite, metrics.values())):
        return {"skipped": 1}
    optimizer.step()
    if args.max_change:
        pixels.bound(seed, args.max_change)
    return metrics


# Flags that do not change what a step computes, but for rounding: a run may go on with others.
FREE = ("out", "resume", "steps", "max_num_seqs", "gpu_memory_utilization", "tokens_per_microbatch")


def load_state(args, settings):
    """The state of the run in `args.out`; None where one begins. Raises InputError."""
    out, path = Path(args.out), Path(args.out, "state.pt")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not args.resume:
            raise InputError(f"--out {out}: it is not empty; go on with the run in it by --resume, "
                             "or name another folder.")
        if not path.exists():
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
        others = [f"--{name.replace('_', '-')}" for name, value in settings.items()
                  if state["settings"].get(name) != value]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; name another folder.") from error
    except Exception as error:                          # torch.load raises anything
        raise InputError(f"--resume: {path} is no whole state of a run; name another --out.") from error
    if others:
        raise InputError(f"--resume: the run in {out} has another {' '.join(others)}; give its flags "
                         "again, or another --out.")
    return state


def finish_step(args, settings, history, pixels, optimizer, seed_image):
    """Write what a run leaves after a step, and print the step's line; its `history` of metrics ends
    with the step's. The earlier of two equally good images is best.png: it is nearer to the seed."""
    out, image, metrics = Path(args.out), pixels.to_image(), history[-1]
    metrics["moved"] = float(np.abs(np.subtract(image, seed_image, dtype=int)).mean())
    notes = {"Title": f"ART image for {args.task}", "Software": f"art.py {__version__}, "
             "arXiv 2606.11854", "step": metrics["step"], "settings": json.dumps(settings)}
    notes |= {name: settings[name] for name in ("task", "model")}
    save(png_bytes(image, notes), out / "last.png")
    if "validation" in metrics:
        save(png_bytes(seed_image), out / "seed.png")           # as cropped and scaled
        save(png_bytes(panel(seed_image, image)), out / "panel.png")
        if all(metrics["validation"] > m.get("validation", -1) for m in history[:-1]):
            notes["validation"] = metrics["validation"]
            save(png_bytes(image, notes), out / "best.png")
    torch.save({"settings": settings, "history": history, "logits": pixels.logits.detach(),
                "optimizer": optimizer.state_dict()}, buffer := io.BytesIO())
    save(buffer.getvalue(), out / "state.pt")
    save("".join(json.dumps(m) + "\n" for m in history).encode(), out / "metrics.jsonl")
    shown = ("reward", "score", "groups", "length", "entropy", "mismatch", "clip_fraction", "skipped",
             "moved", "rollout_s", "trainer_s", "validation")
    print(f"step {metrics['step']}", *(f"{name} {metrics[name]:.4g}" for name in shown
                                       if name in metrics), sep="  ", flush=True)


def panel(seed, image):
    """Seed, image and their difference around mid-grey, amplified as far as 95 % of it stays
    visible, side by side, as a PIL image."""
    difference = np.subtract(image, seed, dtype=int)
    gain = int(np.clip(127 / max(1, np.quantile(abs(difference), 0.95)), 1, 16))
    difference = Image.fromarray((128 + gain * difference).clip(0, 255).astype(np.uint8))
    sheet = Image.new("RGB", (3 * image.width + 40, image.height + 38), "white")
    parts = {"seed": seed, "trained image": image, f"difference x {gain}": difference}
    for i, (label, part) in enumerate(parts.items()):
        left = 10 + i * (image.width + 10)
        sheet.paste(part, (left, 28))
        ImageDraw.Draw(sheet).text((left, 5), label, fill="black", font_size=15)
    return sheet


def train(args):
    """Train one image as the flags say; what it makes lies in the folder `args.out`."""
    torch.manual_seed(args.rng)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    task, processor = TASKS[args.task], load_processor(args.model)
    check_size(processor, args.size)
    seed = load_seed(args.seed, args.size)                                          # 1. Seed
    pixels = PixelLogits(seed, args.rounding).to(device)                            # 2. Pixels
    seed_image = pixels.to_image()
    optimizer = torch.optim.AdamW(pixels.parameters(), args.lr, args.betas,
                                  weight_decay=args.weight_decay)
    examples, validation = load_examples(args, task, processor, seed_image)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings["seed"] = hashlib.sha256(seed_image.tobytes()).hexdigest()
    settings["data"] = hashlib.sha256(repr(examples).encode()).hexdigest()
    history = []                                                # the metrics of each step
    if state := gather(load_state(args, settings) if RANK == 0 else None)[0]:
        history = state["history"]
        pixels.load_state_dict({"logits": state["logits"]})
        optimizer.load_state_dict(state["optimizer"])
    llm = load_engine(args.model, args.max_model_len, args.max_num_seqs,
                      args.gpu_memory_utilization, args.rng)
    model = load_model(args.model, device)
    sampled_groups = sum(metrics.get("sampled_groups", 0) for metrics in history)
    prompts = endless_prompts(examples, args.rng, skip=sampled_groups)
    loss = partial(dapo_loss, eps_low=args.eps_low, eps_high=args.eps_high)

    for step in range(len(history), args.steps + 1):            # step 0 only validates the seed
        metrics, start, groups = {"step": step}, time.time(), []
        if step > 0:
            # 3. Rollout, until enough groups hold right and wrong answers
            groups, rewards, sampled = sample_groups(llm, processor, task, prompts,
                                                     pixels.to_image(), args)
            metrics |= {**sampled, "rollout_s": time.time() - start}
        if groups:
            # 4. Advantages
            advantages, old_logps = group_advantages(rewards), None
            total_tokens = sum(len(c.ids) for group in groups for c in group)
            metrics["lr"] = args.lr * min(1.0, step / max(1, args.warmup))
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
            results = evaluate(llm, processor, task, validation[RANK::WORLD_SIZE],
                               pixels.to_image(), args.max_new_tokens)
            scores = sum(gather([result["score"][0] for result in results]), [])
            metrics["validation"] = sum(scores) / len(scores)
        history.append(metrics)
        if RANK == 0:
            finish_step(args, settings, history, pixels, optimizer, seed_image)
        if len(history) > 10 and all(metrics.get("skipped") for metrics in history[-10:]):
            raise InputError("loss, gradient or a logprob was not finite in ten steps in a row: the "
                             "run ends; a lower --lr may help.")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="art.py --task TASK "
                                     "[--seed PICTURE] [more flags: see --help]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="the benchmark to train for")
    add("--seed", help="the picture to start from; noise if not given")
    add("--model", default="Qwen/Qwen3.5-0.8B", help="hub name or folder")
    add("--data", help="local file of training rows in the benchmark's own schema")
    add("--out", help="folder of the run; runs/TASK if not given")
    add("--limit", type=int, help="use only so many training examples")
    add("--rng", type=int, default=0, help="random number seed")
    add("--resume", action="store_true", help="go on with the run in --out, exactly, or start it; "
        "give its other flags again (--steps may grow)")
    # Known from the paper (of --prompts, the product with --group-size)
    add("--size", type=int, default=256, help="side of the image in pixels: 256 is 64 tokens")
    add("--steps", type=int, default=100, help="rollout batches, one a step")
    add("--lr", type=float, default=0.1, help="AdamW's, constant after --warmup steps")
    add("--warmup", type=int, default=5, help="steps in which the learning rate rises")
    add("--group-size", type=int, default=8, help="completions for each prompt")
    add("--prompts", type=int, default=4, help="prompts a step: 32 completions in all")
    add("--eps-low", type=float, default=0.2, help="the ratio is clipped below 1 - this")
    add("--eps-high", type=float, default=0.28, help="the ratio is clipped above 1 + this")
    # Not known from the paper, or added to it
    add("--rounding", choices=("straight-through", "none"), default="straight-through",
        help="none: the trainer sees the continuous image, as in the paper")
    add("--temperature", type=float, default=1.0, help="of the rollouts")
    add("--betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW's")
    add("--weight-decay", type=float, default=0.0, help="AdamW's; any pulls the image to grey")
    add("--max-change", type=int, help="most that an 8-bit value may differ from the seed's")
    add("--updates", type=int, default=1, help="for each rollout batch; from the second, the clip works")
    add("--rounds", type=int, default=4, help="of sampling in a step, to replace groups that are all "
        "right or all wrong")
    add("--overlong-cache", type=int, default=0, help="tokens before the limit over which a "
        "completion is punished more and more; 0: no punishment")
    add("--weight-cap", type=float, default=2.0, help="of the importance weight trainer / vLLM; 0: "
        "no weight")
    add("--max-grad-norm", type=float, default=0.0, help="the gradient is clipped to it; 0: no clip")
    add("--max-new-tokens", type=int, default=512, help="a completion is cut off there")
    add("--max-model-len", type=int, default=4096, help="of prompt and completion; longer prompts "
        "are left out")
    add("--max-num-seqs", type=int, default=256, help="sequences that vLLM runs at once")
    add("--tokens-per-microbatch", type=int, default=4096, help="in a trainer pass: its memory")
    add("--gpu-memory-utilization", type=float, default=0.5, help="vLLM's share; the trainer needs "
        "the rest")
    add("--validation", type=int, default=128, help="training examples that choose best.png")
    add("--validate-every", type=int, default=10, help="steps between validations")
    return parser, parser.parse_args()


def main():
    parser, args = parse_args()
    args.out = args.out or f"runs/{args.task}"
    if WORLD_SIZE > 1:
        distributed.init_process_group("gloo")
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
