#!/usr/bin/env bash
# NSA against its dense twin: the quickstart's model, same tokens, same seeds; validation loss.
#   bench/twins.sh TEXT OUT [STEPS] [SEED …]      e.g. bench/twins.sh quickstart-run/corpus twins 200 1 2 3
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tercet=${TERCET:-$root/target/release/tercet}
text=$1 out=$2 steps=${3:-200}
shift $(($# < 3 ? $# : 3))
[ $# -gt 0 ] || set -- 1 2 3
mkdir -p "$out"

# The twin: the same file without its [model.nsa] table.
awk '/^\[/ { skip = ($0 == "[model.nsa]") } !skip' "$root/configs/quickstart.toml" >"$out/dense.toml"
cp "$root/configs/quickstart.toml" "$out/nsa.toml"

for seed in "$@"; do
    for kind in nsa dense; do
        run="$out/$kind-$seed"
        [ -e "$run/curve.svg" ] || "$tercet" pretrain "$out/$kind.toml" "output=$run" \
            "data.paths=[\"$text\"]" "data.cache=$out/tokens" "train.steps=$steps" "train.seed=$seed" \
            >"$run.log" 2>&1
        loss=$(grep -o '"validation_loss":[0-9.]*' "$run/metrics.jsonl" | tail -n 1 | cut -d: -f2)
        printf '%-6s seed %s  validation %s\n' "$kind" "$seed" "$loss"
    done
done
