"""ART, Art-based Reinforcement Training: fine-tune a multimodal LLM by training the pixels of one picture.

    python art.py --task gsm8k --seed seed.png          # Qwen3.5-0.8B and the paper's settings as far as they are known, on one GPU
    torchrun --nproc-per-node 4 art.py --task gsm8k --seed seed.png             # the same on four

The model stays frozen. One image stands before every question, and reinforcement learning moves its pixels. The result
is a PNG: any vLLM serves it as an ordinary image request. Method: arXiv 2606.11854, which published no training code.

One step, in the order of this file:
  1. load_seed          the picture to start from
  2. PixelLogits        one parameter (3, H, W); its sigmoid, rounded to 8 bits, is the image, in training as in the PNG
  3. rollout            vLLM samples G completions for each prompt, behind the PNG
  4. group_advantages   rewards relative to those of the other completions of the same prompt
  5. dapo_loss          the clipped surrogate, token by token (DAPO, arXiv 2503.14476), without a KL term
  6. backward           the loss's gradient through the frozen language model and vision tower into the pixels
  7. train              the loop: dynamic sampling, AdamW, validation, best.png
Left out of the textbook: reference model and KL term (beta = 0 in the paper), value function, gradients of any weight.
"""

import argparse
import fcntl
import json
import math
import os
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from eval import (TASKS, HelpFormatter, InputError, Ranks, at_least, evaluate, exit_with, first_line, fitting, generate, key_hash,
                  load_engine, load_processor, model_inputs, open_picture, png_bytes, prompt_text, random_picture, save,
                  user_turn)

__version__ = "1.1"


# ------------------------------------------------------------------------------------------------------------------
# 1. Seed

def load_seed(path, size):
    """Load any picture as uint8 (3, H, W), cropped and scaled to `size` (an int, or height and width).

    Transparency is laid on mid-grey. No path gives noise: sigmoids of N(0, 0.1) logits (0.1 read as the deviation).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if path is None:
        return (torch.sigmoid(0.1 * torch.randn(3, height, width)) * 255).round().to(torch.uint8)
    picture = ImageOps.fit(open_picture(path), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


# ------------------------------------------------------------------------------------------------------------------
# 2. Pixels

class PixelLogits(nn.Module):
    """The trainable image: X_raw = log(p / (1 - p)) of a uint8 seed (3, H, W), float32.

    p = 0 and p = 1 are moved inwards by a quarter of a level, so that every seed value survives the round trip.
    `max_change` bounds the distance of each 8-bit value from the seed's, where the optimiser's steps are `project`ed.
    """

    def __init__(self, seed, max_change=None):
        super().__init__()
        logits = lambda levels: torch.logit(levels / 255, eps=0.25 / 255)                               # noqa: E731
        self.logits = nn.Parameter(logits(seed.float()))
        for name, sign in (("low", -1), ("high", 1)):
            self.register_buffer(name, None if max_change is None else logits(seed.float() + sign * max_change), persistent=False)

    @torch.no_grad()
    def project(self):
        if self.low is not None:
            self.logits.clamp_(self.low, self.high)

    def forward(self):
        """The image as float (3, H, W): its value is the 8-bit image's, its gradient is the sigmoid's.

        The paper's backward sees the unrounded image. Rounding straight through makes the policy that is trained
        the one that is deployed, to the bit.
        """
        image = 255 * torch.sigmoid(self.logits)
        return image + (image.round() - image).detach()

    def to_image(self):
        """The 8-bit PIL image: what vLLM sees and what is deployed."""
        return Image.fromarray(self().detach().to("cpu", torch.uint8).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------------------------------
# 3. Rollout

@dataclass
class Completion:
    prompt: str                     # rendered chat template, with its image placeholder
    prompt_ids: list[int]           # as vLLM ran it: the placeholder expanded to the image's tokens
    ids: list[int]                  # sampled token ids, the end-of-turn token included
    logps: list[float]              # vLLM's logprob of each of them
    text: str
    cut: bool                       # ended by the token limit


def rollout(llm, prompts, image, group_size, max_new_tokens=512, seeds=None, timeout=60):
    """Sample `group_size` completions for each rendered prompt (str) behind the PIL `image`: P lists of G Completions.

    Temperature 1 without top-p or top-k, so that the logprobs are those of the policy. (The paper's temperature is not
    known to us.) `seeds`: one for each prompt, so that its samples do not depend on what the engine has sampled before.
    """
    from vllm import SamplingParams
    params = [SamplingParams(n=group_size, temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_new_tokens, logprobs=0, seed=seed)
              for seed in seeds or [None] * len(prompts)]        # vLLM counts on from the seed for each of the completions
    outputs = dict(generate(llm, prompts, [image] * len(prompts), params, timeout))
    return [[Completion(prompt, list(outputs[i].prompt_token_ids), list(o.token_ids),
                        [at[token].logprob for token, at in zip(o.token_ids, o.logprobs)], o.text,
                        o.finish_reason == "length")
             for o in outputs[i].outputs]
            for i, prompt in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------------------------
# 4. Rewards and advantages

def overlong_penalty(length, max_length, cache_length):
    """DAPO's soft overlong punishment (eq. 13): 0 up to max_length - cache_length tokens, then linearly to -1."""
    return -min(1.0, max(0.0, (length - (max_length - cache_length)) / cache_length))


def group_advantages(rewards, eps=1e-4):
    """(P, G) rewards -> (P, G) advantages: each group centred and divided by its standard deviation.

    The standard deviation is Bessel-corrected and `eps` is added to it, as in TRL. An equal group gives zeros.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


# ------------------------------------------------------------------------------------------------------------------
# 5. Loss

def dapo_loss(logp, old_logp, advantages, mask, eps_low=0.2, eps_high=0.28, total_tokens=None, weight=None):
    """The clipped surrogate of DAPO (eq. 8), negated: a scalar, and metrics.

    logp, old_logp, mask, weight: (N, T), mask true on completion tokens; advantages: (N,). The sum over tokens is divided
    by `total_tokens`, the completion tokens of the whole step (None: those of `mask`), so the losses and the metrics of
    micro-batches add up to the step's. `weight` corrects for the sampler's slightly different policy; it takes no gradient.
    """
    total_tokens = mask.sum() if total_tokens is None else total_tokens
    advantages = advantages[:, None]                                                    # (N, 1)
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))                        # (N, T)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    if weight is not None:
        surrogate = surrogate * weight.detach()
    clipped = ((ratio < 1 - eps_low) & (advantages < 0)) | ((ratio > 1 + eps_high) & (advantages > 0))
    metrics = {"clip_fraction": (clipped & mask).sum().item() / int(total_tokens),
               "ratio": (ratio.detach() * mask).sum().item() / int(total_tokens)}
    return -surrogate.masked_fill(~mask, 0.0).sum() / total_tokens, metrics


# ------------------------------------------------------------------------------------------------------------------
# 6. Backward through the frozen model

class GraphLinearAttentionLayer(LinearAttentionLayer):
    """transformers' cache layer of linear attention copies its state in place, over what the backward needs: this one assigns."""

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.recurrent_states[state_idx], self.is_recurrent_states_initialized[state_idx] = recurrent_states, True
        return recurrent_states


def encode_image(model, processor, prompt, image):
    """Image features of a float (3, H, W) image in [0, 255], with its graph, as `mm_encoder_outputs` wants them.

    The processor is the model's own; given a float tensor it is differentiable, and its values are those of the PNG. It is
    called with a prompt, any, because some set the options of their image processor only then.
    """
    inputs = model_inputs(processor, prompt, image).to(model.device)
    return model.get_image_features(**{k: inputs[k] for k in processor.image_processor.model_input_names if k in inputs},
                                    return_dict=True)


class TokenLogprobs(torch.autograd.Function):
    """Logprobs (M,) of `targets` (M,) from the last hidden states (M, hidden) and the frozen output layer.

    The slope of a logprob, (onehot - p) @ W, is as large as the hidden state and known as soon as p is. So it is kept instead
    of logits, `chunk` tokens at a time: the (tokens, vocabulary) matrix of a batch would be gigabytes.
    """
    @staticmethod
    def forward(ctx, hidden, targets, output, chunk=512):
        logprobs, slopes = [], []
        for h, t in zip(hidden.split(chunk), targets[:, None].split(chunk)):
            logp = output(h).float().log_softmax(-1)
            logprobs.append(logp.gather(1, t)[:, 0])
            slopes.append(logp.exp_().neg_().scatter_add_(1, t, torch.ones_like(t, dtype=logp.dtype)).to(h.dtype) @ output.weight)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


# Cache layers that never write over what the backward needs, so that gradients pass through them.
SHAREABLE = {DynamicLayer, DynamicSlidingWindowLayer, GraphLinearAttentionLayer}


def graph_cache(model):
    """An empty cache that gradients pass through."""
    cache = DynamicCache(config=model.config.get_text_config())
    for layer in cache.layers:
        if type(layer) is LinearAttentionLayer:
            layer.__class__ = GraphLinearAttentionLayer
    return cache


def run_prefix(model, prompt_inputs, features):
    """Image and prompt through the model, once for all completions: (what each cache layer holds, last state (1, 1, hidden)).
    None for a model whose cache has other layers than SHAREABLE."""
    cache = graph_cache(model)
    if other := {type(layer).__name__ for layer in cache.layers if type(layer) not in SHAREABLE}:
        warnings.warn(f"no shared prefix for {', '.join(other)}: every completion runs with its prompt, which is slower")
        return None
    states = model.base_model(**prompt_inputs, mm_encoder_outputs={"image": features}, past_key_values=cache, use_cache=True)
    return [vars(layer) for layer in cache.layers], states.last_hidden_state[:, -1:]


def completion_logprobs(model, prompt_inputs, features, prefix, ids, mask):
    """Logprobs (N, T) of N right-padded completions `ids` (N, T) of one prompt, with their graph to its `prefix`.

    The completions share image and prompt: they run on `run_prefix`'s cache, repeated N times, and their gradients meet
    again in it. So a group costs P + N*T tokens, not N*(P + T). Without a prefix, each runs behind its own, plainly.
    """
    if prefix is None:
        hidden = torch.cat([plain_states(model, prompt_inputs, features, row[own]) for row, own in zip(ids, mask)])
    else:
        cache = graph_cache(model)
        for layer, held in zip(cache.layers, prefix[0]):
            vars(layer).update(tree_map_only(torch.Tensor, lambda x: x.repeat_interleave(len(ids), 0) if x.dim() else x, held))
        # Padding stands on the right, where causal attention cannot see it. Without images in the call, a sampled image
        # placeholder is an ordinary token, as it is to vLLM.
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([prefix[1].expand(len(ids), -1, -1), hidden[:, :-1]], dim=1)[mask]           # state t predicts token t
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(
        mask, TokenLogprobs.apply(hidden, ids[mask], model.get_output_embeddings()))


def plain_states(model, prompt_inputs, features, ids):
    """The states (T, hidden) that predict the completion `ids` (T,), run alone behind its prompt and without a cache."""
    # A sampled image placeholder would be taken for one of the image's: it is read as token 0.
    shape, read = prompt_inputs["input_ids"].shape, ids.masked_fill(ids == model.config.image_token_id, 0)
    inputs = {k: torch.cat([v, (read if k == "input_ids" else torch.zeros_like(read))[None]], dim=1) if v.shape == shape else v
              for k, v in prompt_inputs.items()}                            # token types of a completion are 0: text
    hidden = model.base_model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).last_hidden_state
    return hidden[0, shape[1] - 1:-1]


def cut(tree):
    """(`tree`, its tensors made leaves of a new graph; `join`): the gradients of any number of passes gather on the leaves, in
    float32, until join() sends their sum on through the old graph, once."""
    flat, spec = tree_flatten(tree)
    leaves = {i: f.detach().float().requires_grad_() for i, f in enumerate(flat) if torch.is_tensor(f) and f.requires_grad}

    def join():
        reached = {i: leaf.grad.to(flat[i].dtype) for i, leaf in leaves.items() if leaf.grad is not None}
        torch.autograd.backward([flat[i] for i in reached], list(reached.values()))
    return tree_unflatten([leaves[i].to(f.dtype) if i in leaves else f for i, f in enumerate(flat)], spec), join


def micro_batches(lengths, room):
    """Indices of completions of such `lengths` in batches of at most `room` tokens, at least one completion each. Like stands
    beside like, for all are padded to the batch's longest."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= room:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def backward(model, processor, pixels, groups, advantages, old_logps=None, tokens=4096, eps_low=0.2, eps_high=0.28,
             weight_cap=2.0, total_tokens=None):
    """Add the gradient of the DAPO loss over `groups` (lists of Completions, (P, G) advantages) to `pixels`.

    What sequences share at their front is computed once: the image passes the vision tower once a step, image and prompt
    pass the language model once a group. The gradients of what follows gather there first (`cut`). A micro-batch has at
    most `tokens` tokens, its prompt's included. `old_logps`: what the first update of this rollout batch returned; None in
    that first update, where the policy is the old policy. `total_tokens`: the completion tokens of the whole step, where
    `groups` are a part of it: gradients and metrics of the parts add up. Returns (metrics of the step, old_logps).
    """
    metrics, new_old_logps = dict.fromkeys(("loss", "ratio", "clip_fraction", "mismatch", "mismatch_max"), 0.0), []
    if not groups:
        return metrics, new_old_logps
    device, picture = model.device, pixels.to_image()
    total_tokens = total_tokens or sum(len(c.ids) for group in groups for c in group)
    features, join_image = cut(encode_image(model, processor, groups[0][0].prompt, pixels()))
    for group, group_advantage in zip(groups, advantages):
        inputs = model_inputs(processor, group[0].prompt, picture).to(device)
        if inputs["input_ids"][0].tolist() != group[0].prompt_ids:
            raise RuntimeError("vLLM and the processor disagree about the prompt's token ids")
        inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "attention_mask")}
        prefix, join_prefix = cut(run_prefix(model, inputs, features))
        for rows in micro_batches([len(c.ids) for c in group], tokens - len(group[0].prompt_ids)):
            part = [group[i] for i in rows]
            width = max(2, *(len(c.ids) for c in part))                     # 1 would be taken for a decoding step
            pad = lambda values: torch.tensor([v + [0] * (width - len(v)) for v in values], device=device)        # noqa: E731
            ids, mask = pad([c.ids for c in part]), pad([[True] * len(c.ids) for c in part]).bool()
            sampled = pad([c.logps for c in part])
            logp = completion_logprobs(model, inputs, features, prefix, ids, mask)
            old_logp = logp.detach() if old_logps is None else old_logps[len(new_old_logps)]
            new_old_logps.append(old_logp)
            gap = (old_logp - sampled).masked_fill(~mask, 0.0)              # trainer against engine, before any update
            weight = gap.exp().clamp(max=weight_cap) if weight_cap else None
            loss, part_metrics = dapo_loss(logp, old_logp, group_advantage[rows].to(device), mask,
                                           eps_low, eps_high, total_tokens, weight)
            loss.backward()
            for name, value in {"loss": loss.item(), **part_metrics, "mismatch": gap.abs().sum().item() / total_tokens}.items():
                metrics[name] += value
            metrics["mismatch_max"] = max(metrics["mismatch_max"], gap.abs().max().item())
        join_prefix()
    join_image()
    return metrics, new_old_logps


# ------------------------------------------------------------------------------------------------------------------
# What is checked and loaded before the loop, and what a run leaves

def check_size(processor, size):
    """Raise InputError unless the processor gives the same values for a `size` x `size` picture as PNG and as tensor.

    It does if it takes the pixels as they are; what it resizes, it rounds in the PNG only.
    """
    text = processor.apply_chat_template(user_turn("", True), tokenize=False)

    def obstacle(side):
        picture = random_picture(side, 0)
        pixels = PixelLogits(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        try:
            png, tensor = (model_inputs(processor, text, image)["pixel_values"] for image in (picture, pixels()))
        except (ValueError, RuntimeError) as error:                 # no whole number of patches, or no tensors with a graph
            return f"does not take it ({first_line(error)})"
        if not tensor.requires_grad:
            return "is not differentiable"
        return None if torch.equal(png, tensor) else (
            "would resize it, or a copy of it beside tiles, and the pixels that are trained would not be those that are deployed")

    if reason := obstacle(size):
        sides = sorted({*range(28, 1025, 28), *range(32, 1025, 32)}, key=lambda side: abs(side - size))     # pairs of patches
        works = sorted(islice((side for side in sides if obstacle(side) is None), 5))
        shown = ", ".join(map(str, works)) or "none up to 1024, unless the options in its configuration file are changed"
        raise InputError(f"--size {size}: the model's image processor {reason}; sizes that work near it: {shown}.")


def memory_needed(model, tokens):
    """Bytes of a frozen model's weights, and about those of a trainer pass over `tokens` tokens: each output of the language
    model's matrices is kept some three times (measured by tests/bench.py), and so are the float32 logits of a chunk."""
    outputs = sum(m.out_features for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    logits = 512 * model.config.get_text_config().vocab_size
    return sum(p.nbytes for p in model.parameters()), 3 * (tokens * outputs * model.dtype.itemsize + 4 * logits)


def check_memory(name, free, total, utilization, tokens, trust_remote_code=False):
    """Say how engine and trainer share a GPU of `total` bytes, of which `free` are; raise InputError if they cannot. Nothing is
    loaded for it."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    weights, needed = memory_needed(model, tokens)
    engine, gb = utilization * total, lambda size: f"{size / 1e9:.1f} GB"
    shares = (f"of {gb(total)} ({gb(free)} free) vLLM takes {gb(engine)} (--gpu-memory-utilization {utilization}), its weights "
              f"{gb(weights)} of that; the trainer needs as much for its own, and about {gb(needed)} for a pass "
              f"(--tokens-per-microbatch {tokens})")
    if engine < 1.2 * weights or free - engine < weights + needed:
        raise InputError(f"--model {name}: {shares}, which does not fit: change the two flags, or take a larger GPU.")
    print("memory: " + shares)


def load_model(name, device, trust_remote_code=False):
    """The frozen model: float32 on the CPU, bfloat16 on a GPU, no gradient for any weight. Raises InputError."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32 if device == "cpu" else torch.bfloat16,
                                                            trust_remote_code=trust_remote_code, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: transformers cannot load it as an image-text model ({first_line(error)}).") from error
    model = model.eval().requires_grad_(False).to(device)
    states = []                                         # TokenLogprobs relies on it that the output matrix makes the logits
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    logits = model(torch.tensor([[0, 1]], device=device)).logits
    hook.remove()
    if not torch.equal(logits.float(), model.get_output_embeddings()(states[0]).float()):
        raise InputError(f"--model {name}: it scales or caps the logits of its output matrix, which TokenLogprobs does not.")
    return model


def split_validation(examples, count):
    """(training examples, validation examples): at most `count`, by the hashes of their keys; rows of one key stay together."""
    sizes, chosen, left = Counter(e["key"] for e in examples), set(), count
    for key in sorted(sizes, key=lambda k: key_hash("validation " + k)):
        if sizes[key] <= left:
            chosen.add(key)
            left -= sizes[key]
    return [e for e in examples if e["key"] not in chosen], [e for e in examples if e["key"] in chosen]


def load_state(path, settings, shape):
    """(metrics of the steps so far, tensors) of a run's state. Raises InputError if it is unreadable or of a run with
    other `settings`. The file is plain tensors and JSON: reading it runs nothing."""
    try:
        with safe_open(path, "pt") as file:
            run, tensors = json.loads(file.metadata()["run"]), {name: file.get_tensor(name) for name in file.keys()}
        other = [f"--{k.replace('_', '-')} {run['settings'].get(k)}" for k, v in settings.items() if run["settings"].get(k) != v]
        if not other and any(t.shape not in (shape, ()) or not t.isfinite().all() for t in [tensors["logits"], *tensors.values()]):
            raise ValueError("its tensors do not fit")
    except FileNotFoundError as error:
        raise InputError(f"--resume: there is no {path}, so no run to go on with; start one without --resume, in another --out.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--resume: {path} cannot be read as the state of a run ({first_line(error)}).") from error
    if other:
        raise InputError(f"--resume: {path} is of a run with {' '.join(other)}; give the same flags again, or another --out.")
    return run["metrics"], tensors


def panel(seed, image):
    """Seed, image and their difference (around mid-grey, amplified as far as 95 % of it stays visible), labelled."""
    difference = np.asarray(image, dtype=int) - np.asarray(seed, dtype=int)
    gain = int(min(16, max(1, 127 // max(1, np.quantile(abs(difference), 0.95)))))
    difference = Image.fromarray((128 + gain * difference).clip(0, 255).astype(np.uint8))
    width, height, line = image.width, image.height, 28
    sheet = Image.new("RGB", (3 * width + 40, height + line + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (part, label) in enumerate([(seed, "seed"), (image, "trained image"), (difference, f"difference x {gain}")]):
        sheet.paste(part, (10 + i * (width + 10), line))
        draw.text((10 + i * (width + 10), 5), label, fill="black", font_size=15)
    return sheet


# ------------------------------------------------------------------------------------------------------------------
# 7. The loop

def sample_groups(llm, processor, task, stream, image, args, ranks):
    """Dynamic sampling: roll out prompts until `args.prompts` groups hold right and wrong answers, `--rounds` times at most.

    `stream` yields (seed for the sampler, example), in all ranks the same, which share the prompts of a round. Returns the kept
    groups of all of them, their (P, G) rewards, and metrics over everything that was sampled.
    """
    kept, rewards, seen = [], [], []
    for _ in range(args.rounds):
        share = list(enumerate(islice(stream, args.prompts - len(kept))))[ranks.mine]
        groups = rollout(llm, [prompt_text(processor, task, e) for _, (_, e) in share], image, args.group_size, args.max_new_tokens,
                         [seed for _, (seed, _) in share], args.timeout)
        judged = []
        for (place, (_, example)), group in zip(share, groups):
            scores, shaped = ([judge(example, c.text) for c in group] for judge in (task.score, task.reward))
            if not all(0 <= r <= 1 for r in scores + shaped):                   # not a number fails this, too
                raise InputError(f"the task's reward or score for a completion is outside [0, 1]: {scores + shaped}.")
            if args.overlong_cache:
                shaped = [r + overlong_penalty(len(c.ids), args.max_new_tokens, args.overlong_cache) for r, c in zip(shaped, group)]
            judged.append((place, group, scores, shaped))
        for _, group, scores, shaped in sorted(chain(*ranks.gather(judged)), key=lambda each: each[0]):
            seen += [(s, r, len(c.ids), c.cut) for s, r, c in zip(scores, shaped, group)]
            if len(set(scores)) > 1:                                # judged by the score, not by the shaped reward
                kept.append(group)
                rewards.append(shaped)
        if len(kept) == args.prompts:
            break
    score, reward, length, cut = (float(np.mean(x)) for x in zip(*seen))
    return kept, torch.tensor(rewards), {"reward": reward, "score": score, "groups": len(kept), "length": length, "cut": cut,
                                         "sampled_groups": len(seen) // args.group_size}


def update(model, processor, pixels, optimizer, groups, advantages, args, ranks):
    """`--updates` steps of AdamW on the groups of all ranks. Returns (metrics of the last one, which numbers of the next one are not
    finite, if any: that one is not made)."""
    metrics, old_logps, total_tokens = {}, None, sum(len(c.ids) for group in groups for c in group)
    for _ in range(args.updates):
        pixels.logits.grad = torch.zeros_like(pixels.logits)
        share, old_logps = backward(model, processor, pixels, groups[ranks.mine], advantages[ranks.mine], old_logps,
                                    args.tokens_per_microbatch, args.eps_low, args.eps_high, args.weight_cap, total_tokens)
        ranks.add_up(pixels.logits.grad)
        shares = ranks.gather(share)
        found = {name: (max if name == "mismatch_max" else sum)(s[name] for s in shares) for name in share}
        found["grad_norm"] = nn.utils.clip_grad_norm_(pixels.parameters(), args.max_grad_norm or math.inf).item()
        if wrong := [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]:
            return metrics, wrong
        optimizer.step()
        pixels.project()
        metrics = found
    return metrics, []


# Of the flags, those that do not change what a step computes, but for rounding: a run may go on with others.
FREE = ("out", "resume", "steps", "max_num_seqs", "gpu_memory_utilization", "tokens_per_microbatch", "timeout", "trust_remote_code")


def train(args):
    """Train one image as `args` (see the flags below) say; everything it makes lies in `args.out`, for it alone."""
    ranks, out = Ranks(), Path(args.out)
    if ranks.rank:                                                  # rank 0 writes
        return loop(args, out, ranks)
    try:
        out.mkdir(parents=True, exist_ok=True)
        fcntl.flock(folder := os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)          # let go of even at a kill
    except OSError as error:
        reason = "another run is at work in it" if isinstance(error, BlockingIOError) else error.strerror
        raise InputError(f"--out {out}: {reason}; name another folder.") from error
    try:
        if not args.resume and any(os.path.exists(out / name) for name in ("metrics.jsonl", "state.safetensors")):
            raise InputError(f"--out {out}: it holds a run already; go on with it by --resume, or name another folder.")
        if not args.resume and args.seed and os.path.dirname(os.path.realpath(args.seed)) == os.path.realpath(out):
            raise InputError(f"--out {out}: the seed lies in it, which a picture of the run could replace; name another folder.")
        loop(args, out, ranks)
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory is full: lower --tokens-per-microbatch or --gpu-memory-utilization; --resume goes on.") from error
    finally:
        os.close(folder)
        if not os.listdir(out):                                     # a wrong input leaves no empty folder
            out.rmdir()


def loop(args, out, ranks):
    torch.manual_seed(args.rng)
    seed = load_seed(args.seed, args.size)
    task = TASKS[args.task]
    examples = task.load("train", args.data, args.limit)
    processor = load_processor(args.model, args.trust_remote_code)
    check_size(processor, args.size)
    examples = fitting(processor, task, examples, args.max_model_len - args.max_new_tokens, random_picture(args.size, 0))
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"seed": f"of hash {key_hash(seed.numpy().tobytes().hex()):x}", "data": f"of hash {key_hash(repr(examples)):x}"}
    examples, validation = split_validation(examples, args.validation)
    if len(examples) < args.prompts or not validation:
        raise InputError(f"--task {args.task}: {len(examples)} training examples are left beside {len(validation)} for "
                         f"validation, fewer than --prompts {args.prompts}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = PixelLogits(seed, args.max_change).to(device)
    seed_image = pixels.to_image()
    # The paper's betas, eps and weight decay are not known to us; any decay would pull the picture to grey.
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=args.lr, weight_decay=0.0)
    done = []                                                       # the metrics of each step

    def write(data, name):
        if ranks.rank == 0:
            save(data, out / name)

    def write_metrics():
        write("".join(json.dumps(m) + "\n" for m in done).encode(), "metrics.jsonl")
    if len({*map(json.dumps, ranks.gather(settings))}) > 1:
        raise InputError("torchrun: the ranks have different flags, data or seeds; give all of them the same.")
    if args.resume:
        done, tensors = ranks.gather(None if ranks.rank else load_state(out / "state.safetensors", settings, seed.shape))[0]
        write_metrics()
        pixels.load_state_dict({"logits": tensors.pop("logits")})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: tensors} if tensors else {}})
    best = max((m["validation"] for m in done if "validation" in m), default=-1.0)
    notes = {"Title": f"ART image for {args.task}", "Software": f"art.py {__version__} (arXiv 2606.11854)", "model": args.model,
             "task": args.task, "settings": json.dumps(settings)}
    # A folder that cannot be written is refused before a model is loaded.
    write(png_bytes(seed_image), "seed.png")                        # as cropped and scaled, to be scored beside the others
    write(png_bytes(pixels.to_image(), {**notes, "step": max(0, len(done) - 1)}), "last.png")
    if device == "cuda":
        check_memory(args.model, *torch.cuda.mem_get_info(), args.gpu_memory_utilization, args.tokens_per_microbatch,
                     args.trust_remote_code)
    llm = load_engine(args.model, args.max_model_len, args.max_num_seqs, args.gpu_memory_utilization, args.rng,
                      args.trust_remote_code)
    model = load_model(args.model, device, args.trust_remote_code)
    order = random.Random(args.rng)
    stream = chain.from_iterable(order.sample(examples, len(examples)) for _ in repeat(None))
    stream = ((key_hash(f"{args.rng} {i}") >> 1, example) for i, example in enumerate(stream))
    stream = islice(stream, sum(m["sampled_groups"] for m in done[1:]), None)
    started = time.time()
    print(f"{args.task}: {len(examples)} training and {len(validation)} validation examples, {args.model} on {device}, "
          f"pictures and metrics.jsonl in {out}/" + f", going on after step {len(done) - 1}" * args.resume, flush=True)

    def learn(step):
        start = time.time()
        groups, rewards, metrics = sample_groups(llm, processor, task, stream, pixels.to_image(), args, ranks)
        metrics |= {"skipped": 0, "rollout_s": time.time() - start}
        start, note = time.time(), "no group with right and wrong answers: nothing to learn"
        if groups:
            optimizer.param_groups[0]["lr"] = metrics["lr"] = args.lr * min(1.0, step / max(1, args.warmup))
            updated, wrong = update(model, processor, pixels, optimizer, groups, group_advantages(rewards), args, ranks)
            metrics |= {**updated, "skipped": int(bool(wrong))}
            note = f"skipped: {', '.join(wrong)}" if wrong else (
                f"mismatch {metrics['mismatch']:.4f}  clipped {metrics['clip_fraction']:.3f}")
        image = pixels.to_image()
        metrics["moved"] = float(np.abs(np.asarray(image, dtype=int) - np.asarray(seed_image)).mean())
        metrics["trainer_s"] = time.time() - start
        write(png_bytes(image, {**notes, "step": step}), "last.png")
        tqdm.write(f"step {step:4d}  reward {metrics['reward']:.3f}  score {metrics['score']:.3f}  groups "
                   f"{metrics['groups']}/{metrics['sampled_groups']}  length {metrics['length']:.0f}  {note}  "
                   f"moved {metrics['moved']:.1f}  {metrics['rollout_s']:.1f} + {metrics['trainer_s']:.1f} s")
        return metrics

    bar = tqdm(range(len(done), args.steps + 1), initial=len(done), total=args.steps + 1, unit="step", disable=ranks.rank > 0 or None)
    try:
        for step in bar:
            metrics = {"step": step, **(learn(step) if step else {})}
            if step % args.validate_every == 0 or step == args.steps:
                image = pixels.to_image()
                results = evaluate(llm, processor, task, validation[ranks.mine], image, args.max_new_tokens, args.timeout)
                accuracy = metrics["validation"] = float(np.mean([*chain(*ranks.gather([r["score"] for r in results]))]))
                if accuracy > best:                                 # the earlier image wins a tie: it is nearer to the seed
                    best = accuracy
                    write(png_bytes(image, {**notes, "step": step, "validation": accuracy}), "best.png")
                write(png_bytes(panel(seed_image, image)), "panel.png")
                tqdm.write(f"step {step:4d}  validation {100 * accuracy:5.1f} %  (best {100 * best:5.1f} %)")
            done.append(metrics)
            # The state comes first and holds all the metrics: killed between the two, a run still goes on where it was.
            tensors = {"logits": pixels.logits.detach(), **optimizer.state[pixels.logits]}
            write(safetensors_bytes({name: tensor.cpu() for name, tensor in tensors.items()},
                                    {"run": json.dumps({"settings": settings, "metrics": done})}), "state.safetensors")
            write_metrics()
            bar.set_postfix(reward=f"{metrics.get('reward', 0):.3f}", best=f"{best:.3f}")
            if metrics.get("skipped") and sum(m["skipped"] for m in done[1:]) >= 10:
                raise InputError("10 steps gave a loss, gradient or logprob that is no finite number and were skipped: the run ends.")
    except KeyboardInterrupt:
        write(png_bytes(panel(seed_image, pixels.to_image())), "panel.png")
        tqdm.write("interrupted; --resume goes on after the last whole step")
        sys.exit(130)
    finally:
        if (out / "best.png").exists():
            print(f"best validation {100 * best:.1f} %, {time.time() - started:.0f} s: {out}/best.png, {out}/last.png, "
                  f"{out}/panel.png", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="the benchmark to train for")
    add("--seed", help="the picture to start from; noise if not given")
    add("--model", default="Qwen/Qwen3.5-0.8B", help="hub name or folder")
    add("--data", help="local .jsonl, .json, .csv or .parquet of training rows in the benchmark's own schema")
    add("--out", help="folder of the run (default: runs/TASK)")
    add("--limit", type=at_least(1), help="read only so many training examples")
    add("--rng", type=at_least(0), default=0, help="random number seed")
    add("--resume", action="store_true", help="go on with the run in --out, exactly; give its other flags again (--steps may grow)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    # Known from the paper (of --prompts, the product with --group-size)
    add("--size", type=at_least(1, high=2048), default=256, help="side of the image in pixels: 256 is 64 tokens, and the least Qwen3.5 does not resize")
    add("--steps", type=at_least(1), default=100, help="rollout batches, one a step")
    add("--lr", type=at_least(0, float), default=0.1, help="AdamW, constant after --warmup steps")
    add("--warmup", type=at_least(0), default=5, help="steps in which the learning rate rises")
    add("--group-size", type=at_least(2, high=1024), default=8, help="completions for each prompt, at least 2")
    add("--prompts", type=at_least(1), default=4, help="prompts a step: the paper's 'effective batch 32', taken as completions")
    add("--eps-low", type=at_least(0, float), default=0.2, help="ratio is clipped below 1 - this")
    add("--eps-high", type=at_least(0, float), default=0.28, help="ratio is clipped above 1 + this")
    # Not known from the paper, or added to it
    add("--max-change", type=at_least(1), help="most that a pixel's 8-bit value may differ from the seed's (default: anything)")
    add("--updates", type=at_least(1), default=1, help="updates for each rollout batch; the clip works from the second on")
    add("--rounds", type=at_least(1), default=4, help="sampling rounds a step to replace groups that are all right or all wrong")
    add("--overlong-cache", type=at_least(0), default=0, help="soft overlong punishment over the last so many tokens; 0: none")
    add("--weight-cap", type=at_least(0, float), default=2.0, help="cap of the importance weight trainer / vLLM; 0: no weight")
    add("--max-grad-norm", type=at_least(0, float), default=0.0, help="clip the gradient's norm to this; 0: no clip")
    add("--max-new-tokens", type=at_least(1), default=512, help="tokens after which a completion is cut off")
    add("--max-model-len", type=at_least(1), default=4096, help="most tokens of prompt and completion; longer prompts are left out")
    add("--max-num-seqs", type=at_least(1, high=65536), default=256, help="sequences that vLLM runs at once")
    add("--tokens-per-microbatch", type=at_least(1), default=4096, help="prompt and completion tokens in a trainer pass, which set its memory")
    add("--gpu-memory-utilization", type=at_least(0, float, 1), default=0.5, help="vLLM's share of the GPU; the trainer needs the rest")
    add("--timeout", type=at_least(1), default=60, help="seconds without a step of vLLM that end the run; give a large model on a CPU more")
    add("--validation", type=at_least(1), default=128, help="training examples set aside to choose best.png")
    add("--validate-every", type=at_least(1), default=10, help="steps between validations")
    args = parser.parse_args()
    args.out = args.out or f"runs/{args.task}"
    return args


if __name__ == "__main__":
    exit_with(lambda: train(parse_args()))
