"""Writes prompts-train.jsonl and prompts-held-out.jsonl: requests whose fulfilment can be checked exactly.

Each asks for three bullet points about a subject with two given words in them. The reward (see the
configurations beside) is the weighted mean of: the words that are there, the lines that are bullets
and three in number, and the length. Subjects do not appear on both sides.
"""

import itertools
import json
import random

SUBJECTS = """a small bakery|the history of bridges|growing tomatoes|learning the piano|a night train|wind power|
repairing a bicycle|the deep sea|a village school|making cheese|the printing press|winter birds|a lighthouse|
city gardens|mountain rescue|the first telescopes|bread without yeast|a family budget|river floods|moving house|
coral reefs|the postal service|a chess club|old maps|solar ovens|a marathon|honey bees|public libraries|
sailing boats|the metric system|tea ceremonies|a power cut|forest fires|weather forecasts|a jazz band|glass making|
night markets|desert plants|the violin|a job interview|recycling paper|snow ploughs|ancient Rome|a farm shop|
first aid|a stamp collection|hot springs|road safety|the moon|silk|a radio play|wooden toys|a vegetable soup|
sleep|the bicycle bell|earthworms|a museum visit|ice skating|rain barrels|sign language|a long walk""".replace("\n", "").split("|")
WORDS = """morning careful neighbours simple water patience together season light useful afternoon quiet strong
tradition weather children learn garden repair travel history metal warm distance music market careful safe
paper trees winter bright honest share evening story balance early slowly""".split()
ASKS = [
    "Write exactly three bullet points about {s}. Use the words \"{a}\" and \"{b}\".",
    "Give me three short bullet points on {s}; mention \"{a}\" and \"{b}\".",
    "In three lines, each starting with \"- \", tell me about {s}. The words {a} and {b} must appear.",
]


def rows(subjects, count, rng):
    pairs = list(itertools.permutations(sorted(set(WORDS)), 2))
    for _ in range(count):
        subject, (a, b) = rng.choice(subjects), rng.choice(pairs)
        text = rng.choice(ASKS).format(s=subject, a=a, b=b)
        yield {"prompt": [{"role": "user", "content": text}], "keywords": [a, b]}


def main():
    rng = random.Random(7)
    subjects = SUBJECTS[:]
    rng.shuffle(subjects)
    cut = len(subjects) * 2 // 3
    for name, part, count in [("train", subjects[:cut], 480), ("held-out", subjects[cut:], 240)]:
        with open(f"prompts-{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows(part, count, rng):
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
