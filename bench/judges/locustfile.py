"""More users than the queue takes, with locust: chats and completions, whole, streamed and left half way.

    tercet serve MODEL --port 8000 --cache-gib 0.25 &
    locust -f locustfile.py --headless -u 400 -r 100 -t 5m -H http://127.0.0.1:8000 --server-pid $(pgrep -x tercet)

Long enough that in the second half every place for kept beginnings is taken. Exits with 1 unless
every answer was a 200 that is whole or a 429 with Retry-After, both were seen, the server's
memory (Linux, VmRSS) in the last quarter is that of the second one to 5 %, and after the run
/metrics has no sequence, no page held, none failed and each one accounted for. More than 900
connections are refused with 503, which fails as any other 5xx.

Chat users ask for completions where the model has no chat template, and that is said.
"""

import json
import random
import time

import gevent
import requests
from locust import HttpUser, constant, events, task

TOKENS, GROWTH, SETTLE = 32, 0.05, 30
# What of the kernel's and the allocator's own pages may come and go, whatever the server's size.
SLACK_MIB = 4
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
seen = {"wrong": [], "memory": [], "refused": 0, "whole": 0, "left": 0}


@events.init_command_line_parser.add_listener
def arguments(parser):
    parser.add_argument("--server-pid", type=int, required=True, help="process id of the server, whose memory is sampled")


def memory(pid):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def metrics(host):
    """Samples of /metrics under our own names, summed over labels, and answers by status."""
    found, statuses = {}, {}
    for line in requests.get(host + "/metrics", timeout=10).text.splitlines():
        if line.startswith("tercet_"):
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0) + value
            if name == "tercet_http_responses_total":
                code = int(line.split('code="')[1].split('"')[0])
                statuses[code] = statuses.get(code, 0) + value
    return found, statuses


@events.test_start.add_listener
def begin(environment, **_):
    host, pid = environment.host, environment.parsed_options.server_pid
    for _ in range(60):
        if requests.get(host + "/readyz", timeout=10).status_code == 200:
            break
        time.sleep(1)
    model = requests.get(host + "/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = requests.post(host + "/v1/chat/completions", json=body, timeout=60)
    seen.update(model=model, chats=answer.status_code == 200, before=metrics(host), begun=time.monotonic())
    if not seen["chats"]:
        assert answer.json()["error"]["code"] == "no_chat_template", answer.text
        print("the model has no chat template: all users ask for completions")

    def sample():
        while True:
            seen["memory"].append((time.monotonic() - seen["begun"], memory(pid)))
            gevent.sleep(1)

    seen["sampler"] = gevent.spawn(sample)


class Asking(HttpUser):
    abstract = True
    # No pause after an answer; ask() makes one after a refusal.
    wait_time = constant(0)
    chat = False

    def ask(self, kind, stream, leave=False):
        text = " ".join(random.choices(WORDS, k=random.randint(1, 120)))
        chat = self.chat and seen["chats"]
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {"model": seen["model"], "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        if stream:
            body["stream_options"] = {"include_usage": True}
        name, begun = f"{path} {kind}", time.perf_counter()
        with self.client.post(path, json=body, stream=stream, catch_response=True, name=name, timeout=120) as answer:
            try:
                outcome = self.judge(answer, stream, leave)
            except (requests.RequestException, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
                outcome = f"cut or garbled: {type(error).__name__}: {error}"
            meta = answer.request_meta
            meta["response_time"] = (time.perf_counter() - begun) * 1e3
            if outcome is None:
                answer.success()
            else:
                seen["wrong"].append(f"{name}: {outcome}")
                answer.failure(outcome)
            refused = answer.status_code == 429
            if refused:
                meta["name"] = "429"
        if refused or outcome:
            gevent.sleep(random.uniform(0.2, 1.2))

    def judge(self, answer, stream, leave):
        """What is wrong with the answer, or nothing."""
        if answer.status_code == 429:
            after = answer.headers.get("retry-after", "")
            said = answer.json()["error"]
            seen["refused"] += 1
            return None if after.isdigit() and int(after) > 0 and said["message"] else f"429 with Retry-After {after!r}"
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        if leave:
            # Half of them in the queue, at its first sign; half when the answer has begun.
            begun = b"data: " if random.random() < 0.5 else b":"
            next(line for line in answer.iter_lines(chunk_size=64) if line.startswith(begun))
            answer.close()
            seen["left"] += 1
            return None
        if stream:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: ")]
            if lines[-1] != b"[DONE]":
                return "a stream without [DONE]"
            usage = json.loads(lines[-2])["usage"]
        else:
            usage = answer.json()["usage"]
        seen["whole"] += 1
        return None if usage["completion_tokens"] == TOKENS else f"usage {usage}"

    @task(4)
    def whole(self):
        self.ask("whole", False)

    @task(4)
    def streamed(self):
        self.ask("streamed", True)

    @task(1)
    def left(self):
        self.ask("left", True, leave=True)


class Completions(Asking):
    pass


class Chats(Asking):
    chat = True


@events.quitting.add_listener
def end(environment, **_):
    wrong = seen["wrong"]
    if "sampler" not in seen:
        return
    seen["sampler"].kill()
    host, took = environment.host, time.monotonic() - seen["begun"]
    # Users whose time was up hang up; the server has this long to notice.
    still = ["tercet_requests_running", "tercet_requests_waiting", "tercet_kv_pages_used"]
    for _ in range(SETTLE):
        now, statuses = metrics(host)
        if not any(now[name] for name in still):
            break
        time.sleep(1)
    wrong += [f"{SETTLE} s after the run {name} is {now[name]:.0f}" for name in still if now[name]]
    before, statuses_before = seen["before"]
    grown = {name: now[name] - before.get(name, 0) for name in now}
    statuses = {code: count - statuses_before.get(code, 0) for code, count in statuses.items()}
    wrong += [f"the server counts {count:.0f} answers {code}" for code, count in statuses.items() if code >= 500 and count]
    short = {name: grown[f"tercet_requests_{name}_total"] for name in ("accepted", "finished", "cancelled", "failed")}
    if short["failed"]:
        wrong.append(f"{short['failed']:.0f} sequences failed")
    if short["accepted"] != short["finished"] + short["cancelled"] + short["failed"]:
        wrong.append(f"sequences that are not accounted for: {short}")
    wrong += [f"nothing was {name}: no overload was tried" for name in ("whole", "refused", "left") if not seen[name]]

    def quarter(number):
        return [mib for at, mib in seen["memory"] if number <= at / took * 4 < number + 1]

    print(f"{seen['whole']} whole, {seen['left']} left, {seen['refused']} refused in {took:.0f} s; statuses "
          f"{ {code: int(count) for code, count in sorted(statuses.items()) if count} }; sequences "
          f"{ {name: int(count) for name, count in short.items()} }, preempted {grown['tercet_preemptions_total']:.0f}")
    if quarter(1) and quarter(3):
        start, second, last = seen["memory"][0][1], max(quarter(1)), max(quarter(3))
        print(f"memory: {start:.0f} MiB at the start, at most {max(quarter(0)):.0f}, {second:.0f}, {max(quarter(2)):.0f} and {last:.0f} in "
              f"the quarters; pages used {now['tercet_kv_pages_used']:.0f}, cached {now['tercet_kv_pages_cached']:.0f}")
        if last > second * (1 + GROWTH) + SLACK_MIB:
            wrong.append(f"memory grew from {second:.0f} to {last:.0f} MiB")
    else:
        wrong.append("the run was too short to see memory")
    try:
        body = {"model": seen["model"], "prompt": "x", "max_tokens": 1}
        requests.post(host + "/v1/completions", json=body, timeout=30).raise_for_status()
    except requests.RequestException as error:
        wrong.append(f"it does not answer any more: {error}")
    for line in sorted(set(wrong))[:20]:
        print("WRONG:", line)
    environment.process_exit_code = 1 if wrong else 0
