#!/usr/bin/env bash
# The table of configs/private-clinic/run.sh for a model small enough for two cores and a quarter of
# an hour: configs/private-toy/run.sh [SEEDS]. Results: runs-private-toy/table.md.
# Six hundred patients are few: at ε = 2 noise costs more than there is to gain, and no canary is learnt
# by heart in two and a half passes. It shows that the machinery works, not which method is best.
set -euo pipefail
tercet=${TERCET:-target/release/tercet}
mkdir -p runs-private-toy
# Another seed than that of the private records: nobody is in both.
[ -d runs-private-toy/public ] ||
    $tercet private records --patients 20000 --seed 99 --output runs-private-toy/public
if [ ! -d runs-private-toy/start ]; then
    $tercet pretrain configs/private-toy/base.toml --resume
    rm -rf runs-private-toy/start.tmp
    cp -r runs-private-toy/base/checkpoints/step-00000120 runs-private-toy/start.tmp
    mv runs-private-toy/start.tmp runs-private-toy/start
fi
RECIPE=configs/private-toy RUNS=runs-private-toy EPSILONS=${EPSILONS:-"2 8"} \
    PATIENTS=${PATIENTS:-600} CANARIES=${CANARIES:-80} \
    exec configs/private-clinic/run.sh runs-private-toy/start "${1:-1 2 3}"
