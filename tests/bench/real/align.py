"""Trains tower.safetensors: the vision tower and the projector of model.py together, behind the
frozen language model. The pictures are drawn here; their captions name shapes, colours, sizes,
places and counts, and nothing else. One example in four is a text that its drawing has nothing to
do with, answered as the model answers it without one: else it captions every picture, whatever it
is asked. Features are held about as large as the model's words. Made by these two calls on one GPU,
the first as one of three at once:

    align.py --minutes 7.6 --workers 4 --out first.safetensors
    align.py --minutes 3.3 --workers 14 --init first.safetensors

    align.py --score 100                    # captions of held-out drawings; on a CPU, too

At a learning rate of 1e-3 pixels soon moved little of what the model says (tests/bench/README.md).
"""

import argparse
import itertools
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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
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


class Examples(IterableDataset):
    """Batches for ever, of each of `sides` in turn: pictures (N, side, side, 3), ids (N, T), and
    which of those are an answer (N, T). Each batch is drawn from its own number, so that none comes
    twice in a call. `texts`: (request, ids of the answer)."""

    def __init__(self, tokenizer, texts, batch, sides):
        self.tokenizer, self.texts, self.batch, self.sides = tokenizer, texts, batch, sides

    def __iter__(self):
        worker = get_worker_info()
        for number in itertools.count(worker.id, worker.num_workers):
            rng = random.Random(number)
            side = self.sides[number // worker.num_workers % len(self.sides)]
            yield self.collate(*zip(*(self.draw(rng, side, i) for i in range(self.batch))))

    def draw(self, rng, side, i):
        picture, caption = draw_scene(rng, side)
        if i % 4 == 0:
            return picture, *rng.choice(self.texts)
        ids = self.tokenizer.encode(caption + self.tokenizer.eos_token, add_special_tokens=False)
        return picture, rng.choice(REQUESTS), ids

    def collate(self, pictures, requests, answers):
        prompts = [chat(self.tokenizer, request, pictures[0]) for request in requests]
        pairs = list(zip(prompts, answers))
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        answered = [torch.arange(len(prompt + answer)) >= len(prompt) for prompt, answer in pairs]
        return (torch.from_numpy(np.stack(pictures)), pad_sequence(ids, batch_first=True),
                pad_sequence(answered, batch_first=True))


def chat(tokenizer, request, picture=None):
    """Ids of the chat up to its answer, with as many image tokens as the picture takes."""
    image = [{"type": "image"}] if picture is not None else []
    messages = [{"role": "user", "content": [*image, {"type": "text", "text": request}]}]
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False,
                                         add_generation_prompt=True)
    if picture is not None:
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (len(picture) // PATCH) ** 2)
    return tokenizer.encode(text, add_special_tokens=False)


# --------------------------------------------------------------------------------------------------
# Alignment

def make_model(language_model):
    """LLaVA for 384 x 384 pixels, whose table of positions is interpolated for smaller pictures,
    with a new tower and projector in float32."""
    torch.manual_seed(0)
    text_config = dict(language_model.config.to_dict(), num_hidden_layers=1)
    model = hf.LlavaModel(make_config(text_config, 12 * PATCH))
    model.language_model = language_model.model.requires_grad_(False)
    return model


def tower_parameters(model):
    return {name: weight for name, weight in model.named_parameters()
            if not name.startswith("language_model.")}


def embed(model, pictures, ids):
    """Embeddings (N, T, hidden) of ids (N, T), the features of uint8 pictures (N, side, side, 3) in
    the place of the image's tokens; and the features (N, tokens, hidden)."""
    pixels = pictures.permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] * 255
                 for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    found = model.get_image_features((pixels - mean) / std, interpolate_pos_encoding=True)
    features = torch.stack(list(found.pooler_output))
    embeddings = model.language_model.embed_tokens(ids)
    embeddings[ids == model.config.image_token_id] = features.flatten(0, 1).to(embeddings.dtype)
    return embeddings, features


def answer_loss(model, head, pictures, ids, answered):
    """(cross-entropy of the answers, mean square (N, tokens) of each feature)."""
    embeddings, features = embed(model, pictures, ids)
    hidden = model.language_model(inputs_embeds=embeddings).last_hidden_state[:, :-1]
    answered = answered[:, 1:]
    loss = nn.functional.cross_entropy(head(hidden[answered]).float(), ids[:, 1:][answered])
    return loss, features.float().square().mean(-1)


def answer_texts(language_model, tokenizer, device, samples=4, tokens=32):
    """[(request, ids of an answer)]: samples of what the model says without a picture."""
    requests = [text.format(topic) for text in TEXTS for topic in TOPICS]
    prompts = [chat(tokenizer, request) for request in requests]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    end = tokenizer.eos_token_id
    found = language_model.generate(
        **inputs.to(device), do_sample=True, top_k=0, num_return_sequences=samples,
        max_new_tokens=tokens, eos_token_id=end, pad_token_id=end)
    texts = []
    for i, answer in enumerate(found[:, inputs["input_ids"].shape[1]:].tolist()):
        length = answer.index(end) + 1 if end in answer else len(answer)
        texts.append((requests[i // samples], answer[:length]))
    return texts


def train(model, tokenizer, head, texts, args, device):
    """AdamW for `args.minutes`; the learning rate follows the clock: up for 3 %, then a cosine."""
    parameters = list(tower_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    examples = Examples(tokenizer, texts, args.batch, args.sides)
    loader = iter(DataLoader(examples, None, num_workers=args.workers))
    words = model.language_model.embed_tokens.weight.float().square().mean()
    start, step, shown = time.time(), 0, 0
    while (done := (time.time() - start) / (60 * args.minutes)) < 1:
        batch = [part.to(device) for part in next(loader)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, squares = answer_loss(model, head, *batch)
        size = (squares / words).log().square().mean()          # 0: as large as words
        optimizer.zero_grad()
        (loss + 0.1 * size).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        warm = min(1.0, done / 0.03)
        optimizer.param_groups[0]["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        step += 1
        if time.time() - start > shown:
            print(f"{time.time() - start:5.0f} s  step {step}  loss {loss.item():.4f}  "
                  f"size {size.item():.4f}", flush=True)
            shown += 60 * args.minutes / 40
    print(f"{step} steps of {args.batch} examples in {args.minutes:g} minutes on {device}")
    weights = {name: weight.detach().to("cpu", torch.bfloat16).contiguous()
               for name, weight in hub_names(tower_parameters(model)).items()}
    save_file(weights, args.out)


@torch.no_grad()
def score(model, language_model, tokenizer, number, device):
    """Greedy captions of drawings that were not trained on."""
    for side in (8 * PATCH, 12 * PATCH):
        rng = random.Random(f"held out {side}")
        pictures, captions = zip(*(draw_scene(rng, side) for _ in range(number)))
        pictures = torch.from_numpy(np.stack(pictures)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prompt = torch.tensor([chat(tokenizer, REQUESTS[0], pictures[0])] * number)
            embeddings, _ = embed(model, pictures, prompt.to(device))
            ids = language_model.generate(inputs_embeds=embeddings, do_sample=False,
                                          max_new_tokens=56, pad_token_id=0)
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
    parser.add_argument("--batch", type=int, default=64, help="examples a step (64)")
    parser.add_argument("--lr", type=float, default=5e-4, help="AdamW's (5e-4)")
    parser.add_argument("--init", help="weights to go on with")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384], help="(256 384)")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw, 1 or more")
    parser.add_argument("--score", type=int, default=400, help="held-out drawings a size (400)")
    parser.add_argument("--out", default=TOWER, help="where the weights go (tower.safetensors)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    language_model, tokenizer = load_language_model(
        torch.bfloat16 if device == "cuda" else torch.float32)
    language_model.to(device)
    model = make_model(language_model).to(device)
    if args.init or not args.minutes:
        weights = {name.replace("vision_model.", ""): weight.float()
                   for name, weight in load_file(args.init or args.out).items()}
        model.load_state_dict(weights, strict=False)
    if args.minutes:
        texts = answer_texts(language_model, tokenizer, device)
        train(model, tokenizer, language_model.lm_head, texts, args, device)
    score(model, language_model, tokenizer, args.score, device)


if __name__ == "__main__":
    main()
