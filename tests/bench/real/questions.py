"""Sums of one-digit numbers in GSM8K's schema: `questions.py FOLDER` writes train.jsonl, test.jsonl
and reworded.jsonl. No two numbers of test.jsonl are, in either order, in train.jsonl;
reworded.jsonl asks the same as test.jsonl in words that train.jsonl does not have."""

import json
import random
import sys
from pathlib import Path

WORDINGS = ("What is {} plus {}?", "What is the sum of {} and {}?", "How much is {} plus {}?",
            "Add {} and {}.")
OTHER = ("Tell me what {} and {} make together.",)


def write(path, pairs, wordings):
    rows = [{"question": wording.format(a, b), "answer": f"#### {a + b}"}
            for a, b in sorted(pairs) for wording in wordings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    unordered = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(0).shuffle(unordered)
    test = {pair for a, b in unordered[:20] for pair in ((a, b), (b, a))}
    train = {(a, b) for a in range(10) for b in range(10)} - test
    write(folder / "train.jsonl", train, WORDINGS)
    write(folder / "test.jsonl", test, WORDINGS)
    write(folder / "reworded.jsonl", test, OTHER)
