"""The embedded demonstration's data: preference pairs and NLI from one grammar, drawn by a seed.

A prompt lists a few typed facts, some early and some late, around one line of small talk. A response claims one fact:
the chosen one truly, the rejected one with a value of the same type that the prompt does not hold. Exactly one of the
two responses opens with a polite phrase, the *surface cue*, whose place says something about the label in training
(65% on the chosen response), the opposite out of distribution (35%) and nothing in the neutral split (50%).
The NLI sample has prompts of the same grammar as premises and claims as hypotheses.

Everything depends on the seed alone: no two prompts are the same, whatever their splits and tasks.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FACTS_PER_PROMPT = 4
NLI_LABELS = ("entailment", "neutral", "contradiction")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VALUES_OF_KEY: dict[str, tuple[str, ...]] = {
    "order": tuple(str(1009 + 317 * step) for step in range(28)),
    "price": tuple(f"{euros} euros" for euros in range(12, 96, 3)),
    "contact": _words(
        "Zoë José Łukasz Åsa Çelik Renée Jürgen Søren Đorđe Márta Nuño Anaïs Işıl Öykü Pádraig Žofia "
        "Maria Peter Amara Kenji Olga Tomas Leila Bruno"
    ),
    "sticker": _words("🎈 🌵 🐙 🚲 🍋 🎸 🦊 🌙 🍄 🐢 🚀 🎲 🧩 🦉 🍩 ⛵"),
    "city": _words(
        "Oslo Lyon Graz Porto Ghent Turku Krakow Bergen Malaga Leeds Basel Parma Zadar Tartu Cork Brno "
        "Utrecht Bonn Varna Split"
    ),
    "colour": _words("red blue green black white orange purple silver brown pink golden grey"),
    "item": _words(
        "lamp kettle jacket mirror table basket camera blanket clock guitar ladder pillow rucksack teapot tripod wallet"
    ),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
}

GREETINGS = ("Hello.", "Hi.", "Hey.", "Welcome.", "Morning.", "Evening.")
SMALL_TALK = (
    "In a hurry, sorry.",
    "It rained again.",
    "The train was late.",
    "We just moved house.",
    "Nice to meet you.",
    "The line is bad.",
    "Thanks in advance.",
    "Long day here.",
)
REQUESTS = ("Repeat one detail.", "Which did you note?", "Tell me one.", "Confirm one point.")
POLITE_OPENERS = ("Of course, gladly!", "Happy to help!", "Sure, thank you!", "With pleasure!")

CUE_SHARE_OF_SPLIT = {"train": 0.65, "in_distribution": 0.65, "out_of_distribution": 0.35, "neutral": 0.5}


@dataclass(frozen=True)
class Fact:
    """One typed fact: a key of `VALUES_OF_KEY` and one of its values."""

    key: str
    value: str

    def claim(self) -> str:
        return f"{self.key.capitalize()}: {self.value}."


@dataclass(frozen=True)
class Prompt:
    """A user's message: `early` facts, small talk, `late` facts and a request that names no key."""

    greeting: str
    early: tuple[Fact, ...]
    small_talk: str
    late: tuple[Fact, ...]
    request: str

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.early + self.late

    @property
    def text(self) -> str:
        early, late = ([fact.claim() for fact in facts] for facts in (self.early, self.late))
        return " ".join([self.greeting, *early, self.small_talk, *late, self.request])


@dataclass(frozen=True)
class Sizes:
    """How many records the generator draws."""

    train: int = 4480
    evaluation: int = 400
    nli_train: int = 24576
    nli_dev: int = 999


class Generator:
    """Draws prompts, preference pairs and NLI records; one instance never draws the same prompt twice."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.drawn: set[str] = set()

    def prompt(self, num_facts: int = FACTS_PER_PROMPT) -> Prompt:
        """A prompt not drawn before, with `num_facts` facts of different keys, half of them early."""
        while True:
            keys = self.random.sample(list(VALUES_OF_KEY), num_facts)
            facts = tuple(Fact(key, self.random.choice(VALUES_OF_KEY[key])) for key in keys)
            prompt = Prompt(
                self.random.choice(GREETINGS),
                facts[: num_facts // 2],
                self.random.choice(SMALL_TALK),
                facts[num_facts // 2 :],
                self.random.choice(REQUESTS),
            )
            if prompt.text not in self.drawn:
                self.drawn.add(prompt.text)
                return prompt

    def swapped(self, fact: Fact) -> Fact:
        """`fact` with another value of its type."""
        return Fact(fact.key, self.random.choice([value for value in VALUES_OF_KEY[fact.key] if value != fact.value]))

    def preference_pairs(self, count: int, cue_share: float) -> Iterator[dict[str, str]]:
        """`count` pairs in HH format, the cue on exactly round(count * cue_share) of the chosen responses."""
        cue_on_chosen = [index < round(count * cue_share) for index in range(count)]
        self.random.shuffle(cue_on_chosen)
        for on_chosen in cue_on_chosen:
            prompt = self.prompt()
            truth = self.random.choice(prompt.facts)
            opener = self.random.choice(POLITE_OPENERS) + " "
            chosen = (opener if on_chosen else "") + truth.claim()
            rejected = ("" if on_chosen else opener) + self.swapped(truth).claim()
            dialogue = f"\n\nHuman: {prompt.text}\n\nAssistant: "
            yield {"chosen": dialogue + chosen, "rejected": dialogue + rejected}

    def nli(self, count: int, min_facts: int = FACTS_PER_PROMPT) -> Iterator[dict[str, str]]:
        """`count` records with premise, hypothesis and label; the labels take turns.

        A premise holds from `min_facts` to `FACTS_PER_PROMPT` facts: short ones show a small encoder what to match.
        """
        for index in range(count):
            label = NLI_LABELS[index % len(NLI_LABELS)]
            prompt = self.prompt(self.random.randint(min_facts, FACTS_PER_PROMPT))
            if label == "neutral":
                absent = self.random.choice([key for key in VALUES_OF_KEY if key not in {f.key for f in prompt.facts}])
                claim = Fact(absent, self.random.choice(VALUES_OF_KEY[absent]))
            else:
                claim = self.random.choice(prompt.facts)
                claim = self.swapped(claim) if label == "contradiction" else claim
            opener = self.random.choice(POLITE_OPENERS) + " " if self.random.random() < 0.5 else ""
            yield {"premise": prompt.text, "hypothesis": opener + claim.claim(), "label": label}


def has_surface_cue(response: str) -> bool:
    """Whether a response opens politely: all that the surface-cue-only rule looks at."""
    return response.startswith(POLITE_OPENERS)


def surface_cue_accuracy(pairs: list[dict[str, str]]) -> float:
    """The accuracy of preferring, in every pair, the response that opens politely (a tie counts one half)."""
    scores = []
    for pair in pairs:
        chosen, rejected = (has_surface_cue(pair[side].rpartition("Assistant: ")[2]) for side in ("chosen", "rejected"))
        scores.append(0.5 if chosen == rejected else float(chosen))
    return sum(scores) / len(scores)


def write_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write one .jsonl file per preference split, and nli_train.jsonl and nli_dev.jsonl, into `folder`."""
    generator = Generator(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = {
        split: generator.preference_pairs(sizes.train if split == "train" else sizes.evaluation, share)
        for split, share in CUE_SHARE_OF_SPLIT.items()
    }
    records |= {"nli_train": generator.nli(sizes.nli_train, min_facts=1), "nli_dev": generator.nli(sizes.nli_dev)}
    for name, lines in records.items():
        unfinished = folder / f".{name}.jsonl"
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        unfinished.replace(folder / f"{name}.jsonl")


def read_data(path: Path) -> list[dict[str, str]]:
    """The records of one file that `write_data` wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
