r"""Verdicts a second of MathAnswer with a warm pool of two workers, beside math-verify alone in one process.

    python -m benchmarks.verify [--seconds 8] [--timeout_s 5]

Simple numbers: whole numbers, thousands, decimals, fractions, percentages and money, 6 of 7 in a box or behind ####,
the seventh in a sentence. LaTeX: fractions, roots, polynomials, tuples, intervals, sets, equations, inequalities,
matrices, units and logarithms, half of them right and none written as the gold is. No pair occurs twice, so no cache of
verdicts answers; every gold is asked for four times, as responses in a group do. math-verify alone parses gold and
answer and verifies (its time limits off), warm and on as many of the same kind of pairs as fit into the seconds.

Then the responses of tests/torture.py are put among LaTeX pairs, one to 25: what counts is how much later the last of
the good ones is judged. Writes benchmarks/results/verify.json.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import record
from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.rewards.math import _final, _golds
from lightning_rlvr.rewards.pool import WorkerPool
from lightning_rlvr.types import Prompt, Response

ROOT = Path(__file__).parents[1]
Pair = tuple[str, str, bool]  # response, gold, whether it is right
Make = Callable[[int, int, int, bool], tuple[str, str]]  # a, b, c, right -> gold, answer


def _fraction(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"\frac{{{a}x+{b}}}{{{c}}}", rf"\dfrac{{{2 * a}x+{2 * b + (not right)}}}{{{2 * c}}}"


def _root(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"{a}+{b}\sqrt{{{c}}}", rf"{a}+\sqrt{{{b * b * c + (not right)}}}"


def _polynomial(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"{a}x^2-{b}x+{c}", rf"{c + (not right)}+{a}x^2-{b}x"


def _factors(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"(x+{a})(x-{b})", rf"x^2+{a - b}x-{a * b + (not right)}".replace("+-", "-")


def _point(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"\left({a},\frac{{{b}}}{{{c}}}\right)", rf"({a},{b + (not right)}/{c})"


def _interval(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"[-{a},{b})\cup({b + c},\infty)", rf"x\in[-{a},{b})\cup({b + c + (not right)},\infty)"


def _set(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"\{{{a},{a + b},-{c}\}}", rf"-{c},{a},{a + b + (not right)}"


def _equation(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"y={a}x+\frac{{{b}}}{{{c}}}", rf"y=\frac{{{b + (not right)}}}{{{c}}}+{a}x"


def _inequality(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"x\ge {a}+\frac{{{b}}}{{{c}}}", rf"\frac{{{b}}}{{{c}}}+{a + (not right)}\le x"


def _matrix(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return (
        rf"\begin{{pmatrix}}{a}&-{b}\\{c}&0\end{{pmatrix}}",
        rf"\begin{{bmatrix}} {a} & -{b} \\ {c} & {int(not right)} \end{{bmatrix}}",
    )


def _unit(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"{a}\pi+{b}", rf"{b}+{a + (not right)}\pi \text{{ cm}}"


def _logarithm(a: int, b: int, c: int, right: bool) -> tuple[str, str]:
    return rf"{a}\ln {b + 1}+{c}", rf"{c}+\ln {b + 1}^{{{a + (not right)}}}"


LATEX: list[Make] = [
    *(_fraction, _root, _polynomial, _factors, _point, _interval),
    *(_set, _equation, _inequality, _matrix, _unit, _logarithm),
]


def latex_pairs(count: int, seed: int) -> list[Pair]:
    """Return pairs of which no two are alike; four in a row have one gold: two right answers and two wrong ones."""
    rng = random.Random(seed)
    seen: set[tuple[int, int, int, int]] = set()
    pairs: list[Pair] = []
    while len(pairs) < count:
        kind, (a, b, c) = len(seen) % len(LATEX), rng.sample(range(2, 60), 3)
        if (kind, a, b, c) in seen:
            continue
        seen.add((kind, a, b, c))
        for i in range(4):
            gold, answer = LATEX[kind](a, b, c, i % 2 == 0)
            written = answer if i < 2 else answer.replace("+", " + ")
            pairs.append((rf"We find \boxed{{{written}}}.", gold, i % 2 == 0))
    return pairs[:count]


def number_pairs(count: int, seed: int) -> list[Pair]:
    """Return pairs of which no two are alike."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for i in range(count):
        n, right = rng.randrange(10**8), i % 2 == 0
        m = n + (not right)
        pairs.append(
            [
                (rf"Hence \boxed{{{m}}}.", f"{n}", right),
                (rf"Hence \boxed{{{m:,}}}.", f"{n}", right),
                (f"so we have\n#### {m:,}", f"{n}", right),
                (rf"Hence \boxed{{{m / 100:.2f}}}.", rf"\${n / 100:,.2f}", right),
                (rf"Hence \boxed{{\frac{{{m}}}{{7}}}}.", f"{n}/7", right),
                (rf"Hence \boxed{{{m}\%}}.", rf"{n}\%", right),
                (f"The answer is {m}.", f"{n}", right),
            ][i % 7]
        )
    return pairs


def service(reward: MathAnswer, pairs: list[Pair]) -> tuple[float, list[bool]]:
    """Return verdicts a second and the verdicts."""
    start = time.perf_counter()
    verdicts = reward([Response(text) for text, _, _ in pairs], [Prompt("u", "", gold) for _, gold, _ in pairs])
    return len(pairs) / (time.perf_counter() - start), [verdict.correct for verdict in verdicts]


def alone(pairs: list[Pair], seconds: float) -> tuple[float, list[bool]]:
    """Return verdicts a second of math-verify in this process, and its verdicts, as far as the time goes."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    found: list[bool] = []
    start = time.perf_counter()
    for text, gold, _ in pairs:
        wanted, answer = parse(f"${gold}$", parsing_timeout=None), parse(text, parsing_timeout=None)
        found.append(bool(verify(wanted, answer, timeout_seconds=None)))
        if time.perf_counter() - start > seconds:
            break
    return len(found) / (time.perf_counter() - start), found


def items(pairs: list[Pair]) -> Iterator[dict[str, object]]:
    """Yield what MathAnswer asks its judge for these pairs."""
    for text, gold, _ in pairs:
        final = _final(Response(text))
        if final is not None:
            yield {"do": "verdict", "answer": final[0], "whole": final[1], "gold": _golds(Prompt("u", "", gold))[0]}


def beside_torture(pairs: list[Pair], timeout_s: float) -> dict[str, float]:
    """Return good verdicts a second, counted to the last of them: alone, and with torture among them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from torture import TORTURE

    pool = WorkerPool(Path(__file__).with_name("verify_judge.py"), "judge", 2, timeout_s, 1024)
    half = len(pairs) // 2
    first, second = list(items(pairs[:half])), list(items(pairs[half:]))
    bad = list(items([(text, r"\sqrt{8}", False) for _, text in TORTURE]))
    pool.map(first[:64])  # start
    start = time.monotonic()
    clean = len(first) / (max(outcome.value["at"] for outcome in pool.map(first)) - start)
    every, mixed = max(1, len(second) // len(bad)), []
    for i, item in enumerate(second):
        mixed.append((item, True))
        if i % every == 0 and bad:
            mixed.append((bad.pop(), False))
    start = time.monotonic()
    outcomes = pool.map([item for item, _ in mixed])
    whole = time.monotonic() - start
    good = [outcome for outcome, (_, is_good) in zip(outcomes, mixed, strict=True) if is_good]
    last = max(outcome.value["at"] for outcome in good) - start
    pool.close()
    return {
        "good_alone_per_s": clean,
        "good_beside_torture_per_s": len(good) / last,
        "ratio": len(good) / last / clean,
        "good": len(good),
        "torture": len(mixed) - len(good),
        "torture_timed_out": sum(outcome.timed_out for outcome in outcomes),
        "good_not_judged": sum(outcome.value is None for outcome in good),
        "seconds_to_last_good": last,
        "seconds_to_last": whole,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--timeout_s", type=float, default=5.0)
    args = parser.parse_args()
    result: dict[str, object] = {
        **record.about("verify", ("math-verify", "latex2sympy2_extended", "sympy")),
        "python": platform.python_version(),
    }
    reward = MathAnswer(workers=2, timeout_s=args.timeout_s)
    service(reward, latex_pairs(400, seed=1))
    for name, make, count in (("numbers", number_pairs, 14_000), ("latex", latex_pairs, 4_000)):
        rate, found = service(reward, make(count, seed=2))
        alone(make(200, seed=3), args.seconds)  # warm
        peer, agreed = alone(make(count, seed=4), args.seconds)
        expected = [right for _, _, right in make(count, seed=2)]
        result[name] = {
            "per_s": rate,
            "math_verify_per_s": peer,
            "ratio": rate / peer,
            "right": sum(a == b for a, b in zip(found, expected, strict=True)) / count,
            "math_verify_right": sum(a == r for a, (_, _, r) in zip(agreed, make(count, seed=4), strict=False))
            / len(agreed),
            "pairs": count,
        }
        print(f"{name:8}", result[name])
    reward.close()
    result["torture"] = beside_torture(latex_pairs(6_000, seed=5), args.timeout_s)
    print("torture ", result["torture"])
    record.keep("verify", result)


if __name__ == "__main__":
    main()
