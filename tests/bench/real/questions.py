"""Sums or products of one-digit numbers in GSM8K's schema: `questions.py FOLDER sums|products`
writes train.jsonl, test.jsonl and reworded.jsonl. No two numbers of test.jsonl are, in either
order, in train.jsonl; reworded.jsonl asks the same as test.jsonl in words that train.jsonl does not
have."""

import json
import operator
import random
import sys
from pathlib import Path

# The result, the wordings, and the one of reworded.jsonl
TASKS = {
    "sums": (operator.add, ("What is {} plus {}?", "What is the sum of {} and {}?",
                            "How much is {} plus {}?", "Add {} and {}."),
             "Tell me what {} and {} make together."),
    "products": (operator.mul, ("What is {} times {}?", "What is the product of {} and {}?",
                                "How much is {} times {}?", "Multiply {} by {}."),
                 "Tell me what {} groups of {} make."),
}


def main(folder, task):
    result, wordings, reworded = TASKS[task]
    unordered = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(0).shuffle(unordered)
    test = {pair for a, b in unordered[:20] for pair in ((a, b), (b, a))}
    train = {(a, b) for a in range(10) for b in range(10)} - test
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, pairs, asked in (("train", train, wordings), ("test", test, wordings),
                               ("reworded", test, [reworded])):
        rows = [{"question": wording.format(a, b), "answer": f"#### {result(a, b)}"}
                for a, b in sorted(pairs) for wording in asked]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(folder, name + ".jsonl").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
