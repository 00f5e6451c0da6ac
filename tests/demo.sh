#!/usr/bin/env bash
# ART on a laptop: trains an image against the tiny model in tests/tiny, then scores it on held-out questions.
#   bash tests/demo.sh [gsm8k | gpqa | toolmind] [more flags of art.py, for instance --steps 30]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/cpu/setup.sh
export TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore::FutureWarning
task=${1:-gsm8k}
case $task in gpqa) kind=csv ;; *) kind=jsonl ;; esac
run=runs/demo-$(printf '%s ' "$task" "${@:2}" | tr -cs '[:alnum:]' - | sed 's/-$//')
rm -rf "$run"
.venv/bin/python art.py --task "$task" --seed seed.png --model tests/tiny --data "tests/tiny/$task/train.$kind" --out "$run" \
    --steps 15 --prompts 8 --oversampling 1 --validate-every 5 --max-new-tokens 48 --max-model-len 512 --max-num-seqs 64 "${@:2}"
echo
.venv/bin/python eval.py "$run/seed.png" none random "$run/best.png" --task "$task" --model tests/tiny \
    --data "tests/tiny/$task/test.$kind"
echo "the pictures: $run/best.png, and side by side with the seed: $run/panel.png"
