#!/usr/bin/env bash
# ART, LoRA and a soft prompt on a real language model behind a small vision tower, and every
# control, on two cores.
#   bash tests/bench/real.sh [sums | products]             # trains, scores, prints the table
#   bash tests/bench/real.sh [sums | products] grid        # how the learning rates were chosen
#   bash tests/bench/real.sh [sums | products] robust      # then: what the trained image survives
#   bash tests/bench/real.sh [sums | products] tokens      # ART with 144 image tokens
set -euo pipefail
cd "$(dirname "$0")/../.."
bash tests/bench/real/setup.sh
export TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
task=${1:-sums} what=${2:-table}
python=.venv/bin/python folder=runs/real/$task results=$folder/results.jsonl

model() {       # model FOLDER FLAGS: assembled once for a tower
    [ "runs/real/$1/model.safetensors" -nt tests/bench/real/tower.safetensors ] ||
        $python tests/bench/real/model.py "runs/real/$@"
}
train() {       # train KIND FOLDER FLAGS
    rm -rf "${folder:?}/$2"
    $python tests/bench/baselines.py "$1" --out "$folder/$2" "${flags[@]}" "${@:3}"
}
score() { $python tests/bench/baselines.py score "${flags[@]}" "${test[@]}" --arms "$@"; }
table() { $python tests/bench/baselines.py table --results "$results"; }

case $task in
    sums | products) $python tests/bench/real/questions.py "$folder" "$task" ;;
    *) echo "real.sh: the tasks are sums and products" >&2; exit 2 ;;
esac
model model
float32='{"dtype": "float32", "enable_prefix_caching": true, "block_size": 32}'
flags=(--task gsm8k --model runs/real/model --seed seed.png --max-model-len 384 --max-num-seqs 64
    --engine "$float32" --data "$folder/train.jsonl" --temperature 0.6 --group-size 16
    --validation 48)
test=(--test "$folder/test.jsonl" --max-new-tokens 24)
training=("${test[@]}" --prompts 4 --rounds 1 --steps 40 --validate-every 10 --results "$results")
case $what in
    table)
        rm -f "$results"
        score none random string:64 seed.png --results "$results"
        train art art "${training[@]}" --lr 0.1
        train lora lora "${training[@]}" --lr 0.001
        train soft soft "${training[@]}" --lr 0.1
        table ;;
    grid)
        for kind in art soft lora; do
            for lr in 0.001 0.01 0.1 1; do
                echo "== $kind, learning rate $lr"
                train $kind grid/$kind-$lr --prompts 2 --max-new-tokens 32 --steps 15 \
                    --validate-every 15 --lr $lr
            done
        done ;;
    robust)
        best=$folder/art/best.png
        $python - "$best" <<-'END'
		import sys
		from PIL import Image
		best = sys.argv[1]
		image = Image.open(best).convert("RGB")
		image.save(best + ".90.jpg", quality=90)
		image.quantize(256).convert("RGB").save(best + ".256.png")
		image.resize((128, 128)).resize((256, 256)).save(best + ".half.png")
		END
        model model-int8 --int8
        score "$best" "$best".{90.jpg,256.png,half.png}
        score seed.png "$best" --test "$folder/reworded.jsonl"
        score seed.png "$best" --instruction "Finish with the word Answer: and the number."
        score seed.png "$best" --model runs/real/model-int8
        score seed.png "$best" --engine '{"dtype": "bfloat16"}' ;;
    tokens)
        model model-144 --tokens 144
        train art 144 "${training[@]}" --lr 0.1 --model runs/real/model-144 --size 384 \
            --name "art, 144 tokens"
        score "$folder/144/seed.png" --model runs/real/model-144 --results "$results"
        table ;;
    *) echo "real.sh: after the task comes nothing, grid, robust or tokens" >&2; exit 2 ;;
esac
