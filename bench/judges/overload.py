"""More than a server can do: python overload.py URL MODEL PID [SECONDS] [CLIENTS]

Clients ask as fast as they are answered, half of them streaming and every tenth leaving in the
middle; 429 is followed by a pause. Prints statuses, latencies of what was admitted, and the
server's memory (Linux) at the start, in the middle and at the end. Standard library only.
"""

import collections
import http.client
import json
import random
import sys
import threading
import time


def memory(pid):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


def main():
    url, model, pid = sys.argv[1:4]
    seconds, clients = int((sys.argv + [0, 60])[4] or 60), int(sys.argv[5]) if len(sys.argv) > 5 else 400
    host = url.split("//")[1]
    end = time.time() + seconds
    counts, took, lock = collections.Counter(), [], threading.Lock()

    def client(number):
        draw = random.Random(number)
        while time.time() < end:
            body = {"model": model, "prompt": "once upon a time " * draw.randint(1, 40), "max_tokens": 32,
                    "ignore_eos": True, "stream": number % 2 == 0}
            begun, outcome = time.time(), None
            try:
                connection = http.client.HTTPConnection(host, timeout=120)
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                outcome = answer.status
                if outcome == 200 and draw.random() < 0.1:
                    answer.read(100)
                    outcome = "left"
                else:
                    text = answer.read()
                    if outcome == 200 and body["stream"] and not text.endswith(b"data: [DONE]\n\n"):
                        outcome = "cut"
                connection.close()
            except OSError as error:
                outcome = type(error).__name__
            with lock:
                counts[outcome] += 1
                if outcome == 200:
                    took.append(time.time() - begun)
            if outcome != 200:
                time.sleep(0.2 + draw.random())

    before = memory(pid)
    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    middle = memory(pid)
    for thread in threads:
        thread.join(180)
    took.sort()
    share = lambda q: took[min(int(len(took) * q), len(took) - 1)] if took else float("nan")
    print(f"{clients} clients for {seconds} s:", dict(counts))
    print(f"admitted: p50 {share(.5):.2f} s, p99 {share(.99):.2f} s, longest {share(1):.2f} s")
    print(f"memory: {before} MiB before, {middle} in the middle, {memory(pid)} at the end")
    assert not set(counts) - {200, 429, 503, "left"}, counts


if __name__ == "__main__":
    main()
