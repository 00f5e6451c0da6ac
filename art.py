"""ART, Art-based Reinforcement Training: fine-tune a multimodal LLM by training one picture.

    python art.py --task gsm8k --seed seed.png                               # one GPU
    torchrun --nproc-per-node 4 art.py --task gsm8k --seed seed.png          # four

The model stays frozen; the pixels of one image, put before every question, are trained. The result
is a PNG that any vLLM serves. Method: arXiv 2606.11854, of which no training code was published.
The method, in the order of this file:
  1. load_seed          the picture to start from
  2. PixelLogits        the only parameter; its sigmoid, rounded to 8 bits, is the image
  3. rollout            vLLM samples G completions of each prompt, behind the image
  4. group_advantages   rewards relative to those of the other completions of the same prompt
  5. dapo_loss          the clipped surrogate, token by token (DAPO, arXiv 2503.14476)
  6. backward           its gradient, through the frozen model and its vision tower, to the pixels
  7. train              the loop: dynamic sampling, AdamW, validation, best.png
Not here: KL term (beta = 0 in the paper), DAPO's overlong punishment, value function.
"""

import io
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
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
                  load_processor, model_inputs, open_picture, png_bytes, prepend, render)


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The flags of the command line. Raises InputError for a number out of its range."""
    task: str = field(metadata={"choices": TASKS, "help": "the benchmark to train for"})
    seed: str | None = flag(None, "the picture to start from; noise if not given")
    model: str = flag("Qwen/Qwen3.5-0.8B", "hub name or folder")
    data: str | None = flag(None, "local file of training rows in the benchmark's own schema")
    out: str | None = flag(None, "folder of the run; runs/TASK if not given")
    resume: bool = flag(False, "go on with the run in --out, whose flags are given again")
    # Known from the paper; its effective batch of 32 is taken as prompts * group_size completions
    size: int = flag(256, "side of the image in pixels: 256 is 64 tokens, the least for Qwen3.5")
    steps: int = flag(100, "rollout batches, one a step")
    lr: float = flag(0.1, "AdamW's learning rate, constant after the warm-up")
    warmup: int = flag(5, "steps in which the learning rate rises")
    group_size: int = flag(8, "completions of each prompt")
    prompts: int = flag(4, "prompts a step, on each rank")
    eps_low: float = flag(0.2, "the ratio is clipped below 1 - this")
    eps_high: float = flag(0.28, "the ratio is clipped above 1 + this")
    # Not known from the paper, or added to it
    rounding: bool = flag(True, "of the trained image to 8 bits; the paper: --no-rounding")
    temperature: float = flag(1.0, "of the rollouts")
    weight_decay: float = flag(0.0, "AdamW's; any pulls the image to grey")
    updates: int = flag(1, "of each rollout batch; the clip works from the second on")
    rounds: int = flag(4, "sampling rounds a step, to replace groups all right or all wrong")
    weight_cap: float = flag(2.0, "cap of the importance weight pi_trainer / pi_vllm; 0: none")
    max_new_tokens: int = flag(512, "a completion is cut off there")
    max_model_len: int = flag(4096, "tokens of prompt and completion; longer prompts are left out")
    max_num_seqs: int = flag(256, "sequences that vLLM runs at once")
    tokens_per_microbatch: int = flag(4096, "most in a pass, but for a prompt and one completion")
    gpu_memory_utilization: float = flag(0.5, "vLLM's share of the GPU; the trainer needs the rest")
    validation: int = flag(128, "training examples set aside to choose best.png")
    validate_every: int = flag(10, "steps between validations")
    random_seed: int = flag(0, "of the order of prompts and of their samples")

    def __post_init__(self):
        self.out = self.out or f"runs/{self.task}"
        for item in fields(self):
            usual = (1, 10**9) if item.type is int else (0, 10**9)          # least and most
            check_range(item.name, getattr(self, item.name), *RANGES.get(item.name, usual))


RANGES = {"group_size": (2, 10**9), "temperature": (0.01, 100), "random_seed": (0, 10**9),
          "size": (1, 4096)}


# 1. Seed ------------------------------------------------------------------------------------------


def load_seed(path: str | None, size: int) -> Tensor:
    """Any picture as uint8 (3, size, size), cropped and scaled; no path: normal logits, std 0.1."""
    if path is None:
        return (255 * torch.sigmoid(0.1 * torch.randn(3, size, size))).round().to(torch.uint8)
    picture = ImageOps.fit(open_picture(path), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


# 2. Pixels ----------------------------------------------------------------------------------------


class PixelLogits(nn.Module):
    """The trainable image: float32 logits (3, H, W), at first those of a uint8 seed (3, H, W)."""

    def __init__(self, seed: Tensor, rounding: bool = True):
        super().__init__()
        # X_raw = log(p / (1 - p)), p = seed / 255. 0 and 1 are moved inwards by a quarter of a
        # level, so that all 256 values survive the round trip.
        self.logits = nn.Parameter(torch.logit(seed.float() / 255, eps=0.25 / 255))
        self.rounding = rounding

    def forward(self) -> Tensor:
        """The image as float (3, H, W) in [0, 255]. Rounded straight through: it has the 8-bit
        image's value and the sigmoid's gradient, so that what is trained is what is deployed, to
        the bit. Without rounding: the continuous image, as in the paper's backward pass."""
        image = 255 * torch.sigmoid(self.logits)
        return image + (image.round() - image).detach() if self.rounding else image

    def to_image(self) -> Image.Image:
        """The 8-bit PIL image: what vLLM sees and what is deployed."""
        levels = self().detach().round().to("cpu", torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).numpy())

    def features(self, model, processor, prompt: str):
        """What the frozen vision tower makes of the image, with its graph: the model's processor is
        differentiable and gives the PNG's values. Some want a text beside it: any prompt does."""
        image = self()
        check_size(processor, image.shape[2], image.shape[1])
        inputs = model_inputs(processor, prompt, image).to(model.device)
        names = processor.image_processor.model_input_names
        inputs = {name: value for name, value in inputs.items() if name in names}
        return model.get_image_features(**inputs, return_dict=True)


# 3. Rollout ---------------------------------------------------------------------------------------


@dataclass
class Completion:
    prompt: str                         # rendered chat template, with its image placeholder
    prompt_ids: list[int]               # as vLLM ran it, the placeholder expanded
    ids: list[int]                      # sampled token ids, the end-of-turn token included
    vllm_logps: list[float]             # vLLM's logprob of each
    text: str
    truncated: bool = False             # ended by the token limit
    score: float = 0.0                  # 1 for a right answer
    reward: float = 0.0
    old_logps: list[float] | None = None    # the trainer's, before the first update of the batch


def rollout(llm, prompts: list[str], image: Image.Image | None, group_size: int, max_new_tokens=512,
            temperature=1.0, random_seeds: list[int] | None = None) -> list[list[Completion]]:
    """Sample P groups of G = `group_size` Completions of P rendered prompts behind the image. With
    load_engine's "processed_logprobs", and no top-p or top-k, vLLM's logprobs are the (tempered)
    policy's. `random_seeds`, one a prompt, make samples independent of what came before."""
    from vllm import SamplingParams
    images = {"multi_modal_data": {"image": image}} if image else {}
    requests = [{"prompt": prompt, **images} for prompt in prompts]
    sampling = [SamplingParams(n=group_size, temperature=temperature, top_p=1.0, top_k=0,
                               max_tokens=max_new_tokens, logprobs=0, seed=random_seed)
                for random_seed in random_seeds or [None] * len(prompts)]
    outputs = llm.generate(requests, sampling, use_tqdm=False, tokenization_kwargs=TEMPLATED)
    groups = []
    for prompt, output in zip(prompts, outputs):
        group = []
        for sample in output.outputs:
            ids = list(sample.token_ids)
            logps = [at[token].logprob for token, at in zip(ids, sample.logprobs)]
            group.append(Completion(prompt, output.prompt_token_ids, ids, logps, sample.text,
                                    truncated=sample.finish_reason == "length"))
        groups.append(sorted(group, key=lambda c: len(c.ids)))      # micro-batches pad little then
    return groups


# 4. Rewards and advantages ------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps=1e-4) -> Tensor:
    """(P, G) rewards -> (P, G) advantages A_ij = (R_ij - mean_i) / (std_i + eps), std as in TRL and
    verl with Bessel's correction."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


# 5. Loss ------------------------------------------------------------------------------------------


def dapo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, eps_low=0.2,
              eps_high=0.28, total_tokens: int | None = None, weight: Tensor | None = None):
    """The clipped surrogate of DAPO (eq. 8), negated: a scalar, and metrics.

    logp, old_logp, mask, weight: (N, T), mask true on completion tokens; advantages: (N,) or
    (N, 1), not (N, T). `weight`: of tokens, pi_trainer / pi_vllm. The sum over tokens is divided
    by `total_tokens`, those of the whole step (None: of `mask`), so that micro-batches add up: they
    hold whole completions, but not all of the step. Likewise an objective of sequences (GSPO) sums
    over N and divides by one number for the whole step, such as prompts * group_size.
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
#   pixels -> vision tower -> features || -> prompt -> cache || -> its G completions -> loss
#             once a step              ||    once a group    ||    in micro-batches
#
# All sequences share the image, and those of a group their prompt: each is computed once, and the
# completions run on the prompt's key-value cache, L + G * C tokens a group, not G * (L + C). At ||
# the graph is cut (`cut_graph`): the gradients of all that follows add up there, and go on once.


def backward(model, processor, pixels: nn.Module, groups: list[list[Completion]],
             advantages: Tensor, loss_function: Callable = dapo_loss, temperature=1.0,
             weight_cap=2.0, tokens_per_microbatch=4096, total_tokens=None) -> Counter:
    """Add the gradient of the loss over P groups of G Completions, with advantages (P, G), to the
    pixels. `total_tokens`: of the whole step, if these groups are a part of it; gradients and the
    metrics that it returns add up. The first call for a Completion keeps its `old_logps`."""
    metrics = Counter()
    device, image = model.device, pixels.to_image()
    total_tokens = total_tokens or sum(len(c.ids) for group in groups for c in group)
    features, finish_image = cut_graph(pixels.features(model, processor, groups[0][0].prompt))
    for group, advantage in zip(groups, advantages.to(device)):         # G completions, (G,)
        prefix, finish_prefix = cut_graph(run_prompt(model, processor, group[0], image, features))
        longest = max(len(c.ids) for c in group)        # the prompt's graph is in memory, too
        room = max(1, (tokens_per_microbatch - len(group[0].prompt_ids)) // max(1, longest))
        for start in range(0, len(group), room):                                    # micro-batches
            completions = group[start:start + room]
            ids = pad([c.ids for c in completions], 0, device)                      # (N, T)
            mask = pad([[True] * len(c.ids) for c in completions], False, device)   # (N, T)
            logp = completion_logps(model, prefix, ids, mask, temperature)          # (N, T)
            for c, row in zip(completions, logp.tolist()):
                if c.old_logps is None:                 # the first update of a batch: pi_old = pi
                    c.old_logps = row[:len(c.ids)]
            old_logp = pad([c.old_logps for c in completions], 0.0, device)
            vllm_logp = pad([c.vllm_logps for c in completions], 0.0, device)
            weight = (old_logp - vllm_logp).exp().clamp(max=weight_cap) if weight_cap else None
            loss, logged = loss_function(logp, old_logp, advantage[start:start + room], mask,
                                         total_tokens=total_tokens, weight=weight)
            loss.backward()
            logged |= {"entropy": -old_logp.sum() / total_tokens,
                       "mismatch": (old_logp - vllm_logp).abs().sum() / total_tokens}
            for name, value in logged.items():
                metrics[name] += torch.as_tensor(value).item()
        finish_prefix()
    finish_image()
    return metrics


def run_prompt(model, processor, completion: Completion, image: Image.Image | None, features):
    """Image and prompt through the language model: (the attributes of each cache layer, last hidden
    state (1, 1, hidden)). The model object keeps `rope_deltas`, the offset of positions behind an
    image, for the completions: they must run before the next prompt does."""
    inputs = model_inputs(processor, completion.prompt, image).to(model.device)
    if inputs["input_ids"][0].tolist() != completion.prompt_ids:
        raise RuntimeError("vLLM and the processor disagree about the prompt's token ids")
    del inputs["attention_mask"]                        # one unpadded prompt needs none
    inputs.pop("pixel_values", None)
    cache = graph_cache(model)
    states = model.base_model(**inputs, mm_encoder_outputs={"image": features},
                              past_key_values=cache, use_cache=True)
    return [vars(layer) for layer in cache.layers], states.last_hidden_state[:, -1:]


def completion_logps(model, prefix, ids: Tensor, mask: Tensor, temperature=1.0) -> Tensor:
    """Logprobs (N, T) of N completions `ids` (N, T) behind one prompt, on N copies of its cache,
    through which gradients go back. `mask`: false on their right padding, where they are 0."""
    def repeat(tensor):                     # without dimensions it is a setting, not a state
        return tensor.repeat_interleave(len(ids), 0) if tensor.dim() else tensor

    layers, last_state = prefix
    cache = graph_cache(model)
    for layer, held in zip(cache.layers, layers):
        vars(layer).update(tree_map_only(Tensor, repeat, held))
    # Causal attention cannot see the padding on the right. Without an image in the call, a sampled
    # image placeholder is an ordinary token, as it is to vLLM.
    states = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    # State t - 1 predicts token t.
    hidden = torch.cat([repeat(last_state), states.last_hidden_state[:, :-1]], dim=1)
    logps = token_logps(hidden[mask], ids[mask], model.get_output_embeddings(), temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logps)


def token_logps(hidden: Tensor, targets: Tensor, output: nn.Module, temperature=1.0) -> Tensor:
    """Logprobs (M,) of `targets` (M,) from hidden states (M, hidden) and the output layer. Kept for
    backward is only the slope (onehot - p) @ W / temperature: the logits would be gigabytes."""
    logps, slopes = [], []
    with torch.no_grad():
        for h, target in zip(hidden.split(512), targets[:, None].split(512)):
            logp = (output(h).float() / temperature).log_softmax(-1)        # (512, vocabulary)
            logps.append(logp.gather(1, target)[:, 0])
            slope = logp.exp_().neg_()
            slope.scatter_add_(1, target, torch.ones_like(target, dtype=slope.dtype))
            slopes.append(slope.to(h.dtype) @ output.weight / temperature)
    linear = (hidden.float() * torch.cat(slopes)).sum(-1)
    return torch.cat(logps) + (linear - linear.detach())        # the value, and the gradient


class GraphLinearAttentionLayer(LinearAttentionLayer):
    """transformers overwrites the recurrent state, which backward still needs: this assigns."""

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


def cut_graph(tree):
    """Cut the autograd graph at the tensors of `tree`. Returns (the same tree as the start of a new
    graph, finish). The gradients of any number of backward passes add up at the cut, in float32;
    finish() then sends their sum through the old graph, once."""
    cuts = []

    def cut(tensor):
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().float().requires_grad_()
        cuts.append((tensor, leaf))
        return leaf.to(tensor.dtype)

    def finish():
        reached = [(tensor, leaf) for tensor, leaf in cuts if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in reached],
                                [leaf.grad.to(tensor.dtype) for tensor, leaf in reached])

    return tree_map_only(Tensor, cut, tree), finish


def pad(rows: list[list], fill, device) -> Tensor:
    """Lists of different lengths as one tensor (N, T), with `fill` on the right."""
    width = max(2, *map(len, rows))     # of one token, a model's decoding path overwrites its cache
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


# 7. The loop --------------------------------------------------------------------------------------
# Under torchrun each rank has an engine, a frozen model and prompts of its own; the gradient is
# that of the loss over the tokens of all ranks.

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value) -> list:
    """The `value` of every rank, in their order; without torchrun, a list of one."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(values, value)
    return values


def train(config: Config, pixels: nn.Module | None = None, loss_function: Callable | None = None,
          on_step: Callable | None = None, llm=None, model=None):
    """Train one image as the flags say, into the folder `config.out`. Yours, if given: `pixels` for
    PixelLogits (without an image, as LoRA, if `to_image` gives None), `loss_function` for
    dapo_loss, `on_step` that each step's metrics go to, an engine, a model by `load_model`."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
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
    data = f"{training} {validation} {seed_image and seed_image.tobytes().hex()}"
    state = load_state(config, data, pixels, optimizer)
    llm = llm or load_engine(config.model, config.max_model_len, config.max_num_seqs,
                             config.gpu_memory_utilization, config.random_seed)
    model = model or load_model(config.model, device)

    history = state["history"]                                  # the metrics of each step
    for step in range(len(history), config.steps + 1):          # step 0 only validates the seed
        metrics = {"step": step}
        if step > 0:
            start = time.time()
            groups, sampled = sample_groups(llm, processor, task, training, pixels.to_image(), step,
                                            config)
            middle = time.time()
            lr = optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / config.warmup)
            metrics |= sampled | update_pixels(model, processor, pixels, optimizer, groups,
                                               loss_function, config)
            metrics.update(lr=lr, rollout_s=middle - start, trainer_s=time.time() - middle)
        if step % config.validate_every == 0 or step == config.steps:
            results = evaluate(llm, processor, task, validation[RANK::WORLD_SIZE],
                               pixels.to_image(), config.max_new_tokens)
            right = sum(gather(sum(result["score"] for result in results)))
            metrics["validation"] = right / len(validation)
        history.append(metrics)
        if RANK == 0:
            finish_step(config, state, pixels, optimizer, seed_image)
        if on_step:
            on_step(metrics)


def sample_groups(llm, processor, task: Task, examples: list[Example], image: Image.Image | None,
                  step: int, config: Config) -> tuple[list[list[Completion]], dict]:
    """Dynamic sampling: roll out until `config.prompts` groups hold both right and wrong answers,
    at most `config.rounds` times. Returns those groups, and metrics over all that was sampled, on
    all ranks. Random seed, rank and step seed prompts and samples, as a resumed run must."""
    generator = random.Random(f"{config.random_seed} {RANK} {step}")
    kept, samples = [], []
    for _ in range(config.rounds):
        chosen = generator.sample(examples, config.prompts - len(kept))
        random_seeds = [generator.getrandbits(62) for _ in chosen]
        prompts = [render(processor, prepend(IMAGE, e) if image else e) for e in chosen]
        groups = rollout(llm, prompts, image, config.group_size, config.max_new_tokens,
                         config.temperature, random_seeds)
        for example, group in zip(chosen, groups):
            for c, reward in zip(group, task.rewards(example, group)):
                c.score, c.reward = task.score(example, c.text), reward
                samples.append((c.score, c.reward, len(c.ids), c.truncated))
            if len({c.score for c in group}) > 1:       # by the score, as in DAPO, not the reward
                kept.append(group)
        if len(kept) == config.prompts:
            break
    samples = sum(gather(samples), [])
    metrics = dict(zip(("score", "reward", "length", "truncated"), np.mean(samples, 0).tolist()))
    metrics.update(groups=sum(gather(len(kept))), sampled_groups=len(samples) // config.group_size)
    return kept, metrics


def update_pixels(model, processor, pixels: nn.Module, optimizer, groups: list[list[Completion]],
                  loss_function: Callable, config: Config) -> dict:
    """`config.updates` steps of AdamW on one batch of groups. Returns metrics; "skipped" is 1 if a
    loss or gradient was not finite, so that an update was left out; the others are of the last."""
    total_tokens = sum(gather(sum(len(c.ids) for group in groups for c in group)))
    rewards = torch.tensor([[float(c.reward) for c in group] for group in groups])  # (P, G)
    metrics = Counter()
    for _ in range(config.updates if total_tokens else 0):
        for parameter in pixels.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ours = {} if not groups else backward(          # a rank without groups adds nothing
            model, processor, pixels, groups, group_advantages(rewards), loss_function,
            config.temperature, config.weight_cap, config.tokens_per_microbatch, total_tokens)
        metrics = Counter()
        for part in gather(ours):
            metrics.update(part)                        # adds
        for parameter in pixels.parameters():
            parameter.grad = sum(gather(parameter.grad.cpu())).to(parameter.device)
        metrics["grad_norm"] = nn.utils.get_total_norm(p.grad for p in pixels.parameters()).item()
        if not all(map(math.isfinite, metrics.values())):
            return {"skipped": 1}
        optimizer.step()
    return {**metrics, "skipped": 0}


# What the loop needs: model, data, and the run's folder -------------------------------------------


def load_model(name: str, device: str):
    """The frozen model, float32 on the CPU and bfloat16 on a GPU. Raises InputError."""
    # fla 0.6 would compile a TileLang kernel with pip's nvcc, against other headers (fla issue
    # 949). It reads this when transformers imports it, with the model's code.
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
    ids = torch.tensor([[0, 1]], device=device)
    output = model(input_ids=ids, output_hidden_states=True)
    expected = model.get_output_embeddings()(output.hidden_states[-1])
    if (output.logits - expected).abs().max() > 0.01 * expected.abs().max():
        raise InputError("--model: it scales or caps its logits; art.py does not.")


def load_examples(config: Config, task: Task, processor, image) -> tuple[list, list]:
    """(training, validation) Examples; those of one key, of one conversation, stay together."""
    examples = task.load("train", config.data)
    examples = drop_long(processor, examples, config.max_model_len - config.max_new_tokens,
                         {"--seed": image})
    examples.sort(key=lambda example: key_hash(example.key))
    validation = examples[:config.validation]
    held_out = {example.key for example in validation}
    training = [example for example in examples if example.key not in held_out]
    if len(training) < config.prompts:
        raise InputError(f"--prompts {config.prompts}: only {len(training)} examples are left "
                         f"beside --validation {config.validation}; lower one, or give more data.")
    return training, validation


# Flags that may change when a run goes on: they do not change what a step computes
FREE = ("out", "resume", "steps", "max_num_seqs", "gpu_memory_utilization", "tokens_per_microbatch")


def load_state(config: Config, data: str, pixels: nn.Module, optimizer) -> dict:
    """The state of the run in `config.out`, loaded into pixels and optimizer; a new one where a run
    begins. `data`: its rows and seed. Raises InputError if it is another run's, or broken."""
    folder, path = Path(config.out), Path(config.out, "state.pt")
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings.update(data_and_seed=key_hash(data), ranks=WORLD_SIZE)
    state = {"settings": settings, "history": [], "files": {}}
    with explained(f"--out {folder}: it holds no run", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        held = [name for name in os.listdir(folder) if not name.endswith(".tmp")]
        if path.exists():
            state = torch.load(path, "cpu", weights_only=True)
        others = [name for name in settings if state["settings"].get(name) != settings[name]]
    if held and not (config.resume and path.exists()):
        raise InputError(f"--out {folder}: it is not empty; --resume goes on where a run lies.")
    if others:
        raise InputError(f"--resume: {folder} was run with other {', '.join(others)}: give those.")
    if state["history"]:
        pixels.load_state_dict(state["pixels"])
        optimizer.load_state_dict(state["optimizer"])
        lines = "".join(json.dumps(metrics) + "\n" for metrics in state["history"])
        if RANK == 0:                                   # a kill may have left older files
            print(f"{folder}: goes on after step {state['history'][-1]['step']} of {config.steps}")
            for name, content in {**state["files"], "metrics.jsonl": lines.encode()}.items():
                save(content, folder / name)
    return state


def save(data: bytes, path: Path):
    """Write bytes whole or not at all, also if the program is killed."""
    unfinished = Path(f"{path}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def finish_step(config: Config, state: dict, pixels: nn.Module, optimizer, seed_image):
    """Save and print the last step of the history. The pictures to look at are a part of the state,
    so that both agree whenever the run is killed."""
    *earlier, metrics = state["history"]
    image, files = pixels.to_image(), state["files"]
    notes = {"step": metrics["step"]}
    for name, value in state["settings"].items():               # of local paths, the last part
        notes[name] = Path(str(value)).name if os.path.exists(str(value)) else value
    if image:
        metrics["moved"] = float(abs(np.subtract(image, seed_image, dtype=int)).mean())
        files["last.png"] = png_bytes(image, notes)
    if image and "validation" in metrics:
        notes["accuracy"] = metrics["validation"]
        files["panel.png"] = png_bytes(panel(seed_image, image), notes)
        files["seed.png"] = files.get("seed.png") or png_bytes(seed_image, notes)   # as cropped
        # The earlier of two equally good images is kept: it is nearer to the seed.
        if all(metrics["validation"] > before.get("validation", -1) for before in earlier):
            files["best.png"] = png_bytes(image, notes)
    buffer = io.BytesIO()
    state.update(pixels=pixels.state_dict(), optimizer=optimizer.state_dict())
    torch.save(state, buffer)
    for name, data in {"state.pt": buffer.getvalue(), **files}.items():
        save(data, Path(config.out, name))
    with open(Path(config.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(metrics) + "\n")
    shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
    times = [step["rollout_s"] + step["trainer_s"] for step in state["history"][1:]]
    left = f"{np.median(times) / 60 * (config.steps - len(times)):.1f} min left" if times else ""
    print(f"step {metrics['step']}/{config.steps}", *shown, left, sep="  ", flush=True)


SHOWN = ("reward", "score", "groups", "length", "entropy", "mismatch", "clip_fraction", "skipped",
         "moved", "rollout_s", "trainer_s", "validation")


def panel(seed: Image.Image, image: Image.Image) -> Image.Image:
    """Seed, image and their difference around mid-grey, side by side."""
    seed, image = np.asarray(seed, dtype=int), np.asarray(image, dtype=int)
    return Image.fromarray(np.uint8(np.hstack([seed, image, 128 + image - seed]).clip(0, 255)))


def main(argv: list[str] | None = None, **seams):
    """The command line, of `argv` or of the process; `seams` go to `train`."""
    parser = HfArgumentParser(Config, prog="art.py", usage="art.py --task TASK [flags]")
    args = parser.parse_args(argv)
    if WORLD_SIZE > 1:
        distributed.init_process_group("gloo")
    try:
        train(Config(**vars(args)), **seams)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: --resume with less --tokens-per-microbatch or "
                     "--gpu-memory-utilization, or begin anew with less --max-model-len.")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: --resume goes on after the last step\n")


if __name__ == "__main__":
    main()
