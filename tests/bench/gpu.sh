#!/usr/bin/env bash
# The trainer's and the engine's tables on a GPU, in bfloat16: of the tiny model, and the trainer's of Qwen3.5-0.8B's whole shape
# with random weights, too; ends within 10 minutes, done or not. Needs requirements.txt and peft, no network. Without a GPU it shows the CPU's tables.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
full=$("$python" -c "import torch; print('--full' * torch.cuda.is_available())")
timeout 400 "$python" tests/bench.py trainer $full "$@" || echo "the trainer's table ended early ($?)"
timeout 180 "$python" tests/bench.py engine "$@" || echo "the engine's tables ended early ($?)"
