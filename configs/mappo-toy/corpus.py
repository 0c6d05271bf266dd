"""Writes a corpus of short lists, and prompts: what run.sh trains a tiny model on and asks it.

A document is `name: ada 17: sun bee tea`: one to seven of twelve words, of which none is preferred. The
reward of sample.toml prefers lists that hold two given words and are three or four words long.
"""

import json
import pathlib
import random
import sys

NAMES = "ada ben cleo dan eve finn gus hal ivy jon kim leo".split()
WORDS = "sun bee tea oak sea owl fig ink jam hen fox elm".split()


def main():
    folder = pathlib.Path(sys.argv[1])
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    rng = random.Random(3)
    for i in range(24):
        lines = []
        for name in NAMES:
            for k in range(4):
                words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 7)))
                lines.append(json.dumps({"text": f"name: {name} {4 * (i % 12) + k}: {words}"}))
        (folder / "corpus" / f"{i:02}.jsonl").write_text("\n".join(lines) + "\n")
    for side, numbers in [("train", range(0, 24)), ("held-out", range(24, 48))]:
        rows = [json.dumps({"prompt": f"name: {name} {k}:"}) for name in NAMES for k in numbers]
        (folder / f"prompts-{side}.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
