"""The three tasks: examples, the prompts that a chat template makes of them, and their lengths."""

import copy
import json
import random
import shutil

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

import art
import eval as tasks
import families
from conftest import SEED, TINY, data, prompt, score
from eval import TASKS, Example, InputError
from rows import gpqa_row, gsm8k_row, keys_of, load, toolmind_row, write


def test_the_default_prompts_end_as_the_papers():
    sums = tasks.gsm8k_example({"question": " What? ", "answer": "So.\n#### 1,080"})
    text = sums.messages[0]["content"][0]["text"]
    assert text == "What?\n\nEnd your response with: Answer: <number>" and sums.target == 1080
    choice = tasks.gpqa_example(gpqa_row("rec1"))
    text = choice.messages[0]["content"][0]["text"]
    assert text.endswith("\n\nEnd your response with: The correct answer is (X)")
    assert f"({choice.target}) right" in text and text.count("wrong") == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_image_stands_first_and_can_be_left_out(task, processor):
    example = TASKS[task].load("test", data(task, "test"), 1)[0]
    with_image, without = prompt(processor, example), tasks.render(processor, example)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert with_image.count(image) == 1 and with_image.replace(image, "") == without
    assert with_image.split("<|im_start|>user\n")[1].startswith(image)
    assert "image" not in str(example.messages)                         # prepend() copies


@pytest.mark.parametrize("arm", ["none", "string:4", "random", Image.new("RGB", (64, 64))])
def test_a_message_may_be_a_string_in_every_arm(processor, arm):
    """As in {"content": "Hi"}: the question is there behind an image, and for a server."""
    prompts = []
    for messages in [{"role": "user", "content": "Why so?"}], tasks.user_turn("Why so?"):
        (example, picture), = tasks.arm_requests(processor, [Example("", messages, None)], arm)
        prompts.append(tasks.render(processor, example))
        sent = str(tasks.openai_request(example, picture))
        assert "Why so?" in sent and ("image_url" in sent) == (picture is not None)
    assert prompts[0] == prompts[1] and "Why so?" in prompts[0]


def test_toolmind_rows_as_irregular_as_they_come():
    stop = [{"function": {"name": "stop", "arguments": None}}]
    book = {"function": {"name": "book", "arguments": '{"people": 1}'}}
    example = tasks.toolmind_example({"conversations": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\nOne moment.",
         "tool_calls": [book, *stop]},
        {"role": "tool", "content": [{"status": "ok"}, "done"]}, {"role": "user", "content": None},
        {"role": "assistant", "content": "<think>\nhidden\n</think>", "tool_calls": stop}],
        "tools": [{"type": "function", "function": {"name": "a"}}, {"name": "stop"}]})
    said = [message["content"] for message in example.messages]
    texts = [content[0]["text"] if content else "" for content in said]
    assert texts == ["Be brief.", "Hi", "One moment.", '[{"status": "ok"}, "done"]', ""]
    calls = [call["function"]["arguments"] for call in example.messages[2]["tool_calls"]]
    assert calls == [{"people": 1}, {}] and example.key == "Hi"
    text = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    assert score("toolmind", example, text) == 1


SCHEMA = {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}


@pytest.mark.parametrize("tool, properties", [
    ({"parameters": SCHEMA}, {"room": {"type": "string"}}), ({}, {}), ({"parameters": None}, {}),
    ({"parameters": {"parameters": {"room": {"type": "str"}}}}, {"room": {"type": "str"}}),
    ({"arguments": {"room": {"type": "int"}}}, {"room": {"type": "int"}}),
    ({"input_schema": SCHEMA}, {"room": {"type": "string"}}),
    ({"inputSchema": SCHEMA}, {"room": {"type": "string"}}),
    ({"parameters": {"room": "string"}}, {"room": {"type": "string"}}),
    ({"parameters": {"type": "OBJECT"}}, {}), ({"parameters": {"type": "dict"}}, {}),
    ({"parameters": json.dumps(SCHEMA)}, {"room": {"type": "string"}})])
@pytest.mark.parametrize("wrapped", [True, False])
def test_parameters_reach_the_prompt_however_they_are_written(processor, tool, properties, wrapped):
    tool = {"name": "book", **tool}
    tool = {"type": "function", "function": tool} if wrapped else tool
    example = tasks.toolmind_example({**toolmind_row("q"), "tools": [tool, {"name": "stop"}]})
    assert example.tools[0]["function"]["parameters"].get("properties", {}) == properties
    assert "room" in tasks.render(processor, example) or not properties


def test_gpqa_is_divided_by_ids_whatever_the_order_of_rows(tmp_path, monkeypatch):
    """Into 273 and 273, from the hub or from a file of the hub's name; an id may be an integer."""
    rows, halves = [gpqa_row(f"rec{i}" if i % 2 else i) for i in range(546)], []
    path = str(tmp_path / "gpqa_extended.csv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, repo_type: (
        {("Idavidrein/gpqa", "gpqa_extended.csv"): path}[name]))
    for data, order in (path, rows), (None, random.Random(0).sample(rows, len(rows))):
        write(tmp_path / "gpqa_extended.csv", order)
        halves.append([TASKS["gpqa"].load(split, data) for split in ("train", "test")])
    assert halves[0] == halves[1]
    train, test = (set(keys_of(half)) for half in halves[0])
    assert len(train) == len(test) == 273 and not train & test
    targets = ["ABCD".index(example.target) for half in halves[0] for example in half]
    assert np.bincount(targets).min() > 100                     # the right choice stands everywhere
    mine = load("gpqa", tmp_path / "mine.jsonl", rows)
    assert len(mine) == 546 and mine[0] in sum(halves[0], [])           # another name: used whole


# Prompts: what a chat template refuses, or hides --------------------------------------------------

CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"function": {"name": "find", "arguments": {"what": "x"}}}]}


def tooled(question):
    """An example with a system message, two tools, two earlier calls at once and their results."""
    calls = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    row = toolmind_row(question, calls, *[{"role": "tool", "content": "found \"it\""}] * 2)
    row["conversations"].insert(0, {"role": "system", "content": " Be brief. \n"})
    row["tools"].append({"function": {"name": "find"}})
    return tasks.toolmind_example(row)


def with_template(processor, change):
    """The tiny model's processor with another chat template."""
    processor = copy.copy(processor)
    processor.chat_template = change(processor.chat_template)
    assert processor.chat_template != (TINY / "chat_template.jinja").read_text()
    return processor


def special_calls(processor):
    """The tiny model's processor where a call's tags are special tokens, which vLLM leaves out."""
    processor = tasks.load_processor(str(TINY))
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    return processor


OTHER_CALLS = {
    "<tool_call>\\ncall:visit": lambda processor: with_template(
        processor, lambda text: text.replace("<function=' + call", "call:' + call")),
    "'assistant', but": lambda processor: with_template(
        processor, lambda text: text.replace("m.tool_calls or []", "[]")),
    "<function=visit>": special_calls}


def test_hermes_and_qwens_calls_are_read(processor):
    TASKS["toolmind"].check(processor)
    TASKS["toolmind"].check(with_template(processor, lambda text: text.replace(
        "{%- for call in m.tool_calls or [] %}", "{%- for call in m.tool_calls or [] %}{{- "
        "'<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}"
        "{%- for call in [] %}")))


@pytest.mark.parametrize("written", OTHER_CALLS)
def test_a_model_whose_calls_could_not_be_read_is_refused(processor, written):
    """Each completion would score 0."""
    with pytest.raises(InputError) as error:
        TASKS["toolmind"].check(OTHER_CALLS[written](processor))
    assert "it writes a call as '" in str(error.value) and written in str(error.value)


NO_TOOLS = "{%- set tools = none %}"
HIDING = [                              # the part that is named, what is replaced, by what
    ("tools", "{%- if tools %}", NO_TOOLS + "{%- if tools %}"),
    ("earlier calls", "m.tool_calls or []", "[]"),
    ("earlier calls", "m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    ("system messages", "say(messages[0].content)", "''"),
    ("tool messages", "m.role != 'system'", "m.role not in ['system', 'tool']"),
    ("user messages", "part.text", "''"),
    ("user messages", "{%- for part in content %}", "{%- for part in [] %}"),
    # A template for texts alone prints parts as Python does: [{'type': 'text', 'text': 'Where?'}].
    ("user messages", "{%- if content is string %}", "{%- if content %}"),
    ("user messages", "{%- elif content %}", "{%- elif 1 %}{{- content | tojson }}{%- elif 0 %}")]


@pytest.mark.parametrize("others", [0, 30])
@pytest.mark.parametrize("part, shown, instead", HIDING)
def test_a_template_that_hides_a_part_is_refused(processor, part, shown, instead, others):
    """Also where few of the rows have this part."""
    hiding = with_template(processor, lambda text: text.replace(shown, instead))
    examples = [tasks.toolmind_example(toolmind_row(f"q {i}")) for i in range(others)]
    examples.insert(others // 2, tooled("Where is it?"))
    rows = others + 1 if part in ("tools", "user messages") else 1
    with pytest.raises(InputError, match=f"does not show .*the {part} of {rows} out of {rows} row"):
        tasks.sound_prompts(hiding, examples)


def test_a_template_that_shows_all_parts_is_taken(processor):
    examples = [tooled("Where is it?"), tasks.toolmind_example(toolmind_row("q"))]
    assert tasks.sound_prompts(processor, examples)[0] == examples


@pytest.mark.parametrize("printed", [
    "{{- f.name }}", "{{- f.name | tojson }}", "{{- tool | tojson }}"])
@pytest.mark.parametrize("name", ["find", "f\u00fcr \"alle\"", "a\\b", "stop"])
def test_a_name_is_found_as_it_is_and_within_json(processor, name, printed):
    row = toolmind_row("q", {**CALL, "tool_calls": [{"name": name, "arguments": {}}] * 2})
    row["tools"].append({"name": name})
    example, shown = tasks.toolmind_example(row), "{{- '\\n' + f.name"
    other = with_template(processor, lambda text: text.replace(shown, printed + "{{- ''", 1))
    assert tasks.sound_prompts(other, [example])[0] == [example]


def test_a_name_that_is_no_text_leaves_its_row_out(processor):
    rows = [toolmind_row("a"), toolmind_row("b")]
    rows[0]["tools"].append({"name": 7})
    examples = [tasks.toolmind_example(row) for row in rows]
    assert keys_of(tasks.sound_prompts(processor, examples)[0]) == ["b"]
    with pytest.raises(TypeError, match="the name of a tool is no text"):
        tasks.toolmind_example(toolmind_row("c", {
            **CALL, "tool_calls": [{"name": 7, "arguments": {}}]}))


def test_a_row_whose_call_is_of_a_tool_that_it_does_not_offer_is_no_example():
    """No completion could be right."""
    row = toolmind_row("q")
    row["tools"] = [{"name": "other"}]
    with pytest.raises(ValueError, match="of a tool that it does not offer"):
        tasks.toolmind_example(row)


def test_a_template_that_shows_no_image_is_refused(processor, questions, capsys):
    """Before an engine fails at it."""
    blind = with_template(processor, lambda text: text.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", ""))
    picture = tasks.random_picture(256, 256)
    with pytest.raises(InputError, match="--model: its chat template does not show the image"):
        tasks.drop_long(blind, questions[:3], 400, {"none": None, "seed.png": picture})


FIRST, LAST = "content[:1]", "content[-1:]"


@pytest.mark.parametrize("arm, part, hidden", [
    ("random", FIRST, "the user messages beside an image of 3 out of 3 rows"),
    ("random", LAST, "the image"), ("string:4", LAST, "the question beside string:4")])
def test_a_template_that_shows_one_part_of_a_turn_is_refused(
        processor, questions, arm, part, hidden):
    """It hides the question, or what stands before it."""
    partial = with_template(processor, lambda text: text.replace(
        "for part in content", f"for part in {part}"))
    with pytest.raises(InputError, match=f"its chat template does not show {hidden}"):
        tasks.drop_long(partial, questions[:3], 400, {"none": None, arm: arm})


def test_a_template_that_hides_a_system_message_beside_an_image_is_refused(processor):
    odd = with_template(processor, lambda text: text.replace(
        "say(messages[0].content)", "say(messages[0].content) if messages[1].content | length == 1 "
        "else ''"))
    with pytest.raises(InputError, match="show the system messages beside an image of 1 out of 1"):
        tasks.sound_prompts(odd, [tooled("Where?"), tasks.toolmind_example(toolmind_row("q"))])


# A completion begins within the thought that these templates open, as Qwen3-VL-Thinking's does.
ASSISTANT = "'<|im_start|>assistant\\n'"
THINKING = ASSISTANT[:-1] + "<think>\\n'"


def test_a_thought_that_the_prompt_opens_is_no_answer(processor, llm, questions):
    """Until it is closed. In eval.py as in training."""
    thinking = with_template(processor, lambda text: text.replace(ASSISTANT, THINKING))
    requests = tasks.arm_requests(thinking, questions[:1], None)
    (text, _, _), = tasks.ask_engine(llm, thinking, requests, {"max_tokens": 9})
    assert text.startswith("<think>")
    texts = ["18. Answer: 18. But wait,", "Wait.\n</think>\n\nAnswer: 18"]
    example = Example("", tasks.user_turn("q"), 18)
    for told, template in ([0, 1], thinking), ([1, 1], processor):
        group = [art.Completion(tasks.render(template, example), [], [], None, text)
                 for text in texts]
        art.judge_groups(TASKS["gsm8k"], [example], [group])
        assert [completion.reward for completion in group] == told


def test_a_turn_that_ends_where_no_completion_does_is_said(tmp_path, capsys):
    """As in base models with a chat template: they would go on with a turn of the user."""
    folder = shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, end in ("tokenizer_config.json", "<|endoftext|>"), ("generation_config.json", 0):
        settings = json.loads((folder / name).read_text())
        settings["eos_token" if name.startswith("tok") else "eos_token_id"] = end
        (folder / name).write_text(json.dumps(settings))
    tasks.load_processor(str(folder))
    assert "ends a turn with <|im_end|>, but no completion ends there" in capsys.readouterr().err
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tasks.load_processor(str(folder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_familys_completions_end_with_its_turns(name, tmp_path, capsys):
    families.make_processor(name, tmp_path)
    tasks.load_processor(str(tmp_path))
    assert "ends a turn" not in capsys.readouterr().err


def test_no_questions_have_no_replies(llm, processor):
    """As of a rank, where there are fewer questions than ranks."""
    assert tasks.ask_engine(llm, processor, []) == []


def test_an_engine_with_another_tokenizer_is_refused(llm):
    """For example Mistral's own, which vLLM prefers to that of transformers."""
    other = tasks.load_processor(str(TINY))
    other.tokenizer.add_tokens(["What is"])
    requests = tasks.arm_requests(other, [Example("", tasks.user_turn("What is it?"), None)], None)
    with pytest.raises(InputError, match="vLLM's prompt has other tokens than the processor's"):
        tasks.ask_engine(llm, other, requests)


@pytest.mark.parametrize("mark", ["[THINK]", "<mm:think>", "<|START_THINKING|>", "to=self",
                                  "\u25c1think\u25b7", "reasoning steps:"])
def test_thoughts_in_another_form_are_said(processor, questions, mark, capsys):
    """They would be read as answers."""
    other = with_template(processor, lambda text: text + "{# " + mark + " #}")
    assert tasks.sound_prompts(other, questions[:2])[0] == questions[:2]
    assert f"--model: it knows thoughts in {mark}. eval.py leaves" in capsys.readouterr().err


def test_thoughts_that_the_tokenizer_leaves_out_are_said(questions, capsys):
    """As those of GLM-4.1V-Thinking, whose tags are special tokens."""
    other = tasks.load_processor(str(TINY))
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert tasks.sound_prompts(other, questions[:2])[0] == questions[:2]
    assert "thoughts in </think> as a special token" in capsys.readouterr().err


def test_thoughts_in_think_are_not_worth_a_word(processor, questions, capsys):
    thinking = with_template(processor, lambda text: text + "{# <think></think> thinking #}")
    tasks.sound_prompts(thinking, questions[:2])
    assert "thoughts" not in capsys.readouterr().err


def test_a_row_beside_which_the_template_refuses_an_image_is_left_out(processor):
    """In all arms, before an engine is started."""
    row = toolmind_row("a")
    row["conversations"].insert(0, {"role": "system", "content": "Be brief."})
    examples = [tasks.toolmind_example(row), tasks.toolmind_example(toolmind_row("b"))]
    strict = with_template(processor, lambda text: (
        "{%- if messages[0].role == 'system' and messages[1].content is not string and "
        "messages[1].content[0].type == 'image' %}{{- raise_exception('no') }}{%- endif %}" + text))
    assert keys_of(tasks.sound_prompts(strict, examples)[0]) == ["b"]


def test_a_size_is_tried_with_a_word_beside_the_picture(processor):
    """Some templates refuse a turn without any text."""
    strict = with_template(processor, lambda text: (
        "{%- for m in messages if m.content is not string and not (m.content | selectattr('text', "
        "'defined') | list) %}{{- raise_exception('no text') }}{%- endfor %}" + text))
    assert not tasks.is_resized(strict, 256, 256)


def test_a_tool_whose_name_is_a_number_is_found(processor):
    row = toolmind_row("q")
    row["tools"].append({"name": 7})
    printing = with_template(processor, lambda text: "{{ tools | tojson }}" + text.replace(
        "if tools", "if false"))
    example = tasks.toolmind_example(row)
    assert tasks.sound_prompts(printing, [example])[0] == [example]


def test_a_single_row_of_which_something_is_hidden_is_left_out(processor, capsys):
    """Such as a tool whose name the template writes otherwise."""
    odd = with_template(processor, lambda text: text.replace("f.name", "f.name.replace('&', '+')"))
    examples = [tasks.toolmind_example(toolmind_row(f"q {i}")) for i in range(20)]
    row = toolmind_row("odd")
    row["tools"].append({"name": "a&b"})
    assert tasks.sound_prompts(odd, [tasks.toolmind_example(row), *examples])[0] == examples
    said = "1 of 21 rows left out, of the first one: the model's chat template does not show its to"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("program", [art, tasks])
def test_both_programs_end_where_the_template_hides_the_tools(program, tmp_path, capsys):
    """A model of one's own with another chat template, before an engine is started."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(NO_TOOLS + template.read_text())
    flags = [*([SEED] if program is tasks else ["--out", tmp_path / "run"]), "--task", "toolmind",
             "--data", data("toolmind", "test"), "--model", tmp_path / "model"]
    with pytest.raises(SystemExit) as exit:
        program.main([*map(str, flags)])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2
    assert "error: --model: its chat template does not show the tools" in last


REFUSE = ("{%- for m in messages %}{%- if m.role == 'tool' %}"
          "{{- raise_exception('Roles must\\nalternate!') }}{%- endif %}{%- endfor %}")


def test_rows_that_the_template_refuses_are_left_out_and_counted(processor, capsys):
    """By raise_exception, or by any error of its own; an engine never sees them."""
    examples = [tooled("a"), tasks.toolmind_example(toolmind_row("b")), tooled("c")]
    for refusal, reason in (REFUSE, "Roles must alternate!"), (
            "{{- messages[2].nothing.more if messages[2] }}", "has no attribute"):
        strict = with_template(processor, lambda text: refusal + text)
        kept = tasks.drop_long(strict, examples, 500, {"none": "none"})
        said = capsys.readouterr().err
        assert keys_of(kept) == ["b"] and "1 of 1 prompts fit" in said
        assert "2 of 3 rows left out, of the first one: the model's chat template refuses" in said
        assert reason in said


def test_a_template_that_refuses_all_rows_is_quoted(processor):
    strict = with_template(processor, lambda text: REFUSE + text)
    with pytest.raises(InputError, match=r"--model: 2 of 2 rows .* it \(Roles must alternate!\):"):
        tasks.sound_prompts(strict, [tooled("a"), tooled("b")])


def test_a_lone_surrogate_in_a_tool_leaves_its_row_out(processor):
    """No tokenizer takes it."""
    row = toolmind_row("a")
    row["tools"][0]["function"]["description"] = "half \ud800"
    examples = [tasks.toolmind_example(row), tasks.toolmind_example(toolmind_row("b"))]
    assert keys_of(tasks.sound_prompts(processor, examples)[0]) == ["b"]


# Prompts: the model's own special tokens ----------------------------------------------------------


def test_a_row_that_holds_the_image_placeholder_is_left_out_wherever_it_stands(processor, capsys):
    """And the other special tokens; a tool call's tags are ordinary text."""
    result = {"role": "tool", "content": {"a": ["<|vision_end|>"]}}
    call = {**CALL, "tool_calls": [{"name": "stop", "arguments": {"what": "<|im_end|>"}}]}
    rows = [toolmind_row("what is <|image_pad|>?"), toolmind_row("a", result), toolmind_row("b"),
            toolmind_row("c", call), toolmind_row("<tool_call> <|image_pad |>"), toolmind_row("d")]
    rows[-1]["tools"][0]["function"]["description"] = "<|video_pad|>"
    examples = [tasks.toolmind_example(row) for row in rows]
    kept = tasks.drop_long(processor, examples, 500, {"--seed": Image.new("RGB", (256, 256))})
    assert keys_of(kept) == ["b", "<tool_call> <|image_pad |>"]
    assert "4 of 6 rows left out, of the first one: it holds <|image_pad|>, a special token" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_image_placeholder_of_every_family_is_special(name, tmp_path):
    families.make_processor(name, tmp_path)
    other = tasks.load_processor(tmp_path)
    rows = [gsm8k_row("How many?"), gsm8k_row(f"How many {other.image_token}?")]
    kept, _ = tasks.sound_prompts(other, [tasks.gsm8k_example(row) for row in rows])
    assert keys_of(kept) == ["How many?"]


# Prompts: their lengths ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", *families.FAMILIES])
def test_tokens_counted_in_a_batch_are_the_processors_own(name, tmp_path, questions, monkeypatch):
    """With the picture: to the token, whatever the model makes of text and image."""
    if name != "tiny":
        families.make_processor(name, tmp_path)
    processor = tasks.load_processor(TINY if name == "tiny" else str(tmp_path))
    side = name != "tiny" and families.FAMILIES[name][-1] or 256
    picture = tasks.random_picture(side, side, 0)
    requests = tasks.arm_requests(processor, questions[:20], picture)
    own = [len(tasks.tokenized(processor, *request)) + 2 for request in requests]
    for most in {*own}:
        kept = tasks.drop_long(processor, questions[:20], most, {"--seed": picture})
        assert kept == [e for e, count in zip(questions, own) if count <= most]


def test_too_long_prompts_are_left_out_to_the_token(processor, questions, capsys):
    picture = tasks.random_picture(256, 256)
    requests = tasks.arm_requests(processor, questions[:20], picture)
    longest = max(len(tasks.tokenized(processor, *request)) for request in requests)
    arms = {"none": "none", "a.png": picture}
    kept = [tasks.drop_long(processor, questions[:20], most, arms)
            for most in (longest + 2, longest - 1)]
    assert kept[0] == questions[:20] and 0 < len(kept[1]) < 20
    assert f"{len(kept[1])} of 20 prompts fit into {longest - 1} tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-model-len: .* no room for any prompt; raise it"):
        tasks.drop_long(processor, questions[:20], 9, arms)


def test_the_largest_random_picture_has_room(processor, questions):
    """Where `random --size N` is the longest arm."""
    picture = tasks.random_picture(384, 384, 0)
    more = [len(tasks.tokenized(processor, *tasks.arm_requests(processor, [e], picture)[0])) + 2
            for e in questions[:20]]
    most = sorted(more)[10]
    arms = {"none": "none", "random": "random"}
    kept = tasks.drop_long(processor, questions[:20], most, arms, 384)
    assert kept == [e for e, count in zip(questions, more) if count <= most]
