"""Commands that are printed, to be copied into a shell."""

import re

PLAIN = re.compile(r"[\w@%+=:,./…-]+", re.ASCII)
# What means something between double quotes; ! does where a person types.
SPECIAL = re.compile(r'["$`\\!\n]')


def command(*words: object) -> str:
    """A command as a POSIX shell reads it, quoted no more than it needs.

    >>> print(command("python", "-m", "lmlab.predict", "outputs/run", "What's it?"))
    python -m lmlab.predict outputs/run "What's it?"
    """
    return " ".join(map(quoted, map(str, words)))


def quoted(word: str) -> str:
    if PLAIN.fullmatch(word):
        return word
    if "'" in word and not SPECIAL.search(word):
        return f'"{word}"'
    return "'" + word.replace("'", r"'\''") + "'"
