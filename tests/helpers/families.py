"""Tiny models with random weights of many families, in seconds, with nothing fetched:
`make(name, folder)`.

What makes a family what it is here is kept: configuration, files and processor of its own classes,
the published models' patches, sizes and tiles, the tokens around the image, MRoPE, sliding windows,
gated delta net. Widths and depths are small.
"""

from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

# A tokenizer of bytes, a chat template, the language model's dimensions: shared ------------------

NAMED = {
    "image_token": "<image>", "context_image_token": "<image>", "video_token": "<video>",
    "vision_start_token": "<start_of_image>", "vision_end_token": "<end_of_image>",
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "start_image_token": "<start_of_image>", "end_image_token": "<end_of_image>"}
SPECIAL = ["<pad>", "<bos>", "<end>", "<turn>", *dict.fromkeys(NAMED.values()), "[IMG_BREAK]",
           "[IMG_END]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = ("<bos>{% for m in messages %}<turn>{{ m.role }}\n{% for part in m.content %}"
            "{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")


def make_tokenizer():
    """Bytes and special tokens. It puts <bos> before every text, as Gemma's and Mistral's do, and
    so does the template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    newlines = [AddedToken("\n" * n, normalized=False) for n in (1, 2, 3, 4)]   # as in Gemma's
    tokenizer.add_tokens(newlines)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>", pad_token="<pad>",
        extra_special_tokens=NAMED)


TOKENIZER = make_tokenizer()
ID = TOKENIZER.convert_tokens_to_ids
TOKENS = dict(bos_token_id=ID("<bos>"), eos_token_id=ID("<end>"), pad_token_id=ID("<pad>"))
TEXT = dict(vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=4096,
            tie_word_embeddings=True, **TOKENS)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
QWEN = dict(image_token_id=ID("<image>"), video_token_id=ID("<video>"), tie_word_embeddings=True,
            vision_start_token_id=ID("<start_of_image>"), vision_end_token_id=ID("<end_of_image>"))
QWEN_VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128)
QWEN2_VISION = dict(depth=2, embed_dim=64, mlp_ratio=2, num_heads=4, hidden_size=128)
SIGLIP = dict(VISION, model_type="siglip_vision_model", patch_size=14, vision_use_head=False)
WRAPPED = "<start_of_image><image><end_of_image>"


def rope(*sections, **more):
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections), **more)


def square(side):
    return {"height": side, "width": side}


def qwen(processor, video, patch_size, least):
    geometry = dict(patch_size=patch_size, merge_size=2, temporal_patch_size=2,
                    size={"shortest_edge": least, "longest_edge": 12845056})
    images, videos = hf.Qwen2VLImageProcessor(**geometry), video(**geometry)
    return lambda template: processor(images, TOKENIZER, videos, chat_template=template)


def smolvlm():
    return hf.Idefics3Config(
        text_config=dict(TEXT, model_type="llama"), scale_factor=4, image_token_id=ID("<image>"),
        vision_config=dict(VISION, image_size=512, patch_size=16), tie_word_embeddings=True,
        pad_token_id=ID("<pad>"))


def smolvlm_processor(longest_edge):
    sizes = dict(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 512})
    images = hf.Idefics3ImageProcessor(**sizes)
    return lambda template: hf.Idefics3Processor(images, TOKENIZER, 64, template)


# The families -------------------------------------------------------------------------------------
# name: (model, configuration, processor of a chat template, what the template writes for the image,
# --size). Patches, sizes and tiles are those of the published models.

FAMILIES = {
    "Qwen2-VL": (
        hf.Qwen2VLForConditionalGeneration,
        lambda: hf.Qwen2VLConfig(
            text_config=dict(TEXT, rope_parameters=rope(8, 12, 12)), vision_config=QWEN2_VISION,
            **QWEN),
        qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, 14, 56 * 56), WRAPPED, 224),
    "Qwen2.5-VL": (
        hf.Qwen2_5_VLForConditionalGeneration,
        lambda: hf.Qwen2_5_VLConfig(
            text_config=dict(TEXT, rope_parameters=rope(8, 12, 12)),
            vision_config=dict(QWEN_VISION, fullatt_block_indexes=[1]), **QWEN),
        qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, 14, 56 * 56), WRAPPED, 224),
    "Qwen3-VL": (
        hf.Qwen3VLForConditionalGeneration,
        lambda: hf.Qwen3VLConfig(
            text_config=dict(TEXT, rope_parameters=rope(12, 10, 10, mrope_interleaved=True)),
            vision_config=dict(QWEN_VISION, num_position_embeddings=2304,
                               deepstack_visual_indexes=[0]), **QWEN),
        qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, 16, 65536), WRAPPED, 256),
    "Qwen3.5": (
        hf.Qwen3_5ForConditionalGeneration,
        lambda: hf.Qwen3_5Config(
            text_config=dict(
                TEXT, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                linear_num_value_heads=2, linear_key_head_dim=64, linear_value_head_dim=64,
                rope_parameters=rope(3, 3, 2, mrope_interleaved=True, partial_rotary_factor=0.25)),
            vision_config=dict(QWEN_VISION, num_position_embeddings=2304), **QWEN),
        qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, 16, 65536), WRAPPED, 256),
    "Gemma 3": (            # a sliding window; attention in both directions inside the image
        hf.Gemma3ForConditionalGeneration,
        lambda: hf.Gemma3Config(
            text_config=dict(TEXT, layer_types=["sliding_attention", "full_attention"],
                             sliding_window=64, query_pre_attn_scalar=64),
            vision_config=dict(SIGLIP, image_size=896), mm_tokens_per_image=256,
            image_token_index=ID("<image>"), boi_token_index=ID("<start_of_image>"),
            eoi_token_index=ID("<end_of_image>")),
        lambda template: hf.Gemma3Processor(
            hf.Gemma3ImageProcessor(size=square(896)), TOKENIZER, template, 256),
        "<start_of_image>", 896),
    "LLaVA-OneVision": (    # tiles, beside the whole image
        hf.LlavaOnevisionForConditionalGeneration,
        lambda: hf.LlavaOnevisionConfig(
            text_config=dict(TEXT, model_type="qwen2"), image_token_index=ID("<image>"),
            video_token_index=ID("<video>"), vision_config=dict(SIGLIP, image_size=384),
            tie_word_embeddings=True),
        lambda template: hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(), TOKENIZER, hf.LlavaOnevisionVideoProcessor(), 729,
            "full", template),
        "<image>", 384),
    "InternVL": (           # tiles, but for the smallest size
        hf.InternVLForConditionalGeneration,
        lambda: hf.InternVLConfig(
            text_config=dict(TEXT, model_type="qwen2"), image_token_id=ID("<image>"),
            vision_config=dict(VISION, image_size=448, patch_size=14)),
        lambda template: hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(size=square(448)), TOKENIZER, hf.InternVLVideoProcessor(), 256,
            template),
        "<image>", 448),
    "Mistral 3": (          # a token after each row of the image
        hf.Mistral3ForConditionalGeneration,
        lambda: hf.Mistral3Config(
            text_config=dict(TEXT, model_type="mistral", sliding_window=None),
            vision_config=dict(VISION, model_type="pixtral", image_size=1540, patch_size=14),
            image_token_index=ID("<image>")),
        lambda template: hf.PixtralProcessor(
            hf.PixtralImageProcessor(patch_size=14, size={"longest_edge": 1540}), TOKENIZER, 14, 2,
            template, image_token="<image>"),
        "<image>", 224),
    # As published, it resizes every image to 2048 and shows its tiles beside a copy resized to 512;
    # changed, 512 is one tile.
    "SmolVLM": (hf.Idefics3ForConditionalGeneration, smolvlm, smolvlm_processor(2048), "<image>",
                None),
    "SmolVLM, one tile": (hf.Idefics3ForConditionalGeneration, smolvlm, smolvlm_processor(512),
                          "<image>", 512),
}


def make(name, folder):
    """Write the family's tiny model into `folder`. Every matrix is drawn so that it keeps the size
    of what goes in."""
    make_processor(name, folder)
    model, config, *_ = FAMILIES[name]
    torch.manual_seed(0)
    model = model(config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    if model.config.vision_config.model_type == "siglip_vision_model":
        path, renamed = Path(folder) / "model.safetensors", {}
        for key, weight in load_file(path).items():     # to the hub's names, which vLLM insists on
            renamed[key.replace("vision_tower.", "vision_tower.vision_model.")] = weight
        save_file(renamed, path, metadata={"format": "pt"})


def make_processor(name, folder):
    """Write what the family's processor needs, without a model's weights."""
    _, config, processor, image, _ = FAMILIES[name]
    config().save_pretrained(folder)
    processor(TEMPLATE.replace("IMAGE", image)).save_pretrained(folder)
