"""art.py and eval.py with tiny random models of many families."""

import pytest
import torch
import transformers as hf

import art
import eval as tasks
import families
from conftest import prompt
from family_step import TAKEN, far, gradient, measure, plain_gradient


@pytest.fixture(scope="module", params=["Gemma 3", "InternVL", "Mistral 3", "Qwen2.5-VL"])
def found(request, tmp_path_factory):
    """A step and its validations through vLLM."""
    return measure(request.param, tmp_path_factory.mktemp("family"))


def test_one_step_trains_the_pixels_and_the_result_is_scored(found):
    step = found["metrics"][1]
    assert step["groups"] == 2 and step["grad_norm"] > 0 and step["moved"] > 0
    assert step["ratio"] == pytest.approx(1) and step["clip_fraction"] == 0
    assert all("validation" in line for line in found["metrics"])


def test_png_is_the_policy_behind_one_bos(found):
    """The template writes <bos>, and the tokenizer would write another: a server's have one."""
    assert found["apart"] == 0.0 and found["bos"] == 1 and found["image_tokens"] >= 64


def test_trainer_and_engine_agree(found):
    """vLLM's CPU attention is causal within the image, too: so is Gemma 3's gap measured."""
    assert 0 < found["gap"] < 0.02 and found["blind_gap"] > 3 * found["gap"]


@pytest.mark.parametrize("name", TAKEN)
def test_micro_batches_give_the_plain_gradient_in_every_family(name, tmp_path, questions):
    """Two groups of 3 to 9 tokens, whole and in micro-batches, beside each sequence alone."""
    families.make(name, tmp_path)
    processor, model = tasks.load_processor(tmp_path), art.load_model(tmp_path, "cpu")
    torch.manual_seed(0)
    size, groups = families.FAMILIES[name][-1], []
    pixels = art.PixelLogits(torch.randint(256, (3, size, size), dtype=torch.uint8))
    for question in questions[:2]:
        text = prompt(processor, question)
        prompt_ids = tasks.model_inputs(processor, text, pixels.to_image())["input_ids"][0].tolist()
        groups.append([art.Completion(text, prompt_ids, torch.randint(30, 250, (n,)).tolist(),
                                      [-5.0] * n, "") for n in (9, 3, 6)])
    batch = groups, torch.randn(2, 3)
    expected, _, _ = plain_gradient(model, processor, pixels, *batch)
    for tokens in (8192, len(groups[0][0].prompt_ids) + 12, 1):
        ours = gradient(model, processor, pixels, *batch, tokens_per_microbatch=tokens)
        assert far(ours, expected) < 1e-5


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_size_that_works_is_named(name, tmp_path):
    """Of the processor that always tiles: none."""
    families.make_processor(name, tmp_path)
    processor, size = tasks.load_processor(tmp_path), families.FAMILIES[name][-1]
    works = rf".*\b{size}\b" if size else "none"
    with pytest.raises(tasks.InputError, match=rf"--size {(size or 512) + 6}: .*work: {works}"):
        art.check_size(processor, (size or 512) + 6, (size or 512) + 6)
    if size:
        art.check_size(processor, size, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, None])
def test_a_model_that_caps_its_logits_is_refused(cap, dtype):
    """As Gemma 4: its output matrix gives no logits yet. Without the cap it is taken."""
    small = dict(families.TEXT, layer_types=["sliding_attention", "full_attention"],
                 hidden_size_per_layer_input=0, final_logit_softcapping=cap)
    vision = dict(families.VISION, num_key_value_heads=4, head_dim=16)
    gemma = hf.Gemma4ForConditionalGeneration(hf.Gemma4Config(
        text_config=small, audio_config=None, vision_config=vision,
        image_token_id=families.ID("<image>"), tie_word_embeddings=False)).to(dtype).eval()
    gemma.get_output_embeddings().weight.data *= 100        # logits as large as a trained model's
    if cap is None:
        art.check_model(gemma, "cpu")
        return
    with pytest.raises(tasks.InputError, match="it scales or caps its logits"):
        art.check_model(gemma, "cpu")
