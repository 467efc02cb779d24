"""Patterns of keys, as `--include` and `--exclude` take them: the rules of rclone and .gitignore, on keys relative to a prefix."""

import re

_RULES = "use * ? [abc] [!abc] {one,two} and ** (any folders), with \\ before a character that is meant as it is"


def regex(pattern: str) -> str:
    """The regular expression (RE2) that a whole relative key matches if the pattern does.

    A pattern without a slash matches the last part of a key, in any folder: ``*.jpg``. One with a slash matches from the prefix on:
    ``2024/*.jpg``, and ``/*.jpg`` for what lies in no folder. ``*`` and ``?`` stop at slashes, ``**`` does not, and ``**/`` matches no
    folder too. A slash at the end stands for all below: ``tmp/`` is ``tmp/**``, and ``**/tmp/`` the same in any folder. Case counts.

    Raises ValueError for a pattern that is empty or leaves a bracket open.
    """
    if not pattern.strip("/"):
        raise ValueError(f"the pattern {pattern!r} matches no key: {_RULES}")
    is_anchored = "/" in pattern
    text = pattern.removeprefix("/") + ("**" if pattern.endswith("/") else "")
    found, place, open_braces = "", 0, 0
    while place < len(text):
        character = text[place]
        place += 1
        if text.startswith("**/", place - 1) and (place == 1 or text[place - 2] == "/"):
            found, place = f"{found}(?:.*/)?", place + 2
        elif text.startswith("**", place - 1):
            found, place = f"{found}.*", place + 1
        elif character in "*?":
            found += "[^/]*" if character == "*" else "[^/]"
        elif character == "[":
            stop = text.find("]", place + 1 + text.startswith("!", place))
            if stop < 0:
                raise ValueError(f"the pattern {pattern!r} has no ] for its [: {_RULES}")
            found, place = found + _one_of(text[place:stop]), stop + 1
        elif character == "{":
            found, open_braces = f"{found}(?:", open_braces + 1
        elif character == "," and open_braces:
            found += "|"
        elif character == "}" and open_braces:
            found, open_braces = f"{found})", open_braces - 1
        elif character == "\\" and place < len(text):
            found, place = found + re.escape(text[place]), place + 1
        else:
            found += re.escape(character)
    if open_braces:
        raise ValueError(f"the pattern {pattern!r} has no }} for its {{: {_RULES}")
    return f"(?s)^{'' if is_anchored else '(?:.*/)?'}{found}$"


def _one_of(characters: str) -> str:
    """A class of characters. A negated one does not match a slash either."""
    is_negated = characters.startswith("!")
    inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", characters[is_negated:])
    return f"[^/{inside}]" if is_negated else f"[{inside}]"
