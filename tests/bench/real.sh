#!/usr/bin/env bash
# ART, LoRA and a soft prompt on a real language model behind a small vision tower, and every
# control, on two cores.
#   bash tests/bench/real.sh [sums | products]             # three runs an arm, the table, the curve
#   bash tests/bench/real.sh [sums | products] art|lora|soft SEED STEPS [LR [FLAGS]]     # one run
#   bash tests/bench/real.sh [sums | products] robust      # then: what the trained image survives
set -euo pipefail
cd "$(dirname "$0")/../.."
bash tests/bench/real/setup.sh
.venv/bin/python -c "import matplotlib" 2>/dev/null || .venv/bin/python -m pip install -q matplotlib
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
training=("${test[@]}" --prompts 4 --rounds 1 --oversampling 1 --validate-every 10 --results "$results")
declare -A lr=([art]=0.1 [lora]=0.0003 [soft]=0.03)
run() {         # run KIND SEED STEPS [LR [FLAGS of art.py]]
    local name="$1${4:+-}${*:4}"
    name=${name//[ \/]/-}
    train "$1" "$name-$2" "${training[@]}" --name "$name $2" --lr "${4:-${lr[$1]}}" \
        --random-seed "$2" --steps "$3" "${@:5}"
}
table() {
    $python tests/bench/baselines.py table --results "$results"
    $python tests/bench/real/curve.py "$folder"
}
controls() { score none random string:64 seed.png --results "$results"; }
case $what in
    table)
        rm -f "$results"
        controls
        for seed in 0 1 2; do
            run art $seed 160
            run lora $seed 40
            run soft $seed 40
        done
        table ;;
    art | lora | soft)
        [ -e "$results" ] || controls
        run "$what" "${@:3}"
        table ;;
    robust)
        best=$folder/art-0/best.png
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
    *) echo "real.sh: then nothing, robust or art | lora | soft SEED STEPS" >&2; exit 2 ;;
esac
