"""ART beside LoRA and a soft prompt: the same loss, rollouts, steps and batches, another parameter.

    baselines.py art --task gsm8k --data train.jsonl --test test.jsonl --seed seed.png --lr 0.1
    baselines.py lora --task gsm8k --data train.jsonl --test test.jsonl --lr 0.001
    baselines.py soft ...                           # as many free embeddings as image tokens
    baselines.py score none random string:64 seed.png ...                   # trains nothing
    baselines.py table --results results.jsonl --baseline seed.png

All other flags are art.py's (not used: --max-change, --updates, --rounding, --resume). What a call
finds is appended to --results, a JSON line an arm.
LoRA (PEFT, rank 16, alpha 32, all matrices of the decoder, as in the paper) sees no image; its
rollouts are vLLM's with the current adapter. A soft prompt starts as the seed's image features;
vLLM takes it by enable_mm_embeds. All of them keep the state of the best validation.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import torch
import vllm
from safetensors.torch import save
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import art                                                                              # noqa: E402
import eval as tasks                                                                    # noqa: E402
from cost import lora_config                                                            # noqa: E402


# --------------------------------------------------------------------------------------------------
# The parameters. Each gives art.backward its `to_image` and `forward`, in the place of PixelLogits.

class Art(art.PixelLogits):
    """The pixels; `picture` is what vLLM takes in a prompt."""
    engine = {}

    def __init__(self, model, processor, seed, example):
        super().__init__(seed)

    def prepare(self, llm):
        return llm, self.to_image()

    def deployed(self):
        return tasks.png_bytes(self.to_image())


class Soft(nn.Module):
    """Free embeddings (tokens, hidden) in the image's place, at first the seed's features."""
    engine = {"enable_mm_embeds": True}

    def __init__(self, model, processor, seed, example):
        super().__init__()
        self.seed = art.PixelLogits(seed)
        prompt = tasks.render(processor, tasks.behind(tasks.IMAGE, example))
        with torch.no_grad():
            features, = encode_image(model, processor, prompt, self.seed()).pooler_output
        self.embeddings = nn.Parameter(features.clone())
        inputs = tasks.model_inputs(processor, prompt, self.to_image())
        self.more = {name: inputs[name] for name in ("image_grid_thw",) if name in inputs}
        self.seed.requires_grad_(False)

    def to_image(self):
        """A picture of the right size: art.backward counts its tokens, and looks at no pixel."""
        return self.seed.to_image()

    def forward(self):
        return BaseModelOutputWithPooling(pooler_output=(self.embeddings,))

    def prepare(self, llm):
        # A copy: vLLM keeps what it was given, and the optimizer writes in place.
        embeddings = self.embeddings.detach().to(llm.model_config.dtype, copy=True)
        if self.more:                                   # Qwen: beside the shape of the image
            return llm, {"image_embeds": embeddings, **self.more}
        return llm, embeddings[None]

    def deployed(self):
        return save({"embeddings": self.embeddings.detach()})


class Lora(nn.Module):
    """PEFT's adapter in the decoder of `model`; there is no image."""
    engine = {"enable_lora": True, "max_lora_rank": 16}

    def __init__(self, model, processor, seed, example):
        super().__init__()
        from peft import get_peft_model
        self.adapter = [get_peft_model(model, lora_config())]       # a list: no child of ours
        self.version, self.folder = 0, tempfile.TemporaryDirectory()

    def parameters(self, recurse=True):
        return (weight for weight in self.adapter[0].parameters() if weight.requires_grad)

    def state_dict(self):
        return [weight.detach().clone() for weight in self.parameters()]

    @torch.no_grad()
    def load_state_dict(self, state):
        for weight, kept in zip(self.parameters(), state):
            weight.copy_(kept)

    def to_image(self):
        return None

    def forward(self):
        return None

    def prepare(self, llm):
        self.version += 1
        folder = self.folder.name
        self.adapter[0].peft_config["default"].save_pretrained(folder)
        Path(folder, FILES["lora"]).write_bytes(self.deployed())
        request = vllm.lora.request.LoRARequest(f"step {self.version}", self.version, folder)
        return Adapted(llm, request), "none"

    def deployed(self):
        from peft import get_peft_model_state_dict
        weights = get_peft_model_state_dict(self.adapter[0])
        return save({name: weight.detach().cpu() for name, weight in weights.items()})

    def remove(self):
        """The model as it was."""
        self.adapter[0].unload()


class Adapted:
    """An engine that answers with an adapter, and without an image."""

    def __init__(self, llm, request):
        self.llm, self.request = llm, request

    def generate(self, requests, *args, **options):
        texts = [{"prompt": request["prompt"]} for request in requests]
        return self.llm.generate(texts, *args, lora_request=self.request, **options)


FILES = {"art": "best.png", "soft": "soft.safetensors", "lora": "adapter_model.safetensors"}
KINDS = {"art": Art, "soft": Soft, "lora": Lora}
encode_image, behind = art.encode_image, art.behind


def take_features(model, processor, prompt, features):
    """art.encode_image, where `forward` has given the features already."""
    return features


# --------------------------------------------------------------------------------------------------
# Training, as art.train does it

def train(kind, llm, model, processor, task, training, validation, args):
    """(trained parameter, seconds of its steps, [metrics of each step])."""
    torch.manual_seed(args.rng)
    art.encode_image = encode_image if kind == "art" else take_features
    art.behind = (lambda part, example: example) if kind == "lora" else behind
    parameter = KINDS[kind](model, processor, art.load_seed(args.seed, args.size), training[0])
    optimizer = torch.optim.AdamW(parameter.parameters(), args.lr, args.betas,
                                  weight_decay=args.weight_decay)
    prompts = art.endless_prompts(training, args.rng, 0)
    loss = partial(art.dapo_loss, eps_low=args.eps_low, eps_high=args.eps_high)
    history, best, seconds = [], None, 0.0
    for step in range(args.steps + 1):
        metrics, start = {"step": step}, time.time()
        if step > 0:
            groups, rewards, found = art.sample_groups(engine, processor, task, prompts, picture,
                                                       args)
            metrics.update(found)
            if groups:
                optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / args.warmup)
                optimizer.zero_grad()
                advantages = art.group_advantages(rewards)
                found, _ = art.backward(model, processor, parameter, groups, advantages, loss,
                                        None, args.tokens_per_microbatch, args.temperature,
                                        args.weight_cap)
                metrics.update(found)
                optimizer.step()
            seconds += time.time() - start
        engine, picture = parameter.prepare(llm)
        if step % args.validate_every == 0 or step == args.steps:
            results = tasks.evaluate(engine, processor, task, validation, picture,
                                     args.max_new_tokens)
            metrics["validation"] = np.mean([result["score"][0] for result in results])
            if best is None or metrics["validation"] > best[0]:
                best = metrics["validation"], copy.deepcopy(parameter.state_dict())
        history.append({name: float(value) for name, value in metrics.items()})
        shown = [f"{name} {metrics[name]:.4g}" for name in
                 ("score", "groups", "length", "entropy", "mismatch", "validation")
                 if name in metrics]
        label = f"{kind} lr {args.lr:g} step {step}"
        print(label, *shown, f"{seconds:.0f} s", sep="  ", flush=True)
    parameter.load_state_dict(best[1])
    return parameter, seconds, history


# --------------------------------------------------------------------------------------------------
# Scores

def holds(example, text):
    """Whether the right number stands anywhere in the text, whatever the form."""
    return float(str(example["target"]) in re.findall(r"-?\d+", text))


def score(name, engine, processor, task, examples, arm, args, **more):
    """Ask the test questions; append the arm's record to --results."""
    requests = tasks.arm_requests(processor, examples, arm, args.rng, args.size)
    sampling = {**tasks.GREEDY, "max_tokens": args.max_new_tokens}
    start = time.time()
    answers = tasks.ask_engine(engine, processor, requests, sampling)
    seconds = time.time() - start
    results = [{**tasks.judge(task, e, samples), "holds": [holds(e, samples[0][0])]}
               for e, samples in zip(examples, answers)]
    record = {"arm": name, "results": results, "test_s": seconds, **more}
    accuracy = np.mean([result["score"][0] for result in results])
    print(f"{name}: {100 * accuracy:.2f} % of {len(results)}, {seconds:.0f} s", flush=True)
    if args.results:
        tasks.keep_result(args.results, json.dumps(record) + "\n")


NEEDS = {"art": "nothing: a request with an image", "soft": "--enable-mm-embeds, this model only",
         "lora": "--enable-lora, the adapter on its disk"}


def table(args):
    """A row for each arm of --results, the last of equal names. For the intervals, questions about
    the same numbers count as one."""
    with open(args.results) as file:
        arms = {record["arm"]: record for record in map(json.loads, file)}
    base = np.array([result["score"][0] for result in arms[args.baseline]["results"]])
    keys = [" ".join(sorted(re.findall(r"\d+", result["key"])))
            for result in arms[args.baseline]["results"]]
    rows = {}
    for name, arm in arms.items():
        results = pandas.DataFrame(arm["results"])
        results = results[["score", "holds", "readable", "tokens"]].map(np.mean)
        scores = results["score"].to_numpy()
        rows[name] = {"accuracy %  [95 % interval]": tasks.interval(scores, keys),
                      f"less {args.baseline}": tasks.interval(scores - base, keys),
                      "holds the number %": f"{100 * results['holds'].mean():.1f}",
                      "readable %": f"{100 * results['readable'].mean():.1f}",
                      "tokens": f"{results['tokens'].mean():.1f}",
                      "trained": arm.get("trained", 0), "bytes": arm.get("bytes", 0),
                      "training s": f"{arm.get('train_s', 0):.0f}",
                      "test s": f"{arm['test_s']:.0f}",
                      "a server needs": NEEDS.get(arm.get("kind"), "nothing")}
    print(f"n = {len(base)}\n{pandas.DataFrame(rows).T.to_string()}")


# --------------------------------------------------------------------------------------------------

def parse_args():
    """Our flags, and what is left by art.py's parser."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*KINDS, "score", "table"))
    parser.add_argument("arms", nargs="*", help="for score: what eval.py takes")
    parser.add_argument("--test", help="local file of test rows")
    parser.add_argument("--name", help="the arm's name in --results (its kind)")
    parser.add_argument("--results", help="file to append to")
    parser.add_argument("--grid", type=float, nargs="+",
                        help="only try these learning rates on validation examples")
    parser.add_argument("--baseline", default="seed.png", help="for table: the arm to compare with")
    parser.add_argument("--instruction", help="for score: in the place of the task's own")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of vLLM, JSON")
    own, others = parser.parse_known_args()
    if own.kind == "table":
        return own
    if not (own.test or own.grid):
        parser.error("--test is missing: a local file of test rows")
    argv, sys.argv = sys.argv, [sys.argv[0], *others]
    args = art.parse_args()[1]
    sys.argv = argv
    return argparse.Namespace(**{**vars(args), **vars(own)})


def start_engine(kind, args):
    """load_engine's, with what the kind needs and what --engine says."""
    original, more = vllm.LLM, {**args.engine, **(KINDS[kind].engine if kind in KINDS else {})}
    vllm.LLM = lambda *args, **options: original(*args, **{**options, **more})
    return tasks.load_engine(args.model, args.max_model_len, args.max_num_seqs,
                             args.gpu_memory_utilization, args.rng)


def main():
    args = parse_args()
    if args.kind == "table":
        return table(args)
    task, processor = tasks.TASKS[args.task], tasks.load_processor(args.model)
    test = task.load("test", args.test) if args.test else []
    if args.kind == "score":
        if args.instruction:
            for example in test:
                content = example["messages"][-1]["content"]
                question = content[0]["text"].partition("\n\n")[0]
                content[0] = {"type": "text", "text": f"{question}\n\n{args.instruction}"}
        llm = start_engine("score", args)
        for name in args.arms:
            picture = Path(name).exists()
            arm = tasks.open_picture(name) if picture else name
            more = {"bytes": len(tasks.png_bytes(arm))} if picture else {}
            label = (args.name or "{}").format(name)
            score(label, llm, processor, task, test, arm, args, **more)
        return
    seed_image = art.PixelLogits(art.load_seed(args.seed, args.size)).to_image()
    training, validation = art.load_examples(args, task, processor, seed_image)
    model = art.load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    llm = start_engine(args.kind, args)
    for args.lr in args.grid or [args.lr]:
        parameter, seconds, history = train(args.kind, llm, model, processor, task, training,
                                            validation, args)
        found = max(metrics.get("validation", 0) for metrics in history)
        print(f"{args.kind}, lr {args.lr:g}: validation {100 * found:.2f} % of {len(validation)} "
              f"at best, {100 * history[-1]['validation']:.2f} % at last, {seconds:.0f} s",
              flush=True)
        if not args.grid:
            engine, picture = parameter.prepare(llm)
            folder = Path(args.out or f"runs/{args.kind}")
            folder.mkdir(parents=True, exist_ok=True)
            deployed = parameter.deployed()
            (folder / FILES[args.kind]).write_bytes(deployed)
            if args.kind == "art":
                seed_image.save(folder / "seed.png")
                art.panel(seed_image, picture).save(folder / "panel.png")
            trained = sum(weight.numel() for weight in parameter.parameters()
                          if weight.requires_grad)
            score(args.name or args.kind, engine, processor, task, test, picture, args,
                  kind=args.kind, trained=trained, train_s=seconds, bytes=len(deployed),
                  lr=args.lr, history=history)
        if args.kind == "lora":
            parameter.remove()


if __name__ == "__main__":
    main()
