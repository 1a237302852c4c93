#!/usr/bin/env python3
"""Write the SQuAD-format sample that ships with mixtral-recipes.

Every passage is invented: this script draws names, years and things from the word lists below and sets them
into its own sentences. It writes three files under mixtral_recipes/embedded/squad/:

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
from collections.abc import Callable
from dataclasses import dataclass, field
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

# ---------------------------------------------------------------------------------------------------- word lists

WORDS = {
    "first_she": "Mira Ada Clara Greta Hanna Lena Marta Nora Olga Rosa Sofia Vera",
    "first_he": "Jonas Anton Boris David Emil Felix Hugo Jakob Martin Oscar Simon Theo",
    "last": "Tolen Berg Castell Falk Grant Holm Keller Lund Marsh Novak Olsen Quist Reed Stern Thorn Voss Arden Bloom "
    "Crane Frost",
    "town": "Alderford Brackholm Cranleigh Dunmore Elmstead Hartwick Kelford Larkham Millbrook Netherby Oakham Penfold "
    "Ravenhill Saltmarsh Thornbury Wexcombe Yarrow Ashdale Coldwater Foxley",
    "river": "Ard Bourne Calder Dove Fleet Isen Lune Mere Rill Tarn",
    "colour": "red green blue yellow white black grey orange purple brown pink",
    "material": "stone brick oak iron copper marble slate clay glass bronze",
    "instrument": "flute violin trumpet harp piano drum guitar organ",
    "job": "baker teacher carpenter doctor gardener painter sailor miller nurse printer",
    "workplace": "harbour mill library hospital bakery station school museum lighthouse",
    "animal": "fox owl otter heron badger hare raven swan wolf bear stag seal",
    "pet": "cat dog rabbit parrot goat pony tortoise goose canary hedgehog",
    "food": "bread cheese soup apples plums fish honey cake beans mushrooms cherries nuts",
    "goods": "wool salt timber coal pottery candles paper leather baskets silk tea soap",
    "crop": "barley wheat potatoes cabbages onions rye turnips peas",
    "tree": "elm lime maple birch willow chestnut cedar walnut",
    "flower": "roses tulips lilies poppies daisies violets lavender",
    "spice": "pepper ginger cinnamon mustard thyme garlic sage",
    "month": "January February March April May June July August September October November December",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "hour": "five six seven eight nine ten",
    "number": "twelve fourteen fifteen eighteen twenty thirty forty fifty sixty ninety",
    "room": "cellar attic barn chapel tower well cave orchard",
    "vehicle": "boat sledge train wagon balloon canoe bicycle camel",
    "far": "Iceland Norway Peru Egypt India Chile Japan Cuba Canada Brazil",
    "things": "coins shells maps masks pearls feathers kites buttons stamps crystals",
    "topic": "bees clouds ghosts trains whales mountains dreams storms pirates",
    "object": "bell mirror clock cup sword lamp ring crown",
    "activity": "chess rowing singing knitting dancing sailing juggling painting",
    "subject": "history music botany Latin drawing poetry geography",
    "fear": "thunder water mirrors bicycles trumpets shadows balloons",
    "pet_name": "Pippa Biscuit Clover Ember Fudge Hazel Jasper Pepper Rusty Willow",
    "street": "Mill Church Bridge King Orchard Castle Garden Market Station Abbey",
    "adjective": "Silent Golden Broken Hidden Crooked Distant Painted Lonely Gentle Winter",
    "thing": "Lantern Garden River Mirror Door Island Letter Clock Forest Mountain",
    "name": "Calloway Redmond Fairfax Whitlock Ashby Corbett Hawthorn Langley Tremaine Merrick Selwyn Harlow Digby "
    "Winslow",
}
POOLS = {pool: words.split() for pool, words in WORDS.items()}

# ----------------------------------------------------------------------------------------------------- templates
# {s} the subject, {S} the same at the start of a sentence, {He} {he} {his} {His} its pronouns, {a} the answer.
# "a {a}" becomes "an {a}" before a vowel. A sentence with {s} or {S} can also be told of a second subject.


@dataclass(frozen=True)
class Fact:
    """One attribute: where its answer is drawn from, and how it is told, asked and answered."""

    pool: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    reply: str


@dataclass(frozen=True)
class Domain:
    """A kind of subject with the facts that can be told of it."""

    title: str
    subject: str
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    facts: tuple[Fact, ...] = field(default=())


def fact(pool: str, sentences: str, questions: str, reply: str) -> Fact:
    """Build a Fact from sentences and questions separated by ' / '."""
    return Fact(pool, tuple(sentences.split(" / ")), tuple(questions.split(" / ")), reply)


def domain(title: str, subject: str, openings: str, closings: str, *facts: Fact) -> Domain:
    """Build a Domain from openings and closings separated by ' / '."""
    return Domain(title, subject, tuple(openings.split(" / ")), tuple(closings.split(" / ")), facts)


DOMAINS = (
    domain(
        "Neighbours",
        "{person}",
        "Everybody in the valley knows {s}. / This is the story of {s}. / People like to talk about {s}.",
        "In the evening {he} writes long letters. / {He} never seems to be in a hurry. / "
        "Children wave when {he} walks by.",
        fact(
            "job",
            "{S} works as a {a}. / {He} works as a {a}, like {his} uncle.",
            "What does {s} work as? / What is the job of {s}?",
            "As a {a}.",
        ),
        fact(
            "workplace",
            "{S} can be found at the {a} every morning. / Every morning {he} walks to the {a}.",
            "Where is {s} every morning? / Where can {s} be found every morning?",
            "At the {a}.",
        ),
        fact(
            "town",
            "{S} was born in {a}. / {He} was born in {a}, near the hills.",
            "Where was {s} born? / In which town was {s} born?",
            "In {a}.",
        ),
        fact(
            "instrument",
            "{S} plays the {a}. / On holidays {he} plays the {a}.",
            "What does {s} play? / Which instrument does {s} play?",
            "The {a}.",
        ),
        fact(
            "pet",
            "{S} keeps a {a} as a pet. / {He} keeps a {a} as a pet.",
            "Which pet does {s} keep? / What does {s} keep as a pet?",
            "A {a}.",
        ),
        fact(
            "food",
            "{S} likes to eat {a}. / Most of all {he} likes to eat {a}.",
            "What does {s} like to eat? / Which food does {s} like to eat?",
            "Some {a}.",
        ),
        fact(
            "things",
            "{S} collects {a}. / For many years {he} collects {a}.",
            "What does {s} collect? / Which things does {s} collect?",
            "All sorts of {a}.",
        ),
        fact(
            "activity",
            "{S} is very good at {a}. / All agree that {he} is very good at {a}.",
            "What is {s} very good at? / At which activity is {s} very good?",
            "At {a}.",
        ),
        fact(
            "person",
            "{S} lives next to {a}. / {His} house stands next to that of {a}.",
            "Who lives next to {s}? / Next to whom does {s} live?",
            "It is {a}.",
        ),
    ),
    domain(
        "Towns",
        "{town}",
        "{S} is a small town between two hills. / Few travellers stop in {s}. / "
        "{S} is an old town with narrow streets.",
        "The streets are quiet at night. / Visitors like the clean air. / In winter the roads are often closed.",
        fact(
            "river",
            "{S} lies on the river {a}. / The river {a} runs past the old walls.",
            "On which river does {s} lie? / Which river runs past {s}?",
            "The river {a}.",
        ),
        fact(
            "year",
            "{S} was founded in {a}. / It was founded in {a} by monks.",
            "When was {s} founded? / In which year was {s} founded?",
            "In {a}.",
        ),
        fact(
            "goods",
            "{S} is known for its {a}. / The town is known for its {a}.",
            "What is {s} known for? / For which goods is {s} known?",
            "For its {a}.",
        ),
        fact(
            "day",
            "{S} holds a market every {a}. / The market is held every {a}.",
            "On which day is the market held in {s}? / When does {s} hold a market?",
            "Every {a}.",
        ),
        fact(
            "person",
            "{S} has a mayor named {a}. / The mayor is {a}.",
            "Who is the mayor of {s}? / What is the name of the mayor of {s}?",
            "The mayor is {a}.",
        ),
        fact(
            "month",
            "{S} has a music festival in {a}. / The music festival takes place in {a}.",
            "In which month is the music festival in {s}? / When is the music festival in {s}?",
            "In {a}.",
        ),
        fact(
            "tree",
            "{S} has an old {a} tree in its square. / In the square stands an old {a} tree.",
            "Which tree stands in the square of {s}? / What kind of tree stands in the square of {s}?",
            "An old {a} tree.",
        ),
        fact(
            "animal",
            "{S} shows a {a} on its flag. / The flag shows a {a}.",
            "Which animal is on the flag of {s}? / What does the flag of {s} show?",
            "A {a}.",
        ),
    ),
    domain(
        "Ships",
        "the {adjective} {thing}",
        "{S} is a ship with three masts. / Old sailors remember {s}. / Of all the ships in the bay, {s} is the oldest.",
        "Storms have never harmed the ship. / The crew is proud of the ship. / The sails are mended every spring.",
        fact(
            "person",
            "{S} is commanded by captain {a}. / The captain is {a}.",
            "Who is the captain of {s}? / Which captain commands {s}?",
            "Captain {a}.",
        ),
        fact(
            "year",
            "{S} was built in {a}. / The ship was built in {a}.",
            "When was {s} built? / In which year was {s} built?",
            "In {a}.",
        ),
        fact(
            "town",
            "{S} has its home port in {a}. / The home port is {a}.",
            "What is the home port of {s}? / Where is the home port of {s}?",
            "The port of {a}.",
        ),
        fact(
            "goods",
            "{S} carries a cargo of {a}. / The cargo is {a}.",
            "What cargo does {s} carry? / What is the cargo of {s}?",
            "A load of {a}.",
        ),
        fact(
            "colour",
            "{S} has a {a} hull. / The hull is painted {a}.",
            "What colour is the hull of {s}? / How is the hull of {s} painted?",
            "It is {a}.",
        ),
        fact(
            "far",
            "{S} sails to {a} each summer. / Each summer the ship sails to {a}.",
            "Where does {s} sail each summer? / To which country does {s} sail each summer?",
            "To {a}.",
        ),
        fact(
            "instrument",
            "{S} has a {a} on deck. / On deck somebody plays the {a}.",
            "What is played on deck of {s}? / Which instrument is on deck of {s}?",
            "The {a}.",
        ),
        fact(
            "pet",
            "{S} has a {a} on board for luck. / A brown {a} on board brings luck.",
            "Which animal is on board of {s} for luck? / What brings luck on board of {s}?",
            "A {a}.",
        ),
    ),
    domain(
        "Museum pieces",
        "the {material} {object} of {town}",
        "{S} is shown in a glass case. / Many visitors come to see {s}. / Little is known about the makers of {s}.",
        "A small card tells its story. / It may not be touched. / Copies are sold at the door.",
        fact(
            "person",
            "{S} was found by {a}. / It was found by {a} on a rainy day.",
            "Who found {s}? / By whom was {s} found?",
            "It was {a}.",
        ),
        fact(
            "year",
            "{S} came to the museum in {a}. / It came to the museum in {a}.",
            "When did {s} come to the museum? / In which year did {s} come to the museum?",
            "In {a}.",
        ),
        fact(
            "room",
            "{S} had been hidden in a {a}. / For a long time it was hidden in a {a}.",
            "Where was {s} hidden? / In what place was {s} hidden?",
            "In a {a}.",
        ),
        fact(
            "animal",
            "{S} is decorated with a {a}. / It is decorated with a tiny {a}.",
            "Which animal decorates {s}? / With what is {s} decorated?",
            "With a {a}.",
        ),
        fact(
            "far",
            "{S} was made in {a}. / Experts say that it was made in {a}.",
            "Where was {s} made? / In which country was {s} made?",
            "In {a}.",
        ),
        fact(
            "number",
            "{S} weighs {a} pounds. / It weighs {a} pounds.",
            "How many pounds does {s} weigh? / What does {s} weigh in pounds?",
            "It is {a} pounds.",
        ),
        fact(
            "day",
            "{S} can be seen every {a}. / It can be seen every {a} for free.",
            "On which day can {s} be seen? / When can {s} be seen?",
            "Every {a}.",
        ),
    ),
    domain(
        "Shops",
        "the {colour_cap} {animal_cap}",
        "{S} is a shop with a wide window. / People come from far away to visit {s}. / "
        "{S} is the smallest shop in town.",
        "The shelves reach up to the ceiling. / A bell rings when the door opens. / There is always a long queue.",
        fact(
            "person",
            "{S} belongs to {a}. / The owner of the shop is {a}.",
            "Who is the owner of {s}? / To whom does {s} belong?",
            "The owner is {a}.",
        ),
        fact(
            "street",
            "{S} stands in {a} Street. / The shop stands in {a} Street.",
            "In which street does {s} stand? / Where does {s} stand?",
            "In {a} Street.",
        ),
        fact(
            "goods",
            "{S} sells {a}. / The shop sells {a} of every kind.",
            "What does {s} sell? / Which goods does {s} sell?",
            "It sells {a}.",
        ),
        fact(
            "day",
            "{S} is closed on {a}. / On {a} the shop is closed.",
            "On which day is {s} closed? / When is {s} closed?",
            "On {a}.",
        ),
        fact(
            "hour",
            "{S} opens at {a} in the morning. / The doors open at {a} in the morning.",
            "When does {s} open in the morning? / At which hour does {s} open?",
            "At {a}.",
        ),
        fact(
            "year",
            "{S} was started in {a}. / The shop was started in {a}.",
            "When was {s} started? / In which year was {s} started?",
            "In {a}.",
        ),
        fact(
            "spice",
            "{S} smells of {a}. / The whole shop smells of {a}.",
            "What does {s} smell of? / Which spice does {s} smell of?",
            "It smells of {a}.",
        ),
    ),
    domain(
        "Animals",
        "{pet_name}",
        "{S} is the most famous animal on the hill. / The children are fond of {s}. / Nobody can forget {s}.",
        "On warm days there is a long nap in the sun. / Strangers are greeted with a loud noise. / "
        "The photographs sell well.",
        fact(
            "pet",
            "{S} is a {a} with one white foot. / This animal is a {a} with one white foot.",
            "What kind of animal is {s}? / Which animal is {s}?",
            "A {a}.",
        ),
        fact(
            "person",
            "{S} is looked after by {a}. / The keeper is {a}.",
            "Who looks after {s}? / Who is the keeper of {s}?",
            "The keeper is {a}.",
        ),
        fact(
            "food",
            "{S} eats {a} for breakfast. / Breakfast is always {a}.",
            "What does {s} eat for breakfast? / What is the breakfast of {s}?",
            "Some {a}.",
        ),
        fact(
            "room",
            "{S} sleeps in the {a}. / The favourite place to sleep is the {a}.",
            "Where does {s} sleep? / In what place does {s} sleep?",
            "In the {a}.",
        ),
        fact(
            "town",
            "{S} was brought from {a}. / The animal was brought from {a} in a basket.",
            "From which town was {s} brought? / Where was {s} brought from?",
            "From {a}.",
        ),
        fact(
            "fear",
            "{S} is afraid of {a}. / Only {a} can frighten the animal.",
            "What is {s} afraid of? / What can frighten {s}?",
            "Only {a}.",
        ),
        fact(
            "colour",
            "{S} wears a {a} ribbon. / A {a} ribbon is tied around the neck.",
            "What colour is the ribbon of {s}? / Which colour has the ribbon of {s}?",
            "It is {a}.",
        ),
    ),
    domain(
        "Gardens",
        "the {name} garden",
        "{S} is open to everyone. / A narrow gate leads into {s}. / {S} is a quiet place.",
        "Bees hum there all day. / The paths are covered with gravel. / It smells best after rain.",
        fact(
            "person",
            "{S} was planted by {a}. / It was planted by {a}.",
            "Who planted {s}? / By whom was {s} planted?",
            "It was {a}.",
        ),
        fact(
            "tree",
            "{S} has a tall {a} in the middle. / In the middle grows a tall {a}.",
            "Which tree grows in the middle of {s}? / What grows in the middle of {s}?",
            "A tall {a}.",
        ),
        fact(
            "flower",
            "{S} is full of {a}. / The beds are full of {a}.",
            "Which flowers grow in the beds of {s}? / What is {s} full of?",
            "Full of {a}.",
        ),
        fact(
            "month",
            "{S} is most beautiful in {a}. / It is most beautiful in {a}.",
            "In which month is {s} most beautiful? / When is {s} most beautiful?",
            "In {a}.",
        ),
        fact(
            "material",
            "{S} has a wall made of {a}. / The wall is made of {a}.",
            "What is the wall of {s} made of? / Which material is the wall of {s} made of?",
            "Made of {a}.",
        ),
        fact(
            "spice",
            "{S} has {a} growing in pots. / In the pots grows {a}.",
            "What grows in the pots of {s}? / Which spice grows in the pots of {s}?",
            "Only {a}.",
        ),
        fact(
            "animal",
            "{S} has a statue of a {a}. / At the gate is a statue of a {a}.",
            "Which animal does the statue of {s} show? / What does the statue of {s} show?",
            "A {a}.",
        ),
    ),
    domain(
        "Railways",
        "the {name} line",
        "{S} is a short railway. / Trains have run on {s} for a long time. / {S} winds through the mountains.",
        "Tickets are still made of cardboard. / The view from the window is wonderful. / Delays are rare.",
        fact(
            "town",
            "{S} ends in {a}. / The last stop is {a}, where the line ends.",
            "Where does {s} end? / In which town does {s} end?",
            "In {a}.",
        ),
        fact(
            "year",
            "{S} was opened in {a}. / It was opened in {a} with a brass band.",
            "When was {s} opened? / In which year was {s} opened?",
            "In {a}.",
        ),
        fact(
            "person",
            "{S} has a driver named {a}. / The driver is {a}.",
            "Who is the driver on {s}? / What is the name of the driver on {s}?",
            "The driver is {a}.",
        ),
        fact(
            "hour",
            "{S} starts at {a} in the morning. / The first train leaves at {a} in the morning.",
            "When does the first train leave on {s}? / At which hour does {s} start?",
            "At {a}.",
        ),
        fact(
            "flower",
            "{S} has stations with {a} on the walls. / On the station walls grow {a}.",
            "Which flowers are on the station walls of {s}? / What grows on the station walls of {s}?",
            "Lots of {a}.",
        ),
        fact(
            "goods",
            "{S} transports {a}. / At night the trains transport {a}.",
            "What does {s} transport? / Which goods does {s} transport?",
            "Tons of {a}.",
        ),
        fact(
            "river",
            "{S} crosses the {a}. / A high bridge crosses the {a}.",
            "Which river does {s} cross? / What does {s} cross?",
            "The {a}.",
        ),
    ),
    domain(
        "Books",
        "The {adjective} {thing}",
        "{S} is a book for long evenings. / Every library has a copy of {s}. / {S} is a book that many people love.",
        "The last chapter is a surprise. / Some readers know it by heart. / The pictures are in colour.",
        fact(
            "person",
            "{S} was written by {a}. / The author is {a}.",
            "Who wrote {s}? / Who is the author of {s}?",
            "The author is {a}.",
        ),
        fact(
            "year",
            "{S} appeared in {a}. / The book appeared in {a}.",
            "When did {s} appear? / In which year did {s} appear?",
            "In {a}.",
        ),
        fact(
            "topic",
            "{S} is about {a}. / The story is about {a}.",
            "What is {s} about? / What is the story of {s} about?",
            "About {a}.",
        ),
        fact(
            "town",
            "{S} was printed in {a}. / The book was printed in {a}.",
            "Where was {s} printed? / In which town was {s} printed?",
            "In {a}.",
        ),
        fact(
            "vehicle",
            "{S} ends with an escape by {a}. / In the end the thief escapes by {a}.",
            "By what does the thief escape in {s}? / With which vehicle does the thief escape in {s}?",
            "By {a}.",
        ),
        fact(
            "job",
            "{S} has a {a} as its hero. / The hero is a {a} who cannot sleep.",
            "Who is the hero of {s}? / What is the job of the hero of {s}?",
            "A {a}.",
        ),
        fact(
            "number",
            "{S} has {a} chapters. / There are {a} chapters.",
            "How many chapters does {s} have? / How many chapters are there in {s}?",
            "It has {a} chapters.",
        ),
    ),
    domain(
        "Bridges",
        "{name} Bridge",
        "{S} can be seen from far away. / Many stories are told about {s}. / {S} is a fine piece of work.",
        "At night it is lit by lamps. / Fishermen stand on it in the evening. / It has survived three floods.",
        fact(
            "person",
            "{S} was designed by {a}. / It was designed by {a}.",
            "Who designed {s}? / By whom was {s} designed?",
            "It was {a}.",
        ),
        fact(
            "material",
            "{S} is built of {a}. / It is built of {a}.",
            "What is {s} built of? / Which material is {s} built of?",
            "Built of {a}.",
        ),
        fact(
            "year",
            "{S} was finished in {a}. / It was finished in {a}.",
            "When was {s} finished? / In which year was {s} finished?",
            "In {a}.",
        ),
        fact(
            "river",
            "{S} spans the river {a}. / It spans the river {a}.",
            "Which river does {s} span? / What does {s} span?",
            "The river {a}.",
        ),
        fact(
            "number",
            "{S} has {a} arches. / It stands on {a} arches.",
            "How many arches does {s} have? / On how many arches does {s} stand?",
            "It is {a} arches.",
        ),
        fact(
            "flower",
            "{S} is covered with {a} in summer. / In summer it is covered with {a}.",
            "Which flowers cover {s} in summer? / What is {s} covered with in summer?",
            "With {a}.",
        ),
        fact(
            "animal",
            "{S} is guarded by a stone {a}. / A stone {a} guards it.",
            "Which stone animal guards {s}? / What guards {s}?",
            "A stone {a}.",
        ),
    ),
    domain(
        "Clubs",
        "the {animal_cap} club",
        "{S} welcomes new members. / Nobody is too old for {s}. / There is much laughter at {s}.",
        "Tea is served afterwards. / Guests may watch for free. / There is a small prize at the end of the year.",
        fact(
            "day",
            "{S} meets every {a}. / The members meet every {a}.",
            "When does {s} meet? / On which day does {s} meet?",
            "Every {a}.",
        ),
        fact(
            "workplace",
            "{S} gathers at the {a}. / They gather at the {a}.",
            "Where does {s} gather? / In what place does {s} gather?",
            "At the {a}.",
        ),
        fact(
            "person",
            "{S} is led by {a}. / The leader is {a}.",
            "Who is the leader of {s}? / Who leads {s}?",
            "The leader is {a}.",
        ),
        fact(
            "activity",
            "{S} is devoted to {a}. / All of them enjoy {a}.",
            "What do the members of {s} enjoy? / What is {s} devoted to?",
            "They enjoy {a}.",
        ),
        fact(
            "number",
            "{S} has {a} members. / There are {a} members.",
            "How many members does {s} have? / How many members are there in {s}?",
            "It has {a} members.",
        ),
        fact(
            "year",
            "{S} was formed in {a}. / The club was formed in {a}.",
            "When was {s} formed? / In which year was {s} formed?",
            "In {a}.",
        ),
        fact(
            "instrument",
            "{S} ends each evening with a {a} tune. / Each evening ends with a {a} tune.",
            "Which instrument ends each evening at {s}? / With what tune does each evening end at {s}?",
            "With a {a} tune.",
        ),
    ),
    domain(
        "Expeditions",
        "the {name} expedition",
        "{S} was in all the newspapers. / Few journeys were as bold as {s}. / {S} began with a small plan.",
        "The journey was hard and cold. / Everybody came home safely. / A film was made about it.",
        fact(
            "person",
            "{S} was guided by {a}. / The guide was {a}.",
            "Who was the guide of {s}? / Who guided {s}?",
            "The guide was {a}.",
        ),
        fact(
            "far",
            "{S} travelled to {a}. / The team travelled to {a}.",
            "Where did {s} travel? / To which country did {s} travel?",
            "To {a}.",
        ),
        fact(
            "fear",
            "{S} had trouble with {a}. / The team had trouble with {a}.",
            "What did {s} have trouble with? / With what did {s} have trouble?",
            "Only with {a}.",
        ),
        fact(
            "month",
            "{S} set out in {a}. / The team set out in {a}.",
            "In which month did {s} set out? / When did {s} set out?",
            "In {a}.",
        ),
        fact(
            "vehicle",
            "{S} moved by {a}. / The explorers moved by {a}.",
            "By what did {s} move? / With which vehicle did {s} move?",
            "By {a}.",
        ),
        fact(
            "things",
            "{S} brought back {a}. / The explorers brought back {a}.",
            "What did {s} bring back? / Which things did {s} bring back?",
            "Boxes of {a}.",
        ),
        fact(
            "food",
            "{S} lived on {a}. / For weeks they lived on {a}.",
            "What did {s} live on? / On which food did {s} live?",
            "On {a}.",
        ),
    ),
    domain(
        "Dishes",
        "{town} stew",
        "{S} is an old dish. / Grandmothers still cook {s}. / {S} tastes best in winter.",
        "The pot should never boil over. / Every family has its own secret. / It is eaten with a wooden spoon.",
        fact(
            "crop",
            "{S} is made with {a}. / It is made with {a}.",
            "What is {s} made with? / Which vegetable or grain is {s} made with?",
            "With {a}.",
        ),
        fact(
            "spice",
            "{S} is seasoned with {a}. / It is seasoned with a little {a}.",
            "What is {s} seasoned with? / Which spice is in {s}?",
            "With {a}.",
        ),
        fact(
            "person",
            "{S} was invented by {a}. / The cook who invented it was {a}.",
            "Who invented {s}? / Which cook invented {s}?",
            "It was {a}.",
        ),
        fact(
            "food",
            "{S} is served with {a}. / It is served with {a}.",
            "What is {s} served with? / With which food is {s} served?",
            "With {a}.",
        ),
        fact(
            "number",
            "{S} cooks for {a} minutes. / It cooks for {a} minutes.",
            "How many minutes does {s} cook? / For how many minutes does {s} cook?",
            "For {a} minutes.",
        ),
        fact(
            "day",
            "{S} is eaten on {a}. / Most people eat it on {a}.",
            "On which day is {s} eaten? / When is {s} eaten?",
            "On {a}.",
        ),
        fact(
            "material",
            "{S} needs a pot of {a}. / The pot must be of {a}.",
            "What must the pot for {s} be made of? / Which pot does {s} need?",
            "A pot of {a}.",
        ),
    ),
    domain(
        "Observatories",
        "the {name} observatory",
        "{S} stands on a lonely peak. / On clear nights {s} is busy. / {S} is visited by many schools.",
        "The nights there are very cold. / Coffee is always ready. / The dome turns without a sound.",
        fact(
            "person",
            "{S} is directed by {a}. / The director is {a}.",
            "Who is the director of {s}? / Who directs {s}?",
            "The director is {a}.",
        ),
        fact(
            "year",
            "{S} was completed in {a}. / It was completed in {a}.",
            "When was {s} completed? / In which year was {s} completed?",
            "In {a}.",
        ),
        fact(
            "material",
            "{S} has a dome of {a}. / The dome is of {a}.",
            "What is the dome of {s} made of? / Which material is the dome of {s} made of?",
            "Made of {a}.",
        ),
        fact(
            "far",
            "{S} got its telescope from {a}. / The telescope comes from {a}.",
            "Where does the telescope of {s} come from? / From which country is the telescope of {s}?",
            "From {a}.",
        ),
        fact(
            "month",
            "{S} is closed in {a}. / In {a} the house is closed.",
            "In which month is {s} closed? / When is {s} closed?",
            "In {a}.",
        ),
        fact(
            "animal",
            "{S} named a comet after a {a}. / A comet was named after a {a}.",
            "After which animal was the comet of {s} named? / What did {s} name a comet after?",
            "After a {a}.",
        ),
        fact(
            "things",
            "{S} has a collection of {a}. / Downstairs is a collection of {a}.",
            "What does the collection of {s} contain? / Which things are in the collection of {s}?",
            "It contains {a}.",
        ),
    ),
    domain(
        "Schools",
        "{name} School",
        "{S} has a good name. / The bell of {s} rings twice a day. / Parents are pleased with {s}.",
        "There is a race in the last week of term. / The windows look out on the fields. / Nobody is ever bored.",
        fact(
            "person",
            "{S} has a head teacher named {a}. / The head teacher is {a}.",
            "Who is the head teacher of {s}? / What is the name of the head teacher of {s}?",
            "The head teacher is {a}.",
        ),
        fact(
            "subject",
            "{S} is best in {a}. / The pupils are best in {a}.",
            "In which subject is {s} best? / What is {s} best in?",
            "In {a}.",
        ),
        fact(
            "instrument",
            "{S} has a {a} in every room. / There is a {a} in every room.",
            "Which instrument is in every room of {s}? / What is in every room of {s}?",
            "A {a}.",
        ),
        fact(
            "animal",
            "{S} has a {a} on its badge. / The badge shows a {a}.",
            "Which animal is on the badge of {s}? / What does the badge of {s} show?",
            "A {a}.",
        ),
        fact(
            "town",
            "{S} is in {a}. / The school building is in {a}.",
            "In which town is {s}? / Where is {s}?",
            "In {a}.",
        ),
        fact(
            "food",
            "{S} serves {a} for lunch. / Lunch is mostly {a}.",
            "What does {s} serve for lunch? / What is there for lunch at {s}?",
            "Mostly {a}.",
        ),
        fact(
            "activity",
            "{S} teaches {a} after class. / After class the pupils learn {a}.",
            "What do pupils learn after class at {s}? / What does {s} teach after class?",
            "They learn {a}.",
        ),
    ),
    domain(
        "Farms",
        "{name} Farm",
        "{S} lies at the end of the road. / Walkers often rest at {s}. / {S} has been there for a long time.",
        "The gate should be kept shut. / Eggs can be bought at the window. / The mud is deep in spring.",
        fact(
            "person",
            "{S} is run by {a}. / The farmer is {a}.",
            "Who is the farmer at {s}? / Who runs {s}?",
            "The farmer is {a}.",
        ),
        fact(
            "crop",
            "{S} grows {a}. / The fields are used to grow {a}.",
            "What does {s} grow? / Which crop does {s} grow?",
            "Fields of {a}.",
        ),
        fact(
            "pet_name",
            "{S} has a dog called {a}. / The dog is called {a}.",
            "What is the dog of {s} called? / What is the name of the dog at {s}?",
            "The dog is {a}.",
        ),
        fact(
            "number",
            "{S} keeps {a} sheep. / There are {a} sheep.",
            "How many sheep does {s} keep? / How many sheep are there at {s}?",
            "There are {a} sheep.",
        ),
        fact(
            "colour",
            "{S} has a {a} tractor. / The tractor is {a}.",
            "What colour is the tractor of {s}? / Which colour has the tractor of {s}?",
            "It is {a}.",
        ),
        fact(
            "day",
            "{S} sells milk every {a}. / Milk is sold every {a}.",
            "On which day does {s} sell milk? / When does {s} sell milk?",
            "Every {a}.",
        ),
        fact(
            "tree",
            "{S} stands under a great {a}. / A great {a} shades the house.",
            "Which tree shades {s}? / Under which tree does {s} stand?",
            "A great {a}.",
        ),
    ),
)

# --------------------------------------------------------------------------------------------------- generation


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
        print(f"{', '.join(different)}: not what scripts/make_sample.py makes; run it without --check", file=sys.stderr)
    elif options.check:
        print("the sample is what scripts/make_sample.py makes")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
