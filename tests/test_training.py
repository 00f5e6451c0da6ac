"""The frozen model, the engine and the loop: real vLLM, real gradients, on the tiny model."""

import copy
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open

import art
import eval as tasks
from conftest import SEED, TINY, art_args, data, prompt
from eval import TASKS, InputError, evaluate
from family_step import far, gradient, plain_gradient


@pytest.fixture(scope="module")
def image():
    return art.PixelLogits(art.load_seed(SEED, 256)).to_image()


@pytest.fixture(scope="module")
def batch(llm, processor, questions, image):
    """Two prompts of different length, four completions each, behind the seed; advantages."""
    chosen = sorted(questions[:50], key=lambda example: len(str(example["messages"])))
    prompts = [prompt(processor, example) for example in (chosen[0], chosen[-1])]
    groups = art.rollout(llm, prompts, image, 4, max_new_tokens=48, rngs=[0, 1])
    return groups, torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------
# The gradient

@pytest.mark.parametrize("tokens", [1, 220, 8192])
def test_shared_prefix_gives_the_plain_gradient(batch, model, processor, seed, tokens):
    """Of any size of micro-batch: each sequence alone, the image encoded each time, all logits."""
    fast, slow = art.PixelLogits(seed), art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, fast, *batch, tokens_per_microbatch=tokens)
    expected, loss, _ = plain_gradient(model, processor, slow, *batch)
    assert far(fast.logits.grad, expected) < 1e-5
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_gradient_is_that_of_double_precision(batch, model, processor, seed):
    """The plain way in float64, but for the gated delta net's kernel, which transformers computes
    in float32."""
    slow = art.PixelLogits(seed)
    expected, _, _ = plain_gradient(copy.deepcopy(model).double(), processor, slow, *batch)
    assert far(gradient(model, processor, art.PixelLogits(seed), *batch), expected) < 1e-5


def test_gradient_reaches_every_pixel_and_no_weight(batch, model, processor, seed):
    found = gradient(model, processor, art.PixelLogits(seed), *batch)
    assert (found != 0).float().mean() > 0.999 and torch.isfinite(found).all()
    assert all(weight.grad is None for weight in model.parameters())


def test_the_gradient_is_the_slope_of_the_loss(batch, model, processor, seed):
    """Central differences along random directions of the image before rounding, which has one."""
    pixels, step = art.PixelLogits(seed, "none"), 0.01
    _, old_logps = art.backward(model, processor, pixels, *batch)
    for direction in torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)):
        direction, losses = torch.kron(direction, torch.ones(16, 16)), []
        for sign in (1, -1):
            moved = art.PixelLogits(seed, "none")
            with torch.no_grad():
                moved.logits += sign * step * direction
            metrics, _ = art.backward(model, processor, moved, *batch, old_logps=old_logps)
            losses.append(metrics["loss"])
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = (pixels.logits.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=0.02, abs=1.5e-5)


def test_micro_batches_meet_again_in_the_prefix_which_runs_once(batch, model, processor, seed):
    """One pass of vision tower and prompt for each step and group, whatever the micro-batches."""
    counted = {name: mock.Mock(wraps=getattr(art, name))
               for name in ("encode_image", "run_prefix", "completion_logprobs")}
    with mock.patch.multiple(art, **counted):
        for tokens, passes in ((1, 8), (8192, 2)):
            gradient(model, processor, art.PixelLogits(seed), *batch, tokens_per_microbatch=tokens)
            assert [call.call_count for call in counted.values()] == [1, 2, passes]
            for call in counted.values():
                call.reset_mock()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_slope_kept_for_each_token_is_autograds(dtype, tolerance, temperature):
    """For likely and for unlikely tokens, however they are cut into chunks."""
    torch.manual_seed(0)
    output = torch.nn.Linear(32, 1024, bias=False, dtype=dtype).requires_grad_(False)
    output.weight *= 12
    states, weight = torch.randn(40, 32).to(dtype), torch.randn(40)
    logits = output(states).float() / temperature
    likely = torch.arange(40) % 2 == 0
    targets = torch.where(likely, logits.argmax(-1), torch.randint(1024, (40,)))
    kept, reference = (states.clone().requires_grad_() for _ in range(2))
    found = art.TokenLogprobs.apply(kept, targets, output, temperature, 16)
    logps = (output(reference).float() / temperature).log_softmax(-1)
    expected = logps.gather(1, targets[:, None])[:, 0]
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (found - expected).abs().max() < 1e-5
    assert far(kept.grad.float(), reference.grad.float()) < tolerance


def test_parts_of_a_step_add_up_to_the_whole(batch, model, processor, seed):
    """As two ranks do it: gradients and metrics of either's groups, with the step's tokens."""
    groups, advantages = batch
    total, added = sum(len(c.ids) for group in groups for c in group), art.PixelLogits(seed)
    parts = [art.backward(model, processor, added, groups[i:i + 1], advantages[i:i + 1],
                          total_tokens=total)[0] for i in (0, 1)]
    whole = art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, whole, *batch)
    assert far(added.logits.grad, whole.logits.grad) < 1e-5
    for name, value in metrics.items():
        assert parts[0][name] + parts[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_an_empty_completion_counts_for_nothing(batch, model, processor, seed):
    groups, advantages = batch
    first = groups[0][0]
    empty = art.Completion(first.prompt, first.prompt_ids, [], [], "", False)
    more = [[*groups[0], empty], groups[1]]
    found = art.PixelLogits(seed)
    art.backward(model, processor, found, more, [torch.cat([advantages[0], torch.ones(1)]),
                                                 advantages[1]])
    assert far(found.logits.grad, gradient(model, processor, art.PixelLogits(seed), *batch)) < 1e-5


def test_a_sampled_image_placeholder_is_an_ordinary_token(batch, model, processor, seed):
    """Only the prompt's placeholders take image features."""
    placeholder = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    first, second, *others = batch[0][0]
    odd = copy.deepcopy([first, second])
    for completion in odd:
        completion.ids.insert(2, placeholder)
        completion.logps.insert(2, -9.0)
    short = copy.deepcopy(others)
    for completion in short:
        del completion.ids[1:], completion.logps[1:]
    pixels = art.PixelLogits(seed)
    metrics, _ = art.backward(model, processor, pixels, [odd, short], batch[1][:, :2])
    assert torch.isfinite(pixels.logits.grad).all() and metrics["loss"] != 0


def test_a_sampled_logprob_that_is_no_number_shows_in_the_metrics(batch, model, processor, seed):
    groups = copy.deepcopy(batch[0])
    groups[0][0].logps[0] = float("nan")
    metrics, _ = art.backward(model, processor, art.PixelLogits(seed), groups, batch[1])
    assert not all(map(np.isfinite, metrics.values()))


def test_other_token_ids_than_the_processors_are_an_error(batch, model, processor, seed):
    groups = copy.deepcopy(batch[0])
    groups[1][0].prompt_ids[-1] += 1
    with pytest.raises(RuntimeError, match="disagree about the prompt's token ids"):
        art.backward(model, processor, art.PixelLogits(seed), groups, batch[1])


def test_a_model_without_a_cache_that_gradients_pass_is_refused(model):
    layer = type("OddLayer", (art.DynamicLayer,), {})
    cache = SimpleNamespace(layers=[art.DynamicLayer(), layer()])
    with mock.patch.object(art, "DynamicCache", lambda config: cache):
        with pytest.raises(InputError, match="--model: .*OddLayer"):
            art.graph_cache(model)


# --------------------------------------------------------------------------------------------------
# Trainer and engine

def test_the_engines_token_ids_are_the_processors(batch, processor, image):
    for completion in (completion for group in batch[0] for completion in group):
        ids = tasks.model_inputs(processor, completion.prompt, image)["input_ids"][0].tolist()
        assert ids == completion.prompt_ids and len(completion.ids) == len(completion.logps) > 0
        text = processor.tokenizer.decode(completion.ids, skip_special_tokens=True)
        assert text == completion.text


ODD = ["<|image_pad|>", "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "7"]


class OddEngine:
    """The engine, made to sample image placeholders and ends of text anywhere."""
    def __init__(self, llm, allowed):
        self.llm, self.allowed = llm, allowed

    def generate(self, requests, sampling, **options):
        for params in sampling:
            params.allowed_token_ids, params.ignore_eos = self.allowed, True
        return self.llm.generate(requests, sampling, **options)


class OddOutput:
    """The trainer's output layer with the same restriction."""
    def __init__(self, output, allowed):
        self.output, self.weight, self.allowed = output, output.weight, allowed

    def __call__(self, hidden):
        logits = self.output(hidden)
        only = torch.full_like(logits, -torch.inf)
        only[:, self.allowed] = logits[:, self.allowed]
        return only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sums", "choices", "tool calls", "cut short", "odd tokens"])
def test_the_trainer_is_the_engine(llm, processor, model, seed, kind, dtype):
    """Token ids are vLLM's own and the logprobs agree, whatever the prompt (several turns, tools)
    and whatever was sampled (cut at the limit, placeholders and ends of text in the middle)."""
    name = {"choices": "gpqa", "tool calls": "toolmind"}.get(kind, "gsm8k")
    task, pixels = TASKS[name], art.PixelLogits(seed)
    examples = task.load("train", data(name, "train"))
    examples = sorted(examples, key=lambda example: len(str(example)))[-3:]
    assert name != "toolmind" or all(len(e["messages"]) > 1 and e["tools"] for e in examples)
    engine, limit, trainer = llm, 5 if kind == "cut short" else 48, copy.deepcopy(model).to(dtype)
    allowed = processor.tokenizer.convert_tokens_to_ids(ODD)
    if kind == "odd tokens":
        engine = OddEngine(llm, allowed)
        output = OddOutput(trainer.get_output_embeddings(), allowed)
        trainer.get_output_embeddings = lambda: output
    prompts = [prompt(processor, example) for example in examples]
    groups = art.rollout(engine, prompts, pixels.to_image(), 4, limit, rngs=[0, 1, 2])
    completions = [completion for group in groups for completion in group]
    if kind == "cut short":
        assert all(len(c.ids) == 5 if c.cut else len(c.ids) <= 5 for c in completions)
        assert any(c.cut for c in completions)
    if kind == "odd tokens":
        assert all(set(allowed) >= set(c.ids) and len(c.ids) == 48 for c in completions)
    metrics, _ = art.backward(trainer, processor, pixels, groups, torch.ones(3, 4))
    # The engine computes in bfloat16, whose step at the odd tokens' logits of about 16 is 1/8.
    assert 0 < metrics["mismatch"] < (0.1 if kind == "odd tokens" else 0.01)
    assert metrics["clip_fraction"] == 0                        # one update: the clip is idle
    assert metrics["ratio"] == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_trainer_is_the_engine_at_another_temperature(llm, processor, model, questions, seed,
                                                          temperature):
    """vLLM's logprobs are those of the tempered policy, and so are ours."""
    prompts, pixels = [prompt(processor, e) for e in questions[:4]], art.PixelLogits(seed)
    groups = art.rollout(llm, prompts, pixels.to_image(), 4, 48, temperature, range(4))
    gaps = [art.backward(model, processor, art.PixelLogits(seed), groups, torch.ones(4, 4),
                         temperature=assumed)[0]["mismatch"] for assumed in (temperature, 1.0)]
    assert gaps[0] < 0.01 and gaps[1] > 5 * gaps[0]


def test_the_gap_to_the_engine_is_small_only_behind_the_same_image(batch, model, processor, seed):
    gaps = [art.backward(model, processor, art.PixelLogits(picture), *batch)[0]["mismatch"]
            for picture in (seed, 255 - seed)]
    assert gaps[0] < 0.01 and gaps[1] > 3 * gaps[0]


def test_entropy_is_the_mean_of_minus_logp_over_the_sampled_tokens(batch, model, processor, seed):
    metrics, old_logps = art.backward(model, processor, art.PixelLogits(seed), *batch)
    sampled = [logp for group in batch[0] for c in group for logp in c.logps]
    assert metrics["entropy"] == pytest.approx(-np.mean(sampled), abs=metrics["mismatch"])
    exact = -sum(logps.sum().item() for logps in old_logps) / len(sampled)
    assert metrics["entropy"] == pytest.approx(exact, rel=1e-5)


def test_the_clip_works_from_the_second_update(batch, model, processor, seed):
    pixels = art.PixelLogits(seed)
    optimizer = torch.optim.AdamW(pixels.parameters(), lr=0.5, weight_decay=0.0)
    first, old_logps = art.backward(model, processor, pixels, *batch)
    optimizer.step()
    second, kept = art.backward(model, processor, pixels, *batch, old_logps=old_logps)
    assert all(torch.equal(a, b) for a, b in zip(kept, old_logps))
    assert first["clip_fraction"] == 0 < second["clip_fraction"]
    assert abs(second["ratio"] - 1) > 1e-3
    assert second["mismatch"] == first["mismatch"]      # that of the policy that was sampled
    assert second["entropy"] == first["entropy"]


def test_rounding_straight_through_trains_what_is_deployed(batch, model, processor, seed):
    """Logprobs behind the image that is trained against those behind the PNG: equal to the bit
    here, and not where the backward pass sees the continuous image, as in the paper."""
    noise, gaps = torch.randn(seed.shape, generator=torch.Generator().manual_seed(0)), {}
    for rounding in ("straight-through", "none"):
        trained = art.PixelLogits(seed, rounding)
        with torch.no_grad():
            trained.logits += 0.5 * noise
        levels = torch.from_numpy(np.array(trained.to_image())).permute(2, 0, 1)
        logps = [torch.cat([part.flatten() for part in
                            art.backward(model, processor, pixels, *batch)[1]])
                 for pixels in (trained, art.PixelLogits(levels))]
        gaps[rounding] = (logps[0] - logps[1]).abs().max()
    assert gaps["straight-through"] == 0 < gaps["none"]


def test_the_policy_that_is_trained_is_the_png(llm, processor, questions, seed, tmp_path):
    """vLLM samples the same greedy completions for the saved file as for the image in memory."""
    pixels = art.PixelLogits(seed)
    with torch.no_grad():
        pixels.logits += torch.randn_like(pixels.logits)
    tasks.save(tasks.png_bytes(pixels.to_image(), {"step": 1}), tmp_path / "a.png")
    pictures = pixels.to_image(), tasks.open_picture(tmp_path / "a.png")
    texts = [[result["text"] for result in
              evaluate(llm, processor, TASKS["gsm8k"], questions[:16], picture, 48)]
             for picture in pictures]
    assert texts[0] == texts[1]


# --------------------------------------------------------------------------------------------------
# The loop

def test_dynamic_sampling_keeps_groups_with_right_and_wrong_answers_only(monkeypatch):
    """Groups are judged by the score, refilled with new prompts, and the rounds are bounded."""
    asked = []

    def rollout(llm, prompts, image, group_size, max_new_tokens, temperature, rngs):
        asked.extend(prompts)
        return [[art.Completion("", [1], [1] * (4 if i else 10), [0.0],
                                "right" if i < rights else "wrong", False)
                 for i in range(group_size)] for rights in prompts]
    monkeypatch.setattr(art, "rollout", rollout)
    monkeypatch.setattr(art, "behind", lambda part, example: example)
    monkeypatch.setattr(art, "render", lambda processor, example: example)
    task = SimpleNamespace(score=lambda example, text: float(text == "right"),
                           reward=lambda example, text: 1.0 if text == "right" else 0.1 * example)
    args = SimpleNamespace(prompts=2, rounds=3, group_size=4, max_new_tokens=10, overlong_cache=8,
                           temperature=1.0)

    def sample(rights):
        return art.sample_groups(None, None, task, enumerate(rights), None, args)
    groups, rewards, metrics = sample([0, 4, 0, 2, 1, 3])
    assert [[c.text for c in group].count("right") for group in groups] == [2, 1]
    assert asked == [0, 4, 0, 2, 1]
    assert metrics["groups"] == 2 and metrics["sampled_groups"] == 5
    assert metrics["score"] == pytest.approx((0 + 4 + 0 + 2 + 1) / 20)  # of all that was sampled
    # The first completion has 10 tokens, 8 past 10 - 8: penalty -1; the others have 4: -0.25.
    assert rewards[0].tolist() == pytest.approx([0.0, 0.75, 0.2 - 0.25, 0.2 - 0.25])
    assert sample([0] * 9)[2]["sampled_groups"] == 6


def load_examples(examples, validation, prompts=1):
    args = SimpleNamespace(data=None, limit=None, max_model_len=9, max_new_tokens=1,
                           prompts=prompts, validation=validation)
    task = SimpleNamespace(load=lambda split, data, limit: examples)
    with mock.patch.multiple(art, fitting=lambda processor, examples, *others: examples,
                             behind=lambda part, example: example):
        return art.load_examples(args, task, None, None)


def test_validation_is_a_part_of_training_that_shares_no_key():
    examples = [{"key": str(i // 2)} for i in range(200)]
    training, validation = load_examples(examples, 20)
    assert len(validation) == 20 and len(training) >= 160
    assert not {e["key"] for e in training} & {e["key"] for e in validation}
    _, again = load_examples(examples[::-1], 20)
    assert {e["key"] for e in again} <= {e["key"] for e in examples}
    with pytest.raises(InputError, match="--prompts 9: only [0-8] examples are left beside"):
        load_examples(examples[:20], 10, prompts=9)


def test_prompts_come_once_each_before_one_comes_again():
    stream = art.endless_prompts("abcd", 0, 0)
    first = [next(stream) for _ in range(12)]
    for i in (0, 4, 8):
        assert sorted(example for _, example in first[i:i + 4]) == list("abcd")
    assert len({rng for rng, _ in first}) == 12
    skipped = art.endless_prompts("abcd", 0, 5)
    assert [next(skipped) for _ in range(7)] == first[5:]


def test_flags_reach_the_optimiser_and_the_engine(tmp_path, engine):
    """--betas, --weight-decay, --temperature, --group-size, --eps-low, --max-change and so on."""
    flags = ["--task", "gsm8k", "--model", TINY, "--data", data("gsm8k", "train"), "--seed", SEED,
             "--max-new-tokens", 40, "--max-model-len", 512, "--validation", 8, "--prompts", 8,
             "--steps", 3, "--betas", 0.5, 0.75, "--weight-decay", 0.25, "--temperature", 0.7,
             "--group-size", 3, "--lr", 0.3, "--warmup", 2, "--eps-low", 0.11, "--eps-high", 0.22,
             "--weight-cap", 1.5, "--tokens-per-microbatch", 333, "--max-change", 2,
             "--validate-every", 9]
    made = mock.Mock(wraps=torch.optim.AdamW)
    spies = {name: mock.Mock(wraps=getattr(art, name)) for name in ("rollout", "backward")}
    generate = mock.Mock(wraps=engine.generate)
    with (mock.patch.object(torch.optim, "AdamW", made), mock.patch.multiple(art, **spies),
          mock.patch.object(engine, "generate", generate)):
        art.train(art_args(tmp_path / "run", *flags))
    args, options = made.call_args
    assert (*args[1:], *options.values()) == (0.3, [0.5, 0.75], 0.25)
    sampled = next(call.args[1] for call in generate.call_args_list
                   if isinstance(call.args[1], list))               # not those of a validation
    assert {(s.temperature, s.n, s.max_tokens, s.top_p, s.top_k) for s in sampled} == {
        (0.7, 3, 40, 1.0, 0)}
    call = spies["backward"].call_args.args
    assert call[5].keywords == {"eps_low": 0.11, "eps_high": 0.22} and call[7:10] == (333, 0.7, 1.5)
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line.get("lr") for line in metrics] == pytest.approx([None, 0.15, 0.3, 0.3])
    assert all(line["mismatch"] < 0.01 for line in metrics[1:])
    seed, last = (np.asarray(tasks.open_picture(tmp_path / "run" / name), dtype=int)
                  for name in ("seed.png", "last.png"))
    assert np.abs(last - seed).max() == 2
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_the_pngs_notes_name_model_and_task_without_folders(tmp_path, engine):
    flags = ["--task", "gpqa", "--model", TINY, "--data", data("gpqa", "train"), "--seed", SEED,
             "--max-new-tokens", 16, "--max-model-len", 512, "--validation", 4, "--steps", 1]
    art.train(art_args(tmp_path / "run", *flags))
    notes = tasks.Image.open(tmp_path / "run" / "best.png").text
    assert notes["task"] == "gpqa" and notes["model"] == "tiny" and notes["step"] in ("0", "1")
    assert notes["seed"] == "seed.png" and notes["data"] == "train.csv"
    assert 0 <= float(notes["accuracy"]) <= 1 and str(TINY.parent) not in str(notes)


# --------------------------------------------------------------------------------------------------
# The stand-in

@pytest.mark.parametrize("task", TASKS)
def test_the_stand_in_does_each_task_unreliably(llm, processor, task, image):
    """Without an image or behind the seed it can do each task, but answers wrongly as often."""
    examples = TASKS[task].load("test", data(task, "test"), 120)
    for arm in ("none", image):
        results = evaluate(llm, processor, TASKS[task], examples, arm, 64)
        accuracy = np.mean([result["score"] for result in results])
        print(task, arm, accuracy)
        assert 0.15 <= accuracy <= 0.7


def test_the_stand_in_is_small():
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert 1e6 < sum(file.get_tensor(name).numel() for name in file.keys()) < 4e6
    assert sum(path.stat().st_size for path in TINY.iterdir() if path.is_file()) < 6e6
    layers = json.loads((TINY / "config.json").read_text())["text_config"]["layer_types"]
    assert layers[:2] == ["linear_attention", "full_attention"]
