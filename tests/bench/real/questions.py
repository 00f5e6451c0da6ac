"""Sums or products of one-digit numbers in GSM8K's schema: `questions.py FOLDER sums|products`
writes train.jsonl, test.jsonl and reworded.jsonl. No two numbers of test.jsonl are, in either
order, in train.jsonl; reworded.jsonl asks the same as test.jsonl in words that train.jsonl does not
have."""

import json
import operator
import random
import sys
from pathlib import Path

WORDINGS = {"sums": ("What is {} plus {}?", "What is the sum of {} and {}?",
                     "How much is {} plus {}?", "Add {} and {}."),
            "products": ("What is {} times {}?", "What is the product of {} and {}?",
                         "How much is {} times {}?", "Multiply {} by {}.")}
OTHER = {"sums": ("Tell me what {} and {} make together.",),
         "products": ("Tell me what {} groups of {} make.",)}
RESULT = {"sums": operator.add, "products": operator.mul}


def write(path, pairs, wordings, result):
    rows = [{"question": wording.format(a, b), "answer": f"#### {result(a, b)}"}
            for a, b in sorted(pairs) for wording in wordings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    folder, task = Path(sys.argv[1]), sys.argv[2]
    unordered = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(0).shuffle(unordered)
    test = {pair for a, b in unordered[:20] for pair in ((a, b), (b, a))}
    train = {(a, b) for a in range(10) for b in range(10)} - test
    write(folder / "train.jsonl", train, WORDINGS[task], RESULT[task])
    write(folder / "test.jsonl", test, WORDINGS[task], RESULT[task])
    write(folder / "reworded.jsonl", test, OTHER[task], RESULT[task])
