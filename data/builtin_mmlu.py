"""mini_mmlu: what the nano model learned in pretraining, as multiple choice.

Its subjects are the relations of the invented world and the four kinds of sums, 15 in all. An item is the front of a plain
sentence of the kind that pretraining told, and the options are ways to end it, 8 to 16 of them (with four the model
would hardly ever err). A model this small cannot bind an option to its letter, so the likelihood of the option's text decides. The
facts that pretraining does not tell are left out. Facts and sums of the built-in tasks occur here too, in other words: what
training on such a task adds or spoils shows in that subject.
"""

import hashlib
import json
from functools import cache
from random import Random

from data.benchmarks import Benchmark, Item
from data.builtin import fact_options
from data.builtin_problems import apply
from data.builtin_world import Fact, people_facts, science_facts

MINI_MMLU = "mini_mmlu"
SUMS_OF_A_KIND, OPTIONS = 50, 16
SUMS = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}


def mini_mmlu(max_items: int | None = None) -> Benchmark:
    """The benchmark, always the same; max_items: so many of it, drawn once for all."""
    items = _items()
    if max_items is not None and max_items < len(items):
        items = [items[i] for i in sorted(Random(f"{MINI_MMLU} some").sample(range(len(items)), max_items))]
    content = json.dumps([[item.subject, item.question, item.options, item.gold] for item in items])
    spec = {"mmlu": MINI_MMLU, "max_items": max_items}
    return Benchmark(MINI_MMLU, items, hashlib.sha256(content.encode()).hexdigest(), spec)


@cache
def _items() -> list[Item]:
    rng = Random(MINI_MMLU)
    facts = [fact for fact in (*people_facts(), *science_facts()) if fact.in_corpus]
    items = {item.question: item for item in (_fact_item(rng, fact) for fact in facts)}
    for number, sign in enumerate(SUMS, 1):
        while len(items) < len(facts) + number * SUMS_OF_A_KIND:  # no sum twice: items are to be independent
            item = _sum_item(rng, sign)
            items.setdefault(item.question, item)
    return list(items.values())


def _fact_item(rng: Random, fact: Fact) -> Item:
    """ "A kormar eats", of all foods: the canonical statement up to its value."""
    front, _, _ = fact.relation.statements[0].format(s=fact.subject, v="|").partition(" |")
    options = fact_options(rng, fact, min(OPTIONS, len(fact.relation.values)))
    return Item(fact.relation.name, front, tuple(f" {value}" for value in options), options.index(fact.value))


def _sum_item(rng: Random, sign: str) -> Item:
    """ "17 + 5 =" of the right result and others near it."""
    result = None
    while result is None:
        x, y = rng.randint(2, 50), rng.randint(2, 9 if sign in "*/" else 30)
        x = rng.randint(2, 9) if sign == "*" else x
        result = apply(x, sign, y)
    others = [n for n in range(max(1, result - 10), result + 11) if n != result]
    options = [result, *rng.sample(others, min(OPTIONS - 1, len(others)))]
    rng.shuffle(options)
    return Item(SUMS[sign], f"{x} {sign} {y} =", tuple(f" {n}" for n in options), options.index(result))
