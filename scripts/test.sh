#!/usr/bin/env bash
# Lint, types, tests. Builds the environment on first use. Arguments go to pytest, paths as seen from the project's
# folder:  bash scripts/test.sh -k ledger
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment .venv scripts/constraints.txt
cd "$root"

echo "== ruff check =="
"$python" -m ruff check .
echo "== ruff format =="
"$python" -m ruff format --check .
echo "== mypy =="
"$python" -m mypy
echo "== pytest =="
# One thread for each of two workers: faster on two cores than two threads for one. Nothing may need a network.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec "$python" -m pytest -n 2 "$@"
