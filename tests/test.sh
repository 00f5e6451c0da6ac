#!/usr/bin/env bash
# Sets up what is missing and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/cpu/setup.sh
bash tests/bench/real/setup.sh || echo "without the real language model: its test is skipped" >&2
exec .venv/bin/python -m pytest tests "$@"
