"""How fast a server answers: python rate.py URL MODEL PROMPT_TOKENS BATCHES [TOKENS]

For each of BATCHES (1,8,64) so many clients ask at once, each with a prompt of its own of
PROMPT_TOKENS token ids, and stream TOKENS tokens (128). Prints the time to the first token, the
median time between two tokens, and tokens/s while all of them write. Standard library only.
"""

import http.client
import json
import statistics
import sys
import threading
import time


def main():
    url, model, prompt, batches = sys.argv[1:5]
    prompt, tokens = int(prompt), int((sys.argv + [128])[5])
    host = url.split("//")[1]

    def client(number, times, errors):
        ids = [(i * 31 + number * 7919 + i * i) % 2000 + 10 for i in range(prompt)]
        body = {"model": model, "prompt": ids, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": number}
        connection = http.client.HTTPConnection(host, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            errors.append(f"{answer.status} {answer.read(300).decode()}")
            return
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
        connection.close()

    for batch in map(int, batches.split(",")):
        times, errors = [[] for _ in range(batch)], []
        threads = [threading.Thread(target=client, args=(n, times[n], errors)) for n in range(batch)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors or not all(len(own) > 1 for own in times):
            print(f"{batch} clients: {len(errors)} refused, {errors[:1]}")
            continue
        first = sorted(own[0] - begun for own in times)
        last = max(own[0] for own in times)
        end = min(own[-1] for own in times)
        between = [b - a for own in times for a, b in zip(own, own[1:]) if a >= last]
        written = sum(sum(last < at <= end for at in own) for own in times)
        pace = f"{written / (end - last):.0f} tok/s" if end > last else "they never wrote all at once"
        gap = f"{statistics.median(between) * 1e3:.2f} ms" if between else "-"
        print(
            f"{batch} clients, prompts of {prompt}: first token {first[0]:.2f} to {first[-1]:.2f} s, "
            f"between tokens {gap}, {pace} while all write, {time.perf_counter() - begun:.2f} s in all",
            flush=True,
        )


if __name__ == "__main__":
    main()
