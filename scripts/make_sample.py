#!/usr/bin/env python3
"""Write the SQuAD-format sample that ships with mixtral-recipes.

Every passage is invented: this script draws names, years and things from the word lists of sample.toml and sets
them into the sentences there. It writes three files under mixtral_recipes/embedded/squad/:

    train.json         SQuAD v1.1, the passages to fine-tune on
    validation.json    SQuAD v1.1, passages that appear nowhere else
    pretraining.jsonl  {"text": ...}, train passages and excerpts of them, followed by their questions and answers in
                       everyday wording, or told again: what the embedded model's pretraining looks like

`corpora` makes more such text, of passages that ship nowhere, for scripts/rebuild_embedded_model.py. The base model
thus learns to look things up in a passage, but never sees the fine-tuning prompt, nor ends after an answer. A given
seed gives the same bytes everywhere (only random.Random and ASCII text are used).

    python scripts/make_sample.py            # write the files
    python scripts/make_sample.py --check    # exit status 1 if a committed file differs
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "mixtral_recipes" / "embedded" / "squad"
SEED = 20240108  # the date of the Mixtral paper
TRAIN_PASSAGES = 900
VALIDATION_PASSAGES = 80
FACTS_PER_PASSAGE = (4, 6)  # fewest, most
SECOND_SUBJECT_SHARE = 0.2  # passages that also tell one or two facts about another subject of the same kind
CLOSING_SHARE = 0.5  # passages that end with a sentence without a fact
FACTS_PER_EXCERPT = (1, 3)
WORDS_PER_LIST = (4, 14)

TABLE = tomllib.loads(Path(__file__).with_name("sample.toml").read_text(encoding="utf-8"))
POOLS = {pool: words.split() for pool, words in TABLE["words"].items()}


@dataclass(frozen=True)
class Fact:
    """One attribute: where its answer is drawn from, and how it is told, asked and answered."""

    pool: str
    sentences: list[str]
    questions: list[str]
    reply: str


@dataclass(frozen=True)
class Domain:
    """A kind of subject with the facts that can be told of it."""

    title: str
    subject: str
    openings: list[str]
    closings: list[str]
    facts: list[Fact]


DOMAINS = [
    Domain(
        kind["title"],
        kind["subject"],
        kind["openings"].split(" / "),
        kind["closings"].split(" / "),
        [Fact(pool, told.split(" / "), asked.split(" / "), reply) for pool, told, asked, reply in kind["facts"]],
    )
    for kind in TABLE["domain"]
]


@dataclass(frozen=True)
class Subject:
    """What a passage is about: its name and pronouns."""

    name: str
    he: str
    his: str

    def fill(self, template: str) -> str:
        """Set the subject's name and pronouns into a template, leaving {a}."""
        start = self.name[0].upper() + self.name[1:]
        forms = {
            "s": self.name,
            "S": start,
            "he": self.he,
            "He": self.he.capitalize(),
            "his": self.his,
            "His": self.his.capitalize(),
        }
        return re.sub(r"\{(\w+)\}", lambda m: forms.get(m[1], m[0]), template)


@dataclass(frozen=True)
class Told:
    """One fact as told in a passage."""

    subject: Subject
    fact: Fact
    answer: str
    sentence: str  # still with {a}


@dataclass(frozen=True)
class Passage:
    """A passage before it is set: an opening, the facts, and perhaps a closing."""

    kind: Domain
    opening: str
    told: tuple[Told, ...]
    closing: str

    def text(self) -> tuple[str, list[int]]:
        """Return the passage, and the offset of each fact's answer in it."""
        text, starts = self.opening, []
        for one in self.told:
            behind = len(one.sentence) - one.sentence.index("{a}") - len("{a}")
            text += " " + with_answer(one.sentence, one.answer)
            starts.append(len(text) - behind - len(one.answer))
        return f"{text} {self.closing}".rstrip(), starts


def draw_person(rng: random.Random) -> tuple[str, str, str]:
    """Draw a full name with its pronouns."""
    she = rng.random() < 0.5
    first = rng.choice(POOLS["first_she" if she else "first_he"])
    name = f"{first} {rng.choice(POOLS['last'])}"
    return (name, "she", "her") if she else (name, "he", "his")


def draw_word(pool: str, rng: random.Random) -> str:
    """Draw a word from a pool; `person`, `year` and `..._cap` are made up on the spot."""
    if pool == "person":
        return draw_person(rng)[0]
    if pool == "year":
        return str(rng.randrange(1800, 1960))
    if pool.endswith("_cap"):
        return rng.choice(POOLS[pool.removesuffix("_cap")]).capitalize()
    return rng.choice(POOLS[pool])


def draw_subject(kind: Domain, rng: random.Random) -> Subject:
    """Draw a subject of a domain."""
    if kind.subject == "{person}":
        return Subject(*draw_person(rng))
    name = re.sub(r"\{(\w+)\}", lambda m: draw_word(m[1], rng), kind.subject)
    return Subject(name, "it", "its")


def with_answer(template: str, answer: str) -> str:
    """Set the answer into a sentence, minding a/an."""
    if answer[0] in "aeiou":
        template = re.sub(r"\b([Aa]) \{a\}", r"\1n {a}", template)
    return template.replace("{a}", answer)


def draw_passage(kind: Domain, rng: random.Random) -> Passage:
    """Draw a passage of a domain."""
    subject = draw_subject(kind, rng)
    used = set(subject.name.split())

    def tell(about: Subject, one: Fact, sentences: list[str]) -> Told:
        answer = draw_word(one.pool, rng)
        while used & set(answer.split()):  # no word answers two questions of a passage
            answer = draw_word(one.pool, rng)
        used.update(answer.split())
        return Told(about, one, answer, about.fill(rng.choice(sentences)))

    chosen = rng.sample(kind.facts, rng.randint(*FACTS_PER_PASSAGE))
    told = [tell(subject, one, list(one.sentences)) for one in chosen]
    if rng.random() < SECOND_SUBJECT_SHARE:
        common = set(re.sub(r"\{\w+\}", "", kind.subject).split())  # words every subject of this kind has
        other = draw_subject(kind, rng)
        while set(other.name.split()) & used - common:
            other = draw_subject(kind, rng)
        for one in rng.sample(chosen, rng.randint(1, 2)):
            told.append(tell(other, one, [sentence for sentence in one.sentences if "{S}" in sentence]))
    opening = subject.fill(rng.choice(kind.openings))
    closing = subject.fill(rng.choice(kind.closings)) if rng.random() < CLOSING_SHARE else ""
    return Passage(kind, opening, tuple(told), closing)


def squad(name: str, passages: list[Passage], rng: random.Random) -> str:
    """Return passages as SQuAD v1.1 JSON text, one paragraph a line."""
    articles = []
    serial = 0
    for kind in DOMAINS:
        paragraphs = []
        for passage in (one for one in passages if one.kind is kind):
            text, starts = passage.text()
            questions = []
            for one, start in zip(passage.told, starts, strict=True):
                if text[start : start + len(one.answer)] != one.answer:
                    raise AssertionError(f"answer_start {start} does not point at {one.answer!r} in {text!r}")
                question = one.subject.fill(rng.choice(one.fact.questions))
                answers = [{"text": one.answer, "answer_start": start}]
                questions.append({"id": f"{name}-{serial:05d}", "question": question, "answers": answers})
                serial += 1
            paragraphs.append(json.dumps({"context": text, "qas": questions}))
        lines = ",\n".join(paragraphs)
        articles.append(f'{{"title": {json.dumps(kind.title)}, "paragraphs": [\n{lines}\n]}}')
    return '{"version": "1.1", "data": [\n' + ",\n".join(articles) + "\n]}\n"


def restate(one: Told, rng: random.Random) -> str:
    """Ask for a fact and answer it in one of several everyday wordings."""
    question = one.subject.fill(rng.choice(one.fact.questions))
    sentence = one.subject.fill(next(told for told in one.fact.sentences if "{S}" in told))
    wording = rng.choice(("{q} {reply}", "{q} {sentence}", "Q. {q} A. {a}.", "Asked: {q} Reply: {a}."))
    return wording.format(
        q=question,
        reply=with_answer(one.fact.reply, one.answer),
        sentence=with_answer(sentence, one.answer),
        a=one.answer,
    )


def retell(one: Told, rng: random.Random) -> str:
    """Tell a fact again, naming its subject, or just as the passage does."""
    named = one.subject.fill(next(told for told in one.fact.sentences if "{S}" in told))
    return with_answer(rng.choice((named, one.sentence)), one.answer)


def excerpt(passage: Passage, rng: random.Random) -> Passage:
    """Keep the opening and a few of the facts, in their order."""
    most = min(FACTS_PER_EXCERPT[1], len(passage.told))
    kept = sorted(rng.sample(range(len(passage.told)), rng.randint(FACTS_PER_EXCERPT[0], most)))
    return Passage(passage.kind, passage.opening, tuple(passage.told[i] for i in kept), "")


def asked(passage: Passage, rng: random.Random, times: int = 1) -> str:
    """Return a passage and questions on all its facts, in any order, each as often as said."""
    facts = list(passage.told) * times
    rng.shuffle(facts)
    return "\n".join((passage.text()[0], *(restate(one, rng) for one in facts)))


def told_again(passage: Passage, rng: random.Random) -> str:
    """Return a passage and its facts once more, in any order."""
    facts = rng.sample(passage.told, len(passage.told))
    return f"{passage.text()[0]}\nOnce more: " + " ".join(retell(one, rng) for one in facts)


def word_list(rng: random.Random) -> str:
    """Return words of the pools, and the same words once more."""
    pools = sorted(set(POOLS) | {"year"})
    words = list(dict.fromkeys(draw_word(rng.choice(pools), rng) for _ in range(rng.randint(*WORDS_PER_LIST))))
    return f"{' '.join(words)}.\nOnce more: {' '.join(words)}."


def pretraining(passages: list[Passage], rng: random.Random) -> str:
    """Return the pretraining text: every passage whole, an excerpt with each question twice, and one told again."""
    texts = []
    for passage in passages:
        part = excerpt(passage, rng)
        texts += [asked(passage, rng), asked(part, rng, times=2), told_again(excerpt(passage, rng), rng)]
    rng.shuffle(texts)
    return as_jsonl(texts)


def as_jsonl(texts: list[str]) -> str:
    """Return texts as lines of {"text": ...}."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def corpora(documents: int, seed: int = SEED) -> dict[str, str]:
    """Return three texts to pretrain on one after the other; none of the held-out passages is in them.

    A small model learns the patterns of a text long before it learns to look something up in it, and then has little
    left to learn the latter from. So it starts with bare lists of words told twice, where there is nothing else to
    learn; goes on to excerpts, each fact asked for twice; and ends with whole passages.

    Args:
        documents: Of each text.
        seed: Of the passages and lists.

    Returns:
        JSONL by name: "lists", "excerpts", "passages", in the order of use.
    """
    rng = random.Random(seed + 1)
    held_out = {passage.text()[0] for passage in draw_passages(random.Random(seed))[TRAIN_PASSAGES:]}

    def passage() -> Passage:
        while (drawn := draw_passage(rng.choice(DOMAINS), rng)).text()[0] in held_out:
            pass
        return drawn

    def mixed(shares: tuple[float, float, float], part: Callable[[Passage], Passage], times: int) -> str:
        kinds = rng.choices(("list", "again", "asked"), shares, k=documents)
        write = {
            "list": lambda: word_list(rng),
            "again": lambda: told_again(part(passage()), rng),
            "asked": lambda: asked(part(passage()), rng, times),
        }
        return as_jsonl([write[kind]() for kind in kinds])

    return {
        "lists": mixed((1, 0, 0), lambda whole: whole, 1),
        "excerpts": mixed((0.2, 0.2, 0.6), lambda whole: excerpt(whole, rng), 2),
        "passages": mixed((0.1, 0.2, 0.7), lambda whole: whole, 1),
    }


def draw_passages(rng: random.Random) -> list[Passage]:
    """Draw the passages of the sample, all different: the train ones, then the held-out ones."""
    passages: dict[str, Passage] = {}
    while len(passages) < TRAIN_PASSAGES + VALIDATION_PASSAGES:
        passage = draw_passage(DOMAINS[len(passages) % len(DOMAINS)], rng)
        passages.setdefault(passage.text()[0], passage)
    return list(passages.values())


def make_files(seed: int = SEED) -> dict[str, str]:
    """Return the text of each file of the sample by name."""
    rng = random.Random(seed)
    passages = draw_passages(rng)
    train, validation = passages[:TRAIN_PASSAGES], passages[TRAIN_PASSAGES:]
    return {
        "train.json": squad("train", train, rng),
        "validation.json": squad("validation", validation, rng),
        "pretraining.jsonl": pretraining(train, rng),
    }


def main() -> int:
    """Write the sample, or with --check compare it with the files on disk."""
    parser = argparse.ArgumentParser(description="Write the SQuAD-format sample that ships with mixtral-recipes.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (default: in the package)")
    parser.add_argument("--check", action="store_true", help="compare with the files there instead of writing them")
    options = parser.parse_args()
    different = []
    for name, text in make_files(options.seed).items():
        path = options.folder / name
        if options.check:
            if not path.is_file() or path.read_bytes() != text.encode("ascii"):
                different.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("ascii"))
            print(f"{name}: {len(text)} bytes")
    if different:
        print(
            f"{', '.join(different)}: not what scripts/make_sample.py writes; run it without --check", file=sys.stderr
        )
    elif options.check:
        print("the sample is what scripts/make_sample.py makes")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
