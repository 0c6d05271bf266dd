#!/usr/bin/env bash
# The table of configs/mappo-smollm2/run.sh for a model small enough for two cores and a few minutes:
# configs/mappo-toy/run.sh [SEEDS]. Results: runs-toy/table.md.
set -euo pipefail
tercet=${TERCET:-target/release/tercet}
[ -d runs-toy/corpus ] || python3 configs/mappo-toy/corpus.py runs-toy
if [ ! -d runs-toy/start ]; then
    $tercet pretrain configs/mappo-toy/base.toml --resume
    rm -rf runs-toy/start.tmp
    cp -r runs-toy/base/checkpoints/step-00000500 runs-toy/start.tmp
    mv runs-toy/start.tmp runs-toy/start
fi
RECIPE=configs/mappo-toy RUNS=runs-toy START=runs-toy/start PROMPTS=runs-toy \
    exec configs/mappo-smollm2/run.sh none "${1:-1 2 3}"
