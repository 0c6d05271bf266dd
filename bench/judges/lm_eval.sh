#!/bin/sh
# lm-eval against a running server, its tokenizer included, on two local tasks: lm_eval.sh URL MODEL
#     pip install 'lm-eval[api]'
# A multiple choice whose right answers the server itself makes (most probable continuations), so
# that any model must score 1, and a generation that is only counted.
set -eu
url=$1 model=$2
work=$(mktemp -d)
python3 - "$url" "$model" "$work" <<'PY'
import json, sys, urllib.request
url, model, work = sys.argv[1:]

def ask(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))

rows = []
for prompt in ["The capital of France is", "pub fn new(", "One, two, three,", "Once upon a time"]:
    written = ask("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "add_special_tokens": False,
                                      "ignore_eos": True})["choices"][0]["text"]
    rows.append({"q": prompt, "choices": [written, " zebra zebra zebra zebra"], "gold": 0})
open(work + "/rows.jsonl", "w").write("\n".join(map(json.dumps, rows)))
for name, rest in {
    "own_choice": "output_type: multiple_choice\ndoc_to_choice: \"{{choices}}\"\ndoc_to_target: gold\n"
                  "target_delimiter: \"\"\nmetric_list:\n  - metric: acc\n",
    "own_text": "output_type: generate_until\ndoc_to_target: \"{{choices[0]}}\"\ngeneration_kwargs:\n  until: [\"zzz\"]\n"
                "  max_gen_toks: 4\n  temperature: 0\ntarget_delimiter: \"\"\nmetric_list:\n  - metric: exact_match\n",
}.items():
    open(f"{work}/{name}.yaml", "w").write(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {work}/rows.jsonl\n"
        f"test_split: test\ndoc_to_text: \"{{{{q}}}}\"\n{rest}")
PY
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 lm_eval --model local-completions --include_path "$work" --tasks own_choice,own_text \
    --model_args "model=$model,base_url=$url/v1/completions,tokenizer_backend=remote,max_length=1024,num_concurrent=4"
rm -r "$work"
