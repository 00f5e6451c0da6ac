"""Can the pixels do it at all? `reach.py MODEL TRAIN.jsonl SEED [LR ...]`: the answers as asked for
("Answer: 14") are given, and their log-likelihood is raised by art.backward, without sampling: by
the pixels and by free embeddings in their place. Prints nats a token: what is left at each step."""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from baselines import Art, Soft, art, tasks                                             # noqa: E402


def main(name: str, train: str, seed: str, *rates: str, steps=20, questions=4):
    model, processor = art.load_model(name, "cpu"), tasks.load_processor(name)
    seed = art.load_seed(seed, 256)
    image = art.PixelLogits(seed).to_image()
    tokenizer, groups = processor.tokenizer, []
    for example in tasks.TASKS["gsm8k"].load("train", train)[::7][:questions]:
        prompt = tasks.render(processor, tasks.prepend(tasks.IMAGE, example))
        prompt_ids = tasks.model_inputs(processor, prompt, image)["input_ids"][0].tolist()
        text = f"Answer: {example.target}{tokenizer.eos_token}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        groups.append([art.Completion(prompt, prompt_ids, ids, [0.0] * len(ids), text)])
    for kind in (Art, Soft):
        for rate in map(float, rates or (0.01, 0.1, 1)):
            parameter = kind(model, processor, seed)
            optimizer = torch.optim.AdamW(parameter.parameters(), rate, weight_decay=0.0)
            found = []
            for _ in range(steps + 1):
                optimizer.zero_grad()
                metrics = art.backward(model, processor, parameter, copy.deepcopy(groups),
                                       torch.ones(questions, 1), weight_cap=0)
                optimizer.step()
                found.append(metrics["entropy"])            # - log-likelihood a token
            with torch.no_grad():
                features, = parameter.features(model, processor, groups[0][0].prompt).pooler_output
            print(f"{kind.__name__} lr {rate:g}:", *(f"{value:.2f}" for value in found[::5]),
                  f"; features' root mean square {features.square().mean().sqrt():.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
