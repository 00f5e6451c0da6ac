"""What makes the trainer cheap changes nothing, and what bench.py compares does the same work. How fast it is, bench.py says."""

import pytest
import torch

import art
import bench
from conftest import TINY
from eval import InputError, load_processor, model_inputs, prompt_text, TASKS
from families import FAMILIES, make
from family_step import plain_gradient


@pytest.fixture(scope="module")
def batch(model, processor):
    """Two groups of four completions, 7 to 28 tokens each, behind prompts of 100 tokens."""
    torch.manual_seed(0)
    pixels, groups, advantages = bench.make_groups(model, processor, 100, 28, 4, groups=2)
    for group in groups:
        for i, completion in enumerate(group):
            completion.ids, completion.logps = completion.ids[:7 * (4 - i)], completion.logps[:7 * (4 - i)]
    return pixels, groups, advantages


def gradient(batch, way, model, processor, **options):
    batch[0].logits.grad = None
    way(model, processor, *batch, **options)
    return batch[0].logits.grad.clone()


def far(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_the_slope_kept_for_each_token_is_autograds(model):
    """In float32 and in bfloat16, for likely and for unlikely tokens, however the tokens are cut into chunks."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        output = torch.nn.Linear(32, 1024, bias=False, dtype=dtype).requires_grad_(False)
        with torch.no_grad():
            output.weight *= 12
        states = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        logits = output(states).float()
        targets = torch.where(torch.arange(40) % 2 == 0, logits.argmax(-1), torch.randint(1024, (40,)))
        weight = torch.randn(40)
        kept, reference = (states.clone().requires_grad_() for _ in range(2))
        found = art.TokenLogprobs.apply(kept, targets, output, 16)
        expected = output(reference).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        assert (found - expected).abs().max() < 1e-5 and far(kept.grad.float(), reference.grad.float()) < tolerance


def test_micro_batches_hold_every_completion_once_and_no_more_tokens_than_allowed():
    lengths = [30, 5, 12, 0, 7, 30, 1]
    for room in (-3, 1, 14, 60, 10 ** 9):
        batches = art.micro_batches(lengths, room)
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        assert all(len(batch) * max(lengths[i] for i in batch) <= room for batch in batches if len(batch) > 1)
    assert len(art.micro_batches(lengths, 10 ** 9)) == 1 and len(art.micro_batches(lengths, 60)) == 2


def test_micro_batches_meet_again_in_the_prefix_which_runs_once(batch, model, processor, monkeypatch):
    """Of any size: the same gradient to 1e-5, and one pass of vision tower and prompt for each step and group."""
    calls = {"encode_image": 0, "run_prefix": 0, "completion_logprobs": 0}

    def counted(name, work):
        def run(*arguments):
            calls[name] += 1
            return work(*arguments)
        return run
    whole = gradient(batch, art.backward, model, processor)
    for name in calls:
        monkeypatch.setattr(art, name, counted(name, getattr(art, name)))
    for tokens, passes in ((1, 8), (100 + 28, 6), (100 + 56, 4)):
        calls.update(dict.fromkeys(calls, 0))
        assert far(gradient(batch, art.backward, model, processor, tokens=tokens), whole) < 1e-5
        assert calls == {"encode_image": 1, "run_prefix": 2, "completion_logprobs": passes}


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name][-1]])
def test_micro_batches_give_the_plain_gradient_in_every_family(name, tmp_path, questions):
    """Two groups of completions of 3 to 9 tokens, whole and in micro-batches, against each sequence alone (float32)."""
    make(name, tmp_path)
    processor, model = load_processor(tmp_path), art.load_model(tmp_path, "cpu")
    torch.manual_seed(0)
    size = FAMILIES[name][-1]
    pixels, groups = art.PixelLogits(torch.randint(256, (3, size, size), dtype=torch.uint8)), []
    for question in questions[:2]:
        prompt = prompt_text(processor, TASKS["gsm8k"], question)
        ids = model_inputs(processor, prompt, pixels.to_image())["input_ids"][0].tolist()
        groups.append([art.Completion(prompt, ids, torch.randint(30, 250, (n,)).tolist(), [-5.0] * n, "", False)
                       for n in (9, 3, 6)])
    batch = pixels, groups, torch.randn(2, 3)
    expected, _, _ = plain_gradient(model, processor, *batch)
    for tokens in (8192, len(groups[0][0].prompt_ids) + 12, 1):
        distance = far(gradient(batch, art.backward, model, processor, tokens=tokens), expected)
        print(name, tokens, f"{distance:.1e}")
        assert distance < 1e-5


def test_without_a_shareable_cache_the_gradient_is_the_same(batch, model, processor, monkeypatch):
    expected = gradient(batch, art.backward, model, processor)
    monkeypatch.setattr(art, "SHAREABLE", set())
    with pytest.warns(UserWarning, match="no shared prefix"):
        assert far(gradient(batch, art.backward, model, processor, tokens=130), expected) < 1e-5


def test_the_ways_that_are_compared_do_the_same_work(model, processor):
    """Plain ART of the benchmark has our gradient; LoRA runs the same loss, on all 12 kinds of the decoder's matrices alone."""
    torch.manual_seed(0)
    batch = bench.make_groups(model, processor, 100, 20, 4)
    for completion in batch[1][0]:
        completion.logps = [-99.0] * 20                                     # all importance weights at the cap, which is 1 here
    ours = gradient(batch, art.backward, model, processor, weight_cap=1.0)
    assert far(gradient(batch, bench.plain, model, processor), ours) < 1e-5
    with bench.adapted(model) as wrapped:
        trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
        layers = wrapped.model.model.language_model.layers
        matrices = [m for m in layers.modules() if hasattr(m, "lora_A")]
        everything = [m for m in layers.modules() if type(m) is torch.nn.Linear and not isinstance(m, torch.nn.ModuleDict)]
        assert len(trained) == 2 * len(matrices) and all("language_model" in name for name in trained)
        assert not [m for m in everything if m.weight.shape[0] != 16 and m.weight.shape[1] != 16
                    and not any(m is wrapped_matrix.base_layer for wrapped_matrix in matrices)]
        image, part = batch[0].to_image(), batch[1][0]
        loss = bench.sequence_loss(wrapped, processor, image, part, batch[2][0], 80, logits_to_keep=21)
        with torch.no_grad():
            plain = bench.sequence_loss(wrapped, processor, image, part, batch[2][0], 80)
        loss.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.parameters()) and not any(hasattr(m, "lora_A") for m in model.modules())


def test_memory_is_counted_as_it_lives():
    """Views and in-place results are no new memory, what is freed is gone, what autograd keeps is not."""
    x = torch.ones(1000, requires_grad=True)
    with bench.LiveTensors() as memory:
        for _ in range(5):
            y = torch.ones(1000).add_(1).view(10, 100)                      # 4,000 bytes, freed when the next one is made
        assert memory.live == 4000 and memory.peak == 8000
        z = x.exp().exp()                                                   # both results are kept for the backward
        assert memory.live == 12000
        del y, z
        assert memory.live == 0


def test_the_memory_of_one_and_two_sequences_gives_that_of_many(model, processor):
    batch = bench.make_groups(model, processor, 164, 60, 6)
    for name in ("plain ART", "LoRA", "LoRA, recomputing"):
        prepared, way = bench.WAYS[name]
        with prepared(model) as ready:
            expected = bench.peak_bytes(lambda: way(ready, processor, *batch))
            assert bench.group_bytes(way, ready, processor, batch, 6) == pytest.approx(expected, rel=0.02)


def test_the_prompts_have_the_tokens_they_are_said_to_have(model, processor):
    pixels, groups, _ = bench.make_groups(model, processor, 164, 10, 2)
    ids = model_inputs(processor, groups[0][0].prompt, pixels.to_image())["input_ids"][0].tolist()
    assert len(ids) == 164 == len(groups[0][0].prompt_ids) and ids.count(model.config.image_token_id) == 64
    assert TINY.is_dir()


@pytest.mark.parametrize("share", [None, 1 / 12])
def test_the_memory_that_is_foretold_is_about_what_is_measured(processor, share):
    """Of the tiny model and of a twelfth of Qwen3.5-0.8B's shape, in float32."""
    model = bench.make_model(share)
    batch = bench.make_groups(model, processor, 164, 125, 4)
    weights, foretold = art.memory_needed(model, 164 + 4 * 125)
    measured = bench.peak_bytes(lambda: bench.ours(model, processor, *batch))
    print(f"{foretold / 1e6:.0f} MB foretold, {measured / 1e6:.0f} MB measured")
    assert weights == 4 * sum(p.numel() for p in model.parameters()) and 0.7 < foretold / measured < 1.4


def test_engine_and_trainer_must_fit_into_one_gpu(capsys):
    """What is said and refused before anything is loaded, for the tiny model's 3.5 MB of weights and 176 MB of a pass."""
    art.check_memory(str(TINY), 390e6, 400e6, 0.5, 4096)
    assert "of 0.4 GB (0.4 GB free) vLLM takes 0.2 GB (--gpu-memory-utilization 0.5)" in capsys.readouterr().out
    for utilization, tokens, free in ((0.9, 4096, 400e6), (0.5, 8192, 400e6), (0.005, 4096, 400e6), (0.5, 4096, 300e6)):
        with pytest.raises(InputError, match=f"--gpu-memory-utilization {utilization}.*--tokens-per-microbatch {tokens}.*does not fit"):
            art.check_memory(str(TINY), free, 400e6, utilization, tokens)
