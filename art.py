"""ART, Art-based Reinforcement Training: fine-tune a multimodal LLM by training one picture.

    python art.py --task gsm8k --seed seed.png                               # one GPU
    torchrun --nproc-per-node 4 art.py --task gsm8k --seed seed.png          # four

The model stays frozen; the pixels of one image, put before every question, are trained. The result
is a PNG that works with any vLLM server of the model. Method: arXiv 2606.11854, of which no
training code was published.
The method, in the order of this file:
  1. load_seed          the picture to start from
  2. PixelLogits        the only parameter; its sigmoid, rounded to 8 bits, is the image
  3. rollout            vLLM samples G completions of each prompt, after the image
  4. group_advantages   rewards relative to those of the other completions of the same prompt
  5. dapo_loss          the clipped surrogate, token by token (DAPO, arXiv 2503.14476)
  6. backward           its gradient, through the frozen model and its vision tower, to the pixels
  7. train              the loop: dynamic sampling, AdamW, validation, best.png
The tasks, their scores and what loads processor and engine are in eval.py.
Not here: a KL term (beta = 0 in the paper), DAPO's overlong punishment, a value function.
"""

import fcntl
import io
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText, DynamicCache, HfArgumentParser
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.utils.versions import require_version

from eval import (IMAGE, TASKS, TEMPLATED, Example, InputError, Task, check_range,
                  check_size, drop_long, evaluate, explained, key_hash, load_engine,
                  load_processor, model_inputs, open_picture, opened_thought, png_bytes, prepend,
                  render)


# Flags --------------------------------------------------------------------------------------------


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The flags of the command line. Raises InputError for a number out of its range."""
    task: str = field(metadata={"choices": TASKS, "help": "the benchmark to train for"})
    seed: str | None = flag(None, "the picture to start from; without it, noise")
    model: str = flag("Qwen/Qwen3.5-0.8B", "the model's name on the hub, or its folder")
    data: str | None = flag(None, "a local file of training rows in the benchmark's own schema")
    out: str | None = flag(None, "the folder of the run; without it, runs/TASK")
    resume: bool = flag(False, "go on with the run in --out; give the same flags again")
    # These values are the paper's. Its effective batch of 32 is taken as prompts * group_size.
    size: int = flag(256, "the image's side in pixels; 256, or 64 tokens, is the least for Qwen3.5")
    steps: int = flag(100, "the number of steps; each trains on one batch of rollouts")
    lr: float = flag(0.1, "AdamW's learning rate, constant after the warm-up")
    warmup: int = flag(5, "the number of steps in which the learning rate rises")
    group_size: int = flag(8, "the number of completions of each prompt")
    prompts: int = flag(4, "the number of prompts that a step trains on, on each rank")
    eps_low: float = flag(0.2, "the importance ratio is clipped below 1 - EPS_LOW")
    eps_high: float = flag(0.28, "the importance ratio is clipped above 1 + EPS_HIGH")
    # These are not known from the paper, or are added to it.
    rounding: bool = flag(True, "train the image as rounded to 8 bits; the paper: --no-rounding")
    temperature: float = flag(1.0, "the temperature of the rollouts")
    weight_decay: float = flag(0.0, "AdamW's weight decay; any would pull the image to grey")
    updates: int = flag(1, "updates on each batch of rollouts; the clip works from the second on")
    oversampling: int = flag(3, "prompts that a sampling round takes for each one still wanted")
    rounds: int = flag(4, "the most sampling rounds of a step")
    weight_cap: float = flag(2.0, "most that a token's weight pi_old / pi_vllm may be; 0: it is 1")
    max_new_tokens: int = flag(512, "the most tokens of a completion")
    max_model_len: int = flag(4096, "most tokens of a prompt and its completion together")
    max_num_seqs: int = flag(256, "the number of sequences that vLLM runs at once")
    tokens_per_microbatch: int = flag(12288, "most tokens of a micro-batch; memory grows with it")
    gpu_memory_utilization: float = flag(0.4, "vLLM's share of the GPU; the trainer takes the rest")
    validation: int = flag(128, "training examples that are set aside to choose best.png")
    validate_every: int = flag(10, "steps from one validation to the next")
    random_seed: int = flag(0, "seeds the choice of prompts, the samples, and the noise")

    def __post_init__(self):
        self.out = self.out or f"runs/{self.task}"
        least_and_most = {"group_size": (2, 10**9), "temperature": (0.01, 100), "size": (1, 4096),
                          "random_seed": (0, 10**9), "gpu_memory_utilization": (0.01, 1)}
        for item in fields(self):
            if item.type in (int, float):
                bounds = least_and_most.get(item.name, (1 if item.type is int else 0, 10**9))
                check_range(item.name, getattr(self, item.name), *bounds)


# 1. Seed ------------------------------------------------------------------------------------------


def load_seed(path: str | None, size: int) -> Tensor:
    """Any picture as uint8 (3, size, size), cropped to a square and scaled. Without a path: the
    image of logits drawn from N(0, 0.1), with 0.1 as the standard deviation."""
    if path is None:
        return (255 * torch.sigmoid(0.1 * torch.randn(3, size, size))).round().to(torch.uint8)
    picture = ImageOps.fit(open_picture(path), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


# 2. Pixels ----------------------------------------------------------------------------------------


class PixelLogits(nn.Module):
    """The trainable image: float32 logits (3, H, W), at first those of a uint8 seed (3, H, W).

    A module of your own takes its place in `train` and `backward` if it has the two methods
    `to_image` and `features`, whose docstrings say what they return. A smaller grid, a border or a
    bound on the change need only another `forward`.
    """

    def __init__(self, seed: Tensor, rounding: bool = True):
        super().__init__()
        # X_raw = log(p / (1 - p)), p = seed / 255. The values 0 and 1 of p are moved inwards by a
        # quarter of a level, so that all 256 levels survive the round trip.
        self.logits = nn.Parameter(torch.logit(seed.float() / 255, eps=0.25 / 255))
        self.rounding = rounding

    def forward(self) -> Tensor:
        """The image as float (3, H, W) in [0, 255]. It is rounded straight through: it has the
        8-bit image's value and the sigmoid's gradient, so that what is trained is what is
        deployed, to the bit. Without rounding it is the continuous image, as in the paper."""
        image = 255 * torch.sigmoid(self.logits)
        return image + (image.round() - image).detach() if self.rounding else image

    def to_image(self) -> Image.Image | None:
        """The 8-bit PIL image that vLLM sees and that is deployed. A parameter that is no image,
        such as LoRA's weights, gives None: then prompts hold no image, and your `llm` must sample
        with the parameter's current weights."""
        levels = self().detach().round().to("cpu", torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).numpy())

    def features(self, model, processor, prompt: str):
        """What the frozen vision tower makes of the image, with the graph to the logits, as
        `model.get_image_features` returns it. The model's own processor is differentiable, and
        gives the same values for a float tensor as for the PNG. Some processors want a text beside
        the image, for which any prompt does. A parameter without an image returns None."""
        image = self()
        check_size(processor, image.shape[2], image.shape[1])
        inputs = model_inputs(processor, prompt, image).to(model.device)
        names = processor.image_processor.model_input_names
        inputs = {name: value for name, value in inputs.items() if name in names}
        return model.get_image_features(**inputs, return_dict=True)


# 3. Rollout ---------------------------------------------------------------------------------------


@dataclass
class Completion:
    """One answer to a prompt: sampled by `rollout`, or made of a text by `given_completions`.

    prompt: the rendered chat template, with its placeholder for the image
    prompt_ids: the prompt's token ids as vLLM ran them, with the placeholder expanded
    ids: the completion's own token ids, up to and including the end-of-turn token
    vllm_logps: vLLM's logprob of each of `ids`; None for a text that vLLM did not sample, whose
        importance weight is 1
    text: the text of `ids`
    truncated: whether the token limit ended it
    answer: what `Task.judge` reads in it, or None
    score: by `Task.judge`, 1.0 for a right answer, else 0.0; a group is kept if its scores differ
    reward: by `Task.rewards`, the score or a shaped one; the advantages are made of it
    old_logps: the trainer's logprob of each of `ids` before the first update
    """
    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    vllm_logps: list[float] | None
    text: str
    truncated: bool = False
    answer: object = None
    score: float = 0.0
    reward: float = 0.0
    old_logps: list[float] | None = None


def rollout(llm, prompts: list[str], image: Image.Image | None, group_size: int, max_new_tokens=512,
            temperature=1.0, random_seeds: list[int] | None = None) -> list[list[Completion]]:
    """Sample P groups of G = `group_size` Completions of P rendered prompts after the image.
    `random_seeds`, one for each prompt, make the samples independent of what the engine sampled
    before. The engine needs logprobs_mode="processed_logprobs", as load_engine sets it: vLLM's
    default is the logprobs before division by the temperature."""
    from vllm import SamplingParams
    images = {"multi_modal_data": {"image": image}} if image else {}
    requests = [{"prompt": prompt, **images} for prompt in prompts]
    sampling = [SamplingParams(n=group_size, temperature=temperature, top_p=1.0, top_k=0,
                               max_tokens=max_new_tokens, logprobs=0, seed=random_seed)
                for random_seed in random_seeds or [None] * len(prompts)]
    # TEMPLATED: the template has written the special tokens, so none is added (no second <bos>).
    outputs = llm.generate(requests, sampling, use_tqdm=False, tokenization_kwargs=TEMPLATED)
    groups = []
    for prompt, output in zip(prompts, outputs):
        group = []
        for sample in output.outputs:
            ids = list(sample.token_ids)
            logps = [at[token].logprob for token, at in zip(ids, sample.logprobs)]
            group.append(Completion(prompt, output.prompt_token_ids, ids, logps, sample.text,
                                    truncated=sample.finish_reason == "length"))
        # Completions of similar length stand together, so that micro-batches pad little.
        groups.append(sorted(group, key=lambda completion: len(completion.ids)))
    return groups


def given_completions(processor, prompts: list[str], texts: list[str],
                      image: Image.Image | None) -> list[Completion]:
    """Completions of given `texts`, one for each prompt, with the tokenizer's end token: for
    supervised training, or to ask how likely a text is. A prompt is `render(processor,
    prepend(IMAGE, example))`, with the image's placeholder. Of the image only the size matters."""
    completions = []
    for prompt, text in zip(prompts, texts, strict=True):
        prompt_ids = model_inputs(processor, prompt, image)["input_ids"][0].tolist()
        ids = processor.tokenizer.encode(text + processor.tokenizer.eos_token, **TEMPLATED)
        completions.append(Completion(prompt, prompt_ids, ids, None, text))
    return completions


# 4. Rewards and advantages ------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps=1e-4) -> Tensor:
    """(P, G) rewards -> (P, G) advantages A_ij = (R_ij - mean_i) / (std_i + eps). The standard
    deviation has Bessel's correction, as in TRL and verl."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


# 5. Loss ------------------------------------------------------------------------------------------


def dapo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, eps_low=0.2,
              eps_high=0.28, total_tokens: int | None = None, weight: Tensor | None = None,
              completions: list[Completion] | None = None) -> tuple[Tensor, dict]:
    """The clipped surrogate of DAPO (its equation 8), negated. Returns a scalar, and metrics.

    logp, old_logp, mask, weight: (N, T), mask true on completion tokens
    advantages: (N,) or (N, 1); another number of them raises RuntimeError
    weight: min(pi_old / pi_vllm, cap) of each token, a constant factor of its term: truncated
        importance sampling, since engine and trainer compute differently
    total_tokens: the completion tokens of the whole step, by which the sum over tokens is divided,
    so that the losses of micro-batches add up; without it, those of `mask`
    completions: those of the N rows, for other objectives: DAPO needs no more than the tensors
    """
    advantages, mask = advantages.reshape(len(logp), 1), mask.bool()
    total_tokens = total_tokens or int(mask.sum())
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))            # (N, T)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    surrogate = torch.min(unclipped, clipped)
    if weight is not None:
        surrogate = surrogate * weight.detach()
    loss = -surrogate.masked_fill(~mask, 0.0).sum() / total_tokens
    return loss, {"loss": loss.detach(),
                  "ratio": (ratio.detach() * mask).sum() / total_tokens,
                  "clip_fraction": ((clipped < unclipped) & mask).sum() / total_tokens}


# 6. Backward through the frozen model -------------------------------------------------------------
#
#   pixels -> vision tower -> features -> prompts -> cache -> completions -> logprobs -> loss
#
# A step has P groups of G completions. A micro-batch of it has N completions of at most T tokens,
# which follow K distinct prompts of at most L tokens, the image's included. The prompts run once,
# in one batch that is padded on the left. Their cache (keys and values, or the states of linear
# attention) is copied for each completion, and the completions run on it. So two passes, of K * L
# and of N * T tokens, replace a single pass of N * (L + T) tokens.


def backward(model, processor, pixels: nn.Module, groups: list[list[Completion]],
             advantages: Tensor | list, loss_function: Callable = dapo_loss, temperature=1.0,
             weight_cap=2.0, tokens_per_microbatch=12288, total_tokens=None) -> Counter:
    """Add the gradient of the loss over P groups of G Completions to that of the pixels.

    model: frozen, as `load_model` sets it up
    advantages: (P, G), or a list of P rows. Raises ValueError unless each completion has one.
    loss_function: called as loss_function(logp, old_logp, advantages, mask, total_tokens=...,
        weight=..., completions=...) with the tensors of a micro-batch, shaped as in dapo_loss. It
        returns a scalar and a dict of metrics, both divided by a count over the whole step, such as
        `total_tokens`, for they are added up over micro-batches and ranks. Supervised training:
            return -logp.sum() / total_tokens, {}       # logp is 0 where the mask is false
    total_tokens: the completion tokens of the whole step, if these groups are only a part of it

    Returns the loss function's metrics as floats, with `entropy` and `mismatch`. The first call
    stores the trainer's logprobs in each Completion as its `old_logps`, and later calls use these
    again. So both metrics always describe the policy that was sampled, not one trained since.
    """
    rows, sizes = [len(row) for row in advantages], [len(group) for group in groups]
    if rows != sizes:
        raise ValueError(f"the groups hold {sizes} completions, but the advantages' rows {rows}")
    total_tokens = total_tokens or sum(len(c.ids) for group in groups for c in group)
    metrics = Counter()
    samples = [(completion, float(advantage)) for group, row in zip(groups, advantages)
               for completion, advantage in zip(group, row)]
    for micro_batch in micro_batches(samples, tokens_per_microbatch):
        batch = [completion for completion, _ in micro_batch]                   # N of them
        advantage = torch.tensor([a for _, a in micro_batch], device=model.device)
        logp, mask = completion_logps(model, processor, pixels, batch, temperature)     # (N, T)
        for completion, row in zip(batch, logp.tolist()):
            if completion.old_logps is None:            # in the first update pi_old is pi
                completion.old_logps = row[:len(completion.ids)]
        old_logp = pad([c.old_logps for c in batch], 0.0, model.device)
        vllm_logp = pad([c.vllm_logps or c.old_logps for c in batch], 0.0, model.device)
        weight = (old_logp - vllm_logp).exp().clamp(max=weight_cap) if weight_cap else None
        loss, logged = loss_function(logp, old_logp, advantage, mask, total_tokens=total_tokens,
                                     weight=weight, completions=batch)
        loss.backward()
        sampled = {"entropy": -old_logp.sum() / total_tokens,
                   "mismatch": (old_logp - vllm_logp).abs().sum() / total_tokens}
        for name, value in (sampled | logged).items():
            metrics[name] += torch.as_tensor(value).item()
    return metrics


def micro_batches(samples: list[tuple[Completion, float]], most_tokens: int) -> Iterator[list]:
    """Cut (Completion, advantage) pairs, in their order, into lists of at most `most_tokens`
    tokens, the padding included: K * L + N * T. A pair that is longer is a list of its own."""
    batch = []
    for sample in samples:
        longer = [*batch, sample]
        prompts = {c.prompt: len(c.prompt_ids) for c, _ in longer}      # each prompt runs once
        longest = max(len(c.ids) for c, _ in longer)
        tokens = len(prompts) * max(prompts.values()) + len(longer) * longest
        if batch and tokens > most_tokens:
            yield batch
            longer = [sample]
        batch = longer
    if batch:
        yield batch


def completion_logps(model, processor, pixels: nn.Module, completions: list[Completion],
                     temperature=1.0) -> tuple[Tensor, Tensor]:
    """Logprobs of N Completions of at most T tokens, each after the image and its prompt, with the
    graph to the pixels. Returns them as (N, T), and the mask (N, T) that is true on the
    completions' tokens; elsewhere the logprobs are 0. The completions may follow any prompts; each
    distinct prompt runs once. T is the longest completion's length, at least 2 (see `pad`).
    Raises RuntimeError if their `prompt_ids` are not the processor's."""
    device, image = model.device, pixels.to_image()
    prompts = {c.prompt: c.prompt_ids for c in completions}                             # K prompts
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    rows = torch.tensor([row_of[c.prompt] for c in completions], device=device)         # (N,)
    ids = pad([c.ids for c in completions], 0, device)                                  # (N, T)
    mask = pad([[True] * len(c.ids) for c in completions], False, device)               # (N, T)

    # The K prompts fill a cache.
    inputs = prompt_inputs(processor, prompts, image).to(device)
    features = pixels.features(model, processor, completions[0].prompt)
    # Dimension 0 of each tensor counts images or their tokens. Each prompt has the same image.
    features = tree_map_only(Tensor, lambda x: x.repeat(len(prompts), *[1] * (x.dim() - 1)),
                             features)
    # Positions count the tokens of a prompt from 0, without the padding. But with MRoPE an image of
    # h x w tokens takes only max(h, w) of them. Such a model gets no positions for prompts with an
    # image: it computes them itself, and leaves in `rope_deltas` (K, 1) what has to be added to the
    # number of each prompt's tokens, without the padding, to get its first free position.
    seen = inputs["attention_mask"]                                 # (K, L), 0 on the padding
    cache = graph_cache(model)
    by_model = image is not None and hasattr(model.base_model, "rope_deltas")
    if not by_model:
        inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    # The model takes `mm_encoder_outputs` in the place of pixels that it would encode itself.
    prefix = model.base_model(**inputs, mm_encoder_outputs={"image": features},
                              past_key_values=cache, use_cache=True)
    # The first position after each prompt, (K, 1).
    start = seen.sum(1, keepdim=True) + (model.base_model.rope_deltas if by_model else 0)

    # Each completion gets a copy of its prompt's part of the cache, and goes on from there.
    cache.reorder_cache(rows)
    # No image is given here, so a sampled image placeholder is an ordinary token, as it is to vLLM.
    # Attention is causal, so no token sees the padding on the right.
    suffix = model.base_model(
        input_ids=ids, past_key_values=cache, use_cache=True,
        attention_mask=torch.cat([seen[rows], torch.ones_like(ids)], 1),
        position_ids=start[rows] + torch.arange(ids.shape[1], device=device))

    # The state at token t - 1 predicts token t; the prompt's last one predicts the first.
    states = torch.cat([prefix.last_hidden_state[rows, -1:], suffix.last_hidden_state[:, :-1]], 1)
    logps = token_logps(states[mask], ids[mask], model.get_output_embeddings(), temperature)
    return torch.zeros(ids.shape, device=device).masked_scatter(mask, logps), mask


def prompt_inputs(processor, prompts: dict[str, list[int]], image: Image.Image | None):
    """The processor's tensors of K prompts after the image, padded on the left, without the image's
    pixels. Raises RuntimeError if the token ids are not those that `prompts` gives."""
    if processor.tokenizer.pad_token is None:           # any token will do: it is masked
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    images = [[image]] * len(prompts) if image else None
    inputs = processor(text=list(prompts), images=images, padding=True, padding_side="left",
                       return_tensors="pt", **TEMPLATED)
    inputs.pop("pixel_values", None)
    for ids, seen, expected in zip(inputs["input_ids"], inputs["attention_mask"], prompts.values()):
        if ids[seen.bool()].tolist() != expected:
            raise RuntimeError("the prompt_ids of a Completion are not those that the processor "
                               "gives its prompt and image")
    return inputs


def token_logps(hidden: Tensor, targets: Tensor, output: nn.Module, temperature=1.0,
                chunk=256) -> Tensor:
    """Logprobs (M,), float32, of the tokens `targets` (M,) by the output layer `output`, from the
    hidden states (M, hidden) that enter it. The graph goes to `hidden`, not to the layer's weights.

    The logits of all M tokens would fill gigabytes, so no graph goes through them. Instead the
    slope of each logprob, its gradient with respect to its own hidden state, is computed chunk by
    chunk, and the logits are freed. With a vocabulary of 248,320 a chunk of 256 rows takes 1 GB:
    its logits in float32, the steps of the softmax, and their gradients, of 0.25 GB each.
    """
    logps, slopes = [], []
    for states, target in zip(hidden.detach().split(chunk), targets.split(chunk)):
        with torch.enable_grad():                       # also if the caller wants no gradient
            logits = output(states.requires_grad_()).float() / temperature      # (chunk, V)
            logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            slopes += torch.autograd.grad(logp.sum(), states)   # row i depends on state i alone
        logps.append(logp.detach())
    # `linear - linear.detach()` is 0 and has the gradient `slopes`: it adds the gradient alone.
    linear = (hidden.float() * torch.cat(slopes)).sum(-1)
    return torch.cat(logps) + (linear - linear.detach())


class GraphLinearAttentionLayer(LinearAttentionLayer):
    """transformers copies a new recurrent state into the memory of the old one, which backward
    still needs; here the new tensor takes the old one's place. `state_idx` tells a layer's states
    apart, where it has several. (A convolution's state is overwritten too, but nothing needs its
    old values: the model convolves what torch.cat copied from it, and autograd follows copies.)"""

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def graph_cache(model) -> DynamicCache:
    """An empty cache that gradients pass through. Raises InputError for other kinds of layers."""
    cache = DynamicCache(config=model.config.get_text_config())
    for layer in cache.layers:
        if type(layer) is LinearAttentionLayer:
            layer.__class__ = GraphLinearAttentionLayer
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InputError(f"--model: art.py sends no gradient through a {type(layer).__name__}.")
    return cache


def pad(rows: list[list], fill, device) -> Tensor:
    """Lists of different lengths as one tensor (N, T), with `fill` on the right."""
    # At a width of one token a model would take its decoding path, which overwrites the cache.
    width = max(2, *map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


# 7. The loop --------------------------------------------------------------------------------------
#
# Each step appends a line to metrics.jsonl:
#   step                    0 is the seed, of which there is only the validation
#   reward, score           mean training reward, and mean score as eval.py reports it, of all
#                           completions that were sampled
#   length, truncated       mean tokens of all these; the share that the token limit cut off
#   groups                  groups that the step trains on: at most --prompts on each rank
#   sampled_groups          all groups that were sampled for it
#   rounds                  sampling rounds of the rank that needed most
#   loss, ratio             of the last update: DAPO's loss, and the mean importance ratio
#   clip_fraction           of the last update: share of tokens whose gradient is clipped away
#   entropy                 mean of the trainer's -logp over the tokens that it trains on, in nat
#   mismatch                mean absolute difference of a token's logprob between trainer and vLLM,
#                           in nat; it and entropy are measured before the first update
#   grad_norm, lr           norm of the logits' gradient; learning rate
#   skipped                 1 if a loss, gradient or metric was not finite: updating stopped there
#   moved                   mean absolute difference of image and seed, in 8-bit levels
#   rollout_s, trainer_s    seconds for sampling and scoring, and for the updates
#   validation              accuracy on the validation slice, scored as in eval.py; that of best.png
#                           is a maximum over steps, so it is no test result
#
# Under torchrun each rank has an engine, a frozen model and prompts of its own. Only the gradient
# and the metrics cross: the gradient is that of the loss over the tokens of all ranks.

BY_TORCHRUN = distributed.is_torchelastic_launched()
RANK, LOCAL_RANK = (int(os.environ[name]) if BY_TORCHRUN else 0 for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN else 1


def gather(value) -> list:
    """The `value` of every rank, in their order; without torchrun, a list of one."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(values, value)
    return values


def train(config: Config, pixels: nn.Module | None = None, loss_function: Callable | None = None,
          on_step: Callable | None = None, llm=None, model=None):
    """Train one image as the flags say, into the folder `config.out`.

    What you pass takes the place of ours: `pixels` (the same on every rank) that of PixelLogits,
    `loss_function` that of dapo_loss with --eps-low and --eps-high, `llm` and `model` those of
    load_engine and load_model. At the end of each step, when its files are written,
    `on_step(metrics, groups)` is called with the step's metrics, also those of a loss function of
    your own, and the groups that this rank trained on. The run ends here if it returns True.
    """
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    device = f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.random_seed)
    task, processor = TASKS[config.task], load_processor(config.model)
    pixels = pixels or PixelLogits(load_seed(config.seed, config.size), config.rounding)
    if loss_function is None:
        loss_function = partial(dapo_loss, eps_low=config.eps_low, eps_high=config.eps_high)
    seed_image = pixels.to(device).to_image()
    if seed_image:
        check_size(processor, *seed_image.size)
    optimizer = torch.optim.AdamW(pixels.parameters(), config.lr, weight_decay=config.weight_decay)
    training, validation = load_examples(config, task, processor, seed_image)
    state = load_state(config, training, validation, seed_image, pixels, optimizer)
    llm = llm or load_engine(config.model, config.max_model_len, config.max_num_seqs,
                             config.gpu_memory_utilization, config.random_seed)
    model = model or load_model(config.model, device)

    history = state["history"]                                  # the metrics of each step
    for step in range(len(history), config.steps + 1):          # step 0 only validates the seed
        metrics, groups = {"step": step}, []
        if step > 0:
            start = time.time()
            groups, sampled = sample_groups(llm, processor, task, training, pixels.to_image(), step,
                                            config)
            middle = time.time()
            lr = optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / config.warmup)
            updated = update_pixels(model, processor, pixels, optimizer, groups, loss_function,
                                    config)
            metrics |= {**sampled, **updated, "lr": lr, "rollout_s": middle - start,
                        "trainer_s": time.time() - middle}
        if step % config.validate_every == 0 or step == config.steps:
            metrics["validation"] = validate(llm, processor, task, validation, pixels.to_image(),
                                             config)
        history.append(metrics)
        if RANK == 0:
            add_pictures(state, pixels.to_image(), seed_image)
            save_state(config, state, pixels, optimizer)
            print_step(config, history)
        if on_step and any(gather(on_step(metrics, groups) is True)):
            break


def sample_groups(llm, processor, task: Task, examples: list[Example], image: Image.Image | None,
                  step: int, config: Config) -> tuple[list[list[Completion]], dict]:
    """Dynamic sampling, as in DAPO: groups whose answers are all right or all wrong are dropped,
    and more prompts are sampled until `config.prompts` groups hold both, at most `config.rounds`
    times. Each round draws its prompts from all training examples: there are no epochs. Of the
    groups that hold both, the first in the order of drawing are kept, not the shortest or the best.
    Returns them, and metrics over all that was sampled on all ranks. The generator depends on
    random seed, rank and step alone, so a resumed run draws the same."""
    generator = random.Random(f"{config.random_seed} {RANK} {step}")
    kept, samples, rounds = [], [], 0
    while len(kept) < config.prompts and rounds < config.rounds:
        rounds += 1
        wanted = config.oversampling * (config.prompts - len(kept))
        chosen = generator.sample(examples, min(wanted, len(examples)))
        random_seeds = [generator.getrandbits(62) for _ in chosen]
        prompts = [render(processor, prepend(IMAGE, e) if image else e) for e in chosen]
        groups = rollout(llm, prompts, image, config.group_size, config.max_new_tokens,
                         config.temperature, random_seeds)
        judge_groups(task, chosen, groups)
        for group in groups:
            samples += [(c.score, c.reward, len(c.ids), c.truncated) for c in group]
            if len({c.score for c in group}) > 1:       # by the score, as in DAPO, not the reward
                kept.append(group)
    kept = kept[:config.prompts]
    samples = sum(gather(samples), [])
    means = np.mean(samples, axis=0).tolist()
    metrics = dict(zip(("score", "reward", "length", "truncated"), means))
    metrics["groups"] = sum(gather(len(kept)))
    metrics["sampled_groups"] = len(samples) // config.group_size
    metrics["rounds"] = max(gather(rounds))
    return kept, metrics


def judge_groups(task: Task, examples: list[Example], groups: list[list[Completion]]):
    """Give each Completion of P groups, of P examples, its answer, score and reward. Each is judged
    once, and all are judged together."""
    pairs = [(example, c) for example, group in zip(examples, groups) for c in group]
    texts = [opened_thought(c.prompt) + c.text for _, c in pairs]       # "<think>" or ""
    judged = task.judge([example for example, _ in pairs], texts)
    for (_, c), (answer, score) in zip(pairs, judged):
        c.answer, c.score = answer, score
    for example, group in zip(examples, groups):
        for c, reward in zip(group, task.rewards(example, group)):
            c.reward = float(reward)


def update_pixels(model, processor, pixels: nn.Module, optimizer, groups: list[list[Completion]],
                  loss_function: Callable, config: Config) -> dict:
    """Make `config.updates` steps of AdamW on one batch of groups. Returns the metrics of the last
    update. Where a metric or the gradient is not finite, this update and those after it are not
    made, and "skipped": 1 is the only metric."""
    total_tokens = sum(gather(sum(len(c.ids) for group in groups for c in group)))
    rewards = torch.tensor([[c.reward for c in group] for group in groups])         # (P, G)
    metrics = Counter()
    for _ in range(config.updates if total_tokens else 0):
        for parameter in pixels.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ours = {}
        if groups:                                      # a rank without groups adds nothing
            ours = backward(model, processor, pixels, groups, group_advantages(rewards),
                            loss_function, config.temperature, config.weight_cap,
                            config.tokens_per_microbatch, total_tokens)
        metrics = Counter()
        for of_a_rank in gather(ours):
            for name, value in of_a_rank.items():
                metrics[name] += value
        for parameter in pixels.parameters():
            parameter.grad = sum(gather(parameter.grad.cpu())).to(parameter.device)
        metrics["grad_norm"] = nn.utils.get_total_norm(p.grad for p in pixels.parameters()).item()
        if not all(map(math.isfinite, metrics.values())):
            return {"skipped": 1}
        optimizer.step()
    return {**metrics, "skipped": 0}


def validate(llm, processor, task: Task, examples: list[Example], image: Image.Image | None,
             config: Config) -> float:
    """Accuracy after the image, asked as eval.py asks: greedy, with the presence penalty of
    the paper's evaluation. Each rank asks a part of the questions."""
    results = evaluate(llm, processor, task, examples[RANK::WORLD_SIZE], image,
                       config.max_new_tokens)
    return sum(gather(sum(result["score"] for result in results))) / len(examples)


# What the loop needs: model and data --------------------------------------------------------------


def load_model(name: str, device: str):
    """The frozen model, float32 on the CPU and bfloat16 on a GPU. Raises InputError."""
    # flash-linear-attention (fla) 0.6 would compile a TileLang kernel, and fail where pip's nvcc
    # does not match the CUDA headers (its issue 949). It reads this variable when it is imported,
    # which from_pretrained does below.
    os.environ.setdefault("FLA_TILELANG", "0")
    # Given a mask, cuDNN's attention gave NaN gradients on Hopper (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
    model = model.eval().requires_grad_(False).to(device)
    check_model(model, device)
    return model


def check_model(model, device: str):
    """Raise InputError for a model whose gradients would be wrong, or take ten times as long."""
    cache = graph_cache(model)
    with explained("transformers or flash-linear-attention fails",
                   "pip install -r requirements.txt"):
        require_version("transformers>=5.18")           # older models take no mm_encoder_outputs
        if "cuda" in device and any(isinstance(x, LinearAttentionLayer) for x in cache.layers):
            import fla.ops.gated_delta_rule     # noqa: F401  (transformers falls back silently)
    # These settings of the text model are applied by vLLM, but not by every model around it.
    settings = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    text_config = model.config.get_text_config()
    is_scaled = any(getattr(text_config, name, None) not in (None, 1) for name in settings)
    ids = torch.tensor([[0, 1]], device=device)
    output = model(input_ids=ids, output_hidden_states=True)
    expected = model.get_output_embeddings()(output.hidden_states[-1])
    if is_scaled or (output.logits - expected).abs().max() > 0.01 * expected.abs().max():
        raise InputError("--model: it scales or caps its logits; art.py does not.")


def load_examples(config: Config, task: Task, processor, image) -> tuple[list, list]:
    """(training, validation) Examples. Several may share a key, such as the calls of one ToolMind
    conversation: an example outside of the validation slice that shares its key with one inside is
    left out, so that no conversation is in both."""
    task.check(processor)
    examples = task.load("train", config.data)
    # The image's tokens count as well; "--seed" is what an error calls it.
    examples = drop_long(processor, examples, config.max_model_len - config.max_new_tokens,
                         {"--seed": image})
    examples.sort(key=lambda example: key_hash(example.key))
    validation = examples[:config.validation]
    held_out = {example.key for example in validation}
    training = [example for example in examples if example.key not in held_out]
    if len(training) < config.prompts:
        raise InputError(f"--prompts {config.prompts}: only {len(training)} examples are left "
                         f"beside --validation {config.validation}; lower one, or give more data.")
    print(f"{len(training)} examples to train on, {len(validation)} for validation")
    return training, validation


# The run's folder ---------------------------------------------------------------------------------
# state.pt holds all that a run needs to go on: its settings, the metrics of each step, pixels,
# optimizer, and the picture files, so that these agree with the rest whenever the run is killed.

# These flags may change when a run goes on: no update depends on them, but for rounding errors.
FREE = ("out", "resume", "steps", "max_num_seqs", "gpu_memory_utilization", "tokens_per_microbatch")


def load_state(config: Config, training: list[Example], validation: list[Example],
               seed_image: Image.Image | None, pixels: nn.Module, optimizer) -> dict:
    """The state of the run in `config.out`, or a new one where a run begins. Pixels and optimizer
    are set to it. Rank 0 also writes the pictures and metrics.jsonl again: a kill during save_state
    may have left them one step behind. Raises InputError if the folder holds another run, or a
    broken one."""
    folder, path = Path(config.out), Path(config.out, "state.pt")
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    seed_bytes = seed_image.tobytes().hex() if seed_image else None
    settings["data_and_seed"] = key_hash(f"{training} {validation} {seed_bytes}")
    settings["ranks"] = WORLD_SIZE
    state = {"settings": settings, "history": [], "files": {}}
    with explained(f"--out {folder}: it holds no run", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = RANK > 0 or lock(folder)
        held = [name for name in os.listdir(folder) if not name.endswith(".tmp")]
        if path.exists():
            state = torch.load(path, "cpu", weights_only=True)
        others = [name for name in settings if state["settings"].get(name) != settings[name]]
    if not is_ours:
        raise InputError(f"--out {folder}: another process trains into it: give another folder.")
    if held and not (config.resume and path.exists()):
        raise InputError(f"--out {folder}: it is not empty; give another, or --resume if it holds "
                         "a run.")
    if others:
        raise InputError(f"--resume: {folder} was run with other {', '.join(others)}: give those.")
    if config.resume and not held and RANK == 0:
        print(f"{folder}: holds no run to go on with, so a new one begins")
    if state["history"]:
        pixels.load_state_dict(state["pixels"])
        optimizer.load_state_dict(state["optimizer"])
        if RANK == 0:
            print(f"{folder}: goes on after step {state['history'][-1]['step']} of {config.steps}")
            lines = "".join(json.dumps(metrics) + "\n" for metrics in state["history"])
            for name, content in {**state["files"], "metrics.jsonl": lines.encode()}.items():
                save(content, folder / name)
    return state


LOCKS = {}                                              # {folder: its open file descriptor}


def lock(folder: Path) -> bool:
    """Lock a folder for as long as this process lives; False if another process holds it."""
    folder = folder.resolve()
    if folder not in LOCKS:
        LOCKS[folder] = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(LOCKS.pop(folder))
            return False
        except OSError:                                 # of a file system without locks
            pass
    return True


def add_pictures(state: dict, image: Image.Image | None, seed_image: Image.Image | None):
    """Put the pictures of the last step into the state's files, and `moved` into its metrics."""
    if image is None:
        return
    *earlier, metrics = state["history"]
    files = state["files"]
    notes = {"step": metrics["step"]}                   # what each PNG says about its making
    for name, value in state["settings"].items():
        if value is not None:
            is_path = os.path.exists(str(value))        # of a path only the last part is noted
            notes[name] = Path(str(value)).name if is_path else value
    metrics["moved"] = float(abs(np.subtract(image, seed_image, dtype=int)).mean())
    files["last.png"] = png_bytes(image, notes)
    if "validation" in metrics:
        notes["accuracy"] = metrics["validation"]
        files["panel.png"] = png_bytes(panel(seed_image, image), notes)
        if "seed.png" not in files:                     # the seed as it was cropped and scaled
            files["seed.png"] = png_bytes(seed_image, notes)
        # The earlier of two equally good images is kept: it should be nearer to the seed.
        if all(metrics["validation"] > before.get("validation", -1) for before in earlier):
            files["best.png"] = png_bytes(image, notes)


def panel(seed: Image.Image, image: Image.Image) -> Image.Image:
    """Seed, image and their difference around mid-grey, side by side."""
    seed, image = np.asarray(seed, dtype=int), np.asarray(image, dtype=int)
    return Image.fromarray(np.uint8(np.hstack([seed, image, 128 + image - seed]).clip(0, 255)))


def save_state(config: Config, state: dict, pixels: nn.Module, optimizer):
    """Write state.pt first, then what can be made from it."""
    state.update(pixels=pixels.state_dict(), optimizer=optimizer.state_dict())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for name, content in {"state.pt": buffer.getvalue(), **state["files"]}.items():
        save(content, Path(config.out, name))
    with open(Path(config.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(state["history"][-1]) + "\n")


def save(content: bytes, path: Path):
    """Write a file whole or not at all, also if the program is killed."""
    unfinished = Path(f"{path}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)


PRINTED = ("reward", "score", "groups", "rounds", "length", "entropy", "mismatch", "clip_fraction",
           "skipped", "moved", "rollout_s", "trainer_s", "validation")


def print_step(config: Config, history: list[dict]):
    """One line a step, with the minutes that are left if the others take as long as the median."""
    metrics = history[-1]
    shown = [f"{name} {metrics[name]:.4g}" for name in PRINTED if name in metrics]
    times = [step["rollout_s"] + step["trainer_s"] for step in history[1:]]
    left = f"{np.median(times) / 60 * (config.steps - len(times)):.1f} min left" if times else ""
    print(f"step {metrics['step']}/{config.steps}", *shown, left, sep="  ", flush=True)
    if len(times) == 3 and not any(step["groups"] for step in history[1:]):
        print("three steps have trained on nothing: a group of completions is kept if their scores "
              "differ, and here all were equal", flush=True)


# The command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    """The command line, of `argv` or of the process."""
    parser = HfArgumentParser(Config, prog="art.py", usage="art.py --task TASK [flags]")
    args = parser.parse_args(argv)
    try:
        train(Config(**vars(args)))
    except (InputError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: --resume with less --tokens-per-microbatch or "
                     "--gpu-memory-utilization, or start over with a smaller --max-model-len.")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: --resume goes on after the last step\n")


if __name__ == "__main__":
    main()
