"""How the runs of real.sh went, `curve.py runs/real/TASK`: accuracy on validation against steps and
seconds as curve.png, and of each kind the test accuracies, their mean, and a step's seconds."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot                                                           # noqa: E402

KINDS = {"art": ("ART", "tab:red"), "lora": ("LoRA", "tab:blue"),
         "soft": ("soft prompt", "tab:green")}


def main(folder):
    with open(Path(folder, "results.jsonl")) as file:
        records = {record["arm"]: record for record in map(json.loads, file)}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    found = defaultdict(list)
    for name, record in records.items():
        kind = name.split()[0]
        if kind not in KINDS or "history" not in record:
            continue
        label, colour = KINDS[kind]
        history = record["history"]
        # The median: what else the machine did in a step does not count.
        seconds = median(step["rollout_s"] + step["trainer_s"] for step in history[1:])
        points = [(step["step"], 100 * step["validation"]) for step in history
                  if "validation" in step]
        steps, accuracy = zip(*points)
        for axis, factor in zip(axes, (1, seconds / 60)):
            axis.plot([factor * step for step in steps], accuracy, color=colour, marker=".",
                      label=None if found[kind] else label)
        score = 100 * mean(result["score"] for result in record["results"])
        found[kind].append((score, seconds, [round(value) for value in accuracy]))
    for kind, runs in found.items():
        for score, seconds, accuracy in runs:
            print(f"{kind}: test {score:.2f} %, {seconds:.1f} s a step, validation {accuracy}")
        print(f"{kind}: mean of {len(runs)} runs {mean(run[0] for run in runs):.2f} %")
    for axis, text in zip(axes, ("steps", "minutes of training")):
        axis.set_xlabel(text)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation, %")
    axes[0].set_ylim(0, 102)
    axes[0].legend(loc="lower right", ncols=3, fontsize="small")
    figure.tight_layout()
    figure.savefig(Path(folder, "curve.png"), dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
