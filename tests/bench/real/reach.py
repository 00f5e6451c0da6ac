"""Can the pixels do it at all? `reach.py MODEL TRAIN.jsonl SEED [LR ...]`: the answers as asked for
("Answer: 14") are given, and their log-likelihood is raised by art.backward, without sampling: by
the pixels and by free embeddings in their place. Prints nats a token: what is left at each step."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from baselines import Art, Soft, art, encode_image, take_features, tasks                # noqa: E402


def main(name, train, seed, *rates, steps=20, questions=4):
    task = tasks.TASKS["gsm8k"]
    model, processor = art.load_model(name, "cpu"), tasks.load_processor(name)
    examples = task.load("train", train)[::7][:questions]
    tokenizer, groups = processor.tokenizer, []
    image = art.PixelLogits(art.load_seed(seed, 256)).to_image()
    for example in examples:
        prompt = tasks.render(processor, tasks.behind(tasks.IMAGE, example))
        prompt_ids = tasks.model_inputs(processor, prompt, image)["input_ids"][0].tolist()
        text = f"Answer: {example['target']}{tokenizer.eos_token}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        groups.append([art.Completion(prompt, prompt_ids, ids, [0.0] * len(ids), text, False)])
    for kind in (Art, Soft):
        for rate in map(float, rates or (0.01, 0.1, 1)):
            art.encode_image = encode_image
            parameter = kind(model, processor, art.load_seed(seed, 256), examples[0])
            art.encode_image = encode_image if kind is Art else take_features
            optimizer = torch.optim.AdamW(parameter.parameters(), rate, weight_decay=0.0)
            found = []
            for step in range(steps + 1):
                optimizer.zero_grad()
                metrics, _ = art.backward(model, processor, parameter, groups,
                                          torch.ones(len(groups), 1), weight_cap=0)
                optimizer.step()
                found.append(metrics["entropy"])        # - log-likelihood a token
            with torch.no_grad():
                features, = parameter().pooler_output if kind is Soft else encode_image(
                    model, processor, groups[0][0].prompt, parameter()).pooler_output
            print(f"{kind.__name__} lr {rate:g}:",
                  *(f"{found[step]:.2f}" for step in range(0, steps + 1, 5)),
                  f"; features' root mean square {features.square().mean().sqrt():.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
