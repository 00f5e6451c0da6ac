#!/usr/bin/env bash
# The trainer's and the engine's tables on a GPU, in bfloat16, in one call:
#   bash tests/bench/gpu.sh                 # or PYTHON=python3.11 bash tests/bench/gpu.sh
# The trainer's are of the tiny model and of Qwen3.5-0.8B's whole shape with random weights, the
# engine's of the tiny model. Needs requirements.txt and peft, no network. Ends within 10 minutes,
# done or not. Without a GPU it shows the CPU's tables.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
full=$("$python" -c "import peft, torch; print('--full' * torch.cuda.is_available())")
timeout 400 "$python" tests/bench/cost.py trainer $full "$@" ||
    echo "the trainer's tables ended early (exit code $?)"
timeout 180 "$python" tests/bench/cost.py engine "$@" ||
    echo "the engine's tables ended early (exit code $?)"
