"""Secrets, which no file of a run may hold: redacted wherever a config, a command or a message is written.

A secret is the value of a key that is named like one (`api_key`, `HF_TOKEN`, `dbPassword`), a password or a token in
a URL, what `hydra.job.env_set` puts into the environment, and the lines of `hydra.launcher.setup`. What this process
has redacted once is redacted in its messages too. A process that does its share of a run by the config on disk is
handed the secrets in a variable of its environment.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MARK = "***secret***"
"""What stands for a secret. Hydra reads it as a string."""
VARIABLE = "LMLAB_SECRETS"

# Names of keys in snake case. A number is a secret under the first kind alone: under the second it counts something.
PASSWORD = re.compile(r".*(password|passwd|passphrase|passcode|secret|credential)s?|(.*_)?(pwd|pw)")
TOKEN = re.compile(r".*token|(.*_)?((api|access|private|secret)_?keys?|key|auth|authorization|sig|signature)")
NO_SECRET = re.compile(  # tokens of a text, keys of a table
    r"(.*_)?(bos|eos|pad|mask|unk|cls|sep|special|extra|additional|begin|end|start|stop|image|audio|video)_token"
    r"|(.*_)?(sort|text|label|column|row|group|primary|foreign|input|output|target|cache|dict)_key"
)
WHOLLY = re.compile(r"hydra\.(job\.env_set|launcher\.setup)(\.|$)")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a key, also in camelCase
INTERPOLATION = re.compile(r"\$\{[\w.:]+\}")  # without a default, which might be a secret

# user:PASSWORD@ of a URL, and TOKEN@ of one of the web. A port is no password; a text that is a URL may have spaces.
LOGIN = re.compile(
    r"(?P<before>(?P<all>\A)?[a-z][\w+.-]*://[^/?#@:\s]*:(?!\d{1,5}(?:[/?#,\s]|$))|https?://(?=[^/?#@:\s]+@))"
    r"(?P<secret>(?(all).|\S)+)(?=@)",
    re.IGNORECASE,
)
# name=value of a URL's query, or elsewhere under a name of several words or that of a password; "name": value of JSON.
PAIR = re.compile(
    r"(?P<before>(?:(?<=[?&])|\b(?=[\w.-]*\w[_.-]|pass|secret))(?P<name>[\w.-]+)(?:\\?=|['\"]: ?))"
    r"(?P<secret>'[^']*'|\"[^\"]*\"|(?!…)[^\s&#;,'\"\])}]+)",
    re.IGNORECASE,
)

OVERRIDE = re.compile(r"(?P<key>(?:\+\+?|~)?[\w./@:$-]+)=(?P<value>.*)", re.DOTALL)
CONTAINER = re.compile(r"\s*(?P<open>\{|\[|\w+\s*\()(?P<inside>.*)(?P<close>[\]})])\s*", re.DOTALL)
# Of the value of an override: quoted text, interpolations, escapes, and single signs.
PIECE = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\$\{[^}]*\}|\\.|.", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?", re.IGNORECASE)
SHORTEST = 8  # characters of a secret that is looked for in messages: a shorter one might be a word of theirs

_known = set[str]()


def redacted(config: Any, key: str = "", within: str | None = None) -> Any:
    """A config of plain values, or what lies in it under a dotted key, with its secrets redacted.

    Args:
        within: the kind of the keys around, see `kind`.
    """
    of = kind(key) or within
    if isinstance(config, Mapping):
        of = None if "_target_" in config else of  # a block that is called so, and no secret in parts
        return {name: redacted(value, f"{key}.{name}".lstrip("."), of) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value, key, of) for value in config]
    if isinstance(config, str):
        return shown(config, of)
    return MARK if of == "password" and type(config) in (int, float) else config


def redacted_command(words: Iterable[str]) -> list[str]:
    """The words of a command, overrides of Hydra's or others, with their secrets redacted."""
    return [redacted_word(word) for word in words]


def redacted_text(text: str) -> str:
    """A message without the secrets that this process knows, and without those of the URLs in it."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MARK)
    return shown(text)


def kind(key: str) -> str | None:
    """`password` or `token` where a dotted key is named like one of them."""
    name = "_".join(WORD.findall(key.rpartition(".")[2])).lower()
    if PASSWORD.fullmatch(name):
        return "password"
    return "token" if WHOLLY.match(key) or (TOKEN.fullmatch(name) and not NO_SECRET.fullmatch(name)) else None


def shown(text: str, of: str | None = None) -> str:
    """What is shown of a string under a key of that kind."""
    if of is None:
        text = LOGIN.sub(lambda login: login["before"] + shown(login["secret"], "token"), text)
        return PAIR.sub(lambda pair: pair["before"] + shown_value(pair["secret"], kind(pair["name"])), text)
    if not text or text == MARK or INTERPOLATION.fullmatch(text):
        return text
    if len(text) >= SHORTEST:
        _known.add(text)
    return MARK


def shown_value(typed: str, of: str | None) -> str:
    """Redact the text of a value in an override, and keep the quotes that may stand around it."""
    quote = typed[0] if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"" else ""
    return quote + shown(typed[1:-1] if quote else typed, of) + quote


def redacted_word(word: str) -> str:
    """A word of a command with its secrets redacted; as it was where there are none."""
    override = OVERRIDE.fullmatch(word)
    if override is None:
        return shown(word)
    value = redacted_values(override["value"], bare(word))
    return f"{override['key']}={value}" if MARK in value else word


def redacted_values(typed: str, key: str, within: str | None = None) -> str:
    """Redact each of the values, with commas between them, of an override."""
    return ",".join(redacted_value(part, key, kind(key) or within) for part in parts(typed))


def redacted_value(typed: str, key: str, of: str | None) -> str:
    """Redact one value of an override: a mapping, a list, a call such as choice(…), or a plain one."""
    container, plain = CONTAINER.fullmatch(typed), typed.strip()
    if container and container["open"] == "{":
        divided = (part.partition(":") for part in parts(container["inside"]))
        pairs = [(name.strip(" '\""), value) for name, _, value in divided]
        of = None if any(name == "_target_" for name, _ in pairs) else of
        inside = (f"{name}: {redacted_values(value, f'{key}.{name}', of)}" for name, value in pairs)
        return "{" + ",".join(inside) + "}"
    if container:
        return container["open"] + redacted_values(container["inside"], key, of) + container["close"]
    if NUMBER.fullmatch(plain):
        return MARK if of == "password" else plain
    return plain if plain.lower() in ("null", "true", "false") else shown_value(plain, of)


def parts(typed: str) -> Iterator[str]:
    """What commas divide in a value of an override, those inside of quotes and brackets aside."""
    depth, part = 0, ""
    for piece in PIECE.findall(typed):
        depth += (piece in "{[(") - (piece in "}])")
        if piece == "," and depth == 0:
            yield part
            part = ""
        else:
            part += piece
    if typed:
        yield part


def bare(word: str) -> str:
    """The key of an override, without what stands before it to add or leave it out."""
    return word.partition("=")[0].lstrip("+~")


def lost(config: Any, key: str = "") -> list[str]:
    """The dotted keys in a config of plain values whose secrets were redacted."""
    if isinstance(config, Mapping):
        return [name for inner, value in config.items() for name in lost(value, f"{key}.{inner}".lstrip("."))]
    return [key] if MARK in str(config) else []


def lost_of_command(words: Iterable[str]) -> list[str]:
    """The keys of a command whose secrets were redacted, and that it does not give again."""
    words = list(words)
    given = [bare(word) for word in words if MARK not in word]
    keys = [bare(word) for word in words if MARK in word]
    return [key for key in keys if not any(f"{other}.".startswith(f"{key}.") for other in given)]


def handed_over(config: Any) -> dict[str, str]:
    """Variables for a process that reads a config of plain values from disk, where its secrets are not."""
    found = list(differing(config, redacted(config)))
    return {VARIABLE: json.dumps(found)} if found else {}


def differing(config: Any, other: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Where a config is not like another of the same keys: the path of keys, and its value."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from differing(value, other[key], (*path, key))
    elif config != other:
        yield path, config


def taken_over(config: Any) -> Any:
    """A config of plain values with the secrets that this process was handed over: they are taken once."""
    for path, value in json.loads(os.environ.pop(VARIABLE, "[]")):
        holder = config
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
    redacted(config)  # to know them
    return config
