"""How the arms of real.sh answer, `texts.py runs/real/TASK`: an arm's texts that write the
operation out ("5 * 8 = 40") and the others, how many of each are right, and its accuracy where the
answer is none of the question's numbers."""

import json
import re
import sys
from pathlib import Path

WRITTEN_OUT = re.compile(r"\d\s*[+*x]\s*\d.*=")


def main(folder):
    with open(Path(folder, "test.jsonl")) as file:
        questions = list(map(json.loads, file))
    elsewhere = [question["answer"].split()[1] not in re.findall(r"\d+", question["question"])
                 for question in questions]
    with open(Path(folder, "results.jsonl")) as file:
        for arm in map(json.loads, file):
            right = [result["score"] for result in arm["results"]]
            out = [bool(WRITTEN_OUT.search(result["text"])) for result in arm["results"]]
            of_out = sum(score for score, is_out in zip(right, out) if is_out)
            of_else = sum(score for score, is_else in zip(right, elsewhere) if is_else)
            print(f"{arm['arm']}: {sum(out)} written out, {of_out:.0f} right; {len(out) - sum(out)}"
                  f" others, {sum(right) - of_out:.0f} right; answer not in the question: "
                  f"{100 * of_else / sum(elsewhere):.0f} % of {sum(elsewhere)}")


if __name__ == "__main__":
    main(sys.argv[1])
