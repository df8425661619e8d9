#!/usr/bin/env bash
# The main job on text that every Python installation holds. Builds the environment on first use. Arguments go to
# `datashapley demo`:  bash scripts/demo.sh --help
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment .venv scripts/constraints.txt
exec "$venv/bin/datashapley" demo --output_dir "$root/runs/demo" "$@"
