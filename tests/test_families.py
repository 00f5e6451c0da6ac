"""art.py and eval.py, unchanged, with tiny random models of many families: real vLLM, one process each."""

import pytest
import transformers as hf
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import art
import eval as tasks
import families
from family_step import facts

TAKEN = [name for name, family in families.FAMILIES.items() if family[-1]]


@pytest.fixture(scope="module", params=TAKEN)
def found(request):
    return facts(request.param)


def test_one_step_trains_the_pixels_and_the_result_is_scored(found):
    step = found["metrics"][1]
    assert step["groups"] == 2 and step["grad_norm"] > 0 and step["moved"] > 0
    assert step["ratio"] == pytest.approx(1) and step["clip_fraction"] == 0
    none, random, last = found["table"].partition("accuracy %")[2].splitlines()[1:4]
    assert none.startswith("none ") and random.startswith("random ") and "last.png " in last


def test_the_prompt_begins_once(found):
    """The template writes <bos>, and the tokenizer would write another: a chat server's prompts have one."""
    assert found["bos"] == 1 and found["image_tokens"] >= 64


def test_png_is_the_policy(found):
    assert found["apart"] == 0.0


def test_shared_prefix_and_plain_way_give_the_plain_gradient(found):
    assert found["gradient"] > 0 and found["reached"] > 0.95     # the patches of LLaVA-OneVision leave a margin of 6 pixels
    assert found["shared"] < 1e-4 and found["alone"] < 1e-4


def test_without_a_shareable_cache_the_plain_way_is_taken_and_said_once(found):
    assert found["said"] == 1


def test_trainer_and_engine_agree(found):
    """vLLM's CPU attention is causal within the image, too: Gemma 3's gap is small only on those terms."""
    gap = found["causal_gap"] if found["family"] == "Gemma 3" else found["gap"]
    assert 0 < gap < 0.02 and found["blind_gap"] > 3 * gap              # the gap of a trainer that sees another picture


def test_another_size_is_refused_and_one_that_works_is_named(found):
    assert found["refused"].startswith(f"--size {found['size'] + 6}: the model's image processor would resize it")
    assert f" {found['size']}" in found["refused"].rpartition(":")[2]


def test_a_processor_that_always_tiles_is_refused(tmp_path):
    families.make("SmolVLM", tmp_path)
    with pytest.raises(tasks.InputError, match="resize it, or a copy of it beside tiles.*none up to 1024, unless"):
        art.check_size(tasks.load_processor(tmp_path), 512)


def test_a_size_that_only_the_whole_processor_refuses_is_refused(tmp_path):
    """Mistral 3 merges 2 x 2 patches of 14: its image processor alone would take 238 as it is."""
    families.make("Mistral 3", tmp_path)
    with pytest.raises(tasks.InputError, match="sizes that work near it: 168, 196, 224, 252, 280"):
        art.check_size(tasks.load_processor(tmp_path), 238)


def test_a_processor_without_gradient_is_refused(tmp_path):
    families.make("Gemma 3", tmp_path)
    processor = tasks.load_processor(tmp_path)
    processor.image_processor = Gemma3ImageProcessorPil(size=families.square(896))
    with pytest.raises(tasks.InputError, match="--size 896: the model's image processor does not take it .*requires grad"):
        art.check_size(processor, 896)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    """As Gemma 4: what comes out of its output matrix are not yet the logits."""
    small = dict(families.TEXT, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0)
    hf.Gemma4ForConditionalGeneration(hf.Gemma4Config(
        text_config=dict(small, final_logit_softcapping=30.0), audio_config=None, image_token_id=families.ID("<image>"),
        vision_config=dict(families.VISION, num_key_value_heads=4, head_dim=16))).save_pretrained(tmp_path)
    with pytest.raises(tasks.InputError, match="it scales or caps the logits"):
        art.load_model(str(tmp_path), "cpu")
