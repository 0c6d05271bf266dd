#!/usr/bin/env bash
# Training steps of one small dense Llama, PyTorch and ours in turn, three rounds: tokens/s as JSON lines.
# Usage: bench/step.sh [STEPS] [THREADS]
# Needs Rust and a python3 with torch: pip install torch numpy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=${1:-15}
threads=${2:-$(nproc)}

cargo build --release -q
tercet=${CARGO_TARGET_DIR:-target}/release/tercet
for round in 1 2 3; do
    echo "# round $round"
    python3 bench/torch_step.py --steps "$steps" --threads "$threads"
    "$tercet" bench step --steps "$steps" --threads "$threads" --json -
done
