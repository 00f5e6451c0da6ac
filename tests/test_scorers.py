"""The scorers, judged by answers as models write them: right and wrong ones, and those on which published scorers go wrong."""

import json
import re
import time
from fractions import Fraction

import pytest

import eval as tasks
from conftest import ROOT
from eval import TASKS

BFCL = ROOT.parent / "shared" / "data" / "bfcl"                 # real tools and calls, where they are at hand


def rows(table):
    """One test a text, from a table {what is read: [text, ...]}."""
    return [pytest.param(text, value, id=text[:60] or "nothing") for value, texts in table.items() for text in texts]


GSM8K = {
    18: ["16 - 3 - 4 = 9\n9 * 2 = 18\nAnswer: 18", "**Answer:** 18", "**Answer**: 18 dollars", "Answer: **18**", "**Answer: 18**",
         "Answer: \\boxed{18}", "so it is \\boxed{18}.", "\\boxed{\\text{18 dollars}}", "The answer is \\(18\\).", "Answer: $18$",
         "#### 18", "Answer: <18>", "Answer: `18`", "Answer\uff1a18", "ANSWER: 18", "answer is: 18", "The final answer is 18.",
         "The answer to the question is 18.", "Answer (in dollars): 18", "Answer: Rs.18", "Answer: 18.00", "Answer: 18,",
         "Answer: Janet makes $18.", "Answer: 18 dollars per day", "Answer: 18 (= 9 * 2)", "Answer: 18 (profit = 200 - 182)",
         "Answer: 9 * 2 = 18", "Answer: 18 = 9 * 2", "Answer: x = 18", "Answer: 36/2", "Answer: 9 (eggs) * 2 (dollars) = 18",
         "The answer is 18 (x = 3)", "The answer is 18, as 9 * 2 = 18", "Answer: 17.9 \u2248 18", "Answer: 18, not 20",
         "Answer: 18. Check: 18 / 2 = 9.", "Answer: 18 dollars. That is 9 eggs at 2.", "Answer: 18 or more",
         "Answer: eighteen (18)",
         # the number on another line
         "Answer:\n\n18", "Answer:\r\n18", "Answer:\n- 18 dollars", "**Final Answer**\n\n18", "### Answer\n18",
         "Answer:\n```\n18\n```", "Answer: 18\n2 eggs are left over", "Answer: 18\n\nI hope this answer is helpful!",
         "Answer: 18\n\n#### Explanation", "Answer: 18\n\nIs this answer reasonable? Yes: 9 * 2",
         # two answers: the last; and what is thought aloud is no answer
         "Answer: 3\nNo. Answer: 18", "Answer: 18\nAnswer: <number>", "<think>Answer: 3</think>Answer: 18",
         "Answer: 18\n</think>", "Answer: 18\n<think>Wait. Answer: 3"],
    1080: ["Answer: $1,080.", "Answer: \\$1,080", "Answer: 1\\,080", "Answer: 1{,}080", "Answer: 1 080", "Answer: 1'080",
           "Answer: 1\u2019080", "Answer: 1_080", "Answer: 1\u202f080", "Answer: 1\u2009080", "Answer: 1,080.00 USD",
           "Answer: $ 1,080"],
    100_000: ["Answer: Rs. 1,00,000", "Answer: 100,000", "Answer: 100000.0"],
    -7: ["Answer: -$7", "Answer: $-7", "Answer: \u22127", "Answer: -7 degrees", "\\boxed{-7}"],
    50: ["Answer: 50%", "Answer: 50 %", "\\boxed{50\\%}", "Answer: 50 percent"],
    5: ["Answer: 5.0", "Answer: 5.", "Answer: 5:00 PM", "Answer: 5 100-dollar bills", "Answer: 5th", "Answer: 5-dollar bills"],
    Fraction(1, 2): ["Answer: 1/2", "Answer: \\frac{1}{2}", "Answer: .5", "Answer: 0.50", "Answer: $\\dfrac{1}{2}$"],
    Fraction(5, 2): ["Answer: 5/2 hours", "Answer: 2.5"],
    None: ["", "18", "About 18, I think.", "Answer:", "Answer: seven", "Answer: eighteen", "Answer: <number>",
           "The answers are 18", "<think>Answer: 18", "The answer isn't 18", "The answer is not 18",
           "The answer is definitely not 18.", "Answer: 9 * 2", "Answer: 18 + 2", "Answer: 3 * (2 + 4)", "Answer: 18 x 2",
           "Answer: 18 \\times 2", "Answer: 18^2", "Answer: 18\u00b2", "Answer: 18 or 20", "Answer: **18** or **20**",
           "Answer: 18, 20", "Answer: 18 20", "Answer: 18 and 20", "Answer: 18-20", "Answer: 18 - 20", "Answer: 18\u201320",
           "Answer: 18 to 20 dollars", "Answer: $18 or maybe $20", "Answer: between 18 and 20", "Answer: 18 dollars and 50 cents",
           "Answer: 18 hours 30 minutes", "Answer: 18 hours, 30 minutes", "Answer: 18:30", "Answer: 18\u00bd", "Answer: 18 1/2",
           "Answer: 18\\frac{1}{2}", "Answer: 18,5", "Answer: 18.080.000", "Answer: 18e3", "Answer: 18/0"],
}


@pytest.mark.parametrize("text, value", rows(GSM8K))
def test_gsm8k_reads_the_number_a_person_would(text, value):
    assert tasks.gsm8k_answer(None, text) == value
    for target in (18, -7, 5, 1080):
        example = {"target": Fraction(target)}
        assert TASKS["gsm8k"].score(example, text) == (value == target)
        assert (TASKS["gsm8k"].reward(example, text) == 1) == (value == target)


def official(text):
    """OpenAI's: the first number after "#### ". The strict ones of lm-evaluation-harness and verl use the same expression."""
    found = re.search(r"#### (-?[\d.,]+)", text)
    return found and found[1].replace(",", "")


def harness(text):
    """The flexible filter of lm-evaluation-harness: the last thing that looks like a number, anywhere."""
    found = re.findall(r"-?[$\d.,]{2,}|-?\d+", text)
    return found[-1].replace(",", "").replace("$", "").removesuffix(".") if found else None


def verl(text):
    """The flexible reward of verl: as the harness, but commas and a full stop stay."""
    found = [number for number in re.findall(r"-?[\d.,]+", text) if number != "."]
    return found[-1] if found else None


def authors(text):
    """The paper's authors': the last "Answer:" that a number follows at once, over any spaces and line breaks."""
    found = re.findall(r"answer:\s*\$?\s*(-?[\d,\s]+(?:\.\d+)?)", text, re.I)
    return re.sub(r"[,\s]", "", found[-1]) if found else None


@pytest.mark.parametrize("scorer, text, read, value", [
    (official, "Answer: 18", None, 18), (official, "#### $18", None, 18), (official, "#### 18.", "18.", 18),
    (official, "#### 5.0", "5.0", 5), (official, "#### 3\nNo.\n#### 18", "3", 18), (official, "<think>#### 18", "18", None),
    (harness, "Answer: 18\n2 eggs are left over", "2", 18), (harness, "Answer: 36/2", "2", 18),
    (harness, "Answer: \u22127", "7", -7), (harness, "Answer: 18 (= 9 * 2)", "2", 18),
    (harness, "About 18, I think.", "18", None), (harness, "Answer: 20 or 18", "18", None),
    (harness, "Answer: 1 080", "080", 1080), (verl, "Answer: $1,080.", "1,080.", 1080), (verl, "Answer: -$7", "7", -7),
    (verl, "Answer: 5.0", "5.0", 5), (authors, "**Answer:** 18", None, 18), (authors, "Answer: \\boxed{18}", "", 18),
    (authors, "Answer: -$7", "", -7), (authors, "Answer: 18\n2 eggs are left over", "182", 18),
    (authors, "Answer: 1/2", "1", Fraction(1, 2)), (authors, "Answer: 18 + 2", "18", None),
    (authors, "<think>Answer: 18", "18", None), (authors, "Answer: 18-20", "18", None),
])
def test_gsm8k_where_published_scorers_go_wrong(scorer, text, read, value):
    assert scorer(text) == read and tasks.gsm8k_answer(None, text) == value
    assert read != str(value)


def test_gsm8k_reward_is_shaped_and_only_a_right_answer_earns_one():
    reward = lambda text: TASKS["gsm8k"].reward({"target": Fraction(200)}, text)                         # noqa: E731
    assert [reward(t) for t in ("Answer: 200", "Answer: 201", "Answer: 215", "Answer: 9", "200", "many")] == [
        1.0, 0.4, 0.2, 0.1, 0.01, 0.0]


# In the options, (B) is copper. The prompt asks for the letter: an option's text alone is no answer.
GPQA = {
    "B": ["The correct answer is (B)", "The correct answer is (b).", "**The correct answer is (B)**",
          "The correct answer is **B**", "The correct answer is **(B)**", "The correct answer is [B]",
          "The correct answer is ( B )", "The correct answer is: (B) copper", "The correct answer is option (B)",
          "The correct answer is option B.", "The correct option is (B)", "The correct answer is clearly (B)",
          "The correct answer is (B): copper", "The correct answer is copper (B).", "The correct answer is:\n\n(B)",
          "answer is: \"B\"", "Answer: B", "Answer: b", "Answer: B. copper", "Answer: B) copper", "Answer: B because it is",
          "Answer: B, copper", "ANSWER: (B)", "**Answer:** B", "answer is: \\boxed{B}",
          "The correct answer is: $\\boxed{\\text{B}}$", "answer: \\boxed{\\mathrm{B}}", "so \\boxed{(B)}",
          "From the metals: copper.\nThe correct answer is (B)",
          "<think>(A)? The answer is (A).</think>The correct answer is (B)",
          # alone
          "(B)", "B", "B.", "**B**", "Copper it is.\n\n**(B)**",
          # other letters that are mentioned, but not given as the answer
          "(A) looks right, but the correct answer is (B)", "The answer is A. No: the answer is B.",
          "The answer is (B) because (A) melts.", "The correct answer is (B), not (A).", "The correct answer is not (A) but (B)",
          "The correct answer is (B) rather than (C).", "The correct answer is (B), (A) is wrong.",
          "The correct answer is (B). (A) and (C) are too small.", "The correct answer is (B) (E)-2-butene",
          "The correct answer is (B) (D)-glucose", "The correct answer is (B), vitamin C", "The correct answer is (B) k[A][C]",
          "The correct answer is (B) P(A) = 0.5", "The correct answer is given by (B)",
          "The correct answer is (B)\n\nI hope this answer is helpful!"],
    "A": ["The correct answer is (A)", "Answer: A", "The answer is A because copper melts", "The answer is A. Copper"],
    "C": ["The correct answer is (C), since (B) rusts.", "Answer: (B)? No. The correct answer is (C)"],
    None: ["", "Perhaps copper.", "The correct answer is copper", "The correct answer is Brass", "The answer is a difficult one",
           "The correct answer is D-glucose", "The correct answer is B12", "The correct answer is C\u2013H",
           "The answer is A photon", "The correct answer is vitamin B", "<think>The correct answer is (B)",
           "The correct answer is (X)", "(B) copper is a metal", "The correct answer is (A) or (B)",
           "The correct answer is (B) or (C)", "The correct answer is (A) or maybe (B)",
           "The correct answer is likely (B) or maybe C", "The correct answer is either (B) or (C)",
           "The correct answer is B or C", "The correct answer is B and C", "Answer: B/C", "Answer: A, B",
           "The correct answer is (B) copper or (C) iron", "The correct answer is (A)(B)(C)(D)",
           "The correct answer is (B) but could be (C)", "The correct answer is neither (A) nor (B)",
           "The correct answer is not (B)", "The correct answer isn't (B)", "The correct answer is (B) as well as (C)",
           "The correct answer is (A) is incorrect", "The answer is (B). Wait: the answer is not (B).",
           "The answer is (B).\nOr rather, the answer is (A) or (B).", "(B)(E)", "B or C", "(A) iron (B) copper"],
}


@pytest.mark.parametrize("text, letter", rows(GPQA))
def test_gpqa_reads_the_letter_a_person_would(text, letter):
    assert tasks.gpqa_answer(None, text) == letter
    assert TASKS["gpqa"].score({"target": "B"}, text) == (letter == "B")
    assert TASKS["gpqa"].reward({"target": "B"}, text) == {"B": 1.0, None: 0.0}.get(letter, 0.1)


def baseline(text):
    """GPQA's own: the first bracketed character after "answer is", or else the first in brackets at all."""
    found = re.search(r"answer is \((.)\)", text) or re.search(r"\((.)\)", text)
    return found and found[1]


def harness_letter(text):
    """The flexible filter of lm-evaluation-harness: the last capital in brackets."""
    found = re.findall(r"\(([A-Z])\)", text)
    return found[-1] if found else None


@pytest.mark.parametrize("scorer, text, read, letter", [
    (baseline, "The correct answer is **B**", None, "B"),
    (baseline, "(A) looks right, but the correct answer is **(B)**", "A", "B"),
    (baseline, "The answer is (A). No: the answer is (B).", "A", "B"), (baseline, "The correct answer is (B) or (C)", "B", None),
    (baseline, "<think>The correct answer is (B)", "B", None), (harness_letter, "The correct answer is (B), not (A).", "A", "B"),
    (harness_letter, "The answer is (B) because (A) melts.", "A", "B"), (harness_letter, "The correct answer is (b).", None, "B"),
    (harness_letter, "The correct answer is not (B)", "B", None), (harness_letter, "The correct answer is (A) or (B)", "B", None),
])
def test_gpqa_where_published_scorers_go_wrong(scorer, text, read, letter):
    assert scorer(text) == read != letter and tasks.gpqa_answer(None, text) == letter


TOOLS = [tasks.tool_schema(t) for t in (
    {"function": {"name": "book", "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "people": {"type": "integer"}, "price": {"type": "number"}, "quiet": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}}, "code": {"type": "str, optional"}, "any": {},
        "null": {"type": ["null", "string"]}, "list": {"type": "List[str]"},
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "room": {"type": "object", "properties": {
            "floor": {"type": "integer"}, "door": {"type": "string"}}}}}}},
    {"function": {"name": "stop", "parameters": {}}})]


def hermes(arguments, name="book"):
    return '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>' % (
        name, arguments if isinstance(arguments, str) else json.dumps(arguments))


def xml(arguments, name="book"):
    """As Qwen3.5's chat template writes a call."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return f"<tool_call>\n<function={name}>\n" + "".join(
        f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items()) + "</function>\n</tool_call>"


def judged(reference, text):
    target = tasks.comparable(reference, TOOLS)
    score, reward = (f({"tools": TOOLS, "target": target}, text) for f in (TASKS["toolmind"].score, TASKS["toolmind"].reward))
    assert (reward == 1) == (score == 1) and 0 <= reward <= 1 and (score == 1 or reward <= 0.5)
    return score == 1


OSLO = {"city": "Oslo", "people": 2}
CALL, STOP = xml(OSLO), hermes("{}", "stop")
COMPLETIONS = {
    True: [CALL, hermes(OSLO), hermes('{"people": 2, "city": "Oslo"}'), hermes('{"city": "Oslo", "people": 2.0}'),
           hermes('{"city": "Oslo", "people": "2"}'), hermes('"{\\"city\\": \\"Oslo\\", \\"people\\": 2}"'),
           hermes('{"city": "\\u004fslo", "people": 2}'), CALL.replace("\n", ""), hermes(OSLO).replace("\n", ""),
           xml({"people": 2, "city": "Oslo"}), xml({"city": "Oslo", "people": "2.0"}), "Let me see.\n" + CALL + "\nDone.",
           "<think>\nOslo?\n</think>\n" + CALL, "<think>" + xml({"city": "Rome"}) + "</think>" + CALL],
    False: ["", "I can help you with that.", "book(city='Oslo', people=2)",
            '{"name": "book", "arguments": {"city": "Oslo", "people": 2}}',
            "<function=book>\n<parameter=city>\nOslo\n</parameter>\n</function>", "<tool_call>book</tool_call>",
            "<tool_call></tool_call>", xml({"city": "oslo", "people": 2}), xml({"city": "Oslo ", "people": 2}),
            xml({"city": "Oslo", "people": 3}), xml(OSLO, "Book"), xml(OSLO, "order"), xml({"city": "Oslo", "people": "two"}),
            hermes('{"city": "Oslo", "people": [2]}'), hermes('{"city": "Oslo", "people": true}'), hermes('{"city": "Oslo"}'),
            hermes({**OSLO, "code": "x"}), hermes({**OSLO, "maybe": None}), hermes({"City": "Oslo", "people": 2}),
            hermes('["Oslo", 2]'), hermes("null"), hermes("{}"), 2 * CALL, CALL + STOP, CALL + "<tool_call>", "<think>" + CALL,
            "<think>" + CALL + "</think>", CALL.replace("</tool_call>", ""), CALL.replace("</function>", ""),
            CALL.replace("</parameter>\n</f", "</f"), CALL.replace("</f", "<parameter=city>\nOslo\n</parameter>\n</f"),
            hermes('{"city": "Oslo", "people": 2'), hermes("{'city': 'Oslo', 'people': 2}"),
            hermes('{"city": "Oslo", "people": 2,}'), hermes(OSLO).replace("arguments", "parameters"),
            hermes(OSLO).replace('{"name"', '[{"name"').replace("}}", "}}]"), hermes('{"people": ' + "[" * 2000),
            xml({"city": "Oslo", "people": "[" * 600 + "]" * 600})],
}


@pytest.mark.parametrize("text, right", rows(COMPLETIONS))
def test_toolmind_wants_exactly_the_call_in_either_dialect(text, right):
    assert judged([("book", OSLO)], text) == right


@pytest.mark.parametrize("name, reference, right, wrong", [
    ("code", "007", ["007"], ["7", 7]), ("code", "7", ["7", 7], [7.0, "7.0", "07"]), ("code", "1e2", ["1e2"], [100, "100"]),
    ("code", "true", ["true", True], ["True"]), ("code", "[1]", ["[1]", [1]], ["[1.0]"]), ("maybe", "5", ["5", 5], [5.0]),
    ("null", "5", ["5", 5], [5.0, None]), ("null", None, [None], ["x", ""]), ("list", ["5"], [["5"], '["5"]'], ["5", []]),
    ("people", 7, [7, 7.0, "7", "7.0"], ["07", "seven", True, [7], "8"]),
    ("price", 1.0, [1, "1", 1.0, "1e0"], [1.01, "1,0", None]), ("price", 0.1, ["0.1", 0.10], [0.1000001, "10%"]),
    ("quiet", True, [True, "true", "True"], [1, "1", "yes", False]), ("quiet", False, [False, "false"], [0, None, ""]),
    ("tags", ["a", "b"], [["a", "b"], '["a", "b"]'], [["b", "a"], ["a"], "a, b", ["a", "b", "b"]]),
    ("tags", ["1"], [["1"], '["1"]', [1]], [["1.0"], "1"]), ("tags", [], [[], "[]"], [None, "", {}]),
    ("room", {"floor": 2, "door": "2"}, [{"door": "2", "floor": "2"}, '{"floor": 2.0, "door": "2"}'],
     [{"floor": 2}, {"floor": 2, "door": "2.0"}]),
    ("map", {"a": "7"}, [{"a": "7"}, {"a": 7}, '{"a": "7"}'], [{"a": "7.0"}, {"b": "7"}]), ("any", "NaN", ["NaN"], ["nan", None]),
    ("any", 5, [5, "5", 5.0], ["five"]), ("any", None, [None, "null", "None"], ["", 0, False]),
    ("any", {}, [{}, "{}"], [[], "", None]), ("unheard", "x", ["x"], ["y"]),
    ("any", [1, [2, {"x": [3]}]], ["[1, [2, {\"x\": [3]}]]", [1, [2.0, {"x": ["3"]}]]], [[1, 2, 3]]),
])
def test_toolmind_arguments_are_judged_by_the_tools_schema(name, reference, right, wrong):
    for dialect in hermes, xml:
        assert judged([("book", {name: reference})], dialect({name: reference}))
    for values, expected in (right, True), (wrong, False):
        assert [judged([("book", {name: reference})], hermes({name: value})) for value in values] == [expected] * len(values)
    assert not judged([("book", {name: reference})], hermes({}))


@pytest.mark.parametrize("text, right", rows({
    True: [hermes({"city": "Oslo"}) + xml({"city": "Rome"}) + STOP,
           STOP + xml({"city": "Rome"}) + "\nand\n" + xml({"city": "Oslo"})],
    False: [hermes({"city": "Oslo"}) + STOP, xml({"city": "Oslo"}) * 2 + STOP,
            xml({"city": "Oslo"}) + xml({"city": "Rome"}) + 2 * STOP,
            STOP + xml({"city": "Rome"}) + xml({"city": "Oslo"}).replace("</tool_call>", "")]}))
def test_toolmind_parallel_calls_count_in_any_order(text, right):
    assert judged([("book", {"city": "Rome"}), ("stop", {}), ("book", {"city": "Oslo"})], text) == right


def test_toolmind_reward_rises_with_what_is_right():
    example = {"tools": TOOLS, "target": tasks.comparable([("book", OSLO)], TOOLS)}
    texts = ["nothing", '<tool_call>{"name": "stop"}</tool_call>', hermes({"city": "Rome", "people": 9}),
             hermes({"city": "Oslo", "people": 9}), CALL]
    rewards = [TASKS["toolmind"].reward(example, text) for text in texts]
    assert rewards == sorted(set(rewards)) and rewards[0] == 0 and rewards[-2] <= 0.5 and rewards[-1] == 1


@pytest.mark.skipif(not BFCL.is_dir(), reason="the real calls are not at hand")
def test_toolmind_takes_400_real_calls_in_both_dialects_and_no_other():
    name = "BFCL_v4_simple_python.json"
    questions, answers = ([json.loads(line) for line in open(folder / name)] for folder in (BFCL, BFCL / "possible_answer"))
    for question, answer in zip(questions, answers, strict=True):
        tools = [tasks.tool_schema({"function": f}) for f in question["function"]]
        (function, accepted), = answer["ground_truth"][0].items()
        call = {key: next(v for v in values if v != "") for key, values in accepted.items() if values != [""]}
        call = {key: {k: v[0] for k, v in value.items()} if isinstance(value, dict) else value for key, value in call.items()}
        example = {"tools": tools, "target": tasks.comparable([(function, call)], tools)}
        for dialect in hermes, xml:
            assert TASKS["toolmind"].score(example, dialect(call, function)) == 1
            for key in call:
                assert TASKS["toolmind"].score(example, dialect({k: v for k, v in call.items() if k != key}, function)) == 0
                assert TASKS["toolmind"].score(example, dialect({**call, key: "something else"}, function)) == 0


PATTERNS = ["Answer: ", "answer is", "answer ", "answer\n", "Answer: 1 ", "Answer: (A", "answer is not (A) but ", "\\boxed{",
            "#### ", "1", "1,", "1 ", "1/", "(", "(A)", " ", "\n", "*", "=", "\\frac{1", "<tool_call>", "<tool_call>{", "[",
            "{\"a\":", "<think>", "</think>", "A", "A, ", "is not ", "<tool_call><function=f>", "<parameter=a>", "</parameter>",
            "</parameter> ", "</parameter><parameter=", "</function>"]
BEFORE = ["", "Answer: ", "Answer: 18", "The answer is (A)", "<tool_call><function=book><parameter=city>",
          '<tool_call>{"name": "book", "arguments": ']


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_completion_takes_no_longer_than_its_length(pattern):
    examples = {"gsm8k": {"target": Fraction(18)}, "gpqa": {"target": "B"},
                "toolmind": {"tools": TOOLS, "target": tasks.comparable([("book", OSLO)], TOOLS)}}
    for before in BEFORE:
        for after in "", "</tool_call>", "</function></tool_call>":
            text = before + pattern * (100_000 // len(pattern)) + after
            start = time.process_time()
            for task, example in examples.items():
                assert 0 <= TASKS[task].reward(example, text) <= 1
            assert time.process_time() - start < 1.5, (before, after)
