"""vLLM's benchmark client: python vllm_bench.py URL MODEL TOKENIZER [RATES] [PROMPTS]

TOKENIZER is a folder with the model's tokenizer.json and tokenizer_config.json. For each of RATES
(4,16,inf requests/s) and both backends, PROMPTS (100) prompts of 128 random tokens are asked for 64
tokens each, by `vllm bench serve` of this Python's environment. Fails when a request fails, when a
stream's usage or times cannot be, or when the server's counters under vLLM's names, which are read
before and after, say anything else than the client. Nobody else may use the server meanwhile.

A chat is skipped, and said so, where the model has no template.
"""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

PROMPT, WRITTEN = 128, 64
COUNTERS = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
            "vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count",
            "vllm:request_queue_time_seconds_count", "vllm:inter_token_latency_seconds_count"]
GAUGES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
SUMS = ["vllm:time_to_first_token_seconds_sum", "vllm:e2e_request_latency_seconds_sum"]


def metrics(url):
    """Every sample of /metrics by name, summed over labels."""
    found = {}
    for line in urllib.request.urlopen(url + "/metrics").read().decode().splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def chats(url, model):
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        urllib.request.urlopen(request).read()
        return True
    except urllib.error.HTTPError as error:
        said = json.load(error)["error"]
        assert said["code"] == "no_chat_template", said
        return False


def bench(url, model, tokenizer, backend, rate, prompts, folder):
    path = "/v1/chat/completions" if backend == "openai-chat" else "/v1/completions"
    beside = pathlib.Path(sys.executable).parent / "vllm"
    program = str(beside) if beside.exists() else shutil.which("vllm")
    assert program, "there is no vllm beside this Python, nor on the path"
    before = metrics(url)
    done = subprocess.run(
        [program, "bench", "serve", "--backend", backend, "--base-url", url, "--endpoint", path,
         "--model", model, "--tokenizer", tokenizer, "--dataset-name", "random",
         "--random-input-len", str(PROMPT), "--random-output-len", str(WRITTEN), "--ignore-eos",
         "--num-prompts", str(prompts), "--request-rate", rate, "--seed", "1",
         "--save-result", "--save-detailed", "--disable-tqdm", "--result-dir", folder, "--result-filename", "it.json"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(folder + "/it.json") as file:
        it = json.load(file)
    after = metrics(url)
    wrong = []

    def check(held, what):
        if not held:
            wrong.append(f"{backend} at {rate}/s: {what}")

    errors = sorted({error.strip().splitlines()[-1] for error in it["errors"] if error.strip()})
    check(it["completed"] == prompts and it["failed"] == 0, f"{it['failed']} of {prompts} failed: {errors[:3]}")
    check(set(it["output_lens"]) == {WRITTEN}, f"completion_tokens {sorted(set(it['output_lens']))}, asked {WRITTEN}")
    # A random text read back may have a few tokens more or fewer, a chat has its template's besides.
    check(all(PROMPT // 2 < n < 2 * PROMPT for n in it["input_lens"]), f"prompt_tokens {sorted(set(it['input_lens']))}")
    check(all(0 < t < it["duration"] for t in it["ttfts"]), "a time to the first token is not in the run")
    check(all(gap >= 0 for gaps in it["itls"] for gap in gaps), "a time between tokens is negative")
    # At most one piece of text a token: WRITTEN - 1 gaps. What has no text yet (half of a character) comes later.
    # A completion's end is a chunk of its own, as OpenAI's is, which this client takes for a token; a chat's is not.
    ends = 1 if backend == "openai" else 0
    extra = sum(max(len(gaps) - (WRITTEN - 1) - ends, 0) for gaps in it["itls"])
    fewer = sum(max(WRITTEN - 1 - len(gaps), 0) for gaps in it["itls"])

    missing = [name for name in COUNTERS + GAUGES + SUMS if name not in after]
    check(not missing, f"/metrics has no {missing}")
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in COUNTERS + SUMS}
    said = {"vllm:prompt_tokens_total": it["total_input_tokens"], "vllm:generation_tokens_total": it["total_output_tokens"],
            "vllm:inter_token_latency_seconds_count": prompts * (WRITTEN - 1)}
    for name in COUNTERS:
        check(grown[name] == said.get(name, prompts), f"{name} grew by {grown[name]}, the client saw {said.get(name, prompts)}")
    for name in GAUGES:
        check(after.get(name) == 0, f"{name} is {after.get(name)} when all is answered")
    # The server starts later and stops earlier than the client.
    theirs = grown["vllm:time_to_first_token_seconds_sum"] / prompts * 1e3
    check(0 < theirs <= it["mean_ttft_ms"], f"mean first token: {theirs:.2f} ms in /metrics, {it['mean_ttft_ms']:.2f} ms at the client")
    print(f"{backend}, {rate}/s: {it['completed']} of {prompts}, {it['request_throughput']:.1f} req/s, "
          f"{it['output_throughput']:.0f} tok/s; first token p50 {it['median_ttft_ms']:.1f} ms, p99 {it['p99_ttft_ms']:.1f} ms "
          f"(mean {it['mean_ttft_ms']:.1f}, /metrics {theirs:.1f}); between p50 {it['median_itl_ms']:.2f} ms, "
          f"p99 {it['p99_itl_ms']:.2f} ms; chunks beyond one a token and the end: {extra}, fewer: {fewer}", flush=True)
    check(extra == 0, f"{extra} chunks with a choice more than tokens and ends")
    return wrong


def main():
    url, model, tokenizer = sys.argv[1].rstrip("/"), *sys.argv[2:4]
    rates = (sys.argv[4] if len(sys.argv) > 4 else "4,16,inf").split(",")
    prompts = int(sys.argv[5]) if len(sys.argv) > 5 else 100
    assert all(math.isinf(float(rate)) or float(rate) > 0 for rate in rates), rates
    backends = ["openai"]
    if chats(url, model):
        backends.append("openai-chat")
    else:
        print("openai-chat: the model has no template")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            for rate in rates:
                wrong += bench(url, model, tokenizer, backend, rate, prompts, folder)
    for line in wrong:
        print("WRONG:", line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
