"""What a user says of some sites: leave them as they are, or try only some passes there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Sites by a pattern of their names or by their layers, and what may be done to them.

    `keep` leaves them as they are. Otherwise `passes` are tried there and no others (None: all that
    are), with the settings of `config` fixed. The first rule that covers a site decides.
    """

    sites: str = "*"
    layers: tuple[int, ...] | None = None
    keep: bool = False
    passes: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def covers(self, name: str) -> bool:
        """Whether the rule is about a site."""
        if not fnmatchcase(name, self.sites):
            return False
        return self.layers is None or layer_of(name) in self.layers

    def __str__(self) -> str:
        where = [] if self.sites == "*" else [self.sites]
        where += [] if self.layers is None else [f"layers {', '.join(map(str, self.layers))}"]
        return f"{'keep' if self.keep else 'try'} {' of '.join(reversed(where)) or 'all'}"


def layer_of(name: str) -> int | None:
    """Return the number of a site's layer: the first number in its name."""
    found = re.search(r"(?:^|[._])(\d+)(?:$|[._])", name)
    return None if found is None else int(found.group(1))


def rule_of(rules: Sequence[Rule], name: str) -> Rule | None:
    """Return the rule that decides about a site."""
    return next((rule for rule in rules if rule.covers(name)), None)


def unused(rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
    """List the rules that decide about no site."""
    used = {id(rule_of(rules, name)) for name in names}
    return [rule for rule in rules if id(rule) not in used]
