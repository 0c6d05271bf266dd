"""Connections that say nothing: python idle.py URL PID [COUNT]    (ulimit -n above COUNT)

Opens them all, asks in between, waits for the server to have closed them, asks again.
"""

import collections
import http.client
import socket
import sys
import time

from overload import memory


def live(host):
    begun = time.time()
    try:
        connection = http.client.HTTPConnection(host, timeout=40)
        connection.request("GET", "/livez")
        return connection.getresponse().status, round(time.time() - begun, 2)
    except OSError as error:
        return type(error).__name__, round(time.time() - begun, 2)


def main():
    url, pid, count = sys.argv[1], sys.argv[2], int((sys.argv + [10_000])[3])
    host = url.split("//")[1]
    address = (host.split(":")[0], int(host.split(":")[1]))
    print("before:", live(host), memory(pid), "MiB")
    outcomes, idle = collections.Counter(), []
    for _ in range(count):
        try:
            idle.append(socket.create_connection(address, timeout=5))
            outcomes["open"] += 1
        except OSError as error:
            outcomes[type(error).__name__] += 1
    print(dict(outcomes), "with all open:", live(host), memory(pid), "MiB")
    time.sleep(35)
    print("when they have been idle for 35 s:", live(host), memory(pid), "MiB")
    for one in idle:
        one.close()
    print("after:", live(host), memory(pid), "MiB")


if __name__ == "__main__":
    main()
