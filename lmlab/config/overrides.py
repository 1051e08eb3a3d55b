"""Makes the overrides of a command ready for Hydra's grammar, and explains those that it can't read."""

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
# Groups that a command may leave out. To choose one is to add it, so a + before it says nothing more.
OPTIONAL = re.compile(r"^\+(?=(distill|adapter|experiment)=)")
# A series of models is asked for by its steps alone.
SERIES = re.compile(r"^(\+{0,2}callbacks\.series)=(?!\{)")
KEY = re.compile(r"(\+{1,2}|~)?[A-Za-z_$][\w./@:$-]*")
# Where a value, or an element of one, begins with a home directory; what is in quotes is left alone.
HOME = re.compile(
    r"""(?P<quoted>"(\\.|[^"\\])*"|'(\\.|[^'\\])*')"""
    r"""|(?P<before>^\s*|[,\[(]\s*|[{,]\s*[\w.-]+\s*:\s*)(?P<path>~(\$\{[^}]*\}|[^,\[\](){}"'])*)"""
)
SPECIAL = r"[,()\[\]{}\\]|\$\{"  # what has a meaning to Hydra's grammar, and
STRANGE = r"[^A-Za-z0-9_/\\+.$%*@?|:, \t()\[\]{}-]"  # none, without quotes
OPENING = {"(": ")", "[": "]", "{": "}"}
# How a name that Hydra takes for an option of a group is given instead: (what it names, option, key).
NAMED = {
    "data": ("a data set of the hub", "data=hub", "data.path"),
    "model": ("a model of the hub, or of a directory", "model=pretrained", "model.name"),
    "tokenizer": ("a tokenizer of the hub, or of a directory", "tokenizer=pretrained", "tokenizer.name"),
}


def readable(words: Sequence[str], searches: bool = False) -> list[str]:
    """Returns overrides as Hydra reads them: home directories in full, and any key where a mapping is free.

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
            raise UserError(explain_word(words, number))
        key, _, value = word.partition("=")
        if repeated := repeated_key(value):
            raise UserError(f"{key}: its mapping has the key {repeated} twice. Rename one of the two, or leave it out.")
    words = [SERIES.sub(r"\1.steps=", OPTIONAL.sub("", expand_home(word))) for word in words]
    return [f"++{word}" if any(kind.match(word) for kind in free) else word for word in words]


def expand_home(word: str) -> str:
    """Returns an override with each `~` or `~user` at the beginning of a value, or of an element of a list, in full."""

    def in_full(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match["quoted"]
        path = match["path"].rstrip()
        try:
            full = Path(path).expanduser()
        except RuntimeError:  # there is no such user
            return match[0]
        return match["before"] + literal(f"{full}/" if path.endswith("/") else str(full))

    key, equals, value = word.partition("=")
    return key + equals + HOME.sub(in_full, value) if "~" in value else word


def literal(text: str) -> str:
    """Returns a text as Hydra reads it to the letter: in quotes, if that takes them."""
    return QuotedString(text, Quote.double).with_quotes() if re.search(f"{STRANGE}|{SPECIAL}", text) else text


def shell_override(key: str, text: str) -> str:
    """Returns the override that sets a key to a text, as it is typed in a shell."""
    return command(f"{key}={literal(text)}")


def explain_word(words: Sequence[str], number: int) -> str:
    """Returns the message for the word of that number, which has no "=": what it and those around it may have meant."""
    word = words[number]
    before = words[number - 1] if number else ""
    after = words[number + 1] if number + 1 < len(words) else ""
    if before.endswith("=") or after.startswith("="):
        key, value = (before, word) if before.endswith("=") else (word, after)
        if value == "=":
            value += "".join(words[number + 2 : number + 3])
        together = redacted_word(f"{key}{value}")
        shown = word if word in together else MARK
        return f"{shown}: there is a space beside the =, and an override is one word: {together}"
    for first in range(number - 1, -1, -1):  # the shell made several words of a mapping or a list
        key, equals, value = words[first].partition("=")
        if equals and "is not closed" in (bracket_error(value) or ""):
            ends = (
                n for n in range(number, len(words)) if not bracket_error(" ".join([value, *words[first + 1 : n + 1]]))
            )
            together = redacted_word(" ".join(words[first : next(ends, number) + 1]))
            shown = word if word in together else MARK
            return f"{shown}: to the shell a space ends a word. Put quotes around the whole: {command(together)}"
    key, equals, value = redacted_word(f"{before} {word}").partition("=")
    message = f"{MARK if MARK in value else word}: an override is KEY=VALUE."
    if is_file(word):
        return f"{message}\n{suggest('data', word)}"
    if after and "=" not in after and KEY.fullmatch(word):
        return f"{message} Did you mean {redacted_word(f'{word}={after}')}?"
    if equals and not KEY.fullmatch(word):
        return f"{message}\nIf it belongs to the word before it, put quotes around both: {shell_override(key, value)}"
    return message


def is_file(text: str) -> bool:
    """Returns whether a text names a file, or several, of those that hold text."""
    from lmlab.data.options import BUILDERS, COMPRESSED

    return text.endswith((*BUILDERS, *COMPRESSED)) or Path(text).is_file()


def suggest(group: str, text: str, split: str = "data.train") -> str | None:
    """Returns how to give a file or a name of the hub that was given for the option of a group; None for another text.

    Args:
        split: the key that names text.
    """
    text = text.strip("\"'")
    if group == "data" and is_file(text):
        return f"For text in files: data=files {shell_override(split, text)}"
    if group not in NAMED or not ("/" in text or Path(text).is_dir()):
        return None
    what, option, key = NAMED[group]
    return f"For {what}: {option} {shell_override(key, text)}"


def explain_override(word: str, error: Exception) -> str:
    """Returns the message for an override that Hydra's grammar does not take, without the secrets in it."""
    word = word.removeprefix("++")  # which `readable` may have put there
    key, _, value = word.partition("=")
    shown = redacted_word(word)
    message = f"can't read the override {shown}: "
    if not KEY.fullmatch(key):
        return f'{message}"{shown.partition("=")[0]}" is no key, which is words with dots between them.'
    strange = re.search(STRANGE, without_quoted(value))
    if strange:
        why = f"{strange[0]} can't stand there without quotes."
    elif wrong := bracket_error(value):
        return f"{message}{wrong}."
    elif shown != word:  # which what the grammar says may quote in part
        why = "the grammar does not take its value"
    else:
        lines = [line.strip() for line in str(error).splitlines()]
        why = next((line for line in lines if line and not line.startswith(("Error parsing", "See http"))), lines[0])
    quoted = shell_override(key, shown.partition("=")[2])
    return f"{message}{why}\nText that is to be taken to the letter has quotes of its own: {quoted}"


def bracket_error(value: str) -> str | None:
    """Returns what is wrong with the brackets or the commas of a value; None where nothing is."""
    value, unclosed = without_quoted(value), list[str]()
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


def repeated_key(value: str) -> str | None:
    """Returns a key that a mapping in a value has twice, of which Hydra would take the last; None where none is."""
    keys: list[set[str] | None] = [None]  # of each bracket that is open; None where it is that of no mapping
    for match in re.finditer(r"[\[({\])}]|(?<=[{,])\s*([\w.+-]+)\s*:", without_quoted(value)):
        sign, key = match[0], match[1]
        if sign in OPENING:
            keys.append(set() if sign == "{" else None)
        elif key is None:
            keys = keys[:-1] or [None]
        elif keys[-1] is not None:
            if key in keys[-1]:
                return key
            keys[-1].add(key)
    return None


def without_quoted(value: str) -> str:
    """Returns a value without what is quoted, escaped or an interpolation in it, where any sign may stand."""
    return re.sub(r"""\$\{[^}]*\}|\\.|"[^"]*"|'[^']*'""", "x", value)
