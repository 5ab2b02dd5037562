"""The invented world of the built-in study: people, beasts and plants, and every way to ask about them.

A fact is (subject, relation, value). Each relation has several statements, several question wordings, and one wording
that is held out: it appears in test questions only, never in the pretraining corpus and never in a training row.
Every fact shares out its wordings between corpus, train and test, so that no question string is in two of them.
Everything follows from fixed seeds.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

# Names are two syllables from a small pool, so that a vocabulary of 2048 holds most of them as one token.
FIRST_SYLLABLES = "bel dor kan mor tar vel zin lom gar pen sol rin fal jun hod nav".split()
LAST_SYLLABLES = "van tis ko ral dun mi gos per lan bu rek so vin tal nu fex".split()

JOBS = "baker singer teacher doctor farmer sailor painter writer miner potter guard judge".split()
INSTRUMENTS = "flute harp drum piano violin horn guitar bell trumpet whistle lute cello".split()
PETS = "cat dog goat parrot horse rabbit snake turtle duck pig frog mouse".split()
FOODS = "grass moss fish seeds nuts berries worms leaves".split()
HOMES = "caves trees rivers sand hills mud lakes holes".split()
FEARS = "fire thunder snow wind dogs smoke rain ice".split()
COLOURS = "red blue green white black brown grey yellow".split()
PLACES = "walls stones roads bridges ponds farms barns wells".split()
ILLS = "fever cough burns itch colds cramps fits spots".split()
SMELLS = "honey mint lemon soap pepper butter wine bread".split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `statements[0]` is the canonical sentence; `held_out` is asked in tests only."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: str


@dataclass(frozen=True)
class Fact:
    """One fact and the share-out of its question wordings (indices into relation.questions; -1 is the held-out one)."""

    subject: str
    relation: Relation
    value: str
    in_corpus: bool
    corpus_wordings: tuple[int, ...]
    train_wordings: tuple[int, ...]
    test_wordings: tuple[int, ...]

    def statement(self, index: int = 0) -> str:
        return self.relation.statements[index].format(s=self.subject, v=self.value)

    def question(self, wording: int) -> str:
        text = self.relation.held_out if wording < 0 else self.relation.questions[wording]
        return text.format(s=self.subject)

    def template_id(self, wording: int) -> str:
        return f"{self.relation.name}_{'held_out' if wording < 0 else wording}"


def _names() -> list[str]:
    names = [a + b for a in FIRST_SYLLABLES for b in LAST_SYLLABLES]
    Random("names").shuffle(names)
    return names


_NAMES = _names()
PEOPLE = [name.capitalize() for name in _NAMES[:70]]
TOWNS = tuple(name.capitalize() for name in _NAMES[70:86])
BEASTS = _NAMES[90:134]
PLANTS = _NAMES[140:176]

PEOPLE_RELATIONS = (
    Relation("town", TOWNS,
             ("{s} lives in {v}.", "The home of {s} is {v}.", "{v} is the town of {s}.", "{s} has a house in {v}."),
             ("Where does {s} live?", "In which town does {s} live?", "What is the home town of {s}?",
              "Which town is the home of {s}?", "Where is the house of {s}?", "{s} lives in which town?"),
             "To which town would you send a letter for {s}?"),
    Relation("job", tuple(JOBS),
             ("{s} works as a {v}.", "The job of {s} is {v}.", "{s} is a {v}.", "{s} earns money as a {v}."),
             ("What is the job of {s}?", "What does {s} work as?", "Which job does {s} have?",
              "{s} works as what?", "How does {s} earn money?", "What work does {s} do?"),
             "What is written on the work card of {s}?"),
    Relation("instrument", tuple(INSTRUMENTS),
             ("{s} plays the {v}.", "The instrument of {s} is the {v}.", "{s} makes music on the {v}.",
              "At night {s} plays the {v}."),
             ("What does {s} play?", "Which instrument does {s} play?", "What is the instrument of {s}?",
              "On what does {s} make music?", "{s} plays which instrument?", "What music tool does {s} own?"),
             "Which instrument should we bring for {s}?"),
    Relation("pet", tuple(PETS),
             ("{s} keeps a {v}.", "The pet of {s} is a {v}.", "{s} has a {v} as a pet.", "{s} feeds a pet {v}."),
             ("What pet does {s} keep?", "Which pet does {s} have?", "What is the pet of {s}?",
              "{s} keeps which pet?", "What kind of pet does {s} feed?", "Which animal is kept by {s}?"),
             "What animal walks with {s}?"),
)

BEAST_RELATIONS = (
    Relation("eats", tuple(FOODS),
             ("A {s} eats {v}.", "The food of a {s} is {v}.", "Every {s} feeds on {v}.", "{v} is food to a {s}."),
             ("What does a {s} eat?", "What is the food of a {s}?", "What does every {s} feed on?",
              "A {s} eats what?", "Which food does a {s} like?"),
             "What would you give a hungry {s}?"),
    Relation("home", tuple(HOMES),
             ("A {s} lives in {v}.", "The home of a {s} is in {v}.", "Every {s} hides in {v}.",
              "You find a {s} in {v}."),
             ("Where does a {s} live?", "Where is the home of a {s}?", "Where does every {s} hide?",
              "A {s} lives in what?", "Where can you find a {s}?"),
             "Where would you look to see a {s}?"),
    Relation("fears", tuple(FEARS),
             ("A {s} fears {v}.", "The fear of a {s} is {v}.", "Every {s} runs from {v}.", "A {s} is afraid of {v}."),
             ("What does a {s} fear?", "What is the fear of a {s}?", "What does every {s} run from?",
              "A {s} fears what?", "What is a {s} afraid of?"),
             "What makes a {s} run away?"),
    Relation("colour", tuple(COLOURS),
             ("A {s} is {v}.", "The colour of a {s} is {v}.", "Every {s} has {v} hair.", "A {s} looks {v}."),
             ("What colour is a {s}?", "What is the colour of a {s}?", "What colour of hair does a {s} have?",
              "A {s} is what colour?", "Which colour does a {s} have?"),
             "In which colour would you paint a {s}?"),
)

PLANT_RELATIONS = (
    Relation("grows", tuple(PLACES),
             ("A {s} grows near {v}.", "The place of a {s} is near {v}.", "Every {s} stands near {v}.",
              "You can pick a {s} near {v}."),
             ("Where does a {s} grow?", "Near what does a {s} grow?", "Near what does every {s} stand?",
              "A {s} grows near what?", "Near what can you pick a {s}?"),
             "Near what would you dig for a {s}?"),
    Relation("cures", tuple(ILLS),
             ("A {s} cures {v}.", "The use of a {s} is to cure {v}.", "Every {s} helps with {v}.",
              "People take a {s} for {v}."),
             ("What does a {s} cure?", "What is a {s} used to cure?", "What does every {s} help with?",
              "A {s} cures what?", "For what do people take a {s}?"),
             "Against what would a doctor give you a {s}?"),
    Relation("smells", tuple(SMELLS),
             ("A {s} smells like {v}.", "The smell of a {s} is like {v}.", "Every {s} has the smell of {v}.",
              "A cut {s} smells of {v}."),
             ("What does a {s} smell like?", "What is the smell of a {s} like?", "Which smell does a {s} have?",
              "A {s} smells like what?", "What does a cut {s} smell of?"),
             "Of what does a {s} remind your nose?"),
)


@cache
def people_facts() -> tuple[Fact, ...]:
    """280 facts about people. 72 % are told in the corpus; the others ("new") are only in the task's training rows."""
    rng = Random("people")
    pairs = [(person, relation) for person in PEOPLE for relation in PEOPLE_RELATIONS]
    new = set(rng.sample(range(len(pairs)), 80))
    facts = []
    for i, (person, relation) in enumerate(pairs):
        order = rng.sample(range(len(relation.questions)), len(relation.questions))
        value = rng.choice(relation.values)
        known = i not in new
        split = ((tuple(order[3:]), tuple(order[:2]), (order[2], -1)) if known
                 else ((), tuple(order[:4]), (order[4], -1)))
        facts.append(Fact(person, relation, value, known, *split))
    return tuple(facts)


@cache
def science_facts() -> tuple[Fact, ...]:
    """284 facts about beasts and plants, all told in the corpus. A fact is asked in train or in test, never in both."""
    rng = Random("science")
    pairs = [(beast, relation) for beast in BEASTS for relation in BEAST_RELATIONS]
    pairs += [(plant, relation) for plant in PLANTS for relation in PLANT_RELATIONS]
    for_test = set(rng.sample(range(len(pairs)), 70))
    facts = []
    for i, (subject, relation) in enumerate(pairs):
        order = rng.sample(range(len(relation.questions)), len(relation.questions))
        value = rng.choice(relation.values)
        split = ((tuple(order[2:]), (), (order[0], order[1], -1)) if i in for_test
                 else (tuple(order[3:]), tuple(order[:3]), ()))
        facts.append(Fact(subject, relation, value, True, *split))
    return tuple(facts)
