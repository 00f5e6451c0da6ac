"""Trains tower.safetensors: the vision tower and the projector of model.py, as LLaVA's are aligned,
the language model frozen. The pictures are drawn here; their captions name shapes, colours, sizes,
places and counts, and nothing else. Made by these two calls, on an H100 and on two cores:

    align.py --captions-only --minutes 8.7 --out first.safetensors
    align.py --init first.safetensors --minutes 13 --batch 4 --lr 5e-4 --sides 256 --workers 0

After the first the model captions every picture, whatever it is asked. So the second adds texts
that a picture has nothing to do with: what the model says to them without one it goes on saying.

    align.py --score 200                    # captions of held-out drawings
"""

import argparse
import math
import random
import re
import time
from functools import partial

import numpy as np
import torch
import transformers as hf
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from model import (IMAGE_TOKEN, PATCH, TEMPLATE, TOWER, hub_names, load_language_model,
                   make_config)

# --------------------------------------------------------------------------------------------------
# Pictures and captions

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
           "yellow": (240, 210, 40), "purple": (140, 60, 180), "orange": (245, 140, 30),
           "pink": (250, 150, 190), "brown": (120, 75, 40)}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
          "bottom right")
NUMBERS = ("one", "two", "three", "four", "five", "six")
REQUESTS = ("Describe the picture.", "What does the picture show?", "Write a caption.",
            "What do you see?")


def polygon(shape):
    """Corners of a shape around (0, 0), in a circle of radius 1."""
    angles = {"square": [45, 135, 225, 315], "triangle": [90, 210, 330],
              "star": [90 + 36 * i for i in range(10)]}
    if shape == "cross":
        a = 0.33
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
                (-1, a), (-1, -a), (-a, -a)]
    radii = [1, 0.42] * 5 if shape == "star" else [1] * 4
    return [(r * math.cos(math.radians(a)), -r * math.sin(math.radians(a)))
            for a, r in zip(angles[shape], radii)]


def draw_shape(draw, shape, colour, background, x, y, r):
    box = (x - r, y - r, x + r, y + r)
    if shape in ("circle", "ring"):
        draw.ellipse(box, fill=colour)
        if shape == "ring":
            inner = 0.6 * r
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=background)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in polygon(shape)], fill=colour)


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def listed(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def draw_scene(rng, side):
    """(picture as uint8 (side, side, 3), caption): up to three things in places, or several equal
    ones. A cell is a ninth of the picture."""
    def jitter(colour):
        return tuple(max(0, min(255, level + rng.randint(-12, 12))) for level in colour)

    ground_name = rng.choice(list(BACKGROUNDS))
    ground, cell = jitter(BACKGROUNDS[ground_name]), side / 3
    picture = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    if rng.random() < 0.3:
        count, kind = rng.randint(1, 6), (rng.choice(list(COLOURS)), rng.choice(SHAPES))
        places = sorted(rng.sample(range(9), count))
        things = [(*kind, rng.choice(("small", "large"))) for _ in places]
        plural = {"cross": "crosses"}.get(kind[1], kind[1] + "s")
        name = f"{kind[0]} {kind[1] if count == 1 else plural}"
        are = "is" if count == 1 else "are"
        caption = f"There {are} {NUMBERS[count - 1]} {name} on {article(ground_name)} background."
    else:
        places = sorted(rng.sample(range(9), rng.randint(1, 3)))
        things = [(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(("small", "large")))
                  for _ in places]
        parts = [f"{article(f'{size} {colour} {shape}')} at the {PLACES[place]}"
                 for place, (colour, shape, size) in zip(places, things)]
        caption = f"On {article(ground_name)} background, {listed(parts)}."
    for place, (colour, shape, size) in zip(places, things):
        r = cell * (rng.uniform(0.19, 0.25) if size == "small" else rng.uniform(0.38, 0.46))
        x = cell * (place % 3 + 0.5 + rng.uniform(-0.05, 0.05))
        y = cell * (place // 3 + 0.5 + rng.uniform(-0.05, 0.05))
        draw_shape(draw, shape, jitter(COLOURS[colour]), ground, x, y, r)
    return np.asarray(picture), caption


# Of a text the model's own answers are used, none is given here.
TOPICS = """river bread winter horse garden train market mountain letter bicycle kitchen island
    forest lamp bridge teacher summer village boat music apple storm school coffee dog library
    window harbour friend morning desert snow bird holiday carpet road city""".split()
TEXTS = ("Write a sentence about a {}.", "What is a {}?", "Tell me a short story about a {}.",
         "Why do people like a {}?", "Give me some advice about a {}.", "Say something about {}.",
         "List things that you find near a {}.", "Hello! Do you know a joke about a {}?",
         "How does a {} change over time?", "Explain {} to a child.", "Translate {} into French.",
         "What would you ask a friend about a {}?")


def draw_anything(rng, side):
    """A drawing, or noise or a smooth field of any contrast: pictures that a text is not about."""
    if rng.random() < 0.4:
        return draw_scene(rng, side)[0]
    cells = rng.choice((2, 4, 8, 32, side))
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (cells, cells, 3))
    picture = Image.fromarray(values.astype(np.uint8)).resize((side, side), Image.BICUBIC)
    grey = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    return np.asarray(Image.blend(grey, picture, rng.random()))


class Scenes(IterableDataset):
    """Batches of drawings, captions and a request, and of pictures and texts, for ever, of each of
    `sides` in turn. Each batch is drawn from its own number, so that none comes twice."""

    def __init__(self, batch, sides):
        self.batch, self.sides = batch, sides

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            rng = random.Random(number)
            side = self.sides[number // stride % len(self.sides)]
            pictures, captions = zip(*(draw_scene(rng, side) for _ in range(self.batch)))
            others = [draw_anything(rng, side) for _ in range(self.batch)]
            text = rng.choice(TEXTS).format(rng.choice(TOPICS))
            yield np.stack(pictures), captions, rng.choice(REQUESTS), np.stack(others), text
            number += stride


# --------------------------------------------------------------------------------------------------
# Alignment

def make_model(language_model, text_config):
    """LLaVA for 384 x 384 pixels, whose table of positions is interpolated for smaller pictures,
    with a new tower and projector in float32."""
    torch.manual_seed(0)
    model = hf.LlavaModel(make_config(dict(text_config, num_hidden_layers=1), 12 * PATCH))
    model.language_model = language_model.requires_grad_(False)
    return model


def tower_parameters(model):
    return {name: weight for name, weight in model.named_parameters()
            if not name.startswith("language_model.")}


def embed_prompt(model, tokenizer, request, pictures, count):
    """Embeddings (count, T, hidden) of the chat up to its answer, behind uint8 or float `pictures`
    (count, H, W, 3), or behind none."""
    image = [{"type": "image"}] if pictures is not None else []
    messages = [{"role": "user", "content": [*image, {"type": "text", "text": request}]}]
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False,
                                         add_generation_prompt=True)
    embed = model.language_model.embed_tokens
    parts = [embed(encode(tokenizer, [part], model.device)[0]).expand(count, -1, -1)
             for part in text.split(IMAGE_TOKEN)]
    if pictures is not None:
        pixels = pictures.permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values, device=model.device)[:, None, None] * 255
                     for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        features = model.get_image_features((pixels - mean) / std, interpolate_pos_encoding=True)
        parts.insert(1, torch.stack(list(features.pooler_output)).to(parts[0].dtype))
    return torch.cat(parts, 1)


def encode(tokenizer, texts, device):
    """Ids (N, T), padded on the right, and their mask."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[i < len(row) for i in range(width)] for row in rows], device=device)


def predict(model, prompt, ids):
    """Hidden states (N, T, hidden) that predict `ids` (N, T) behind the prompt's embeddings."""
    states = torch.cat([prompt, model.language_model.embed_tokens(ids[:, :-1])], 1)
    return model.language_model(inputs_embeds=states).last_hidden_state[:, prompt.shape[1] - 1:]


@torch.no_grad()
def generate(model, head, prompt, count, temperature=0.0):
    """Ids (N, count) behind the prompt's embeddings (N, T, hidden)."""
    ids, states, cache = [], prompt, hf.DynamicCache()
    for _ in range(count):
        hidden = model.language_model(inputs_embeds=states, past_key_values=cache)
        logits = head(hidden.last_hidden_state[:, -1]).float()
        ids.append(torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0] if temperature
                   else logits.argmax(-1))
        states = model.language_model.embed_tokens(ids[-1][:, None])
    return torch.stack(ids, 1)


def caption_loss(model, tokenizer, head, pictures, request, captions):
    ids, mask = encode(tokenizer, [c + tokenizer.eos_token for c in captions], model.device)
    hidden = predict(model, embed_prompt(model, tokenizer, request, pictures, len(ids)), ids)
    return nn.functional.cross_entropy(head(hidden[mask]).float(), ids[mask])


def text_loss(model, tokenizer, head, pictures, text, tokens=24):
    """KL divergence a token from what the model says without a picture, on a sample of that."""
    with torch.no_grad():
        prompt = embed_prompt(model, tokenizer, text, None, len(pictures))
        ids = generate(model, head, prompt, tokens, temperature=1.0)
        before = head(predict(model, prompt, ids)).float().log_softmax(-1)
        ended = (ids == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0                 # up to the first end, it included
    hidden = predict(model, embed_prompt(model, tokenizer, text, pictures, len(ids)), ids)
    behind = head(hidden).float().log_softmax(-1)
    return (before.exp() * (before - behind)).sum(-1)[mask].mean()


def train(model, tokenizer, head, args, device):
    """AdamW for `args.minutes`; the learning rate follows the clock: up for 3 %, then a cosine."""
    parameters = list(tower_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    loader = iter(DataLoader(Scenes(args.batch, args.sides), None, num_workers=args.workers))
    start, step, shown = time.time(), 0, 0
    while (done := (time.time() - start) / (60 * args.minutes)) < 1:
        pictures, captions, request, others, text = next(loader)
        pictures = torch.as_tensor(pictures, device=device, dtype=torch.float)
        pictures = pictures + 6 * torch.rand(1, device=device) * torch.randn_like(pictures)
        others = torch.as_tensor(others, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = caption_loss(model, tokenizer, head, pictures.clamp(0, 255), request, captions)
            kept = torch.zeros((), device=device)
            if not args.captions_only:
                kept = text_loss(model, tokenizer, head, others, text)
        optimizer.zero_grad()
        (loss + kept).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        warm = min(1.0, done / 0.03)
        optimizer.param_groups[0]["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        step += 1
        if time.time() - start > shown:
            print(f"{time.time() - start:5.0f} s  step {step}  captions {loss.item():.4f}  "
                  f"texts {kept.item():.4f}", flush=True)
            shown += 60 * args.minutes / 40
    print(f"{step} steps of {args.batch} captions in {args.minutes:g} minutes on {device}")
    weights = {name: weight.detach().to("cpu", torch.bfloat16).contiguous()
               for name, weight in hub_names(tower_parameters(model)).items()}
    save_file(weights, args.out)


@torch.no_grad()
def score(model, tokenizer, head, number, device):
    """Greedy captions of drawings that were not trained on."""
    for side in (8 * PATCH, 12 * PATCH):
        rng = random.Random(f"held out {side}")
        pictures, captions = zip(*(draw_scene(rng, side) for _ in range(number)))
        pictures = torch.from_numpy(np.stack(pictures)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prompt = embed_prompt(model, tokenizer, REQUESTS[0], pictures, number)
            ids = generate(model, head, prompt, 56)
        found = [text.partition(tokenizer.eos_token)[0]
                 for text in tokenizer.batch_decode(ids)]
        words = ("whole caption", lambda text: text), ("background", lambda text: [
            word for word in BACKGROUNDS if word + " background" in text])
        words += tuple((name, partial(words_of, names)) for name, names in (
            ("colours", COLOURS), ("shapes", SHAPES), ("number", NUMBERS)))
        words += ("places", lambda text: re.findall(r"at the ([a-z ]*?)(?=,|\.| and)", text)),
        print(f"{number} held-out drawings, {side} x {side}: " + ", ".join(
            f"{name} {100 * np.mean([f(a) == f(b) for a, b in zip(found, captions)]):.1f} %"
            for name, f in words))
        for caption, text in list(zip(captions, found))[:4]:
            print(f"  drawn: {caption}\n  found: {text}")


def words_of(names, text):
    """Those of `names` that stand in the text, in its order, without a plural's ending."""
    return re.findall("|".join(names), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="of training; 0: only score (0)")
    parser.add_argument("--captions-only", action="store_true", help="no texts")
    parser.add_argument("--batch", type=int, default=64, help="captions, and texts, a step (64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's (1e-3)")
    parser.add_argument("--init", help="weights to go on with")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384], help="(256 384)")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw (12)")
    parser.add_argument("--score", type=int, default=400, help="held-out drawings a size (400)")
    parser.add_argument("--out", default=TOWER, help="where the weights go (tower.safetensors)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    whole, tokenizer = load_language_model(dtype)
    model = make_model(whole.model, whole.config.to_dict()).to(device)
    head = whole.lm_head.to(device)
    if args.init or not args.minutes:
        weights = {name.replace("vision_model.", ""): weight.float()
                   for name, weight in load_file(args.init or args.out).items()}
        model.load_state_dict(weights, strict=False)
    if args.minutes:
        train(model, tokenizer, head, args, device)
    score(model, tokenizer, head, args.score, device)


if __name__ == "__main__":
    main()
