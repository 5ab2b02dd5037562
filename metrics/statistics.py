"""How sure a score is: intervals and paired tests.  Everything is 95 % and two-sided."""

import math
from collections.abc import Sequence

import numpy

Z = 1.959963984540054  # normal quantile at 0.975
# Student's t quantile at 0.975 for 1 .. 30 degrees of freedom
T_975 = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
    2.2010,
    2.1788,
    2.1604,
    2.1448,
    2.1314,
    2.1199,
    2.1098,
    2.1009,
    2.0930,
    2.0860,
    2.0796,
    2.0739,
    2.0687,
    2.0639,
    2.0595,
    2.0555,
    2.0518,
    2.0484,
    2.0452,
    2.0423,
)


def t_quantile(freedom: int) -> float:
    """t at 0.975; beyond the table two terms of the expansion around the normal quantile (error below 2e-4)."""
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {freedom}")
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """(low, high) of a share: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n); n = 0 gives (0, 1).

    Wilson, JASA 1927.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no share")
    if n == 0:
        return 0.0, 1.0
    share, scale = successes / n, 1 + Z * Z / n
    middle = (share + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / scale
    return (0.0 if successes == 0 else max(0.0, middle - half)), (1.0 if successes == n else min(1.0, middle + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) = mean ± z s/√n for many values (NLL, ROUGE-L); n = 1 has no width, n = 0 is NaN."""
    array = numpy.asarray(values, dtype=numpy.float64)
    if array.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(array.mean())
    half = Z * float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else 0.0
    return mean, mean - half, mean + half


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over few seeds: mean ± t s/√n (Student); one seed has no interval: (mean, NaN, NaN)."""
    array = numpy.asarray(values, dtype=numpy.float64)
    if array.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(array.mean())
    if array.size == 1:
        return mean, math.nan, math.nan
    half = t_quantile(array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return mean, mean - half, mean + half


def mcnemar(only_first: int, only_second: int) -> float:
    """p of the exact McNemar test, min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c))); b, c: items one side got right."""
    if only_first < 0 or only_second < 0:
        raise ValueError("counts cannot be negative")
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, rounds: int = 10_000) -> dict[str, float]:
    """mean(b - a) over the same items: {"difference", "low", "high", "p"} by resampling items (Koehn, EMNLP 2004).

    p: twice the share of resamples on the far side of zero, never below 1/rounds.  Deterministic in `seed`.
    """
    difference = numpy.asarray(b, dtype=numpy.float64) - numpy.asarray(a, dtype=numpy.float64)
    if difference.ndim != 1 or difference.size == 0:
        raise ValueError("a and b must be two equally long, non-empty lists of scores")
    generator, means = numpy.random.default_rng(seed), []
    for start in range(0, rounds, 500):  # in blocks, so that memory stays at 500 x n
        picks = generator.integers(0, difference.size, (min(500, rounds - start), difference.size))
        means.append(difference[picks].mean(axis=1))
    means = numpy.concatenate(means)  # (rounds,)
    low, high = numpy.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return {
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, max(2 * tail, 1 / rounds))),
    }


def resampled_sums(values, seed: int = 0, rounds: int = 1000) -> numpy.ndarray:
    """(rounds, k): the sums over items of values (items, k), each round of as many items drawn with replacement.

    For scores of a whole corpus, which are no mean over items (BLEU, SARI as EASSE has it): what they are made of is summed.
    Deterministic in `seed`.
    """
    values = numpy.asarray(values, dtype=numpy.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must be (items, numbers) with at least one item, not of shape {values.shape}")
    generator, sums, even = numpy.random.default_rng(seed), [], numpy.full(len(values), 1 / len(values))
    for start in range(0, rounds, 100):  # in blocks, so that memory stays at 100 x n
        sums.append(generator.multinomial(len(values), even, size=min(100, rounds - start)) @ values)
    return numpy.concatenate(sums)


def sign_flip(differences: Sequence[int]) -> float:
    """p of the exact sign-flip test: the share of all sign patterns whose |sum| is at least the one seen.

    differences: one whole number an item, for example the seeds in which b had it right less those in which a had.  An item's
    seeds keep one sign together, so answers that go together are no independent evidence.  For one seed this is the exact
    McNemar test.  Raises ValueError for numbers that are not whole.
    """
    steps = numpy.asarray(differences, dtype=numpy.float64)
    if steps.ndim != 1 or (steps != numpy.rint(steps)).any():
        raise ValueError("the sign-flip test counts: differences must be one list of whole numbers")
    seen, sizes = abs(int(steps.sum())), numpy.abs(steps[steps != 0]).astype(int)
    reach = int(sizes.sum())
    share = numpy.zeros(2 * reach + 1)  # of patterns whose sum is index - reach
    share[reach] = 1.0
    for size in sizes:
        share = 0.5 * (numpy.roll(share, size) + numpy.roll(share, -size))  # the ends are still empty, so nothing wraps
    sums = numpy.abs(numpy.arange(-reach, reach + 1))
    return min(1.0, float(share[sums >= seen].sum()))


def compare_items(a: Sequence, b: Sequence, seed: int = 0) -> dict:
    """mean(b - a) over the same items of every seed: a, b (seeds, items), or (items,) of one.

    {"difference", "low", "high", "p_bootstrap", "p", "only_a", "only_b", "by_seed", "seed_low", "seed_high"}.  low, high: the
    bootstrap interval over items.  An item is one cluster: its scores of all seeds are averaged before items are
    resampled, since seeds share the items.  That interval holds for these trained models; how far other seeds would be
    apart is told by seed_low and seed_high (Student's over the seeds' differences, NaN for one seed).  p: the exact
    sign-flip test by item (one seed: McNemar), NaN where scores are not whole; only_a, only_b: scores one side had alone.
    Where all items changed alike (none did, say) resampling sees no spread: low, high are then as far off as Wilson's upper
    bound on the share of items that might be otherwise.
    """
    first, second = (numpy.atleast_2d(numpy.asarray(x, dtype=numpy.float64)) for x in (a, b))
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"a and b must be scores of the same seeds and items, not of shapes {first.shape} and {second.shape}")
    change = second - first  # (seeds, items)
    found = paired_bootstrap(first.mean(axis=0), second.mean(axis=0), seed)
    _, seed_low, seed_high = seed_interval(change.mean(axis=1))
    whole = bool((change == numpy.rint(change)).all())
    if whole and numpy.ptp(change.mean(axis=0)) == 0:
        other = wilson_interval(0, change.shape[1])[1]
        found |= {"low": max(-1.0, found["difference"] - other), "high": min(1.0, found["difference"] + other)}
    return {
        "difference": found["difference"],
        "low": found["low"],
        "high": found["high"],
        "p_bootstrap": found["p"],
        "p": sign_flip(change.sum(axis=0)) if whole else math.nan,
        "only_a": int((change < 0).sum()),
        "only_b": int((change > 0).sum()),
        "by_seed": [float(x) for x in change.mean(axis=1)],
        "seed_low": seed_low,
        "seed_high": seed_high,
    }
