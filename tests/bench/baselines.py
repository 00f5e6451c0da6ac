"""ART beside LoRA and a soft prompt: art.py's loop, loss, rollouts and batches, another parameter.

    baselines.py art --task gsm8k --data train.jsonl --test test.jsonl --seed seed.png --lr 0.1
    baselines.py lora --task gsm8k --data train.jsonl --test test.jsonl --lr 0.001
    baselines.py soft ...                           # as many free embeddings as image tokens
    baselines.py score --arms none random string:64 seed.png ...            # trains nothing
    baselines.py table --results results.jsonl --baseline seed.png

All other flags are art.py's; without --test it only trains. What a call finds is appended to
--results, a JSON line an arm. LoRA (PEFT, rank 16, alpha 32, all matrices of the decoder, as in the
paper) sees no image; its rollouts are vLLM's with the current adapter. A soft prompt starts as the
seed's image features; vLLM takes it by enable_mm_embeds. All keep the state of the best validation.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPooling

sys.path.insert(0, str(Path(__file__).parents[2]))

import eval as tasks                                                                    # noqa: E402
from cost import art, lora_config                                                       # noqa: E402


# The parameters, each for art.train's `pixels`, and how vLLM takes them, for its `llm` ------------


class Art(art.PixelLogits):
    """The pixels."""
    engine_options = {}
    needs = "nothing: a request with an image"

    def __init__(self, model, processor, seed):
        super().__init__(seed)

    def engine(self, llm):
        return llm

    def save(self, folder) -> Path:
        path = Path(folder, "best.png")
        path.write_bytes(tasks.png_bytes(self.to_image()))
        return path


class Soft(nn.Module):
    """Free embeddings (tokens, hidden) in the image's place, at first the seed's features."""
    engine_options = {"enable_mm_embeds": True}
    needs = "--enable-mm-embeds, this model only"

    def __init__(self, model, processor, seed):
        super().__init__()
        pixels = art.PixelLogits(seed).to(model.device)
        example = tasks.Example("", tasks.user_turn(""), None)
        prompt = tasks.render(processor, tasks.prepend(tasks.IMAGE, example))
        with torch.no_grad():
            features, = pixels.features(model, processor, prompt).pooler_output
        self.embeddings = nn.Parameter(features.clone())
        self.picture = pixels.to_image()
        inputs = tasks.model_inputs(processor, prompt, self.picture)
        self.grid = inputs.get("image_grid_thw")            # Qwen's: the shape of the image

    def features(self, model, processor, prompt):
        return BaseModelOutputWithPooling(pooler_output=(self.embeddings,))

    def to_image(self):
        """A picture of the right size: art.py counts its tokens, and looks at no pixel."""
        return self.picture

    def engine(self, llm):
        return SoftEngine(llm, self)

    def save(self, folder) -> Path:
        path = Path(folder, "soft.safetensors")
        save_file({"embeddings": self.embeddings.detach().cpu()}, path)
        return path


class SoftEngine:
    """vLLM with the embeddings in each image's place."""

    def __init__(self, llm, soft: Soft):
        self.llm, self.soft = llm, soft

    def generate(self, requests, sampling, **options):
        # A copy: vLLM keeps what it was given, and the optimizer writes in place.
        embeddings = self.soft.embeddings.detach().to("cpu", self.llm.model_config.dtype, copy=True)
        image = embeddings[None]
        if self.soft.grid is not None:
            image = {"image_embeds": embeddings, "image_grid_thw": self.soft.grid}
        data = {"multi_modal_data": {"image": image}}
        requests = [{"prompt": request["prompt"], **data} for request in requests]
        return self.llm.generate(requests, sampling, **options)


class Lora(nn.Module):
    """PEFT's adapter in the decoder of `model`; there is no image."""
    engine_options = {"enable_lora": True, "max_lora_rank": 16}
    needs = "--enable-lora, the adapter on its disk"

    def __init__(self, model, processor=None, seed=None):
        super().__init__()
        adapted = get_peft_model(model, lora_config())
        self.weights = nn.ParameterList(w for w in adapted.parameters() if w.requires_grad)
        self.adapted = [adapted]                            # a list: the model is no part of this

    def features(self, model, processor, prompt):
        return None

    def to_image(self):
        return None

    def engine(self, llm):
        return LoraEngine(llm, self)

    def save(self, folder) -> Path:
        self.adapted[0].save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors")


class LoraEngine:
    """vLLM with the adapter as it is at each call."""

    def __init__(self, llm, lora: Lora):
        self.llm, self.lora, self.version = llm, lora, 0

    def generate(self, requests, sampling, **options):
        from vllm.lora.request import LoRARequest
        self.version += 1                                   # vLLM keeps what it has read by number
        with tempfile.TemporaryDirectory() as folder:
            self.lora.save(folder)
            adapter = LoRARequest(f"adapter {self.version}", self.version, folder)
            return self.llm.generate(requests, sampling, lora_request=adapter, **options)


KINDS = {"art": Art, "soft": Soft, "lora": Lora}


def train(parameter, llm, model, config: art.Config) -> list[dict]:
    """art.train; leaves `parameter` in the state of the best validation. The steps' metrics."""
    history, best = [], {}

    def on_step(metrics, groups):
        found = metrics.get("validation", -1)
        if found > max((before.get("validation", -1) for before in history), default=-1):
            best.update(copy.deepcopy(parameter.state_dict()))
        history.append(dict(metrics))

    art.train(config, pixels=parameter, llm=parameter.engine(llm), model=model, on_step=on_step)
    parameter.load_state_dict(best)
    return history


# Scores -------------------------------------------------------------------------------------------


def holds(example: tasks.Example, text: str) -> float:
    """Whether the right number stands anywhere in the text, whatever the form."""
    return float(str(example.target) in re.findall(r"-?\d+", text))


def score(name: str, llm, examples, arm, config: art.Config) -> dict:
    """Ask the test questions behind `arm`, as eval.py does: the arm's record."""
    task, processor = tasks.TASKS[config.task], tasks.load_processor(config.model)
    requests = tasks.arm_requests(processor, examples, arm, config.random_seed, config.size)
    start = time.time()
    replies = tasks.ask_engine(llm, processor, requests,
                               {**tasks.GREEDY, "max_tokens": config.max_new_tokens})
    seconds, results = time.time() - start, []
    for example, result in zip(examples, tasks.judged_results(task, examples, replies)):
        results.append({**result, "holds": holds(example, result["text"])})
    accuracy = np.mean([result["score"] for result in results])
    print(f"{name}: {100 * accuracy:.2f} % of {len(results)}, {seconds:.0f} s", flush=True)
    return {"arm": name, "results": results, "test_s": seconds, "bytes": 0}


def print_table(path: str, baseline: str):
    """eval.py's, of the last record of each name, and what an arm takes. For the intervals,
    questions about the same numbers count as one."""
    with open(path) as file:
        records = {record["arm"]: record for record in map(json.loads, file)}
    more = {}
    for name, record in records.items():
        for result in record["results"]:
            result["key"] = " ".join(sorted(re.findall(r"\d+", result["key"])))
        held = np.mean([result["holds"] for result in record["results"]])
        more[name] = {"holds the number %": f"{100 * held:.1f}",
                      "trained": record.get("trained", 0),
                      "training s": f"{record.get('train_s', 0):.0f}",
                      "test s": f"{record['test_s']:.0f}",
                      "a server needs": record.get("needs", "nothing")}
    records = {baseline: records[baseline], **records}      # the first is compared with
    table = tasks.table(records).join(pandas.DataFrame(more).T)
    print(f"n = {len(records[baseline]['results'])}\n{table.to_string()}")


# Command line -------------------------------------------------------------------------------------


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for art.py's."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=[*KINDS, "score", "table"])
    add("--arms", nargs="+", default=[], help="for score: what eval.py takes")
    add("--test", help="local file of test rows")
    add("--name", help="of the arm in --results (its kind, or what eval.py takes)")
    add("--results", help="file to append to")
    add("--baseline", default="seed.png", help="for table: the arm to compare with (seed.png)")
    add("--instruction", help="for score: in the place of the task's own")
    add("--engine", type=json.loads, default={}, help="more options of vLLM, JSON")
    return parser.parse_known_args()


def instructed(example: tasks.Example, instruction: str) -> tasks.Example:
    """The example with another instruction behind its question."""
    question = example.messages[-1]["content"][0]["text"].partition("\n\n")[0]
    return replace(example, messages=tasks.user_turn(f"{question}\n\n{instruction}"))


def trained_arm(kind: type, llm, examples, config: art.Config, name: str) -> dict:
    """Train, save and score; the arm's record."""
    model = art.load_model(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.random_seed)
    parameter = kind(model, tasks.load_processor(config.model),
                     art.load_seed(config.seed, config.size))
    history = train(parameter, llm, model, config)
    size = parameter.save(config.out).stat().st_size
    record = {"arm": name}
    if examples:
        picture = parameter.to_image() or "none"
        record = score(name, parameter.engine(llm), examples, picture, config)
    seconds = sum(step["rollout_s"] + step["trainer_s"] for step in history[1:])
    trained = sum(weight.numel() for weight in parameter.parameters())
    return {**record, "bytes": size, "trained": trained, "train_s": seconds, "needs": kind.needs,
            "lr": config.lr, "history": history}


def untrained_arm(arm: str, llm, examples, config: art.Config, name: str) -> dict:
    """Score a picture file, "none", "random" or "string:N"; the arm's record."""
    if not Path(arm).exists():
        return score(name, llm, examples, arm, config)
    picture = tasks.open_picture(arm)
    record = score(name, llm, examples, picture, config)
    return {**record, "bytes": len(tasks.png_bytes(picture))}


def main():
    args, rest = parse_args()
    if args.kind == "table":
        return print_table(args.results, args.baseline)
    config, = HfArgumentParser(art.Config).parse_args_into_dataclasses(rest)
    examples = tasks.TASKS[config.task].load("test", args.test) if args.test else []
    if args.instruction:
        examples = [instructed(example, args.instruction) for example in examples]
    kind = KINDS.get(args.kind)
    options = {**args.engine, **(kind.engine_options if kind else {})}
    llm = tasks.load_engine(config.model, config.max_model_len, config.max_num_seqs,
                            config.gpu_memory_utilization, config.random_seed, **options)
    if kind:
        records = [trained_arm(kind, llm, examples, config, args.name or args.kind)]
    else:
        records = [untrained_arm(arm, llm, examples, config, args.name or arm)
                   for arm in args.arms]
    if args.results:
        with open(args.results, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
