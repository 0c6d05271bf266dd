#!/usr/bin/env bash
# The whole table: configs/private-clinic/run.sh START [SEEDS]
# START is a model folder; its weights must not have seen the records, which are made here. What is
# there is not done again, so an interrupted table is gone on with by the same command. Results:
# runs-private/table.md. METHODS, EPSILONS, PATIENTS and CANARIES make it smaller, KEYS changes keys
# of every run; `rldp-m2` and `random-action-m2` are the controllers that move the noise as well.
# configs/private-toy/run.sh does the same for a tiny model, with RECIPE and RUNS set.
#
# Coins and noise are seeded, so that the table can be repeated: the records are of nobody.
set -euo pipefail
recipe=${RECIPE:-configs/private-clinic}
runs=${RUNS:-runs-private}
tercet=${TERCET:-target/release/tercet}
start=${1:?the model folder to start from}
seeds=${2:-"1 2 3"}
methods=${METHODS:-"dp-sgd auto-s per-layer schedule quantile adaclip geoclip random-action rldp"}
epsilons=${EPSILONS:-"0.5 2 4 5 8"}
patients=${PATIENTS:-43000}
canaries=${CANARIES:-1000}
read -ra keys <<<"${KEYS:-}"
# A run that is stopped saves and ends well; the table must end with it.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT TERM

mkdir -p "$runs"
records=$runs/records
[ -d "$records" ] ||
    $tercet private records --patients "$patients" --canaries "$canaries" --seed 1 --output "$records"

# Where nothing was proven ε = 1 is claimed: refuted where training goes on until canaries are known
# by heart.
run() { # NAME SEED [key=value…]
    local out=$runs/$1-$2
    [ -s "$out/audit.json" ] && return
    $tercet private tune "$recipe/tune.toml" output="$out" model.path="$start" \
        "data.paths=[\"$records/train.jsonl\"]" "data.validation_paths=[\"$records/heldout.jsonl\"]" \
        private.people=$((patients * 9 / 10 + canaries + 10)) train.seed="$2" "${keys[@]}" "${@:3}" \
        --insecure-seed "$2" --resume
    local claim=()
    case $1 in no-noise* | start*) claim=(--epsilon 1) ;; esac
    # Three is the answer of an audit that refutes; the table says so.
    $tercet private audit "$out" --canaries "$records/canaries.jsonl" --members "$records/train.jsonl" \
        --nonmembers "$records/heldout.jsonl" "${claim[@]}" --json >"$out/audit.tmp" || [ $? -eq 3 ]
    mv "$out/audit.tmp" "$out/audit.json"
}
# What the start is worth, and what could be had without privacy.
run start-0 1 private.noise=false train.lr=1e-12
for seed in $seeds; do
    run no-noise-0 "$seed" private.noise=false
    for epsilon in $epsilons; do
        for method in $methods; do
            more=(private.epsilon="$epsilon" "private.method=\"${method%-m2}\"")
            case $method in
                schedule) more+=("private.schedule.sigma=[1.2,0.85]" "private.schedule.threshold=[2.0,0.5]") ;;
                *-m2) more+=('private.mode="m2"') ;;
            esac
            run "$method-$epsilon" "$seed" "${more[@]}"
        done
    done
done
python3 configs/private-clinic/table.py "$runs" | tee "$runs/table.md"
