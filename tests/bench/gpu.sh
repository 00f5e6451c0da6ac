#!/usr/bin/env bash
# What a person with a GPU runs first: a line a check, at most 13 minutes in all.
#   bash tests/bench/gpu.sh                     # or PYTHON=python3.12 bash tests/bench/gpu.sh
#   bash tests/bench/gpu.sh --cpu               # small, without a GPU: that is how this is tested
#   bash tests/bench/gpu.sh versions train      # of versions load gradient speed demo train
# Needs requirements.txt and, for LoRA, peft; no network. A check that fails says FAILED, and the
# next one goes on. Logs lie in runs/gpu/, or in $GPU_OUT.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} cpu=''
if [ "${1:-}" = --cpu ]; then
    python=.venv/bin/python cpu=--cpu
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

part versions 60 && {       # the first import of torch alone takes half a minute from a cold disk
    [ "$cpu" ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    check versions versions
    finish
}
part load 40 && { check load load; finish; }
part gradient 180 && {      # at once: most of the first time goes into tuning fla's kernels
    for shape in tiny slice; do
        for dtype in float32 bfloat16; do
            check "gradient-$shape-$dtype" gradient $shape $dtype
        done
    done
    finish
}
part gradient 20 && { check compare compare; finish; }
part speed 180 && { check speed speed; finish; }
part demo 150 && { check demo demo; finish; }
part train 150 && { check train train; finish; }
echo "gpu.sh took $SECONDS s"
