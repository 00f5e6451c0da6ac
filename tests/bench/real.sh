#!/usr/bin/env bash
# ART, LoRA and a soft prompt on a real language model behind a small vision tower, on two cores, and every control.
#   bash tests/bench/real.sh [sums | products]             # trains, scores, prints the table
#   bash tests/bench/real.sh [sums | products] grid        # how the learning rates below were chosen
#   bash tests/bench/real.sh [sums | products] robust      # after the table: what the trained image survives
#   bash tests/bench/real.sh [sums | products] tokens      # ART with 144 image tokens
set -euo pipefail
cd "$(dirname "$0")/../.."
bash tests/bench/real/setup.sh
export TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
task=${1:-sums} what=${2:-table}
python=.venv/bin/python folder=runs/real/$task

model() {       # model FOLDER FLAGS: assembled once for a tower
    [ "runs/real/$1/model.safetensors" -nt tests/bench/real/tower.safetensors ] || $python tests/bench/real/model.py "runs/real/$@"
}
run() { $python tests/bench/baselines.py "$@"; }

mkdir -p "$folder"
case $task in
    sums | products) $python tests/bench/real/questions.py "$folder" "$task" ;;
    *) echo "real.sh: the tasks are sums and products" >&2; exit 2 ;;
esac
model model
float32='"dtype": "float32", "enable_prefix_caching": true, "block_size": 32'
flags=(--task gsm8k --model runs/real/model --seed seed.png --max-model-len 384 --max-num-seqs 64 --engine "{$float32}"
    --data "$folder/train.jsonl" --test "$folder/test.jsonl" --temperature 0.6 --group-size 16 --validation 48)
training=("${flags[@]}" --prompts 4 --rounds 1 --max-new-tokens 24 --steps 40 --validate-every 10 --out "$folder"
    --results "$folder/results.jsonl")
scoring=("${flags[@]}" --max-new-tokens 24)
case $what in
    table)
        rm -f "$folder/results.jsonl"
        run score none random string:64 seed.png "${scoring[@]}" --results "$folder/results.jsonl"
        run art "${training[@]}" --lr 0.1
        run lora "${training[@]}" --lr 0.001
        run soft "${training[@]}" --lr 0.1
        run table --results "$folder/results.jsonl" ;;
    grid)
        for kind in art soft lora; do
            run $kind "${flags[@]}" --prompts 2 --max-new-tokens 32 --steps 15 --validate-every 15 --grid 0.001 0.01 0.1 1
        done ;;
    robust)
        best=$folder/best.png
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
        run score "$best" "$best".{90.jpg,256.png,half.png} "${scoring[@]}"
        run score seed.png "$best" "${scoring[@]}" --test "$folder/reworded.jsonl"
        run score seed.png "$best" "${scoring[@]}" --instruction "Finish with the word Answer: and the number."
        run score seed.png "$best" "${scoring[@]}" --model runs/real/model-int8
        run score seed.png "$best" "${scoring[@]}" --engine '{"dtype": "bfloat16"}' ;;
    tokens)
        model model-144 --tokens 144
        run art "${training[@]}" --lr 0.1 --model runs/real/model-144 --size 384 --out "$folder/144" --name "art, 144 tokens"
        run score "$folder/144/seed.png" "${scoring[@]}" --model runs/real/model-144 --results "$folder/results.jsonl"
        run table --results "$folder/results.jsonl" ;;
    *) echo "real.sh: after the task comes nothing, grid, robust or tokens" >&2; exit 2 ;;
esac
