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
    """A step and an evaluation through vLLM."""
    return {"family": request.param, **measure(request.param, tmp_path_factory.mktemp("family"))}


def test_one_step_trains_the_pixels_and_the_result_is_scored(found):
    step = found["metrics"][1]
    assert step["groups"] == 2 and step["grad_norm"] > 0 and step["moved"] > 0
    assert step["ratio"] == pytest.approx(1) and step["clip_fraction"] == 0
    assert [arm.rpartition("/")[2] for arm in found["arms"]] == ["none", "random", "last.png"]


def test_the_prompt_begins_once(found):
    """The template writes <bos>, and the tokenizer would write another: a server's have one."""
    assert found["bos"] == 1 and found["image_tokens"] >= 64


def test_png_is_the_policy(found):
    assert found["apart"] == 0.0


def test_shared_prefix_gives_the_plain_gradient(found):
    assert found["gradient"] > 0 and found["reached"] > 0.95 and found["shared"] < 1e-4


def test_trainer_and_engine_agree(found):
    """vLLM's CPU attention is causal within the image, too: so is Gemma 3's gap measured."""
    assert 0 < found["gap"] < 0.02 and found["blind_gap"] > 3 * found["gap"]


@pytest.mark.parametrize("name", TAKEN)
def test_micro_batches_give_the_plain_gradient_in_every_family(name, tmp_path, questions):
    """Two groups of completions of 3 to 9 tokens, whole and in micro-batches, against each
    sequence alone (float32); no engine."""
    families.make(name, tmp_path)
    processor, model = tasks.load_processor(tmp_path), art.load_model(tmp_path, "cpu")
    torch.manual_seed(0)
    size, groups = families.FAMILIES[name][-1], []
    pixels = art.PixelLogits(torch.randint(256, (3, size, size), dtype=torch.uint8))
    for question in questions[:2]:
        text = prompt(processor, question)
        prompt_ids = tasks.model_inputs(processor, text, pixels.to_image())["input_ids"][0].tolist()
        groups.append([art.Completion(text, prompt_ids, torch.randint(30, 250, (n,)).tolist(),
                                      [-5.0] * n, "", False) for n in (9, 3, 6)])
    batch = groups, torch.randn(2, 3)
    expected, _, _ = plain_gradient(model, processor, pixels, *batch)
    for tokens in (8192, len(groups[0][0].prompt_ids) + 12, 1):
        ours = gradient(model, processor, pixels, *batch, tokens_per_microbatch=tokens)
        assert far(ours, expected) < 1e-5


@pytest.mark.parametrize("name", TAKEN)
def test_another_size_is_refused_and_one_that_works_is_named(name, tmp_path):
    families.make(name, tmp_path)
    processor, size = tasks.load_processor(tmp_path), families.FAMILIES[name][-1]
    art.check_size(processor, size)
    with pytest.raises(tasks.InputError, match=rf"--size {size + 6}: .*near it: .*\b{size}\b"):
        art.check_size(processor, size + 6)


def test_a_processor_that_always_tiles_is_refused(tmp_path):
    families.make("SmolVLM", tmp_path)
    with pytest.raises(tasks.InputError, match="--size 512: .*near it: none"):
        art.check_size(tasks.load_processor(tmp_path), 512)


def test_a_size_that_only_the_whole_processor_refuses_is_refused(tmp_path):
    """Mistral 3 merges 2 x 2 patches of 14: its image processor alone would take 238 as it is."""
    families.make("Mistral 3", tmp_path)
    with pytest.raises(tasks.InputError, match="sizes that work near it: 168, 196, 224, 252, 280"):
        art.check_size(tasks.load_processor(tmp_path), 238)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    """As Gemma 4: what comes out of its output matrix are not yet the logits."""
    small = dict(families.TEXT, layer_types=["sliding_attention", "full_attention"],
                 hidden_size_per_layer_input=0, final_logit_softcapping=30.0)
    vision = dict(families.VISION, num_key_value_heads=4, head_dim=16)
    config = hf.Gemma4Config(text_config=small, audio_config=None, vision_config=vision,
                             image_token_id=families.ID("<image>"))
    hf.Gemma4ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(tasks.InputError, match="it scales or caps its logits"):
        art.load_model(str(tmp_path), "cpu")
