"""The overrides of a command: made ready for Hydra's grammar, and what is wrong with one that it can't read."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from lmlab.console import command
from lmlab.errors import UserError
from lmlab.secrets import MARK, redacted_word

# Mappings whose keys are for others to say: a model's architecture, the columns of a data set, a class of Optuna's,
# a callback or a logger, the environment. Hydra knows the keys of the YAML files alone.
FREE = re.compile(r"(model\.config|data\.filter|hydra\.job\.env_set)[.=]|(callbacks|logger)(\.\w+)?=\{")
FREE_OF_A_SEARCH = re.compile(r"hydra\.sweeper\.(sampler|pruner)[.=]")
KEY = re.compile(r"(\+{1,2}|~)?[A-Za-z_$][\w./@:$-]*")
# Where a value, or an element of one, begins with a home directory; what is in quotes is left alone.
HOME = re.compile(
    r"""(?P<quoted>"(\\.|[^"\\])*"|'(\\.|[^'\\])*')"""
    r"""|(?P<before>^\s*|[,\[(]\s*|[{,]\s*[\w.-]+\s*:\s*)(?P<path>~(\$\{[^}]*\}|[^,\[\](){}"'])*)"""
)
SPECIAL = r"[,()\[\]{}\\]|\$\{"  # what has a meaning to Hydra's grammar, and
STRANGE = r"[^A-Za-z0-9_/\\+.$%*@?|:, \t()\[\]{}-]"  # none, without quotes
OPENING = {"(": ")", "[": "]", "{": "}"}
# How the files and names that Hydra takes for an option of a group are given instead.
NAMED = {
    "data": ("a data set of the hub", "data=hub", "data.path"),
    "model": ("a model of the hub, or of a directory", "model=pretrained", "model.name"),
    "tokenizer": ("a tokenizer of the hub, or of a directory", "tokenizer=pretrained", "tokenizer.name"),
}


def readable(words: Sequence[str], searches: bool = False) -> list[str]:
    """Overrides as Hydra reads them: home directories in full, and any key where a mapping is free.

    Args:
        searches: the command's config may choose a sweeper that has a sampler, without a word of it.

    Raises:
        UserError: a word is no override.
    """
    free = [FREE]
    if searches or any(word.startswith("hydra/sweeper=") for word in words):
        free.append(FREE_OF_A_SEARCH)
    for number, word in enumerate(words):
        if "=" not in word and not word.startswith("~"):
            raise UserError(no_override(words, number))
    return [f"++{word}" if any(kind.match(word) for kind in free) else word for word in map(at_home, words)]


def at_home(word: str) -> str:
    """An override with each `~` or `~user` at the beginning of a value, or of an element of a list, in full."""

    def in_full(found: re.Match[str]) -> str:
        if found["quoted"]:
            return found["quoted"]
        path = found["path"].rstrip()
        try:
            full = Path(path).expanduser()
        except RuntimeError:  # there is no such user
            return found[0]
        return found["before"] + literal(f"{full}/" if path.endswith("/") else str(full))

    key, equals, value = word.partition("=")
    return key + equals + HOME.sub(in_full, value) if "~" in value else word


def literal(text: str) -> str:
    """A text as Hydra reads it to the letter: in quotes, if that takes them."""
    return QuotedString(text, Quote.double).with_quotes() if re.search(f"{STRANGE}|{SPECIAL}", text) else text


def typed(key: str, text: str) -> str:
    """An override that sets a key to a text, as it is typed in a shell."""
    return command(f"{key}={literal(text)}")


def no_override(words: Sequence[str], number: int) -> str:
    """What is wrong with a word without a "=", and what was meant by it and those around it; without their secrets."""
    word = words[number]
    before = words[number - 1] if number else ""
    after = words[number + 1] if number + 1 < len(words) else ""
    if before.endswith("=") or after.startswith("="):
        key, value = (before, word) if before.endswith("=") else (word, after)
        if value == "=":
            value += "".join(words[number + 2 : number + 3])
        meant_by_it = redacted_word(f"{key}{value}")
        shown = word if word in meant_by_it else MARK
        return f"{shown}: there is a space beside the =, and an override is one word: {meant_by_it}"
    for first in range(number - 1, -1, -1):  # the shell made several words of a mapping or a list
        key, equals, value = words[first].partition("=")
        if equals and "is not closed" in (fault(value) or ""):
            ends = (n for n in range(number, len(words)) if not fault(" ".join([value, *words[first + 1 : n + 1]])))
            together = redacted_word(" ".join(words[first : next(ends, number) + 1]))
            shown = word if word in together else MARK
            return f"{shown}: to the shell a space ends a word. Put quotes around the whole: {command(together)}"
    key, equals, value = redacted_word(f"{before} {word}").partition("=")
    said = f"{MARK if MARK in value else word}: an override is KEY=VALUE."
    if is_file(word):
        return f"{said}\n{meant('data', word)}"
    if after and "=" not in after and KEY.fullmatch(word):
        return f"{said} Did you mean {redacted_word(f'{word}={after}')}?"
    if equals and not KEY.fullmatch(word):
        return f"{said}\nIf it belongs to the word before it, put quotes around both: {typed(key, value)}"
    return said


def is_file(text: str) -> bool:
    """Whether a text names a file, or several, of those that hold text."""
    from lmlab.data.options import BUILDERS

    return text.endswith((*BUILDERS, ".gz")) or Path(text).is_file()


def meant(group: str, text: str, split: str = "data.train") -> str | None:
    """What to say of a file or a name of the hub that was given for the option of a group; text is named by `split`."""
    text = text.strip("\"'")
    if group == "data" and is_file(text):
        return f"For text in files: data=files {typed(split, text)}"
    if group not in NAMED or not ("/" in text or Path(text).is_dir()):
        return None
    what, option, key = NAMED[group]
    return f"For {what}: {option} {typed(key, text)}"


def unreadable(word: str, error: Exception) -> str:
    """What to say of an override that Hydra's grammar does not take, without its secrets."""
    word = word.removeprefix("++")  # which `readable` may have put there
    key, _, value = word.partition("=")
    shown = redacted_word(word)
    said = f"can't read the override {shown}: "
    if not KEY.fullmatch(key):
        return f'{said}"{shown.partition("=")[0]}" is no key, which is words with dots between them.'
    strange = re.search(STRANGE, bare(value))
    if strange:
        why = f"{strange[0]} can't stand there without quotes."
    elif found := fault(value):
        return f"{said}{found}."
    elif shown != word:  # which what the grammar says may quote in part
        why = "the grammar does not take its value"
    else:
        lines = [line.strip() for line in str(error).splitlines()]
        why = next((line for line in lines if line and not line.startswith(("Error parsing", "See http"))), lines[0])
    quoted = typed(key, shown.partition("=")[2])
    return f"{said}{why}\nText that is to be taken to the letter has quotes of its own: {quoted}"


def fault(value: str) -> str | None:
    """What is wrong with the brackets or the commas of a value; None where nothing is."""
    value, unclosed = bare(value), list[str]()
    for sign in value:
        if sign in OPENING:
            unclosed.append(sign)
        elif sign in OPENING.values() and (not unclosed or OPENING[unclosed.pop()] != sign):
            return f"the {sign} closes nothing"
    if unclosed:
        return f"the {unclosed[-1]} is not closed"
    if re.search(r",\s*$", value):
        return "a value is missing after the last comma"
    return "a value is missing beside a comma" if re.search(r"(^|[,\[({])\s*,|,\s*[\])}]", value) else None


def bare(value: str) -> str:
    """A value without what is quoted, escaped or an interpolation in it, where any sign may stand."""
    return re.sub(r"""\$\{[^}]*\}|\\.|"[^"]*"|'[^']*'""", "x", value)
