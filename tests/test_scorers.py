"""The scorers, judged by answers as models write them: right and wrong ones, and those on which
published scorers go wrong."""

import json
import re
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import eval as tasks
from conftest import ROOT, data
from eval import TASKS

SHARED = ROOT.parent / "shared" / "data"                    # real rows, where they are at hand
BFCL = SHARED / "bfcl"


def reward(task, example, text):
    return (TASKS[task].reward or TASKS[task].score)(example, text)


def rows(table):
    """One test a text, from a table {what is read: [text, ...]}."""
    return [pytest.param(text, value, id=text[:60] or "nothing")
            for value, texts in table.items() for text in texts]


# --------------------------------------------------------------------------------------------------
# GSM8K

GSM8K = {
    18: [
        "16 - 3 - 4 = 9\n9 * 2 = 18\nAnswer: 18", "**Answer:** 18", "**Answer**: 18 dollars",
        "Answer: **18**", "**Answer: 18**", "Answer: \\boxed{18}", "so it is \\boxed{18}.",
        "\\boxed{\\text{18 dollars}}", "The answer is \\(18\\).", "Answer: $18$", "#### 18",
        "Answer: <18>", "Answer: `18`", "Answer\uff1a18", "ANSWER: 18", "answer is: 18",
        "__Answer:__ 18", "<answer>18</answer>", "Answers: 18", "The answers are 18",
        "The final answer is 18.", "The answer to the question is 18.", "Answer (in dollars): 18",
        "Answer: Rs.18", "Answer: 18.00", "Answer: 18,", "Answer: Janet makes $18.",
        "Answer: 18 dollars per day", "Answer: 18 (= 9 * 2)", "Answer: 18 (profit = 200 - 182)",
        "Answer: 9 * 2 = 18", "Answer: 18 = 9 * 2", "Answer: x = 18", "Answer: 36/2",
        "Answer: 9 (eggs) * 2 (dollars) = 18", "The answer is 18 (x = 3)",
        "The answer is 18, as 9 * 2 = 18", "Answer: 17.9 \u2248 18", "Answer: 18, not 20",
        "Answer: 18. Check: 18 / 2 = 9.", "Answer: 18 dollars. That is 9 eggs at 2.",
        "Answer: 18 or more", "Answer: eighteen (18)",
        # a number beside it that is none of the answer's
        "Answer: 75% of 24 is 18", "Answer: Day 3: 18", "Answer: In 3 days she makes 18 dollars",
        "Answer: 18 dollars for 3 hours",
        # the number on another line
        "Answer:\n\n18", "Answer:\r\n18", "Answer:\n- 18 dollars", "**Final Answer**\n\n18",
        "### Answer\n18", "Answer:\n```\n18\n```", "Answer: 18\n2 eggs are left over",
        "Answer: 18\n\nI hope this answer is helpful!", "Answer: 18\n\n#### Explanation",
        "Answer: 18\n\nIs this answer reasonable? Yes: 9 * 2",
        # two answers: the last; and what is thought aloud is no answer
        "Answer: 3\nNo. Answer: 18", "Answer: 18\nAnswer: <number>",
        "<think>Answer: 3</think>Answer: 18", "Answer: 18\n</think>",
        "Answer: 18\n<think>Wait. Answer: 3"],
    1080: [
        "Answer: $1,080.", "Answer: \\$1,080", "Answer: 1\\,080", "Answer: 1{,}080",
        "Answer: 1 080", "Answer: 1'080", "Answer: 1\u2019080", "Answer: 1_080",
        "Answer: 1\u202f080", "Answer: 1\u2009080", "Answer: 1,080.00 USD", "Answer: $ 1,080"],
    100_000: ["Answer: Rs. 1,00,000", "Answer: 100,000", "Answer: 100000.0"],
    20_000: ["Answer: $20K", "Answer: 20 thousand dollars"],
    1_500_000: ["Answer: 1.5 million"],
    25: ["Answer: Each of the 4 friends pays $25."],
    30: ["Answer: In 5 years Jane will be 30"],
    -7: ["Answer: -$7", "Answer: $-7", "Answer: \u22127", "Answer: -7 degrees", "\\boxed{-7}",
         "Answer: - 7"],
    50: ["Answer: 50%", "Answer: 50 %", "\\boxed{50\\%}", "Answer: 50 percent"],
    5: ["Answer: 5.0", "Answer: 5.", "Answer: 5 100-dollar bills", "Answer: 5th"],
    Fraction(1, 2): ["Answer: 1/2", "Answer: \\frac{1}{2}", "Answer: .5", "Answer: 0.50",
                     "Answer: $\\dfrac{1}{2}$"],
    Fraction(5, 2): ["Answer: 5/2 hours", "Answer: 2.5", "Answer: 2 1/2"],
    Fraction(37, 2): ["Answer: 18\xbd", "Answer: 18 1/2", "Answer: 18\\frac{1}{2}"],
    None: [
        "", "18", "About 18, I think.", "Answer:", "Answer: seven", "Answer: eighteen",
        "Answer: <number>", "<think>Answer: 18", "The answer isn't 18", "The answer is not 18",
        "The answer is definitely not 18.", "Answer: 9 * 2", "Answer: 18 + 2",
        "Answer: 3 * (2 + 4)", "Answer: 18 x 2", "Answer: 18 \\times 2", "Answer: 18^2",
        "Answer: 18\xb2", "Answer: 18 or 20", "Answer: **18** or **20**", "Answer: 18 (or 20)",
        "Answer: 18, 20", "Answer: 18; 20", "Answer: 18 20", "Answer: 18 and 20", "Answer: 18-20",
        "Answer: 18 - 20", "Answer: 18\u201320", "Answer: 18 to 20 dollars",
        "Answer: $18 or maybe $20", "Answer: between 18 and 20",
        "Answer: 18 dollars and 50 cents", "Answer: 18 hours 30 minutes",
        "Answer: 18 hours, 30 minutes", "Answer: 18:30", "Answer: 18,5", "Answer: 18.080.000",
        "Answer: 18e3", "Answer: 18/0"],
}


@pytest.mark.parametrize("text, value", rows(GSM8K))
def test_gsm8k_reads_the_number_a_person_would(text, value):
    assert tasks.gsm8k_answer(None, text) == value
    for target in (18, -7, 5, 1080):
        example = {"target": Fraction(target)}
        assert TASKS["gsm8k"].score(example, text) == (value == target)
        assert reward("gsm8k", example, text) == (value == target)          # binary


# What the short rule gives, and what a person reads
KNOWN_MISSES = [
    ("Answer: 5:00 PM", None, 5), ("Answer: 5-dollar bills", None, 5),
    ("Answer: 24/3 = 8. On Wednesday there was 2*8 = 16 feet.", 8, 16)]


@pytest.mark.parametrize("text, read, person", KNOWN_MISSES)
def test_gsm8k_where_our_rule_goes_wrong(text, read, person):
    assert tasks.gsm8k_answer(None, text) == read != person


def official(text):
    """OpenAI's: the first number after "#### "; the strict ones of lm-evaluation-harness and verl
    use the same expression."""
    found = re.search(r"#### (-?[\d.,]+)", text)
    return found and found[1].replace(",", "")


def harness(text):
    """lm-evaluation-harness, flexible: the last thing that looks like a number, anywhere."""
    found = re.findall(r"-?[$\d.,]{2,}|-?\d+", text)
    return re.sub(r"[,$]", "", found[-1]).removesuffix(".") if found else None


def verl(text):
    """The flexible reward of verl: as the harness, but commas and a full stop stay."""
    found = [number for number in re.findall(r"-?[\d.,]+", text) if number != "."]
    return found[-1] if found else None


@pytest.mark.parametrize("scorer, text, read, value", [
    (official, "Answer: 18", None, 18), (official, "#### $18", None, 18),
    (official, "#### 18.", "18.", 18), (official, "#### 5.0", "5.0", 5),
    (official, "#### 3\nNo.\n#### 18", "3", 18), (official, "<think>#### 18", "18", None),
    (harness, "Answer: 18\n2 eggs are left over", "2", 18), (harness, "Answer: 36/2", "2", 18),
    (harness, "Answer: \u22127", "7", -7), (harness, "Answer: 18 (= 9 * 2)", "2", 18),
    (harness, "About 18, I think.", "18", None), (harness, "Answer: 20 or 18", "18", None),
    (harness, "Answer: 1 080", "080", 1080), (verl, "Answer: $1,080.", "1,080.", 1080),
    (verl, "Answer: -$7", "7", -7), (verl, "Answer: 5.0", "5.0", 5)])
def test_gsm8k_where_published_scorers_go_wrong(scorer, text, read, value):
    assert scorer(text) == read and tasks.gsm8k_answer(None, text) == value
    assert read != str(value)


@pytest.mark.parametrize("text, read, value", [
    ("Answer: 18", 18, 18), ("Answer: $1,080.", 1080, 1080), ("Answer: -7", -7, -7),
    ("Answer: 3\nAnswer: 18.5", Fraction(37, 2), Fraction(37, 2)),
    ("<think>Answer: 3</think>Answer: 18", 18, 18), ("Answer: **18**", None, 18),
    ("**Answer:** 18", None, 18), ("\\boxed{18}", None, 18), ("Answer: \\boxed{18}", None, 18),
    ("The answer is 18", None, 18), ("Answer: -$7", None, -7), ("Answer: 18\n2 eggs", 182, 18),
    ("Answer: 1/2", 1, Fraction(1, 2)), ("Answer: 18 + 2", 18, None),
    ("<think>Answer: 18", 18, None), ("Answer: 18-20", 18, None),
    ("", None, None), ("Answer: ,", None, None)])
def test_gsm8k_by_the_papers_rule_and_by_ours(text, read, value):
    assert tasks.gsm8k_paper_answer(text) == read and tasks.gsm8k_answer(None, text) == value
    result = tasks.judge(TASKS["gsm8k"], {"key": "", "target": Fraction(18)}, [(text, 1, False)])
    assert result["paper_score"] == [read == 18] and result["score"] == [value == 18]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
@pytest.mark.parametrize("ending", [
    "#### {}", "**Answer:** {}", "Answer: ${}.", "Answer:\n\n\\boxed{{{}}}", "Answer: 1 + 1 = {}",
    "The answer is {} dollars. Check: 1 + 1 = 2."])
def test_gsm8ks_reference_solutions_score_one_however_they_end(ending):
    for row in map(json.loads, open(SHARED / "gsm8k" / "test.jsonl")):
        solution, number = row["answer"].split("#### ")
        text = solution + ending.format(number)
        assert TASKS["gsm8k"].score(tasks.gsm8k_example(row), text) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_gsm8ks_last_sentences_are_hardly_ever_read_as_a_wrong_number():
    """The last line of a reference solution, as people wrote it, behind "Answer: "."""
    wrong, right = [], 0
    for row in map(json.loads, open(SHARED / "gsm8k" / "test.jsonl")):
        solution = re.sub(r"<<.*?>>", "", row["answer"].split("\n####")[0])
        text = "Answer: " + solution.splitlines()[-1]
        read, target = tasks.gsm8k_answer(None, text), tasks.gsm8k_example(row)["target"]
        right += read == target
        wrong += [] if read in (None, target) else [text]
    print(f"{right} right, {len(wrong)} wrong", *wrong, sep="\n")
    assert len(wrong) <= 12 and right > 1100


# --------------------------------------------------------------------------------------------------
# GPQA. In the options, (B) is copper. The prompt asks for the letter: an option's text is none.

GPQA = {
    "B": [
        "The correct answer is (B)", "The correct answer is (b).", "**The correct answer is (B)**",
        "The correct answer is **B**", "The correct answer is **(B)**",
        "The correct answer is [B]", "The correct answer is ( B )",
        "The correct answer is: (B) copper", "The correct answer is option (B)",
        "The correct answer is option B.", "The correct option is (B)",
        "The correct answer is clearly (B)", "The correct answer is (B): copper",
        "The correct answer is copper (B).", "The correct answer is:\n\n(B)", "answer is: \"B\"",
        "Answer: B", "Answer: b", "Answer: B. copper", "Answer: B) copper",
        "Answer: B because it is", "Answer: B, copper", "ANSWER: (B)", "**Answer:** B",
        "answer is: \\boxed{B}", "The correct answer is: $\\boxed{\\text{B}}$",
        "answer: \\boxed{\\mathrm{B}}", "so \\boxed{(B)}", "The answer should be (B)",
        "answer should be (B)", "(B) is the correct answer", "The answer is letter B",
        "From the metals: copper.\nThe correct answer is (B)",
        "<think>(A)? The answer is (A).</think>The correct answer is (B)",
        # alone
        "(B)", "B", "B.", "**B**", "Copper it is.\n\n**(B)**",
        # other letters that are mentioned, but not given as the answer
        "(A) looks right, but the correct answer is (B)", "The answer is A. No: the answer is B.",
        "The answer is (B) because (A) melts.", "The correct answer is (B), not (A).",
        "The correct answer is not (A) but (B)", "The correct answer is (B) rather than (C).",
        "The correct answer is (B), (A) is wrong.",
        "The correct answer is (B). (A) and (C) are too small.",
        "The correct answer is (B) (E)-2-butene", "The correct answer is (B) (D)-glucose",
        "The correct answer is (B), vitamin C", "The correct answer is (B) k[A][C]",
        "The correct answer is (B) P(A) = 0.5", "The correct answer is given by (B)",
        "The correct answer is (B)\n\nI hope this answer is helpful!",
        "The correct answer is (B) B, A, C"],
    "A": ["The correct answer is (A)", "Answer: A", "The answer is A because copper melts",
          "The answer is A. Copper"],
    "C": ["The correct answer is (C), since (B) rusts.",
          "Answer: (B)? No. The correct answer is (C)", "The correct answer is (C) A and D",
          "The correct answer is (C) Both A and B", "The correct answer is (C) Compound A and B"],
    "D": ["The correct answer is (D) All of the above: A, B and C"],
    None: [
        "", "Perhaps copper.", "The correct answer is copper", "The correct answer is Brass",
        "The answer is a difficult one", "The correct answer is D-glucose",
        "The correct answer is B12", "The correct answer is C\u2013H", "The answer is A photon",
        "The correct answer is vitamin B", "<think>The correct answer is (B)",
        "The correct answer is (X)", "(B) copper is a metal", "The correct answer is (A) or (B)",
        "The correct answer is (B) or (C)", "The correct answer is (A) or maybe (B)",
        "The correct answer is likely (B) or maybe C", "The correct answer is either (B) or (C)",
        "The correct answer is B or C", "The correct answer is B and C", "Answer: B/C",
        "Answer: A, B", "The correct answer is (B) copper or (C) iron",
        "The correct answer is (A)(B)(C)(D)", "The correct answer is (B) but could be (C)",
        "The correct answer is neither (A) nor (B)", "The correct answer is not (B)",
        "The correct answer isn't (B)", "The correct answer is (B) as well as (C)",
        "The correct answer is (A) is incorrect", "The answer is (B). Wait: the answer is not (B).",
        "The answer is (B).\nOr rather, the answer is (A) or (B).", "(B)(E)", "B or C",
        "(A) iron (B) copper"],
}


@pytest.mark.parametrize("text, letter", rows(GPQA))
def test_gpqa_reads_the_letter_a_person_would(text, letter):
    assert tasks.gpqa_answer(None, text) == letter
    assert TASKS["gpqa"].score({"target": "B"}, text) == (letter == "B")
    assert reward("gpqa", {"target": "B"}, text) == {"B": 1.0, None: 0.0}.get(letter, 0.1)


def baseline(text):
    """GPQA's own: the first bracketed character after "answer is", or the first in brackets."""
    found = re.search(r"answer is \((.)\)", text) or re.search(r"\((.)\)", text)
    return found and found[1]


def harness_letter(text):
    """The flexible filter of lm-evaluation-harness: the last capital in brackets."""
    found = re.findall(r"\(([A-Z])\)", text)
    return found[-1] if found else None


@pytest.mark.parametrize("scorer, text, read, letter", [
    (baseline, "The correct answer is **B**", None, "B"),
    (baseline, "(A) looks right, but the correct answer is **(B)**", "A", "B"),
    (baseline, "The answer is (A). No: the answer is (B).", "A", "B"),
    (baseline, "The correct answer is (B) or (C)", "B", None),
    (baseline, "<think>The correct answer is (B)", "B", None),
    (harness_letter, "The correct answer is (B), not (A).", "A", "B"),
    (harness_letter, "The answer is (B) because (A) melts.", "A", "B"),
    (harness_letter, "The correct answer is (b).", None, "B"),
    (harness_letter, "The correct answer is not (B)", "B", None),
    (harness_letter, "The correct answer is (A) or (B)", "B", None)])
def test_gpqa_where_published_scorers_go_wrong(scorer, text, read, letter):
    assert scorer(text) == read != letter and tasks.gpqa_answer(None, text) == letter


# --------------------------------------------------------------------------------------------------
# ToolMind

BOOK = {
    "city": {"type": "string"}, "people": {"type": "integer"}, "price": {"type": "number"},
    "quiet": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}},
    "code": {"type": "str, optional"}, "any": {}, "null": {"type": ["null", "string"]},
    "list": {"type": "List[str]"},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    "room": {"type": "object", "properties": {"floor": {"type": "integer"},
                                              "door": {"type": "string"}}}}
TOOLS = [tasks.tool_schema({"function": function}) for function in (
    {"name": "book", "parameters": {"type": "object", "required": ["city"], "properties": BOOK}},
    {"name": "stop", "parameters": {}})]


def hermes(arguments, name="book"):
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(arguments, name="book"):
    """As Qwen3.5's chat template writes a call."""
    parameters = ""
    for key, value in arguments.items():
        value = value if isinstance(value, str) else json.dumps(value)
        parameters += f"<parameter={key}>\n{value}\n</parameter>\n"
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def judged(reference, text):
    example = {"tools": TOOLS, "target": tasks.comparable(reference, TOOLS)}
    score, value = TASKS["toolmind"].score(example, text), reward("toolmind", example, text)
    assert (value == 1) == (score == 1) and value in (0, 0.1, 0.3, 1)
    return score == 1


OSLO = {"city": "Oslo", "people": 2}
CALL, STOP = xml(OSLO), hermes("{}", "stop")
COMPLETIONS = {
    True: [
        CALL, hermes(OSLO), hermes('{"people": 2, "city": "Oslo"}'),
        hermes('{"city": "Oslo", "people": 2.0}'), hermes('{"city": "Oslo", "people": "2"}'),
        hermes('"{\\"city\\": \\"Oslo\\", \\"people\\": 2}"'),
        hermes('{"city": "\\u004fslo", "people": 2}'), CALL.replace("\n", ""),
        hermes(OSLO).replace("\n", ""), xml({"people": 2, "city": "Oslo"}),
        xml({"city": "Oslo", "people": "2.0"}), "Let me see.\n" + CALL + "\nDone.",
        "<think>\nOslo?\n</think>\n" + CALL, "<think>" + xml({"city": "Rome"}) + "</think>" + CALL],
    False: [
        "", "I can help you with that.", "book(city='Oslo', people=2)",
        '{"name": "book", "arguments": {"city": "Oslo", "people": 2}}',
        "<function=book>\n<parameter=city>\nOslo\n</parameter>\n</function>",
        "<tool_call>book</tool_call>", hermes("[1]"), hermes("5"), "<tool_call></tool_call>",
        xml({"city": "oslo", "people": 2}), xml({"city": "Oslo ", "people": 2}),
        xml({"city": "Oslo", "people": 3}), xml(OSLO, "Book"), xml(OSLO, "order"),
        xml({"city": "Oslo", "people": "two"}), hermes('{"city": "Oslo", "people": [2]}'),
        hermes('{"city": "Oslo", "people": true}'), hermes('{"city": "Oslo"}'),
        hermes({**OSLO, "code": "x"}), hermes({**OSLO, "maybe": None}),
        hermes({"City": "Oslo", "people": 2}), hermes('["Oslo", 2]'), hermes("null"), hermes("{}"),
        2 * CALL, CALL + STOP, CALL + "<tool_call>", "<think>" + CALL,
        "<think>" + CALL + "</think>", CALL.replace("</tool_call>", ""),
        CALL.replace("</function>", ""), CALL.replace("</parameter>\n</f", "</f"),
        CALL.replace("</f", "<parameter=city>\nOslo\n</parameter>\n</f"),
        hermes('{"city": "Oslo", "people": 2'), hermes("{'city': 'Oslo', 'people': 2}"),
        hermes('{"city": "Oslo", "people": 2,}'), hermes(OSLO).replace("arguments", "parameters"),
        hermes(OSLO).replace('{"name"', '[{"name"').replace("}}", "}}]"),
        hermes('{"people": ' + "[" * 2000), xml({"city": "Oslo", "people": "[" * 600 + "]" * 600})],
}


@pytest.mark.parametrize("text, right", rows(COMPLETIONS))
def test_toolmind_wants_exactly_the_call_in_either_dialect(text, right):
    assert judged([("book", OSLO)], text) == right


@pytest.mark.parametrize("name, reference, right, wrong", [
    ("code", "007", ["007"], ["7", 7]), ("code", "7", ["7", 7], [7.0, "7.0", "07"]),
    ("code", "1e2", ["1e2"], [100, "100"]), ("code", "true", ["true", True], ["True"]),
    ("code", "[1]", ["[1]", [1]], ["[1.0]"]), ("maybe", "5", ["5", 5], [5.0]),
    ("null", "5", ["5", 5], [5.0, None]), ("null", None, [None], ["x", ""]),
    ("list", ["5"], [["5"], '["5"]'], ["5", []]),
    ("people", 7, [7, 7.0, "7", "7.0"], ["07", "seven", True, [7], "8"]),
    ("price", 1.0, [1, "1", 1.0, "1e0"], [1.01, "1,0", None]),
    ("price", 0.1, ["0.1", 0.10], [0.1000001, "10%"]),
    ("quiet", True, [True, "true", "True"], [1, "1", "yes", False]),
    ("quiet", False, [False, "false"], [0, None, ""]),
    ("tags", ["a", "b"], [["a", "b"], '["a", "b"]'], [["b", "a"], ["a"], "a, b", ["a", "b", "b"]]),
    ("tags", ["1"], [["1"], '["1"]', [1]], [["1.0"], "1"]),
    ("tags", [], [[], "[]"], [None, "", {}]),
    ("room", {"floor": 2, "door": "2"},
     [{"door": "2", "floor": "2"}, '{"floor": 2.0, "door": "2"}'],
     [{"floor": 2}, {"floor": 2, "door": "2.0"}]),
    ("map", {"a": "7"}, [{"a": "7"}, {"a": 7}, '{"a": "7"}'], [{"a": "7.0"}, {"b": "7"}]),
    ("any", "NaN", ["NaN"], ["nan", None]), ("any", 5, [5, "5", 5.0], ["five"]),
    ("any", None, [None, "null", "None"], ["", 0, False]), ("any", {}, [{}, "{}"], [[], "", None]),
    ("unheard", "x", ["x"], ["y"]),
    ("any", [1, [2, {"x": [3]}]], ["[1, [2, {\"x\": [3]}]]", [1, [2.0, {"x": ["3"]}]]],
     [[1, 2, 3]])])
def test_toolmind_arguments_are_judged_by_the_tools_schema(name, reference, right, wrong):
    call = [("book", {name: reference})]
    for dialect in hermes, xml:
        assert judged(call, dialect({name: reference}))
    for values, expected in (right, True), (wrong, False):
        for value in values:
            assert judged(call, hermes({name: value})) == expected, value
    assert not judged(call, hermes({}))


@pytest.mark.parametrize("text, right", rows({
    True: [hermes({"city": "Oslo"}) + xml({"city": "Rome"}) + STOP,
           STOP + xml({"city": "Rome"}) + "\nand\n" + xml({"city": "Oslo"})],
    False: [hermes({"city": "Oslo"}) + STOP, xml({"city": "Oslo"}) * 2 + STOP,
            xml({"city": "Oslo"}) + xml({"city": "Rome"}) + 2 * STOP,
            STOP + xml({"city": "Rome"}) + xml({"city": "Oslo"}).replace("</tool_call>", "")]}))
def test_toolmind_parallel_calls_count_in_any_order(text, right):
    calls = [("book", {"city": "Rome"}), ("stop", {}), ("book", {"city": "Oslo"})]
    assert judged(calls, text) == right


def test_toolmind_reward_rises_with_what_is_right():
    example = {"tools": TOOLS, "target": tasks.comparable([("book", OSLO)], TOOLS)}
    texts = ["nothing", hermes("{}", "stop"), hermes({"city": "Rome", "people": 9}), CALL]
    assert [reward("toolmind", example, text) for text in texts] == [0, 0.1, 0.3, 1]


@pytest.mark.parametrize("content", [
    "a </think> b", "a <think> b", "<think>", "</think>", "<tool_call>", "a </tool_call> b",
    "</function>", "<function=stop>", "<parameter=city>", "</tool_call><tool_call>", '"}}', "?\n!",
    "<think>" + STOP + "</think>", "\n", " ", "None", "true", "<|im_end|>"])
@pytest.mark.parametrize("dialect", [hermes, xml])
def test_toolmind_delimiters_in_arguments_are_text(content, dialect):
    for name in ("city", "any", "content"):
        call = {name: content}
        assert judged([("book", call)], dialect(call))
        assert judged([("book", call), ("stop", {})], "So:\n" + dialect(call) + STOP)
        assert not judged([("book", {name: content + "."})], dialect(call))


identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
pieces = st.lists(st.sampled_from([
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", '"', "}",
    "<parameter=x>", "\n", " ", "\\", "{", "[1]", "null", "5", "a", "\u00e9"]), max_size=6)
json_texts = st.one_of(st.text(max_size=12), pieces.map("".join))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | json_texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_texts, inner, max_size=3),
    max_leaves=8)
often = settings(max_examples=300, deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))


@often
@given(arguments=st.dictionaries(identifiers | st.sampled_from(list(BOOK)), json_values,
                                 max_size=4), dialect=st.sampled_from([hermes, xml]))
@example(arguments={"content": "a </think> b"}, dialect=xml)
@example(arguments={"content": "<think>"}, dialect=hermes)
def test_toolmind_every_reference_scores_one_in_either_dialect(arguments, dialect):
    """(A literal </parameter> in an XML value excepted.)"""
    text = dialect(arguments)
    assume(dialect is hermes or text.count("</parameter>") == len(arguments))
    assert judged([("book", arguments)], text)
    assert judged([("book", arguments)], "<think>\nbook it\n</think>\n\n" + text)


@pytest.mark.skipif(not BFCL.is_dir(), reason="the real calls are not at hand")
def test_toolmind_takes_400_real_calls_in_both_dialects_and_no_other():
    name = "BFCL_v4_simple_python.json"
    questions, answers = ([json.loads(line) for line in open(folder / name)]
                          for folder in (BFCL, BFCL / "possible_answer"))
    for question, answer in zip(questions, answers, strict=True):
        tools = [tasks.tool_schema({"function": f}) for f in question["function"]]
        (function, accepted), = answer["ground_truth"][0].items()
        call = {}
        for key, values in accepted.items():
            value = next((value for value in values if value != ""), None)
            if isinstance(value, dict):
                value = {inner: choices[0] for inner, choices in value.items()}
            if values != [""]:
                call[key] = value
        example = {"tools": tools, "target": tasks.comparable([(function, call)], tools)}
        for dialect in hermes, xml:
            assert TASKS["toolmind"].score(example, dialect(call, function)) == 1
            for key in call:
                fewer = {k: v for k, v in call.items() if k != key}
                for other in (fewer, {**call, key: "something else"}):
                    assert TASKS["toolmind"].score(example, dialect(other, function)) == 0


# --------------------------------------------------------------------------------------------------
# Whatever a model writes has a score, in a time that does not grow faster than the text

PIECES = [
    "Answer:", "answer is", "####", "\\boxed{", "}", "{", "\\frac{1}{2}", "The correct answer is (",
    ")", "A", "B", "(C)", "or", "1", "18", ",", ".", "-", "\u2212", "$", "%", "/", "=", "*", "**",
    "(", " ", "\n", "\r\n", "\t", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<function=", "f", ">", "</function>", "<parameter=", "x", "</parameter>", '{"name": "', '"',
    '", "arguments": ', "[", "]", ":", "null", "true", "NaN", "1e999", "\\u0000", "\\ud800", "\0",
    "\ud800", "\u0663", "\xbd", "\xb2", "0" * 500, "[" * 2000, "{" * 2000, '{"a":' * 2000,
    "9" * 5000, "1 1/", "million", "K"]
completions = st.one_of(
    st.text(max_size=200), st.text(st.characters(codec=None), max_size=100),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join))


@pytest.fixture(scope="module")
def examples():
    return {name: task.load("test", data(name, "test"), 2) for name, task in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
@often
@given(text=completions)
@example(text="")
def test_every_completion_has_a_score(examples, name, text):
    for question in examples[name]:
        score = TASKS[name].score(question, text)
        value, answer = reward(name, question, text), TASKS[name].answer(question, text)
        assert score in (0.0, 1.0) and 0 <= value <= 1 and (score == 1) == (value == 1)
        assert score == 0 or answer is not None
        tasks.judge(TASKS[name], question, [(text, 1, False)])


schemas = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "object", "List[str]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "properties", "items", "anyOf", "oneOf", "additionalProperties", "x"]), inner),
    max_leaves=8)


@often
@given(value=json_values, schema=schemas)
@example(value=1, schema={"properties": {"x": {"anyOf": ["string"]}}})
@example(value={"y": 1}, schema={"properties": {"x": {"type": "object", "properties": ["y"]}}})
def test_every_argument_is_comparable_under_every_schema(value, schema):
    """A completion may call any tool of its row, however oddly that is written down."""
    tools = [tasks.tool_schema({"name": "f", "parameters": schema})]
    example = {"tools": tools, "target": tasks.comparable([("g", {})], tools)}
    assert reward("toolmind", example, hermes({"x": value}, "f")) in (0, 0.1)


PATTERNS = [
    "Answer: ", "answer is", "answer ", "answer\n", "Answer: 1 ", "Answer: (A",
    "answer is not (A) but ", "\\boxed{", "#### ", "1", "1,", "1 ", "1/", "(", "(A)", " ", "\n",
    "*", "=", "\\frac{1", "<tool_call>", "<tool_call>{", "[", "{\"a\":", "<think>", "</think>", "A",
    "A, ", "is not ", "<tool_call><function=f>", "<parameter=a>", "</parameter>", "</parameter> ",
    "</parameter><parameter=", "</function>", "in ", "of the ", "1 1/", "- "]
BEFORE = ["", "Answer: ", "Answer: 18", "The answer is (A)",
          "<tool_call><function=book><parameter=city>",
          '<tool_call>{"name": "book", "arguments": ']


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_completion_takes_no_longer_than_its_length(pattern):
    """20,000 characters, far more than --max-new-tokens allows, in a moment."""
    questions = {"gsm8k": {"target": Fraction(18)}, "gpqa": {"target": "B"},
                 "toolmind": {"tools": TOOLS, "target": tasks.comparable([("book", OSLO)], TOOLS)}}
    for before in BEFORE:
        text, start = before + pattern * (20_000 // len(pattern)), time.process_time()
        for task, question in questions.items():
            assert 0 <= reward(task, question, text) <= 1
        assert time.process_time() - start < 1, before
