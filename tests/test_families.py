"""art.py and eval.py with tiny random models of many families."""

import pytest
import torch
import transformers as hf

import art
import eval as tasks
import families
from family_step import TAKEN, far, gradient, measure, plain_gradient, plain_logps


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


# Logprobs and gradients beside the plain way ------------------------------------------------------


@pytest.fixture(scope="module", params=TAKEN)
def family(request, tmp_path_factory):
    """(model, processor, pixels) of a family."""
    folder = tmp_path_factory.mktemp("family")
    families.make(request.param, folder)
    torch.manual_seed(0)
    size = families.FAMILIES[request.param][-1]
    pixels = art.PixelLogits(torch.randint(256, (3, size, size), dtype=torch.uint8))
    return art.load_model(folder, "cpu"), tasks.load_processor(folder), pixels


QUESTIONS = ["How many?", "What is seven plus eight? Think before you say it.", "Why so?\n\n" * 9]


def given(processor, image, lengths, seed=0):
    """Completions of random ids, of {number of the question: [number of tokens, ...]}."""
    generator, completions = torch.Generator().manual_seed(seed), []
    for number, tokens in lengths.items():
        example = tasks.Example("", tasks.user_turn(QUESTIONS[number]), None)
        text = tasks.render(processor, tasks.prepend(tasks.IMAGE, example) if image else example)
        prompt_ids = tasks.model_inputs(processor, text, image)["input_ids"][0].tolist()
        for count in tokens:
            ids = torch.randint(30, 250, (count,), generator=generator).tolist()
            completions.append(art.Completion(text, prompt_ids, ids, [-5.0] * count, ""))
    return completions


def test_any_list_of_completions_has_the_plain_gradient(family):
    """Three prompts of different lengths with one, two and three completions, mixed up; some have
    one token. In micro-batches of one completion, of some, and of all."""
    model, processor, pixels = family
    completions = given(processor, pixels.to_image(), {0: [9, 1], 1: [4], 2: [1, 7, 3]})
    completions = [completions[i] for i in (3, 0, 5, 2, 1, 4)]
    batch = [completions], torch.randn(1, 6)
    expected, loss, _ = plain_gradient(model, processor, pixels, *batch)
    whole = sum(len(c.prompt_ids) + len(c.ids) for c in completions)
    for tokens in (1, whole // 2, 10 * whole):
        assert far(gradient(model, processor, pixels, *batch, tokens_per_microbatch=tokens),
                   expected) < 1e-5


def test_completions_of_one_token_alone_have_the_plain_logprobs(family):
    model, processor, pixels = family
    completions = given(processor, pixels.to_image(), {0: [1], 1: [1, 1]})
    logps, mask = art.completion_logps(model, processor, pixels, completions)
    expected = [plain_logps(model, processor, c, pixels()) for c in completions]
    assert mask.sum() == 3
    torch.testing.assert_close(logps[mask], torch.cat(expected), rtol=0, atol=2e-5)


def test_a_sampled_image_placeholder_is_an_ordinary_token(family):
    """The plain way refuses it. There another token stands in its place, with its embedding."""
    model, processor, pixels = family
    placeholder, other = model.config.image_token_id, 40
    sampled, *rest = given(processor, pixels.to_image(), {0: [6], 1: [5]})
    sampled.ids[2] = other
    embedding = model.get_input_embeddings()

    def give_the_placeholders_embedding(module, inputs, output):
        odd = module.forward(torch.tensor([placeholder]))[0]
        where = torch.zeros(output.shape[:2], dtype=torch.bool)
        where[:, len(sampled.prompt_ids) + 2] = True
        return torch.where(where[..., None], odd, output)
    hook = embedding.register_forward_hook(give_the_placeholders_embedding)
    expected = plain_logps(model, processor, sampled, pixels())
    hook.remove()
    sampled.ids[2] = placeholder
    found = art.completion_logps(model, processor, pixels, [sampled, *rest])[0][0]
    others = [0, 1, 3, 4, 5]                            # token 2 itself is another one there
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=2e-5)


class NoImage(torch.nn.Module):
    """A parameter without an image, as LoRA's."""

    def to_image(self):
        return None

    def features(self, model, processor, prompt):
        return None


def test_a_text_only_list_after_one_with_an_image_has_the_plain_logprobs(family):
    """Models with MRoPE keep the positions of the image that they saw last."""
    model, processor, pixels = family
    with_image = given(processor, pixels.to_image(), {0: [4], 1: [4, 2]})
    art.completion_logps(model, processor, pixels, with_image)
    completions = given(processor, None, {0: [4, 1], 1: [6], 2: [3]})
    logps, mask = art.completion_logps(model, processor, NoImage(), completions)
    expected = [plain_logps(model, processor, c, None) for c in completions]
    torch.testing.assert_close(logps[mask], torch.cat(expected), rtol=0, atol=2e-5)


def test_a_tokenizer_without_a_pad_token_gives_the_same_logprobs(family, monkeypatch):
    model, processor, pixels = family
    completions = given(processor, pixels.to_image(), {0: [4], 2: [5, 2]})
    expected, _ = art.completion_logps(model, processor, pixels, completions)
    pad_token = processor.tokenizer.pad_token
    processor.tokenizer.pad_token = None
    found, _ = art.completion_logps(model, processor, pixels, completions)
    processor.tokenizer.pad_token = pad_token
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Sizes, and what is refused -----------------------------------------------------------------------


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


def test_a_model_whose_logits_vllm_alone_scales_is_refused(model, monkeypatch):
    """As Granite Vision: transformers' LLaVA does not divide the text model's logits."""
    monkeypatch.setattr(model.config.get_text_config(), "logits_scaling", 8.0, raising=False)
    with pytest.raises(tasks.InputError, match="it scales or caps its logits"):
        art.check_model(model, "cpu")
