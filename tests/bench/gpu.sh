#!/usr/bin/env bash
# What a person with a GPU runs first: a line a check, at most 8 minutes in all.
#   bash tests/bench/gpu.sh                     # or PYTHON=python3.12 bash tests/bench/gpu.sh
#   bash tests/bench/gpu.sh --cpu               # small, without a GPU: that is how this is tested
#   bash tests/bench/gpu.sh versions train      # of versions load gradient speed demo train
# Needs requirements.txt and, for LoRA, peft; no network. A check that fails says FAILED, and the
# next one goes on. Logs lie in runs/gpu/, or in $GPU_OUT.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} cpu='' steps=15
if [ "${1:-}" = --cpu ]; then
    python=.venv/bin/python cpu=--cpu steps=2
    shift
fi
parts=" ${*:-versions load gradient speed demo train} "
end=0 running=()
export GPU_OUT=${GPU_OUT:-runs/gpu}
mkdir -p "$GPU_OUT" && rm -rf "$GPU_OUT"/{demo,lucky,model} "$GPU_OUT"/*.{log,pt}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR
trap 'kill $(jobs -p); exit 130' INT TERM

part() {        # NAME SECONDS: is it asked for? What it leaves of its seconds, the next may use
    [[ $parts == *" $1 "* ]] && end=$((end + $2))
}
start() {       # NAME COMMAND ..., at the same time as others; its stderr is the log
    timeout -k 5 $((end - SECONDS)) "${@:2}" 2>"$GPU_OUT/$1.log" &
    running+=("$1 $!")
}
finish() {
    local name pid code
    for each in "${running[@]}"; do
        read -r name pid <<<"$each"
        wait "$pid"
        code=$?
        [ $code = 0 ] || echo "FAILED  $name: exit code $code (124: out of time)," \
            "$(tail -1 "$GPU_OUT/$name.log" | cut -c1-300)"
    done
    running=()
}
check() { start "$1" "$python" tests/bench/gpu.py $cpu "${@:2}"; }

part versions 30 && {
    [ "$cpu" ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    check versions versions
    finish
}
part load 30 && { check load load; finish; }
part gradient 140 && {      # at once: most of the first time goes into tuning fla's kernels
    for shape in tiny slice; do
        for dtype in float32 bfloat16; do
            check "gradient-$shape-$dtype" gradient $shape $dtype
        done
    done
    finish
}
part gradient 10 && { check compare compare; finish; }
part speed 60 && { check speed speed; finish; }
# As tests/demo.sh
flags=(--task gsm8k --model tests/tiny)
part demo 75 && {
    start art "$python" art.py "${flags[@]}" --seed seed.png --data tests/tiny/gsm8k/train.jsonl \
        --out "$GPU_OUT/demo" --steps $steps --prompts 8 --validate-every 5 --max-new-tokens 48 \
        --max-model-len 512 --max-num-seqs 64
    finish
}
part demo 35 && {
    start eval "$python" eval.py "$GPU_OUT/demo/seed.png" none random "$GPU_OUT/demo/best.png" \
        "${flags[@]}" --data tests/tiny/gsm8k/test.jsonl
    finish
}
part train 95 && { check train train; finish; }
echo "gpu.sh took $SECONDS s"
