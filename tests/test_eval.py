"""eval.py as an instrument: arms on the same questions, paired differences, completions that are
kept, and the engine it starts."""

import dataclasses
import re
import struct
import sys
import zlib
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
import vllm
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

import eval as tasks
from conftest import ARMS, LIMIT, SEED, TINY, data, eval_flags, eval_main, kept
from eval import TASKS


class Parrot:
    """An engine that says the same to all requests, until it fails."""
    def __init__(self, calls=9):
        self.calls = iter(range(calls))

    def generate(self, prompts, sampling, **options):
        next(self.calls)
        sample = mock.Mock(text="Answer: 1", token_ids=[1, 2, 3], finish_reason="stop")
        processor = tasks.load_processor(str(TINY))
        outputs = []
        for prompt in prompts:
            image = prompt.get("multi_modal_data", {}).get("image")
            ids, = tasks.model_inputs(processor, prompt["prompt"], image)["input_ids"]
            outputs.append(mock.Mock(outputs=[sample], prompt=prompt["prompt"],
                                     prompt_token_ids=ids))
        return outputs


@pytest.mark.parametrize("task", ["gsm8k", "toolmind"])
def test_arms_answer_the_same_questions_in_one_table(task, tmp_path, llm, capsys):
    eval_main(*ARMS, *eval_flags(task, tmp_path / "out"), llm=llm)
    printed, records = capsys.readouterr().out, kept(tmp_path / "out")
    table = tasks.table(records)
    assert f"{task}, n = {LIMIT}, " in printed and printed.endswith(table.to_string() + "\n")
    assert list(records) == list(table.index) == ARMS
    assert any("paper_score" in name for name in table) == (task == "gsm8k")
    results = {arm: pandas.DataFrame(record["results"]) for arm, record in records.items()}
    for arm, found in results.items():
        row = table.loc[arm]
        assert list(found["key"]) == list(results["none"]["key"]) and len(found) == LIMIT
        pattern = r"([-\d.]+)  \[ *([-\d.]+), *([-\d.]+)\]"
        accuracy, low, high = map(float, re.fullmatch(pattern, row.iloc[0]).groups())
        assert accuracy == pytest.approx(100 * found["score"].mean(), abs=0.01)
        assert 0 <= low <= accuracy <= high <= 100
        less, low, high = map(float, re.fullmatch(pattern, row["less none"]).groups())
        difference = found["score"] - results["none"]["score"]
        assert less == pytest.approx(100 * difference.mean(), abs=0.01) and low <= less <= high
        for name in ("readable", "truncated", "failed"):
            assert float(row[f"{name} %"]) == pytest.approx(100 * found[name].mean(), abs=0.1)
        assert float(row["tokens"]) == pytest.approx(found["tokens"].mean(), abs=0.1)
        picture = tasks.png_bytes(tasks.open_picture(SEED))
        assert row["bytes"] == (len(picture) if arm == SEED else 0)
    assert any(found["score"].any() for found in results.values())


def test_the_bootstrap_interval_is_the_binomials_and_does_not_change():
    scores, keys = np.array([1.0] * 120 + [0.0] * 180), list(range(300))
    found = tasks.interval(scores, keys)
    assert found == pytest.approx((40, 40 - 1.96 * 2.83, 40 + 1.96 * 2.83), abs=0.5)
    assert tasks.interval(scores, keys) == found


def test_the_bootstrap_draws_rows_of_a_conversation_together():
    """Twice the same rows under the same keys say no more than once; as others they would."""
    scores = np.random.default_rng(0).random(60).round()
    once = tasks.interval(scores, list(range(60)))
    twice = tasks.interval(np.tile(scores, 2), list(range(60)) * 2)
    apart = tasks.interval(np.tile(scores, 2), list(range(120)))
    assert twice == pytest.approx(once) and apart[2] - apart[1] < 0.8 * (once[2] - once[1])


def test_half_a_character_in_a_completion_or_a_key_does_not_cost_the_table():
    examples = [tasks.Example(f"key {i} \ud800", [], tasks.Fraction(18)) for i in range(4)]
    replies = [("Answer: 18 \ud800", 3, False)] * 4
    results = tasks.judged_results(TASKS["gsm8k"], examples, replies)
    table = tasks.table({"none": {"bytes": 0, "results": results}})
    assert table.iloc[0, 0].startswith("100.00")


def test_each_arm_is_kept_when_it_ends(tmp_path):
    """The second arm's engine fails: the first one's completions are there."""
    with pytest.raises(StopIteration):
        eval_main("none", SEED, *eval_flags("gsm8k", tmp_path / "out", 4), llm=Parrot(calls=1))
    record = kept(tmp_path / "out")["none"]
    assert [result["text"] for result in record["results"]] == ["Answer: 1"] * 4
    assert record["settings"]["limit"] == 4 and list(kept(tmp_path / "out")) == ["none"]


def test_string_is_so_many_random_tokens_before_the_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 8)
    requests = [tasks.arm_requests(processor, examples, arm)
                for arm in ("none", "string:64", "string:64")]
    counts = [[len(tasks.tokenized(processor, *request)) for request in arm] for arm in requests]
    newlines = len(processor.tokenizer("\n\n")["input_ids"])
    assert all(64 <= longer - plain <= 64 + newlines for plain, longer, _ in zip(*counts))
    assert requests[1] == requests[2]
    texts = {example.messages[0]["content"][0]["text"] for example, _ in requests[1]}
    assert len(texts) == 8                                              # fresh for each question
    texts |= {tasks.random_string(processor.tokenizer, 8, i) for i in range(100)}
    assert not [text for text in texts if re.search(r"<\||<tool_call>|<think>", text)]


def test_random_is_a_fresh_picture_for_every_question(processor):
    examples = TASKS["gsm8k"].load("test", data("gsm8k", "test"), 4)
    pictures = [[picture.tobytes() for _, picture in
                 tasks.arm_requests(processor, examples, "random", seed, 64)] for seed in (0, 0, 1)]
    assert pictures[0] == pictures[1] and len({*pictures[0], *pictures[2]}) == 8
    values = np.asarray(tasks.random_picture(300, 200, 7))
    assert values.shape == (200, 300, 3) and values.min() == 0 and values.max() == 255


def test_what_the_processor_resizes_is_said(tmp_path, capsys):
    """Of picture files and of `random --size N` alike."""
    small = tmp_path / "small.png"
    Image.new("RGB", (128, 128)).save(small)
    flags = [*eval_flags("gsm8k", tmp_path / "out", 2), "--size", 128]
    eval_main(SEED, small, "random", *flags, llm=Parrot())
    said = [line for line in capsys.readouterr().err.splitlines() if "resizes" in line]
    assert [line.partition(": the processor")[0] for line in said] == [str(small), "random"]


THIN, BITS = "refuses it .*aspect ratio.*200", r"no readable picture \(32 bits a value\): .*save it"


@pytest.mark.parametrize("size, mode, reason", [
    ((2050, 8), "RGB", THIN), ((300, 1), "L", THIN), ((256, 256), "F", BITS), ((9, 9), "I", BITS)])
def test_a_picture_that_is_refused_is_named(tmp_path, refused_here, size, mode, reason):
    Image.new(mode, size).save(tmp_path / "a.tiff")
    flags = ["none", tmp_path / "a.tiff", *eval_flags("gsm8k", tmp_path / "out")]
    assert re.search(f"{tmp_path}/a.tiff: .*{reason}", refused_here("eval", *flags, llm=Parrot()))


ROTATION, LIKE_INTEL = struct.pack("<HHII", 0x0112, 3, 1, 6), b"Exif\0\0II*\0\x08\0\0\0\2\0"
RESOLUTION = struct.pack("<HHI", 0x011A, 2, 3) + b"72\0\0" + bytes(4)      # a text, no fraction


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [
    LIKE_INTEL + ROTATION + RESOLUTION, LIKE_INTEL, LIKE_INTEL[:12], b"Exif\0\0II", b"Exif\0\0junk",
    b"junk"])
def test_a_picture_with_broken_exif_data_is_read_as_it_lies(tmp_path, suffix, exif):
    Image.new("RGB", (20, 10), "red").save(tmp_path / f"a.{suffix}", exif=exif)
    assert tasks.open_picture(tmp_path / f"a.{suffix}").size == (20, 10)


def png(bits, colour_type, pixels, transparent):
    """A PNG file of one row of pixels, all packed as the file holds them."""
    width = 8 * len(pixels) // (bits * (3 if colour_type == 2 else 1))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)),
              (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


VALUES = [40_000, 0, 65535, 50_000]


@pytest.mark.parametrize("bits, colour_type, pixels, transparent", [
    (16, 0, struct.pack(">4H", *VALUES), VALUES[:1]), (8, 0, bytes([156, 0, 255, 157]), [156]),
    (4, 0, bytes([0x90, 0xFA]), [9]), (2, 0, bytes([0b10001101]), [2]),
    (16, 2, struct.pack(">12H", *np.repeat(VALUES, 3)), VALUES[:1] * 3)])
def test_a_transparent_colour_is_grey(tmp_path, bits, colour_type, pixels, transparent):
    """The first of four pixels has it, the others have not."""
    key = struct.pack(f">{len(transparent)}H", *transparent)
    (tmp_path / "a.png").write_bytes(png(bits, colour_type, pixels, key))
    values = np.asarray(tasks.open_picture(tmp_path / "a.png"))[0]
    assert (values[0] == 128).all() and (values[1] == 0).all() and (values[2] == 255).all()
    assert (values[3] != 128).all()


@pytest.fixture
def gpu(monkeypatch):
    """vllm.LLM as load_engine calls it on a machine that seems to have a GPU."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with mock.patch.object(vllm, "LLM") as LLM:
        before = torch._dynamo.config.disable
        yield LLM
        torch._dynamo.config.disable = before


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_all_options_on_a_gpu_are_vllms(gpu, monkeypatch, by_torchrun, capsys):
    """One's own options override ours; a silent first start of minutes would look like a hang."""
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: by_torchrun)
    gpu.side_effect = lambda *args, **options: print("the engine", file=sys.stderr)
    tasks.load_engine(str(TINY), gpu_memory_utilization=0.7, dtype="float16", quantization="fp8")
    (model,), options = gpu.call_args
    assert model == str(TINY) and options["dtype"] == "float16" and options["quantization"] == "fp8"
    assert set(options) <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert options["gdn_prefill_backend"] == "triton" and options["gpu_memory_utilization"] == 0.7
    assert "enforce_eager" not in options and "enable_prefix_caching" not in options
    assert ("distributed_executor_backend" in options) == by_torchrun
    said = capsys.readouterr().err.splitlines()
    assert "the first start compiles for minutes" in said[0] and said[1] == "the engine"


@pytest.mark.parametrize("error", [
    ValueError("Free memory on cuda:0 is less than desired"), ImportError("no libcudart.so")])
def test_an_engine_that_cannot_start_gets_a_sentence(gpu, refused_here, tmp_path, error):
    gpu.side_effect = error
    sentence = refused_here("eval", "none", *eval_flags("gsm8k", tmp_path / "out", 2))
    assert f"--model {TINY}: vLLM cannot start it ({str(error)[:20]}" in sentence
