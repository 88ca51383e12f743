"""Whether two things that math-verify read are the same, by quicker or better means than its own.

Loaded with _math_judge.py, beside it. Each test may raise whatever sympy's parts do on what they were not made for.
"""

from __future__ import annotations

from typing import Any

from latex2sympy2_extended.logic import And
from sympy import Expr, Interval, MatrixBase, Poly, Rational, Symbol
from sympy import FiniteSet as SympyFiniteSet
from sympy import Union as SympyUnion
from sympy.core.relational import Relational

EVALUATED = 30  # digits to which values are compared with decimals and with each other
_APART = Rational(1, 10**5)  # of the larger value: more than math-verify's rounding to 6 places explains
_TURNED = {"==": "==", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def differ(a: Any, b: Any) -> bool:
    """Say whether two formulas have other values where their variables are numbers of our choice.

    math-verify simplifies the difference instead, which takes long and ends the same way.
    """
    if not _is_formula(a) or not _is_formula(b):
        return False
    names = sorted({symbol.name for part in (a, b) for symbol in part.free_symbols})
    points = {name: Rational(2 * i + 13, 11) for i, name in enumerate(names)}
    first, second = (
        part.subs({symbol: points[symbol.name] for symbol in part.free_symbols}).evalf(EVALUATED) for part in (a, b)
    )
    if not all(value.is_number and value.is_finite and value.is_comparable for value in (first, second)):
        return False
    return bool(abs(first - second) > max(abs(first), abs(second)) * _APART)


def expands_to_zero(a: Any, b: Any) -> bool:
    """Say whether two formulas are the same once multiplied out; simplification, which takes longer, may say so too."""
    return _is_formula(a) and _is_formula(b) and (a - b).expand() == 0


def same_line(a: Any, b: Any) -> bool | None:
    """Say whether two linear equations or inequalities with rational numbers are one; None if one is none.

    math-verify solves them.
    """
    if not isinstance(a, Relational) or not isinstance(b, Relational):
        return None
    first, second = _line(a), _line(b)
    return None if first is None or second is None else first == second


def _line(relation: Relational) -> tuple[str, dict[Any, Any]] | None:
    """Return the sign and the coefficients on the left of 0, that of the first variable made 1."""
    if relation.rel_op not in _TURNED:
        return None
    names = sorted(relation.free_symbols, key=str)
    poly = Poly(relation.lhs - relation.rhs, *names) if names else None
    if poly is None or poly.total_degree() != 1 or not all(value.is_Rational for value in poly.coeffs()):
        return None
    terms = {tuple(zip(map(str, names), powers, strict=True)): value for powers, value in poly.terms()}
    leading = next(poly.coeff_monomial(name) for name in names if poly.coeff_monomial(name) != 0)
    sign = relation.rel_op if leading > 0 else _TURNED[relation.rel_op]
    return sign, {term: value / leading for term, value in terms.items()}


def _is_formula(part: Any) -> bool:
    return isinstance(part, Expr) and not isinstance(part, MatrixBase | Symbol) and part.is_commutative is not False


def same_set(a: Any, b: Any) -> bool:
    """Say whether two chains of inequalities in one variable, or several that `or` joins, have the same solutions.

    One may be an interval or a union of them.
    """
    if not (_is_chain(a) or _is_chain(b)) or len(a.free_symbols | b.free_symbols) != 1:
        return False
    first, second = _solutions(a), _solutions(b)
    return first is not None and second is not None and bool(first == second)


def _is_chain(part: Any) -> bool:
    if isinstance(part, SympyFiniteSet):
        return len(part.args) > 0 and all(map(_is_chain, part.args))
    return isinstance(part, And) or (isinstance(part, Relational) and part.rel_op in ("<", "<=", ">", ">="))


def _solutions(part: Any) -> Any:
    """Return the set of the reals that a part describes, None if it describes none."""
    if not _is_chain(part):
        return part if isinstance(part, Interval | SympyUnion) else None
    return SympyUnion(*map(_solutions, part.args)) if isinstance(part, SympyFiniteSet) else part.as_set()
