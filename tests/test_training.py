"""The frozen model, the engine and the loop: real vLLM, real gradients, on the tiny model."""

import copy
import dataclasses
import importlib.metadata
import os
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import vllm

import art
import eval as tasks
import quick_loop
from conftest import QUICK, ROOT, SEED, TINY, config, data, keep, prompt
from eval import TASKS, Example, InputError
from family_step import far, fresh, gradient, plain_gradient


@pytest.fixture(scope="module")
def image():
    return art.PixelLogits(art.load_seed(SEED, 256)).to_image()


@pytest.fixture(scope="module")
def batch(llm, processor, questions, image):
    """Two prompts of different length, four completions each, behind the seed; advantages."""
    chosen = sorted(questions[:50], key=lambda example: len(str(example.messages)))
    prompts = [prompt(processor, example) for example in (chosen[0], chosen[-1])]
    groups = art.rollout(llm, prompts, image, 4, max_new_tokens=48, random_seeds=[0, 1])
    return groups, torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def backward(model, processor, pixels, batch, **options):
    """art.py's backward as a first update: (metrics, the groups with their logprobs)."""
    groups = fresh(batch[0])
    return art.backward(model, processor, pixels, groups, batch[1], **options), groups


def old_logps(groups):
    return [logp for group in groups for completion in group for logp in completion.old_logps]


@pytest.fixture(scope="module")
def plain(batch, model, processor):
    """(gradient, loss) of the plain way in float64, but for the gated delta net's kernel, which
    transformers computes in float32."""
    pixels = art.PixelLogits(art.load_seed(SEED, 256))
    return plain_gradient(copy.deepcopy(model).double(), processor, pixels, *batch)[:2]


@pytest.mark.parametrize("tokens", [1, 220, 8192])
def test_shared_prefix_gives_the_plain_gradient(batch, model, processor, seed, plain, tokens):
    """Of any size of micro-batch: each sequence alone, the image encoded each time, all logits. It
    reaches every pixel and no weight."""
    pixels = art.PixelLogits(seed)
    metrics, _ = backward(model, processor, pixels, batch, tokens_per_microbatch=tokens)
    expected, loss = plain
    assert far(pixels.logits.grad, expected) < 1e-5
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert (pixels.logits.grad != 0).float().mean() > 0.999
    assert all(weight.grad is None for weight in model.parameters())


def test_the_gradient_is_the_slope_of_the_loss(batch, model, processor, seed):
    """Central differences along random directions of the image before rounding, which has one."""
    pixels, step = art.PixelLogits(seed, rounding=False), 0.01
    _, groups = backward(model, processor, pixels, batch)
    for direction in torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)):
        direction, losses = torch.kron(direction, torch.ones(16, 16)), []
        for sign in (1, -1):
            moved = art.PixelLogits(seed, rounding=False)
            with torch.no_grad():
                moved.logits += sign * step * direction
            losses.append(art.backward(model, processor, moved, groups, batch[1])["loss"])
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = (pixels.logits.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=0.02, abs=1.5e-5)


@pytest.mark.parametrize("tokens, parts", [(1, 8), (8192, 1)])
def test_a_micro_batch_is_two_passes_and_one_image(batch, model, processor, seed, tokens, parts):
    """The default step is one: its prompts are one pass, all its completions the other."""
    vision, passes = mock.Mock(wraps=model.get_image_features), []
    count = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with mock.patch.object(model, "get_image_features", vision):
        gradient(model, processor, art.PixelLogits(seed), *batch, tokens_per_microbatch=tokens)
    count.remove()
    assert vision.call_count == parts and len(passes) == 2 * parts


def test_micro_batches_hold_at_most_so_many_tokens_with_their_padding():
    """And all completions, in their order; one that has more stands alone."""
    lengths = [("a", 10), ("a", 30), ("b", 30), ("b", 5), ("c", 900), ("a", 1)]
    prompts = {"a": [0] * 50, "b": [0] * 70, "c": [0] * 70}
    samples = [(art.Completion(prompt, prompts[prompt], [1] * tokens, [], ""), 1.0)
               for prompt, tokens in lengths]
    # 230: two prompts padded to 70 tokens each and three completions padded to 30 each
    for most, expected in (9999, [6]), (230, [3, 1, 1, 1]), (229, [2, 2, 1, 1]), (2, [1] * 6):
        parts = list(art.micro_batches(samples, most))
        assert sum(parts, []) == samples and [len(part) for part in parts] == expected


def test_advantages_of_other_numbers_than_completions_are_refused(batch, model, processor, seed):
    """Groups that have no row would be left out silently."""
    with pytest.raises(ValueError, match=r"hold \[4, 4\] completions, .* rows \[4\]"):
        art.backward(model, processor, art.PixelLogits(seed), batch[0], batch[1][:1])
    with pytest.raises(ValueError, match=r"rows \[2, 2, 2, 2\]"):
        art.backward(model, processor, art.PixelLogits(seed), batch[0], batch[1].T)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_slope_kept_for_each_token_is_autograds(dtype, tolerance, temperature):
    """For likely and for unlikely tokens, in more than one of its chunks of 512."""
    torch.manual_seed(0)
    output = torch.nn.Linear(32, 1024, bias=False, dtype=dtype).requires_grad_(False)
    output.weight *= 12
    states, weight = torch.randn(1100, 32).to(dtype), torch.randn(1100)
    logits = output(states).float() / temperature
    likely = torch.arange(1100) % 2 == 0
    targets = torch.where(likely, logits.argmax(-1), torch.randint(1024, (1100,)))
    kept, reference = (states.clone().requires_grad_() for _ in range(2))
    found = art.token_logps(kept, targets, output, temperature)
    logps = (output(reference).float() / temperature).log_softmax(-1)
    expected = logps.gather(1, targets[:, None])[:, 0]
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (found - expected).abs().max() < 1e-5
    assert far(kept.grad.float(), reference.grad.float()) < tolerance


def test_other_token_ids_than_the_processors_are_an_error(batch, model, processor, seed):
    groups = copy.deepcopy(batch[0])
    groups[1][0].prompt_ids[-1] += 1
    with pytest.raises(RuntimeError, match="prompt_ids of a Completion are not those"):
        backward(model, processor, art.PixelLogits(seed), (groups, batch[1]))


def test_a_model_without_a_cache_that_gradients_pass_is_refused(model):
    layer = type("OddLayer", (art.DynamicLayer,), {})
    cache = SimpleNamespace(layers=[art.DynamicLayer(), layer()])
    with mock.patch.object(art, "DynamicCache", lambda config: cache):
        with pytest.raises(InputError, match="--model: .*OddLayer"):
            art.graph_cache(model)


# The trainer is the engine ------------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def trainer(request, model):
    return copy.deepcopy(model).to(request.param)


def long_prompts(processor, name):
    """Three prompts of a task: several turns and tools, where it has them."""
    examples = TASKS[name].load("train", data(name, "train"))
    return [prompt(processor, example) for example in sorted(examples, key=str)[-3:]]


def agreement(llm, processor, trainer, seed, prompts, max_new_tokens=48):
    """What was sampled of the prompts, what art.py measures on it, and the pixels."""
    pixels = art.PixelLogits(seed)
    groups = art.rollout(llm, prompts, pixels.to_image(), 4, max_new_tokens,
                         random_seeds=[0, 1, 2])
    advantages = torch.ones(3, 4)
    metrics, _ = backward(trainer, processor, pixels, (groups, advantages))
    return [completion for group in groups for completion in group], metrics, pixels


@pytest.mark.parametrize("name", TASKS)
def test_the_trainer_is_the_engine(llm, processor, trainer, seed, name):
    """The same logprobs of the same policy, so that with one update the clip is idle."""
    _, metrics, pixels = agreement(llm, processor, trainer, seed, long_prompts(processor, name))
    assert 0 < metrics["mismatch"] < 0.01
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] == pytest.approx(1)
    assert torch.isfinite(pixels.logits.grad).all()


def test_the_entropy_is_that_of_what_was_sampled(llm, processor, model, seed):
    sampled, metrics, _ = agreement(llm, processor, model, seed, long_prompts(processor, "gsm8k"))
    logps = [logp for completion in sampled for logp in completion.vllm_logps]
    assert metrics["entropy"] == pytest.approx(-np.mean(logps), abs=metrics["mismatch"])


def test_completions_that_were_cut_off_agree_too(llm, processor, trainer, seed):
    sampled, metrics, _ = agreement(llm, processor, trainer, seed,
                                    long_prompts(processor, "gsm8k"), max_new_tokens=5)
    assert any(c.truncated for c in sampled)
    assert all(len(c.ids) == 5 if c.truncated else len(c.ids) <= 5 for c in sampled)
    assert 0 < metrics["mismatch"] < 0.01


ODD = ["<|image_pad|>", "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "7"]


def test_odd_tokens_agree_too(llm, processor, trainer, seed, monkeypatch):
    """Image placeholders, which are ordinary tokens once sampled, and ends of text in the middle.
    Engine and trainer know no others here."""
    allowed = processor.tokenizer.convert_tokens_to_ids(ODD)
    odd = partial(vllm.SamplingParams, allowed_token_ids=allowed, ignore_eos=True)
    monkeypatch.setattr(vllm, "SamplingParams", odd)
    output = trainer.get_output_embeddings()
    others = [token for token in range(len(output.weight)) if token not in allowed]
    output.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(others), -torch.inf))
    sampled, metrics, _ = agreement(llm, processor, trainer, seed,
                                    long_prompts(processor, "gsm8k"))
    assert all(set(allowed) >= set(c.ids) and len(c.ids) == 48 for c in sampled)
    # The engine computes in bfloat16, whose step at these logits of about 16 is 1/8.
    assert 0 < metrics["mismatch"] < 0.1


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_gap_to_the_engine_is_small_only_at_the_same_temperature_and_image(
        llm, processor, model, questions, seed, temperature):
    """vLLM's logprobs are those of the tempered policy, and so are ours."""
    prompts = [prompt(processor, example) for example in questions[:4]]
    groups = art.rollout(llm, prompts, art.PixelLogits(seed).to_image(), 4, 48, temperature,
                         range(4))

    def gap(picture, temperature):
        return backward(model, processor, art.PixelLogits(picture), (groups, torch.ones(4, 4)),
                        temperature=temperature)[0]["mismatch"]
    assert gap(seed, temperature) < 0.01
    assert gap(seed, 1.0) > 5 * gap(seed, temperature)
    assert gap(255 - seed, temperature) > 3 * gap(seed, temperature)


@pytest.mark.parametrize("tokens", [1, 8192])
def test_the_clip_works_from_the_second_update(batch, model, processor, seed, tokens):
    """The ratio is that to the logprobs before the first update, which each Completion keeps."""
    pixels, options = art.PixelLogits(seed), {"tokens_per_microbatch": tokens}
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.5, weight_decay=0.0)
    first, groups = backward(model, processor, pixels, batch, **options)
    before = old_logps(groups)
    optimizer.step()
    second = art.backward(model, processor, pixels, groups, batch[1], **options)
    after, _ = backward(model, processor, pixels, batch, **options)     # with logprobs of its own
    assert old_logps(groups) == before and after["clip_fraction"] == 0
    assert first["clip_fraction"] == 0 < second["clip_fraction"]
    assert abs(second["ratio"] - 1) > 1e-3
    assert second["mismatch"] == first["mismatch"] != after["mismatch"]     # of what was sampled
    assert second["entropy"] == first["entropy"] != after["entropy"]


# Dynamic sampling ---------------------------------------------------------------------------------


class Shaped(tasks.Task):
    """Wrong answers have different rewards."""

    def judge(self, examples, texts):
        return [(text, float(text == "right")) for text in texts]

    def rewards(self, example, completions):
        return [1.0 if c.score else 0.1 * i for i, c in enumerate(completions)]


@pytest.fixture
def sample(monkeypatch):
    """art.py's sampling of one step: a function of flags that returns (groups, metrics, asked).
    An example says how many of its four completions are right."""
    asked = []

    def rollout(llm, prompts, image, group_size, *others):
        asked.extend(prompts)
        texts = [["right"] * rights + ["wrong"] * (4 - rights) for rights in prompts]
        return [[art.Completion("", [1], [1] * (i + 1), [0.0], text)
                 for i, text in enumerate(row)] for row in texts]
    monkeypatch.setattr(art, "rollout", rollout)
    monkeypatch.setattr(art, "render", lambda processor, example: example)

    def sample(*more, step=1, rights=(0, 4, 0, 2, 1, 3)):
        asked.clear()
        flags = config("unused", "--task", "gsm8k", "--prompts", 2, "--rounds", 3, "--group-size",
                       4, *more)
        found = art.sample_groups(None, None, Shaped(None, None), list(rights), None, step, flags)
        return *found, list(asked)
    return sample


def rights(groups):
    return [sum(c.score for c in group) for group in groups]


@pytest.mark.parametrize("oversampling", [1, 2, 3])
@pytest.mark.parametrize("step", range(10))
def test_the_first_groups_that_hold_right_and_wrong_are_kept(sample, oversampling, step):
    """In the order of their drawing, so that no kind of question is preferred, and judged by the
    score: rewards differ in a group that is all wrong, too."""
    groups, metrics, asked = sample("--oversampling", oversampling, step=step)
    varied = [right for right in asked if right in (1, 2, 3)]
    assert rights(groups) == varied[:2] and metrics["groups"] == len(groups)
    for group in groups:
        assert [c.reward for c in group] == Shaped(None, None).rewards(None, group)


@pytest.mark.parametrize("oversampling", [1, 2, 3])
@pytest.mark.parametrize("step", range(10))
def test_what_was_sampled_is_measured_whole(sample, oversampling, step):
    """Also the groups that are thrown away."""
    _, metrics, asked = sample("--oversampling", oversampling, step=step)
    assert metrics["sampled_groups"] == len(asked)
    assert metrics["score"] == pytest.approx(np.mean(asked) / 4)
    assert metrics["length"] == 2.5 and metrics["truncated"] == 0


@pytest.mark.parametrize("oversampling, sampled", [(1, 6), (2, 12), (3, 18)])
def test_rounds_are_bounded_where_nothing_varies(sample, oversampling, sampled):
    groups, metrics, asked = sample("--oversampling", oversampling, rights=[0] * 99)
    assert groups == [] and len(asked) == sampled and metrics["rounds"] == 3


def test_a_round_samples_for_the_groups_that_are_still_wanted(sample):
    """Of six prompts in the first round one is varied: three more for the other group."""
    step = next(step for step in range(99) if len(rights(sample(
        "--oversampling", 3, "--rounds", 1, step=step, rights=[0] * 20 + [2] * 5)[0])) == 1)
    _, metrics, asked = sample("--oversampling", 3, "--rounds", 2, step=step,
                               rights=[0] * 20 + [2] * 5)
    assert len(asked) == 9 and metrics["rounds"] == 2


def test_wide_rounds_need_fewer_of_them(sample):
    half = [0, 2] * 50
    rounds = [np.mean([sample("--oversampling", width, step=step, rights=half)[1]["rounds"]
                       for step in range(40)]) for width in (1, 3)]
    assert rounds[1] < 1.5 < rounds[0]


def test_data_smaller_than_a_wide_round_are_sampled_whole(sample):
    groups, metrics, asked = sample("--oversampling", 3, rights=[2, 1, 3])
    assert sorted(asked) == [1, 2, 3] and len(groups) == 2 and metrics["rounds"] == 1


def test_a_step_draws_the_same_again_and_another_step_does_not(sample):
    assert sample(step=3)[2] == sample(step=3)[2] != sample(step=4)[2]


def load_examples(examples, validation, prompts=1):
    flags = config("unused", "--task", "gsm8k", "--prompts", prompts, "--validation", validation)
    task = SimpleNamespace(load=lambda split, data: list(examples), check=lambda processor: None)
    with mock.patch.object(art, "drop_long", lambda processor, examples, *others: examples):
        return art.load_examples(flags, task, None, None)


def test_validation_is_a_part_of_training_that_shares_no_key():
    examples = [Example(str(i // 2), [], i) for i in range(200)]
    training, validation = load_examples(examples, 20)
    assert len(validation) == 20 and len(training) >= 160
    assert not {e.key for e in training} & {e.key for e in validation}
    _, again = load_examples(examples[::-1], 20)                        # whatever their order
    assert {e.key for e in again} == {e.key for e in validation}
    with pytest.raises(InputError, match="--prompts 9: only [0-8] examples are left beside"):
        load_examples(examples[:20], 12, prompts=9)


def test_flags_reach_the_optimiser_the_loss_and_the_engine(tmp_path, llm, model):
    flags = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train"), "--seed", SEED,
             "--max-new-tokens", 40, "--max-model-len", 512, "--validation", 8, "--prompts", 8,
             "--steps", 3, "--weight-decay", 0.25, "--temperature", 0.7, "--group_size", 3,
             "--lr", 0.3, "--warmup", 2, "--eps-low", 0.11, "--eps-high", 0.22,
             "--weight-cap", 1.5, "--tokens-per-microbatch", 333, "--validate-every", 9]
    spies = {name: mock.Mock(wraps=getattr(art, name)) for name in ("backward", "dapo_loss")}
    made, generate = mock.Mock(wraps=torch.optim.AdamW), mock.Mock(wraps=llm.generate)
    lines = []
    with (mock.patch.object(torch.optim, "AdamW", made), mock.patch.multiple(art, **spies),
          mock.patch.object(llm, "generate", generate)):
        art.train(config(tmp_path / "run", *flags), on_step=keep(lines), llm=llm, model=model)
    assert made.call_args.kwargs == {"weight_decay": 0.25}
    sampled = next(call.args[1] for call in generate.call_args_list
                   if isinstance(call.args[1], list))               # not those of a validation
    assert {(s.temperature, s.n, s.max_tokens, s.top_p, s.top_k) for s in sampled} == {
        (0.7, 3, 40, 1.0, 0)}
    assert spies["backward"].call_args.args[6:9] == (0.7, 1.5, 333)
    used = spies["dapo_loss"].call_args.kwargs
    assert (used["eps_low"], used["eps_high"]) == (0.11, 0.22) and used["weight"].max() <= 1.5
    assert [line.get("lr") for line in lines] == pytest.approx([None, 0.15, 0.3, 0.3])
    assert all(line["mismatch"] < 0.01 for line in lines[1:])


@pytest.mark.parametrize("task", ["gpqa", "toolmind"])
def test_the_other_tasks_train_too(tmp_path, llm, model, task):
    lines = []
    art.train(config(tmp_path, "--task", task, "--seed", SEED, *QUICK, data(task, "train"),
                     "--steps", 2, "--validation", 16), on_step=keep(lines), llm=llm, model=model)
    assert lines[-1]["groups"] > 0 and lines[-1]["validation"] > 0 and lines[-1]["moved"] > 0


def test_each_png_carries_its_task_model_and_settings_without_folders(tmp_path):
    """Each names the step that it shows: seed.png is step 0's, with the seed's own accuracy."""
    lines = []
    quick_loop.train(tmp_path / "run", "--model", TINY, steps=1, on_step=keep(lines))
    best = max((0, 1), key=lambda step: lines[step]["validation"])
    for name, step in {"seed": 0, "panel": 1, "last": 1, "best": best}.items():
        notes = tasks.Image.open(tmp_path / "run" / f"{name}.png").text
        assert (notes["task"], notes["model"], notes["step"]) == ("gsm8k", "tiny", str(step)), name
        assert (notes["seed"], notes["data"], notes["lr"]) == ("seed.png", "train.jsonl", "0.1")
        if name != "last":
            assert float(notes["accuracy"]) == lines[step]["validation"]
        for text in notes.values():
            assert str(ROOT) not in text and str(tmp_path) not in text


NUMBERS = [field for field in dataclasses.fields(art.Config) if field.type in (int, float)]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf"])
@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_a_number_that_means_nothing_is_refused_in_one_sentence(field, value, capsys, tmp_path):
    """In both spellings, before anything is loaded."""
    for flag in {f"--{field.name}", f"--{field.name.replace('_', '-')}"}:
        with mock.patch.object(art, "load_processor", pytest.fail):
            with pytest.raises(SystemExit) as error:
                art.main(["--task", "gsm8k", "--out", str(tmp_path / "run"), f"{flag}={value}"])
        said = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and said[-1].startswith("art.py: error: "), said
        assert field.name.replace("_", "-") in said[-1].replace("_", "-"), said
    assert not (tmp_path / "run").exists()


def test_without_fla_a_gpu_is_refused(model, monkeypatch):
    """transformers would take a reference implementation that is ten times slower, silently."""
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(InputError, match="flash-linear-attention fails .*fla.*pip install .*\\.$"):
        art.check_model(model, "cuda:0")
    art.check_model(model, "cpu")


def test_an_older_transformers_is_refused(model, monkeypatch):
    """5.17's models take no image features from outside."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: (
        "5.17.0" if name == "transformers" else version(name)))
    with pytest.raises(InputError, match=r"transformers>=5\.18.*pip install .*\.$"):
        art.check_model(model, "cpu")


def test_tilelang_is_off_before_fla_is_imported(monkeypatch):
    """fla reads FLA_TILELANG when transformers imports it, with the model's code; with pip's nvcc
    its TileLang kernels do not compile."""
    def from_pretrained(*args, **options):
        assert "fla" not in sys.modules and os.environ["FLA_TILELANG"] == "0"
        raise KeyboardInterrupt
    monkeypatch.setenv("FLA_TILELANG", "")              # so that it is restored
    monkeypatch.delenv("FLA_TILELANG")
    monkeypatch.setattr(art.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(KeyboardInterrupt):
        art.load_model(str(TINY), "cpu")
