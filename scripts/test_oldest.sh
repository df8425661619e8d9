#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml admits, in an environment of their own (.venv-oldest).
# Arguments go to pytest, as with test.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment .venv-oldest scripts/constraints-oldest.txt
cd "$root"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec "$python" -m pytest -n 2 "$@"
