#!/usr/bin/env bash
# Sets up what is missing and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/cpu/setup.sh
exec .venv/bin/python -m pytest tests "$@"
