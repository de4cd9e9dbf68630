"""Recipes with one token changed: left out, doubled, misspelt, exchanged, or of another type."""

import random
import re
from collections.abc import Iterator

# Words, numbers with their signs, punctuation one by one; blanks and line ends are no tokens.
_TOKEN = re.compile(r"[\w%.*-]+|[^\w\s]")
_OTHERS = (
    *("0", "-1", "1", "3", "7%", "0.25", "1e400", "999999999999999999999", ".nan", ".inf", "0x1F"),
    *("true", "no", "null", "~", "[]", "{}", '""', "'", '"', "[", "]", "{", "}", ":", "-", "#"),
    *("*a", "&a", "!!str", "!x", "|", ">", "%", "@", "`", "\\", "\t", "é", "\u2028", "2026-11-22"),
    *("dha", "window", "sites", "layers", "goal", "params", "latency", "exact", "12:30:45", "<<"),
)


def mutants(text: str, count: int, seed: int) -> Iterator[str]:
    """Yield so many texts, each with one token other than it was."""
    draw = random.Random(seed)
    places = [m.span() for m in _TOKEN.finditer(text) if not _in_comment(text, m.start())]
    while count:
        start, stop = draw.choice(places)
        made = text[:start] + _changed(text[start:stop], text, places, draw) + text[stop:]
        if made != text:
            count -= 1
            yield made


def _in_comment(text: str, place: int) -> bool:
    return text[text.rfind("\n", 0, place) + 1 :].lstrip().startswith("#")


def _changed(token: str, text: str, places: list[tuple[int, int]], draw: random.Random) -> str:
    """Return what takes the place of a token."""
    at = draw.randrange(len(token))
    other = draw.choice(places)
    return draw.choice(
        (
            "",
            f"{token} {token}",
            f"{token}{token}",
            token[:at] + token[at + 1 :],
            token[:at] + draw.choice("abcxyz0189_-. ") + token[at:],
            token.upper(),
            f'"{token}"',
            text[slice(*other)],
            draw.choice(_OTHERS),
            draw.choice(_OTHERS),
        )
    )
