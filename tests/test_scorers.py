"""The scorers, judged by answers as models write them: right and wrong ones, and those on which
published scorers go wrong."""

import json
import re
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from vllm.tool_parsers.utils import coerce_to_schema_type, extract_types_from_schema

import eval as tasks
from conftest import ROOT, data, reward, score
from eval import TASKS
from rows import hermes, xml

SHARED = ROOT.parent / "shared" / "data"                    # real rows, where they are at hand


def question(target, tools=None):
    return tasks.Example("", [], target, tools)


def rows(table, before=""):
    """One test a text, from a table {what is read: [text behind `before`, ...]}."""
    return [pytest.param(before + text, value, id=(before + text)[:60] or "nothing")
            for value, texts in table.items() for text in texts]


BEHIND_ANSWER = {
    18: [
        "**18**", "\\boxed{18}", "$18$", "<18>", "18.00", "Janet makes $18.", "36/2", "18/day",
        "18 (= 9 * 2)", "9 * 2 = 18", "x = 18", "the total (in dollars) is 18", "18, not 20",
        "18 dollars. That is 9 eggs at 2.", "18 or more", "eighteen (18)", "18 m\u00b2",
        "18 kg of CO2", "18\\text{ cm}^2", "\\frac{36.0}{2}", "\\boxed{\\frac{36}{2}}",
        "18\n2 eggs are left over", "18\n\nIs this answer reasonable? Yes: 9 * 2",
        # two answers: the last; and what is thought aloud, or called wrong, is no answer
        "16 - 7 = 9 eggs.\n9 * 2 = 18 dollars.\n\nTherefore, she makes 18.",
        "She sells 16 - 7 = 9 eggs.\n9 * 2 = 18\n\\boxed{18}", "18; 16 - 7 = 9", "<b>18</b>",
        "\n\n1. **Eggs:** 16\n2. **Left:** 9\n\n\\boxed{18}", "18 because 3 + 4 = 7",
        "18 - She has 3 + 4 = 7 left.",
        "about 18", "5\nWait.\nAnswer: about 18",
        "3\nNo. Answer: 18", "18\nAnswer: <number>", "18\n</think>", "18\n<think>Wait. Answer: 3",
        "18\nA common wrong answer is 20", "18\nThe answer cannot be 20.",
        "18\nWrong answer: 20",
        # and what the prompt asks for outranks all other marks
        "18\n\nThe answer is reasonable because 3 eggs are eaten.", "18\nSo \\boxed{3} were eaten.",
        "18\n(The answer is rounded to 2 decimal places.)", "18\n\n#### 3 eggs",
        "eighteen\nThe answer is 18.",
        # markup around it
        "\n\n\\[\n18\n\\]", "\n$$\n18\n$$", "\\[ 18 \\]", "\\(18\\)", "\n```\n18\n```",
        "\n```text\n18\n```", "```18```", "\n\\begin{align*}\nx &= 18\n\\end{align*}", "\n- 18",
        "\n\\begin{equation}\n\\boxed{18}\n\\end{equation}", "\n\n---\n\n18", "18^\\circ",
        "18^{\\circ}", "18\u00b0", "18\\quad", "18 \\mbox{ dollars}", "\\displaystyle 18",
        "\\underline{18}", "18~dollars", "\\textbf{18}", "\\boldsymbol{18}", "\\bm{18}",
        "\\large 18", "\\color{red}{18}",
        # a word for "="
        "6 times 3 equals 18", "9 plus 9 equals 18 dollars", "9 * 2 \\Rightarrow 18"],
    1080: ["$1,080.", "\\$1,080", "1\\,080", "1{,}080", "1'080", "1_080", "1\u202f080"],
    -7: ["-$7", "$-7", "-7 degrees", "- 7", "\u22127", "\u20137", "\u2212$7", "(-7)", "minus 7",
         "-\\boxed{7}", "negative 7", "3 - 10 = -7", "a loss of -$7", "\\frac{-14}{2}"],
    50: ["50%"], 5: ["5.0", "5.", "5th", "5-dollar bills"], Fraction(5, 2): ["5/2 hours", "2.5"],
    Fraction(1, 2): ["1/2", "\\frac12", ".5", "0.50"], Fraction(-1, 2): ["-\\frac{1}{2}"],
    # a part of something longer: never a wrong number made of its digits
    None: [
        "eighteen", "<number>", "9 * 2", "10**3", "18 + 2", "18 \\times 2", "{36 \\over 2}", "18^2",
        "18\u00b2", "2^{10}", "\\sqrt{324}", "\u221a324", "\\sqrt[3]{27}", "\\binom{5}{2}", "18-20",
        "\\log_2 8", "\\frac{3+1}{2}", "\\frac{1}{-2}", "18\u201320", "18 20", "18:30", "18,5",
        "9 times 2", "36 divided by 2", "18 \u00b1 2",
        "0.\\overline{3}", "18\\pi", "18, 20", "18.080.000", "18e3",
        "18/0", "1\u20443", "36 \u00f7 2", "e^{3}"],
}
GSM8K = {
    18: [
        "16 - 3 - 4 = 9\n9 * 2 = 18\nAnswer: 18", "**Answer:** 18", "**Answer: 18**", "#### 18",
        "so it is \\boxed{18}.", "Answer\uff1a18", "ANSWER: 18", "<answer>18</answer>",
        "The final answer is 18.", "The answer to the question is 18.", "Answer (in dollars): 18",
        "Answer:\r\n18", "**Final Answer**\n\n18", "#### **18**", "#### $18", "## Answer\n18",
        "_Answer_: 18", "Answer - 18", "<answer>18</answer>\n\nConfidence: 95%",
        "Answer: Janet's ducks lay 16 eggs.\nShe sells 9.\n#### 18",
        "**Answer:**\n\n1. She has 16 eggs.\n2. She sells 9.\n\n\\boxed{18}",
        "Let us find the answer:\n16 - 3 - 4 = 9\n9 * 2 = 18\n\n\\boxed{18}",
        "The answer is 18.\nThe answer is reasonable because 3 eggs are eaten.",
        "**Answer:**\n\n\\[\n18\n\\]", "Answer in dollars: 18\nThe answer is not 3",
        "First express the answer as a percentage: 20 of 100\n#### 18",
        "<think>Answer: 3</think>Answer: 18",
        # the last "Answer:" counts, also where an earlier one begins with a number
        "Answer: 9\nAnswer: The total is 18.", "Step 1 answer: 9\nAnswer: She makes $18 a day.",
        "$\\boxed{9}$ eggs are left.\n9 * 2 = 18\nAnswer: She makes $18 a day.",
        "**Answer:**\n\nShe sells 16 - 7 = 9 eggs.\n\nThat is 9 * 2 dollars.\n\n**Total: 18**"],
    -7: ["#### \u22127", "\\boxed{-7}", "It is -\\boxed{7}.", "$-\\boxed{7}$"],
    None: ["", "18", "Answer: \u221ax", "\\boxed{\u221a(a^2+b^2)}",
           "Answer:", "<think>Answer: 18", "The answer isn't 18", "The answer is not 18"],
}


@pytest.mark.parametrize("text, value", rows(BEHIND_ANSWER, "Answer: ") + rows(GSM8K))
def test_gsm8k_reads_the_number_a_person_would(text, value):
    assert tasks.gsm8k_answer(None, text) == value
    for target in (18, -7, 5, 1080):
        example = question(Fraction(target))
        assert score("gsm8k", example, text) == (value == target)
        assert reward("gsm8k", example, text) == (value == target)          # binary


# Where the rule of one sentence reads otherwise: {(read, what a person reads): texts}. What follows
# the first number counts for nothing, so that listing several gains nothing.
GSM8K_OTHERWISE = {
    (18, None): [
        "18 or 20", "**18** or **20**", "18 (or 20)", "18 and 20", "18 to 20 dollars",
        "between 18 and 20", "18 dollars and 50 cents", "18 hours 30 minutes"],
    (3, 18): ["In 3 days she makes 18 dollars"], (75, 18): ["75% of 24 is 18"],
    (9, 18): ["9 (eggs) * 2 (dollars) = 18"], (4, 25): ["Each of the 4 friends pays $25."],
    (8, 16): ["24/3 = 8. On Wednesday there was 2*8 = 16 feet."], (3, None): ["3 * (2 + 4)"],
    (20, 20_000): ["$20K", "20 thousand dollars"], (None, 1080): ["1 080"], (None, 5): ["5:00 PM"],
    (None, 100_000): ["Rs. 1,00,000"], (None, 18): ["18 = 9 * 2", "Day 3: 18"],
    (None, Fraction(37, 2)): ["18\u00bd", "18\\frac{1}{2}", "18 1/2"],
}


@pytest.mark.parametrize("text, read, value", [
    ("Answer: 18", 18, 18), ("Answer: $1,080.", 1080, 1080), ("Answer: -7", -7, -7),
    ("Answer: 3\nAnswer: 18.5", Fraction(37, 2), Fraction(37, 2)), ("Answer: -$7", None, -7),
    ("<think>Answer: 3</think>Answer: 18", 18, 18), ("Answer: **18**", None, 18),
    ("**Answer:** 18", None, 18), ("\\boxed{18}", None, 18), ("The answer is 18", None, 18),
    ("Answer: 18\n2 eggs", 182, 18), ("Answer: 1/2", 1, Fraction(1, 2)),
    ("Answer: 18 + 2", 18, None), ("<think>Answer: 18", 18, None), ("Answer: ,", None, None)])
def test_gsm8k_by_the_papers_rule_and_by_ours(text, read, value):
    assert tasks.gsm8k_paper_answer(text) == read and tasks.gsm8k_answer(None, text) == value
    result, = tasks.judged_results(TASKS["gsm8k"], [question(Fraction(18))], [(text, 1, False)])
    assert result["paper_score"] == (read == 18) and result["score"] == (value == 18)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
def test_gsm8ks_reference_solutions_score_one_however_they_end():
    """And their last sentences behind "Answer: " are hardly ever read as a wrong number."""
    endings = ["#### {}", "**Answer:** {}", "Answer: ${}.", "Answer:\n\n\\boxed{{{}}}",
               "Answer: 1 + 1 = {}", "The answer is {} dollars. Check: 1 + 1 = 2.",
               "**Final Answer**\n\n{}"]
    wrong, right = [], 0
    for row in map(json.loads, open(SHARED / "gsm8k" / "test.jsonl")):
        solution, number = row["answer"].split("#### ")
        example = tasks.gsm8k_example(row)
        for ending in endings:
            assert score("gsm8k", example, solution + ending.format(number)) == 1
        sentence = re.sub(r"<<.*?>>", "", solution.rstrip("\n")).splitlines()[-1]
        read = tasks.gsm8k_answer(None, "Answer: " + sentence)
        right += read == example.target
        wrong += [] if read in (None, example.target) else [sentence]
    print(f"{right} right, {len(wrong)} wrong", *wrong, sep="\n")
    assert len(wrong) <= 30 and right > 1250


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
@pytest.mark.parametrize("form, most_wrong", [
    ("Answer: {0}\n#### {1}", 40), ("Answer:\n{0}\n\n\\boxed{{{1}}}", 40),
    ("Answer:\n{0}\n\nTherefore, the total is {1}.", 40),
    ("**Answer:**\n\n{2}\n\nSo the total is {1}.", 0),
    ("**Answer:**\n\n{2}\n\n\\boxed{{{1}}}", 0), ("Answer: {1} because {3}", 0),
    *[("**Answer:**\n\n{2}\n\n" + end, 0) for end in (
        "**{1}**", "= {1}", "Result: {1}", "**Final result:** {1}", "The total is {1}.",
        "In conclusion, she makes {1}.", "Altogether she makes {1}.")],
    ("Answer: {1}; {3}", 0)])
def test_gsm8ks_solutions_below_the_mark_do_not_hide_the_answer(form, most_wrong):
    """Models write the whole solution there, with the answer at its end, or explain it behind it.
    A first line that begins with one number ("16 eggs are laid") is taken for the answer."""
    wrong = 0
    for row in map(json.loads, open(SHARED / "gsm8k" / "test.jsonl")):
        solution, number = re.sub(r"<<.*?>>", "", row["answer"]).split("#### ")
        lines = solution.strip().splitlines()
        steps = "\n".join(f"{i}. **Step {i}:** {line}" for i, line in enumerate(lines, 1))
        text = form.format(solution.strip(), number, steps, lines[-1])
        wrong += tasks.gsm8k_answer(None, text) != tasks.gsm8k_example(row).target
    assert wrong <= most_wrong


# GPQA: the letter that the prompt asks for. (B) is copper; an option's text is no answer ----------

BEHIND_THE_PROMPTS_WORDS = {
    "B": [
        "(B)", "**B**", "[B]", "option (B)", "clearly (B)", "(B): copper", "copper (B).",
        # other letters that are mentioned, but not given as the answer
        "(B), not (A).", "(B) rather than (C).", "(B), (A) is wrong.", "(B) B, A, C",
        "(B) (E)-2-butene", "(B) (D)-glucose", "(B), vitamin C", "(B) k[A][C]", "(B) P(A) = 0.5",
        "(B)\n\nI hope this answer is helpful!", "(B)\nA common wrong answer is (A).",
        "(B).\n\nThe other answers are incorrect because (A) melts.",
        "(B)\n\nWhy not the other answer choices:\n\n(A) melts, and (C) is",
        # what the prompt asks for outranks all other marks
        "(B).\nThis answer is supported by ruling out (A).", "(B).\nFinal answer: A is out.",
        "copper, (B).\nThe answer is A plus for conductors.", "\n\\[\n\\boxed{B}\n\\]"],
    "C": ["(C), since (B) rusts.", "(C) A and D", "(C) Both A and B", "(C) Compound A and B"],
    None: ["copper", "Brass", "D-glucose", "D\u2011glucose", "B12", "C\u2013H", "vitamin B", "(X)",
           "neither (A) nor (B)", "not (B)"],
}
GPQA = {
    "B": [
        "The correct answer is: (B) copper", "The correct option is (B)", "The answer is letter B",
        "The correct answer is:\n\n**B. copper**", "The answer should be (B)", "Answer: b", "(B)",
        "Answer: B. copper", "**Answer:** B", "The correct answer is: $\\boxed{\\text{B}}$", "B",
        "(B) is the correct answer", "From the metals: copper.\nThe correct answer is (B)", "**B**",
        "Copper it is.\n\n**(B)**", "(A) looks right, but the correct answer is (B)",
        "<think>(A)? The answer is (A).</think>The correct answer is (B)",
        "To see which correct answer is best: (A) no, (B) yes.\n\nAnswer: (B)",
        "The correct answer should be around 10. Option (A) 12, (B) 10.\n\n**Answer: (B)**",
        "Let's see what the correct answer is:\n- A: no\n- B: yes\n\nAnswer: B",
        "The answer is A. No: the answer is B.",
        "The answer is (B). This answer is supported by ruling out (A).",
        "Looking at the answer choices:\n(A) iron\n(B) copper\n\n**B**",
        "The correct answer to the question is (B).\nThe answer is supported by (A).",
        "The answer is B because (A) melts.", "The correct answer is b) copper"],
    "C": ["Answer: (B)? No. The correct answer is (C)"],
    None: [
        "", "Perhaps copper.", "The answer is a difficult one", "<think>The correct answer is (B)",
        "(B) copper is a metal", "The correct answer isn't (B)", "B or C", "(A) iron (B) copper"],
}


@pytest.mark.parametrize("text, letter",
                         rows(BEHIND_THE_PROMPTS_WORDS, "The correct answer is ") + rows(GPQA))
def test_gpqa_reads_the_letter_a_person_would(text, letter):
    assert tasks.gpqa_answer(None, text) == letter
    assert score("gpqa", question("B"), text) == (letter == "B")
    assert reward("gpqa", question("B"), text) == {"B": 1.0, None: 0.0}.get(letter, 0.1)


@pytest.mark.parametrize("text", [
    "The correct answer is <|begin_of_box|>{}<|end_of_box|>", "<|begin_of_box|>{}<|end_of_box|>",
    "The correct answer is <{}>", "Therefore, ({}) is the correct answer.",
    "The correct answer is copper, which is option {}.", "The correct answer is clearly **{}**",
    "{} is correct", "{} is the best choice.", "Option {} is the best choice", "Option {}", "{}",
    "Answer: {}", "Answer: {} with high confidence", "Answer: {} is correct", "\\boxed{{{}}}",
    "The correct answer is the letter {}", "So, {} is the answer.", "<Answer>{}</Answer>",
    "<final_answer>{}</final_answer>", "The correct answer, based on the analysis above, is ({})",
    "**{}** is right", "The answer is {} because copper melts", "The answer is {}. Copper"])
def test_gpqa_reads_every_letter_alike(text):
    """A too, which is a word as well: otherwise a quarter of the answers is judged more harshly."""
    assert [tasks.gpqa_answer(None, text.format(letter)) for letter in "ABCD"] == [*"ABCD"]


GPQA_OTHERWISE = {
    ("A", None): ["(A) or (B)", "(A)(B)(C)(D)", "(A) is incorrect", "A photon"],
    ("B", None): ["(B) or (C)", "likely (B) or maybe C", "either (B) or (C)", "B or C",
                  "(B) copper or (C) iron", "(B) as well as (C)",
                  "(B). Wait: the answer is not (B)."],
    (None, "B"): ["not (A) but (B)"],
}


@pytest.mark.parametrize("text, readings", rows(GSM8K_OTHERWISE, "Answer: ")
                         + rows(GPQA_OTHERWISE, "The correct answer is "))
def test_where_our_rules_read_otherwise(text, readings):
    read, person = readings
    answer = tasks.gsm8k_answer if text.startswith("Answer: ") else tasks.gpqa_answer
    assert answer(None, text) == read != person


BOOK = {
    "city": {"type": "string"}, "people": {"type": "integer"}, "price": {"type": "number"},
    "quiet": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}},
    "code": {"type": "str, optional"}, "any": {}, "null": {"type": ["null", "string"]},
    "list": {"type": "List[str]"},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    "room": {"type": "object", "properties": {"floor": {"type": "integer"},
                                              "door": {"type": "string"}}},
    "ref": {"$ref": "#/$defs/text"}, "all": {"allOf": [{"$ref": "#/$defs/text"}]},
    "enum": {"enum": ["1.10", "2.0"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "union": {"type": "Union[int, str]"}, "node": {"$ref": "#/$defs/node"},
    "which": {"oneOf": [{"type": "object", "properties": {"id": {"type": "integer"}}},
                        {"type": "object", "properties": {"id": {"type": "string"}}}]},
    "many": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}}
DEFS = {"text": {"type": "string"}, "node": {"type": "object", "properties": {
    "value": {"type": "string"}, "next": {"$ref": "#/$defs/node"}}}}
TOOLS = [tasks.tool_schema({"function": function}) for function in (
    {"name": "book", "parameters": {"type": "object", "required": ["city"], "properties": BOOK,
                                    "$defs": DEFS}},
    {"name": "stop", "parameters": {}})]


def judged(reference, text, tools=TOOLS):
    """Whether a completion makes the calls of a row's reference."""
    calls = [(name, tasks.read_json(json.dumps(arguments))) for name, arguments in reference]
    example = question(tasks.comparable(calls, tools), tools)
    found, value = score("toolmind", example, text), reward("toolmind", example, text)
    assert (value == 1) == (found == 1) and value in (0, 0.1, 0.3, 1)
    return found == 1


OSLO, ROME = {"city": "Oslo", "people": 2}, {"city": "Rome"}
CALL, STOP = xml(OSLO), hermes("{}", "stop")
COMPLETIONS = {
    True: [
        CALL, hermes(OSLO), hermes('{"people": 2, "city": "Oslo"}'), CALL.replace("\n", ""),
        hermes(OSLO).replace("arguments", "parameters"),            # as references may name them
        hermes('"{\\"city\\": \\"Oslo\\", \\"people\\": 2}"'), hermes(OSLO).replace("\n", ""),
        hermes('{"city": "\\u004fslo", "people": 2}'), xml({"people": 2, "city": "Oslo"}),
        "Let me see.\n" + CALL + "\nDone.", "<think>\nOslo?\n</think>\n" + CALL,
        "<think>" + xml(ROME) + "</think>" + CALL,
        # drafted in a thought that the chat template opened
        xml(ROME) + "</think>" + CALL, "<tool_call>book?\nNo.</think>" + CALL],
    False: [
        "", "I can help you with that.", "book(city='Oslo', people=2)", hermes("[1]"), hermes("5"),
        '{"name": "book", "arguments": {"city": "Oslo", "people": 2}}', hermes("null"),
        "<function=book>\n<parameter=city>\nOslo\n</parameter>\n</function>", hermes("{}"),
        "<tool_call>book</tool_call>", "<tool_call></tool_call>", hermes('["Oslo", 2]'),
        xml({"city": "oslo", "people": 2}), xml({"city": "Oslo ", "people": 2}), xml(OSLO, "Book"),
        xml({"city": "Oslo", "people": 3}), hermes({"city": "Oslo"}), hermes({**OSLO, "code": "x"}),
        hermes({"City": "Oslo", "people": 2}), 2 * CALL, CALL + STOP, CALL + "<tool_call>",
        "<think>" + CALL, "<think>" + CALL + "</think>", CALL + "\n</think>\nNo call is needed.",
        CALL.replace("</tool_call>", ""), CALL.replace("</function>", ""),
        CALL.replace("</parameter>\n</f", "</f"),
        CALL.replace("</f", "<parameter=city>\nOslo\n</parameter>\n</f"),
        hermes('{"city": "Oslo", "people": 2, "people": 2}'),
        hermes('"{\\"city\\": \\"Oslo\\", \\"people\\": 2, \\"people\\": 2}"'),
        hermes('{"city": "Oslo", "people": 2'), hermes("{'city': 'Oslo', 'people': 2}"),
        '<tool_call>{"name": null, "arguments": {}}</tool_call>' + CALL,
        hermes('{"city": "Oslo", "people": 2,}'), hermes(OSLO).replace("arguments", "args"),
        hermes('[["city", "Oslo"], ["people", 2]]'),
        hermes('{"people": ' + "[" * 2000), xml({"city": "Oslo", "people": "[" * 600 + "]" * 600})],
}


@pytest.mark.parametrize("text, right", rows(COMPLETIONS))
def test_toolmind_wants_exactly_the_call_in_either_dialect(text, right):
    assert judged([("book", OSLO)], text) == right


def test_toolmind_parallel_calls_count_in_any_order():
    oslo, rome = xml({"city": "Oslo"}), xml(ROME)
    calls = [("book", ROME), ("stop", {}), ("book", {"city": "Oslo"})]
    assert judged(calls, hermes({"city": "Oslo"}) + rome + STOP)
    assert judged(calls, STOP + rome + "\nand\n" + oslo)
    for text in oslo + STOP, oslo + oslo + STOP, oslo + rome + STOP + STOP:
        assert not judged(calls, text)


DELIMITERS = [
    "a </think> b", "a <think> b", "<think>", "</think>", "<tool_call>", "a </tool_call> b",
    "</function>", "<function=stop>", "<parameter=city>", "</tool_call><tool_call>", '"}}', "?\n!",
    "<think>" + STOP + "</think>", "\n", " ", "None", "true", "<|im_end|>"]


@pytest.mark.parametrize("name, reference, right, wrong", [
    ("code", "007", ["007"], ["7", 7]), ("code", "7", ["7", 7], [7.0, "7.0", "07"]),
    ("code", "1e2", ["1e2"], [100, "100"]), ("code", "true", ["true", True], ["True"]),
    ("code", "[1]", ["[1]", [1]], ["[1.0]"]), ("maybe", "5", ["5", 5], [5.0]),
    ("null", "5", ["5", 5], [5.0, None]), ("any", {}, [{}, "{}"], [[], "", None]),
    ("list", ["5"], [["5"], '["5"]'], ["5", []]), ("tags", [], [[], "[]"], [None, "", {}]),
    ("people", 7, [7, 7.0, "7", "7.0"], ["07", "seven", True, [7], "8"]),
    ("price", 1.0, [1, "1", 1.0, "1e0"], [1.01, "1,0", None]),
    ("price", 0.1, ["0.1", 0.10], [0.1000001, "10%"]), ("unheard", "x", ["x"], ["y"]),
    ("quiet", True, [True, "true", "True"], [1, "1", "yes", False]),
    ("quiet", False, [False, "false"], [0, None, ""]), ("any", "NaN", ["NaN"], ["nan", None]),
    ("tags", ["a", "b"], [["a", "b"], '["a", "b"]'], [["b", "a"], ["a"], "a, b", ["a", "b", "b"]]),
    ("tags", ["1"], [["1"], '["1"]', [1]], [["1.0"], "1"]), ("any", 5, [5, "5", 5.0], ["five"]),
    ("room", {"floor": 2, "door": "2"}, [{"door": "2", "floor": "2"}, '{"floor": 2, "door": "2"}'],
     [{"floor": 2}, {"floor": 2, "door": "2.0"}]),
    ("map", {"a": "7"}, [{"a": "7"}, {"a": 7}, '{"a": "7"}'], [{"a": "7.0"}, {"b": "7"}]),
    ("ref", "1.10", ["1.10"], ["1.1", 1.1]), ("all", "1.10", ["1.10"], ["1.1", 1.1]),
    ("enum", "1.10", ["1.10"], ["1.1", 1.1]), ("either", "1.10", ["1.10"], ["1.1"]),
    ("either", 5, [5, "5"], ["05", 6]), ("union", "1.10", ["1.10"], ["1.1"]),
    ("which", {"id": "1.10"}, [{"id": "1.10"}], [{"id": "1.1"}, {}]),
    ("many", "1.10", ["1.10"], ["1.1", ["1.10"]]),
    ("many", ["1.10"], [["1.10"], '["1.10"]'], [["1.1"], "1.10"]),
    ("node", {"next": {"value": "1.0"}}, ['{"next": {"value": "1.0"}}'],
     [{"next": {"value": "1"}}]),
    ("any", [1, [2, {"x": [3]}]], ["[1, [2, {\"x\": [3]}]]", [1, [2.0, {"x": ["3"]}]]], [[1, 2]]),
    *[(name, text, [text], [text + "."])
      for text in DELIMITERS for name in ("city", "any", "content")]])
def test_toolmind_arguments_are_judged_by_the_tools_schema(name, reference, right, wrong):
    """In either dialect; and delimiters in them are text."""
    call = [("book", {name: reference})]
    for dialect in hermes, xml:
        text = dialect({name: reference})
        assert judged(call, text) and judged([*call, ("stop", {})], "So:\n" + text + STOP)
    for values, expected in (right, True), (wrong, False):
        for value in values:
            assert judged(call, hermes({name: value})) == expected, value
    assert judged(call, hermes({})) == (reference == "None")


@pytest.mark.parametrize("null", [None, "null", "None"])
@pytest.mark.parametrize("name", ["city", "any", "null", "room", "tags"])
def test_toolmind_an_argument_that_is_null_is_one_that_is_not_given(name, null):
    """At any depth, in completions and references; but other empty values are values."""
    for reference, other in ({name: null}, {}), ({}, {name: null}):
        for dialect in hermes, xml:
            assert judged([("book", reference)], dialect(other))
            assert judged([("book", {"x": [reference]})], dialect({"x": [other]}))
    for empty in "", 0, False, [], {}:
        assert not judged([("book", {name: null})], hermes({name: empty}))


@pytest.mark.parametrize("schema", [
    {"allOf": [{"type": "object", "properties": {"code": {"type": "string"}}}]},
    {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"code": {"type": "string"}}}}}])
def test_toolmind_a_tools_whole_schema_may_be_combined_or_referred_to(schema):
    tools, call = [tasks.tool_schema({"name": "f", "parameters": schema})], ("f", {"code": "1.10"})
    assert judged([call], hermes(call[1], "f"), tools)
    assert not judged([call], hermes({"code": "1.1"}, "f"), tools)


@pytest.mark.parametrize("name", [
    "city", "people", "price", "quiet", "tags", "null", "map", "maybe", "room", "all", "ref",
    "enum", "either", "node", "which"])
@pytest.mark.parametrize("text", [
    "5", "5.5", "-3", "1.10", "True", "False", "true", "null", "Oslo", "[1, 2]", '["a"]', "['a']",
    '{"a": 1}', "{'a': True}", "(1, 2)", "", '"quoted"', "1,080"])
def test_toolmind_reads_an_xml_parameter_as_vllms_parser_does(name, text):
    """Version 0.32 takes a Python list or dict for a text, not for the list or dict."""
    root = TOOLS[0]["function"]["parameters"]
    schema = {"ref": DEFS["text"], "node": DEFS["node"]}.get(name, BOOK[name])
    deployed = coerce_to_schema_type(text, extract_types_from_schema(schema))
    assert tasks.canonical(text, BOOK[name], root) == tasks.canonical(deployed, BOOK[name], root)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not at hand")
@pytest.mark.parametrize("dialect", [hermes, xml])
def test_bfcls_possible_calls_score_one(dialect):
    """For each of its 400 questions, under the schema of its tool."""
    files = [SHARED / "bfcl" / folder / "BFCL_v4_simple_python.json"
             for folder in ("", "possible_answer")]
    count = 0
    for asked, possible in zip(*map(open, files), strict=True):
        tools = [tasks.tool_schema(tool) for tool in json.loads(asked)["function"]]
        (name, accepted), = json.loads(possible)["ground_truth"][0].items()
        arguments = {key: values[0] for key, values in accepted.items() if values[0] != ""}
        assert judged([(name, arguments)], dialect(arguments, name), tools)
        for key in arguments:
            assert not judged([(name, arguments)], dialect({**arguments, key: "else"}, name), tools)
        count += 1
    assert count == 400


def test_toolmind_reward_rises_with_what_is_right():
    example = question(tasks.comparable([("book", OSLO)], TOOLS), TOOLS)
    texts = ["nothing", STOP, hermes({"city": "Rome", "people": 9}), CALL]
    assert [reward("toolmind", example, text) for text in texts] == [0, 0.1, 0.3, 1]


names = st.sampled_from([*BOOK, "x"]) | st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True)
json_texts = st.text(max_size=12) | st.lists(st.sampled_from(
    [*DELIMITERS, '"', "}", "\\", "{", "[1]", "null", "5"]), max_size=6).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | json_texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_texts, inner, max_size=3),
    max_leaves=8)
schemas = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "object", "List[str]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "properties", "items", "anyOf", "oneOf", "allOf", "$ref", "enum",
         "additionalProperties", "x"]), inner),
    max_leaves=8)
often = settings(max_examples=300, deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))


@often
@given(arguments=st.dictionaries(names, json_values, max_size=4),
       dialect=st.sampled_from([hermes, xml]), odd=schemas)
@example(arguments={"x": {"y": 1}}, dialect=hermes,
         odd={"properties": {"x": {"type": "object", "properties": ["y"]}}})
def test_toolmind_every_reference_scores_one_and_no_other(arguments, dialect, odd):
    """In either dialect (a literal </parameter> in an XML value excepted), and however oddly the
    schema of a tool is written down: else the row is left out."""
    text, call = dialect(arguments), [("book", arguments)]
    assume(dialect is hermes or text.count("</parameter>") == len(arguments))
    for thought in "", "<think>\nbook it\n</think>\n\n", STOP + "</think>":
        assert judged(call, thought + text)
    for key in arguments:
        fewer = {name: value for name, value in arguments.items() if name != key}
        assert judged(call, dialect(fewer)) == (tasks.parsed(arguments[key]) is None)
        assert not judged(call, dialect({**fewer, key: "something else"}))
    target = {"tool_calls": [{"name": "odd", "arguments": arguments}]}
    user, tools = {"role": "user", "content": "q"}, [{"name": "odd", "parameters": odd}]
    row = json.dumps({"conversations": [user, target], "tools": tools})
    try:
        oddly = tasks.toolmind_example(tasks.read_json(row))
    except Exception:
        return                                              # a row that is left out
    assert score("toolmind", oddly, hermes(arguments, "odd")) == 1


PIECES = [
    "Answer: ", "answer is", "answer ", "answer\n", "Answer: 1 ", "Answer: (A", "answer is not ",
    "answer is not (A) but ", "wrong ", "wrong answer is 1", "answer: \\sqrt ", "\\sqrt ",
    "\\boxed{", "Answer: a (", "Answer: x1.", "The correct answer is (", "#### ", "\\frac{1", "(A)",
    "(", ")", "A", "A, ", "is not ", "in ", "of the ", "1", "1,", "1 ", "1/", "1 1/", "18",
    "0" * 500, "1e999", "9" * 5000, "NaN", "\u0663", "\xbd", ",", ".", "- ", "$", "%", "=", "*",
    " ", "\n", "\r\n", "\0", "\ud800", "\\u0000", "\\ud800", "}", "<think>", "</think>",
    "<tool_call>", "<tool_call>{", '"', "<tool_call><function=f><parameter=a></think>",
    "<tool_call></think>", "<tool_call><function=f>", "</tool_call>", "<function=", "f>",
    "</function>", "<parameter=a>", "</parameter>", '{"a":', "</parameter> ",
    "</parameter><parameter=", '{"name": "', '", "arguments": ', "[", "]", "null", "[" * 2000,
    '{"a":' * 2000]
BEFORE = ["", "Answer: ", "Answer: 18", "The answer is (A)",
          "<tool_call><function=book><parameter=city>",
          '<tool_call>{"name": "book", "arguments": ']
completions = st.text(max_size=200) | st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(codec=None), max_size=5)).map("".join)


@pytest.mark.parametrize("name", TASKS)
@often
@given(text=completions)
@example(text="")
def test_every_completion_has_a_score(name, text):
    for example in TASKS[name].load("test", data(name, "test"), 2):
        found = score(name, example, text)
        value, answer = reward(name, example, text), TASKS[name].answer(example, text)
        assert found in (0.0, 1.0) and 0 <= value <= 1 and (found == 1) == (value == 1)
        assert found == 0 or answer is not None
        tasks.judged_results(TASKS[name], [example], [(text, 1, False)])


@pytest.mark.parametrize("pattern", PIECES)
def test_a_long_completion_takes_no_longer_than_its_length(pattern):
    """20,000 characters, far more than --max-new-tokens allows, in a moment."""
    questions = {"gsm8k": question(Fraction(18)), "gpqa": question("B"),
                 "toolmind": question(tasks.comparable([("book", OSLO)], TOOLS), TOOLS)}
    for before in BEFORE:
        text, start = before + pattern * (20_000 // len(pattern)), time.process_time()
        for task, asked in questions.items():
            assert 0 <= reward(task, asked, text) <= 1
        assert time.process_time() - start < 1, before
