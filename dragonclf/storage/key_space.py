"""Where to cut the keys of one prefix that nobody has listed yet, guessed from those that were.

Guesses only decide how fast a parallel listing goes: whatever they are, it is right.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

MAX_KEY_BYTES = 1024
DIGITS = 12  # characters of a key, after what its range's keys begin with, that tell where in the range it is
NUM_PLACES = 64  # characters of a key, after the prefix, for which kinds are kept apart
FEW_PLACES = 4  # less that keys begin with in common is found by halving
SAMPLE_KEYS = 16  # of a page: kinds are learned from these
LAST_CHARACTER, SURROGATES = 0x10FFFF, range(0xD800, 0xE000)


class KeySpace:
    """What is known of the keys under a prefix: their characters, and which kinds of them (digits, letters) stand at which place."""

    def __init__(self, prefix: str):
        self._start = len(prefix)
        self._seen: set[str] = set()
        self._kinds: list[set[str]] = []  # by place after the prefix
        self._alphabets: dict[int, list[str]] = {}  # made when needed

    def learn(self, keys: Sequence[str]) -> None:
        """Note a page's keys."""
        seen = set("".join([key[self._start :] for key in keys]))
        if any(character.isdecimal() and character.isascii() for character in seen):
            seen.update("0123456789")
        changed = not seen <= self._seen
        self._seen |= seen
        for key in keys[:: max(1, len(keys) // SAMPLE_KEYS)]:
            for place, character in enumerate(key[self._start : self._start + NUM_PLACES]):
                if place == len(self._kinds):
                    self._kinds.append(set())
                kind = _kind(character)
                if kind not in self._kinds[place]:
                    self._kinds[place].add(kind)
                    changed = True
        if changed:
            self._alphabets = {}

    def middle(self, low: str, high: str | None) -> str | None:
        """A short key between two (None: the prefix's end), halfway if keys are spread evenly. None if no such key can be made."""
        start, first, last = self._bounds(low, high)
        middle, characters = (first + last) // 2, []
        for place in reversed(range(start, start + DIGITS)):
            alphabet = self._alphabet(place)
            middle, digit = divmod(middle, len(alphabet) + 1)
            characters.append(alphabet[min(digit, len(alphabet) - 1)] if alphabet else "")
        text = low[:start] + "".join(reversed(characters))
        shortest = next((length for length in range(start + 1, len(text) + 1) if low < text[:length]), None)
        if shortest is None:
            return None
        for cut in (text[: shortest + 1], text[:shortest]):
            if (high is None or cut < high) and len(cut.encode()) <= MAX_KEY_BYTES:
                return cut
        return None

    def pages_left(self, first: str, last: str, end: str | None) -> float:
        """Pages from `last` to `end`, if keys are as dense there as in a page that holds `first` to `last`."""
        start, low, high = self._bounds(first, end)
        now = self._number(last, start)
        return max(0, high - now) / max(1, now - low)

    def beginnings(self, first: str, last: str, end: str | None, *, count: int) -> list[str]:
        """At most `count` keys between `last` and `end`, where keys stop to begin as those of the page `first` to `last` do.

        After a page from `img_0000` to `img_0999` they are `img_1`, `img` + a character, `im` + one, and so on. Listing from each at
        once tells what keys have in common, however much it is.
        """
        lowest = self._start if end is None else _common(last, end)
        places = range(_common(first, last), lowest - 1, -1)
        if len(places) < FEW_PLACES or count < 1:
            return []
        places = places[:: max(1, -(-len(places) // count))]
        cuts = [last[:place] + following for place in places if (following := _following(last[place : place + 1]))]
        return [cut for cut in cuts if last < cut and (end is None or cut < end) and len(cut.encode()) <= MAX_KEY_BYTES]

    def _bounds(self, low: str, high: str | None) -> tuple[int, int, int]:
        """(how many characters all keys between the two begin with, numbers of the two)."""
        if high is not None:
            start = _common(low, high)
            return start, self._number(low, start), self._number(high, start)
        number = 1
        for place in range(self._start, self._start + DIGITS):
            number *= len(self._alphabet(place)) + 1
        return self._start, self._number(low, self._start), number

    def _number(self, key: str, start: int) -> int:
        """Where a key is among those that begin with its first `start` characters: the next ones as digits."""
        number = 0
        for place in range(start, start + DIGITS):
            alphabet = self._alphabet(place)
            number = number * (len(alphabet) + 1) + bisect_left(alphabet, key[place : place + 1])
        return number

    def _alphabet(self, place: int) -> list[str]:
        """The characters to expect at a place: those seen anywhere, of the kinds seen there."""
        place -= self._start
        if place not in self._alphabets:
            kinds = self._kinds[place] if place < len(self._kinds) else None
            self._alphabets[place] = sorted(c for c in self._seen if kinds is None or _kind(c) in kinds)
        return self._alphabets[place]


def is_ordered(keys: Sequence[str]) -> bool:
    """Whether keys go up by their bytes, each once. (UTF-8 sorts as the code points of `str` do.)"""
    return all(one < other for one, other in pairwise(keys))


def _kind(character: str) -> str:
    if not character.isascii():
        return "other"
    return "0" if character.isdecimal() else "a" if character.islower() else "A" if character.isupper() else character


def _common(one: str, other: str) -> int:
    """How many characters two keys begin with in common."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _following(character: str) -> str:
    """The next character, none if there is none: all that begins with `character` is less."""
    code = ord(character) + 1 if character else LAST_CHARACTER + 1
    code = SURROGATES.stop if code in SURROGATES else code
    return chr(code) if code <= LAST_CHARACTER else ""
