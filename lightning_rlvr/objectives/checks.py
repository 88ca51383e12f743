"""Checks of settings: the constraint, the value, what it means, the key to change."""

from __future__ import annotations

from typing import get_args

from lightning_rlvr.types import UserError


def check(ok: bool, key: str, value: object, rule: str, meaning: str) -> None:
    """Raise UserError unless `ok`."""
    if not ok:
        raise UserError(f"{key} must be {rule}, got {value}: {meaning}. Set model.objective.init_args.{key}.")


def check_choice(value: str, key: str, choices: object) -> None:
    """Raise UserError unless `value` is one of the choices of a Literal type."""
    check(value in get_args(choices), key, value, f"one of {', '.join(get_args(choices))}", "no other is known")


def check_share(value: float, key: str) -> None:
    """Raise UserError unless `value` lies in [0, 1]."""
    check(0 <= value <= 1, key, value, "in [0, 1]", "it is a share of tokens")


def check_weight(value: float, key: str) -> None:
    """Raise UserError unless `value` is finite and not negative."""
    check(0 <= value < float("inf"), key, value, "0 or more and finite", "it weighs a term of the loss")
