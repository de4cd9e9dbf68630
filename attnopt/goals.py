"""Goals: budgets as shares of what the source takes, and how much quality may go for them."""

import difflib
from collections.abc import Mapping
from typing import Any

BUDGETS = {
    "kv_cache": "the cache of a text as long as the workload",
    "params": "the parameters",
    "flops": "the operations of the workload",
    "latency": "the time of the workload, by measured times of its ops on this machine",
    "memory": "the weights and the cache of the workload, in bytes",
}
GOALS = (*BUDGETS, "max_drop")


def checked_goal(goal: Mapping[str, Any]) -> dict[str, float]:
    """Return the goal as fractions; an unknown or impossible one is a ValueError."""
    for name in goal:
        if name not in GOALS:
            near = difflib.get_close_matches(str(name), GOALS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(GOALS)}"
            raise ValueError(f"unknown goal {name!r}{hint}")
    found = {name: fraction(value, name) for name, value in goal.items() if value is not None}
    for name in BUDGETS:
        if not 0 < found.get(name, 1.0) <= 1:
            hint = f"; did you mean {goal[name]}%?" if 1 < found[name] <= 100 else ""
            raise ValueError(f"{name} {goal[name]!r} must be above 0 and at most 100%{hint}")
    if found.get("max_drop", 0.0) < 0:
        raise ValueError(f"max_drop {goal['max_drop']!r} must not be negative")
    # Whoever writes 5 means 5 %, and a gate of 500 % lets everything pass; 5.0 is computed.
    said = goal.get("max_drop")
    if found.get("max_drop", 0.0) > 1 and not isinstance(said, float) and "%" not in str(said):
        raise ValueError(
            f"max_drop {goal['max_drop']!r} would be {found['max_drop']:.0%}; write it with a "
            f"percent sign, such as {goal['max_drop']}%"
        )
    return found


def budgets_of(goal: Mapping[str, float]) -> dict[str, float]:
    """Return the budgets of a goal, in the order in which they are listed here."""
    return {name: goal[name] for name in BUDGETS if name in goal}


def fraction(value: Any, name: str) -> float:
    """Read 0.5 or "50%"."""
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"{name} {value!r} is no fraction; write 50% or 0.5") from error
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} {value!r} is no fraction; write 50% or 0.5")
    return number
