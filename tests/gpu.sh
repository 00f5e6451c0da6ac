#!/usr/bin/env bash
# The benchmark's tables on a GPU, with all layers and the whole vocabulary of Qwen3.5-0.8B's shape, random weights, bfloat16;
# ends within 10 minutes, done or not. Needs requirements.txt and peft, no network. Without a GPU it shows the CPU's tables.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
full=$("$python" -c "import torch; print('--full' * torch.cuda.is_available())")
timeout 400 "$python" tests/bench.py trainer $full "$@" || echo "the trainer's table ended early ($?)"
timeout 180 "$python" tests/bench.py engine "$@" || echo "the engine's tables ended early ($?)"
