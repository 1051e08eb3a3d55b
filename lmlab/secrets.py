"""Secrets, which no file of a run may hold: redacted wherever a config, a command or a message is written.

A secret is the value of a key that is named like one (`api_key`, `HF_TOKEN`, `dbPassword`), also in a text (`Pwd=…;`,
`--password …`, `Authorization: Bearer …`), a password or a token in a URL, what `hydra.job.env_set` puts into the
environment, and the lines of `hydra.launcher.setup`. What this process has redacted once is redacted in its messages
too. A process that does its share of a run by the config on disk is handed the secrets in a variable of its
environment.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MARK = "***secret***"
"""What stands for a secret. Hydra reads it as a string."""
VARIABLE = "LMLAB_SECRETS"

# Words in the name of a key, in snake case. A number is a secret under the first alone: elsewhere it counts something.
PASSWORD = re.compile(r"(^|_)([a-z]*(password|passwd|passphrase|passcode|secret|credential)s?|pwds?|pw$)(?=_|$)")
TOKEN = re.compile(
    r"(^|_)([a-z]*tokens?|(api|access|auth|private|secret|ssh)?keys?|bearers?|(auth|authorization|sig|signature)$)(?=_|$)"
)
NO_SECRET = re.compile(  # tokens of a text, keys of a table or of attention
    r"(^|_)((bos|eos|pad|mask|unk|cls|sep|special|extra|additional|added|begin|end|start|stop|image|audio|video)_tokens?"
    r"|(sort|text|label|column|row|group|primary|foreign|input|output|target|cache|dict|num|past)_keys?"
    r"|(num|new|max|min)_tokens|tokens_(seen|per)|key_(states|padding|value_states)|token_(type|ids))(?=_|$)"
)
WHOLLY = re.compile(r"hydra\.(job\.env_set|launcher\.setup)(\.|$)")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a key, also in camelCase
INTERPOLATION = re.compile(r"\$\{[\w.:]+\}")  # without a default, which might be a secret

VALUE = r"(?P<secret>'[^']*'|\"[^\"]*\"|(?!…|\*\*\*secret)[^\s&#;,'\"\])}]+)"
IN_TEXT = (
    # user:PASSWORD@ of a URL, and TOKEN@ of one of the web. A port is no password; a text that is a URL may have
    # spaces.
    re.compile(
        r"(?P<before>(?P<all>\A)?(?<![\w+.-])[\w+.-]+://[^/?#@:\s]*:(?!\d{1,5}(?:[/?#,\s]|$))|https?://(?=[^/?#@:\s]+@))"
        r"(?P<secret>(?(all).|\S)+)(?=@)",
        re.IGNORECASE,
    ),
    # The same without what a URL begins with. What has a digest behind the @ is a container's image.
    re.compile(
        r"(?P<before>(?<![\w.+:@{-])(?!mailto:)[\w.+-]+:)"
        r"(?P<secret>[^\s/@:,;'\"(){}\[\]<>=&?]+)(?=@(?!sha256:)[\w\[])",
        re.IGNORECASE,
    ),
    # A header of HTTP, or its value.
    re.compile(
        r"(?P<before>\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|digest|token)\s+)?+|\bbearer\s+(?=\S{8}))"
        rf"{VALUE}",
        re.IGNORECASE,
    ),
    # name=value and "name": value; `key` alone may be any.
    re.compile(
        r"(?P<before>(?<![\w.-])(?:(?<=[?&;])|(?!keys?\b['\"\\]*[=:]))"
        r"(?=[\w.-]*(?:pass|pwd|pw|secret|credential|token|key|bearer|auth|sig))(?P<name>[\w.-]++)(?:\\?=|['\"]: ?))"
        rf"{VALUE}",
        re.IGNORECASE,
    ),
    # --name value
    re.compile(rf"(?P<before>(?<![\w-])--?(?P<name>[a-z][\w.-]*)[ \t]+)(?!-){VALUE}", re.IGNORECASE),
    # X-Name: value, and lines of YAML and TOML. A name with a dot is a key of which a message is told.
    re.compile(
        r"(?P<before>(?<![\w.-])"
        r"(?P<name>[\w-]+[_-](?:key|token)|(?:[\w-]*[_-])?(?:password|passwd|passphrase|pwd|secret))(?::| ?=)[ \t]+)"
        rf"{VALUE}",
        re.IGNORECASE,
    ),
)
"""Where a secret stands in a text: under a name, if there is one, that is to be that of a secret."""
FLAG = re.compile(r"--?([a-z][\w.-]*)", re.IGNORECASE)

OVERRIDE = re.compile(r"(?P<key>(?:\+\+?|~)?[\w./@:$-]+)=(?P<value>.*)", re.DOTALL)
CONTAINER = re.compile(  # a mapping or a list may lack its end
    r"\s*(?P<open>\{|\[|\w+\s*\((?=.*\)\s*\Z))(?P<inside>.*?)(?P<close>[\]})]?)\s*", re.DOTALL
)
# Of the value of an override: quoted text, interpolations, escapes, and single signs.
PIECE = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\$\{[^}]*\}|\\.|.", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?", re.IGNORECASE)
SHORTEST = 8  # characters of a secret that is looked for in messages: a shorter one might be a word of theirs

_known = dict[str, str]()
"""Secrets, and overrides with some, and what is shown in place of them."""


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
    shown, of = list[str](), None
    for word in words:
        shown.append(shown_value(word, of) if of and not word.startswith("-") else redacted_word(word))
        flag = FLAG.fullmatch(word)
        of = kind(flag[1]) if flag else None
    return shown


def redacted_text(text: str) -> str:
    """A message without the secrets that this process knows, and without those of the URLs in it."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _known[secret])
    return shown(text)


def kind(key: str) -> str | None:
    """`password` or `token` where a dotted key is named like one of them."""
    name = "_".join(WORD.findall(key.rpartition(".")[2])).lower()
    if PASSWORD.search(name):
        return "password"
    return "token" if WHOLLY.match(key) or TOKEN.search(NO_SECRET.sub("", name)) else None


def shown(text: str, of: str | None = None) -> str:
    """What is shown of a string under a key of that kind."""
    if of is None:
        for pattern in IN_TEXT:
            text = pattern.sub(shown_found, text)
        return text
    if not text or text == MARK or INTERPOLATION.fullmatch(text):
        return text
    if len(text) >= SHORTEST:
        _known[text] = MARK
    return MARK


def shown_found(found: re.Match[str]) -> str:
    """What is shown of a part of a text that may have a secret in it."""
    name = found.groupdict().get("name")
    return found["before"] + shown_value(found["secret"], "password" if name is None else kind(name))


def shown_value(typed: str, of: str | None) -> str:
    """Redact a value in an override or a text, and keep the quotes that may stand around it."""
    if NUMBER.fullmatch(typed):
        return MARK if of == "password" else typed
    if typed.lower() in ("null", "true", "false"):
        return typed
    quote = typed[0] if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"" else ""
    return quote + shown(typed[1:-1] if quote else typed, of) + quote


def redacted_word(word: str) -> str:
    """A word of a command with its secrets redacted; as it was where there are none."""
    override = OVERRIDE.fullmatch(word)
    if override is None:
        return shown(word)
    value = redacted_values(override["value"], bare(word))
    if MARK not in value:
        return word
    redacted_override = f"{override['key']}={value}"
    _known[word.lstrip("+~")] = redacted_override.lstrip("+~")
    return redacted_override


def redacted_values(typed: str, key: str, within: str | None = None) -> str:
    """Redact each of the values, with commas between them, of an override."""
    return ",".join(redacted_value(part, key, kind(key) or within) for part in parts(typed))


def redacted_value(typed: str, key: str, of: str | None) -> str:
    """Redact one value of an override: a mapping, a list, a call such as choice(…), or a plain one."""
    container = CONTAINER.fullmatch(typed)
    if container is None or (of and not container["close"]):
        return shown_value(typed.strip(), of)
    if container["open"] != "{":
        return container["open"] + redacted_values(container["inside"], key, of) + container["close"]
    pairs = [part.partition(":") for part in parts(container["inside"])]
    pairs = [(name.strip(" '\""), colon, value) for name, colon, value in pairs]
    of = None if any(name == "_target_" for name, *_ in pairs) else of
    inside = (
        f"{name}: {redacted_values(value, f'{key}.{name}', of)}" if colon else redacted_value(name, key, of)
        for name, colon, value in pairs
    )
    return "{" + ",".join(inside) + container["close"]


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
