"""How near image features come to a soft prompt: `reach.py MODEL SOFT SEED`. Fits the pixels to the
embeddings by least squares, from the seed, and prints what is left of their distance."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[3]))

import art                                                                              # noqa: E402
from eval import IMAGE, behind, load_processor, render                                 # noqa: E402


def main(name, soft, seed, steps=300):
    model, processor = art.load_model(name, "cpu"), load_processor(name)
    target = load_file(soft)["embeddings"].float()
    example = {"messages": [{"role": "user", "content": []}], "tools": None}
    prompt = render(processor, behind(IMAGE, example))
    pixels = art.PixelLogits(art.load_seed(seed, 256))
    optimizer = torch.optim.Adam(pixels.parameters(), 0.1)
    words = model.get_input_embeddings().weight
    print(f"root mean square: words {words.square().mean().sqrt():.3f}, "
          f"soft prompt {target.square().mean().sqrt():.3f}")
    for step in range(steps + 1):
        features, = art.encode_image(model, processor, prompt, pixels()).pooler_output
        distance = (features - target).square().mean()
        if step % 100 == 0:
            first = features.detach() if step == 0 else first
            start = distance.item() if step == 0 else start
            moved = torch.cosine_similarity((features - first).flatten(), (target - first).flatten(), 0)
            print(f"step {step}: features' root mean square {features.square().mean().sqrt():.3f}, "
                  f"{100 * distance / start:.1f} % of the squared distance left, cosine of the "
                  f"two displacements {moved:.3f}", flush=True)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
