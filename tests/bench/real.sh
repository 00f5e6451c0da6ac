#!/usr/bin/env bash
# ART, LoRA and a soft prompt on a real language model behind a small vision tower, on two cores, and every control.
#   bash tests/bench/real.sh [sums | words]            # trains, scores, prints the table
#   bash tests/bench/real.sh [sums | words] grid       # how the learning rates below were chosen
set -euo pipefail
cd "$(dirname "$0")/../.."
bash tests/bench/real/setup.sh
export TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
task=${1:-sums} what=${2:-table}
python=.venv/bin/python folder=runs/real/$task
[ -e runs/real/model/model.safetensors ] || $python tests/bench/real/model.py runs/real/model
mkdir -p "$folder"
case $task in
    sums) $python tests/bench/real/questions.py "$folder" ;;
    words) cp tests/tiny/gsm8k/{train,test}.jsonl "$folder" ;;
esac
flags=(--task gsm8k --model runs/real/model --data "$folder/train.jsonl" --test "$folder/test.jsonl" --seed seed.png
    --temperature 0.6 --group-size 16 --prompts 2 --max-new-tokens 32 --max-model-len 384 --max-num-seqs 64
    --validation 48 --engine '{"dtype": "float32", "enable_prefix_caching": true, "block_size": 32}')
if [ "$what" = grid ]; then
    for kind in art lora soft; do
        $python tests/bench/baselines.py $kind "${flags[@]}" --steps 15 --validate-every 15 --grid 0.001 0.01 0.1
    done
    exit
fi
flags+=(--steps 60 --validate-every 15 --results "$folder/results.jsonl" --out "$folder")
rm -f "$folder/results.jsonl"
$python tests/bench/baselines.py score none random string:64 seed.png "${flags[@]}"
$python tests/bench/baselines.py art "${flags[@]}" --lr 0.1
$python tests/bench/baselines.py lora "${flags[@]}" --lr 0.001
$python tests/bench/baselines.py soft "${flags[@]}" --lr 0.01
$python tests/bench/baselines.py table --results "$folder/results.jsonl"
