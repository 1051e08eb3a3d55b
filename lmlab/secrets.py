"""Redacts secrets, which no file of a run may hold, wherever a config, a command or a message is written.

A secret is the value of a key that is named like one (`api_key`, `HF_TOKEN`, `dbPassword`), also in a text (`Pwd=…;`,
`--password …`, `Authorization: Bearer …`), a password or a token in a URL, what `hydra.job.env_set` puts into the
environment, and the lines of `hydra.launcher.setup`. What this process has redacted once is redacted in its messages
too.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MARK = "***secret***"
"""The string that is shown in place of a secret. Hydra reads it as a string."""

# Words in the name of a key, in snake case. A number under the name of a token is no secret: it counts something.
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
IN_TEXT = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # user:PASSWORD@ of a URL, and TOKEN@ of one of the web. A port is no password; a text that is a URL may have
        # spaces.
        r"(?:(?P<all>\A)?(?<![\w+.-])[\w+.-]+://[^/?#@:\s]*:(?!\d{1,5}(?:[/?#,\s]|$))|https?://(?=[^/?#@:\s]+@))"
        r"(?P<secret>(?(all).|\S)+)(?=@)",
        # The same without what a URL begins with. What has a digest behind the @ is a container's image.
        r"(?<![\w.+:@{-])(?!mailto:)[\w.+-]+:(?P<secret>[^\s/@:,;'\"(){}\[\]<>=&?]+)(?=@(?!sha256:)[\w\[])",
        # A header of HTTP, or its value.
        r"(?:\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|digest|token)\s+)?+|\bbearer\s+(?=\S{8}))" + VALUE,
        # name=value and "name": value; `key` alone may be any.
        r"(?<![\w.-])(?:(?<=[?&;])|(?!keys?\b['\"\\]*[=:]))"
        r"(?=[\w.-]*(?:pass|pwd|pw|secret|credential|token|key|bearer|auth|sig))(?P<name>[\w.-]++)(?:\\?=|['\"]: ?)"
        + VALUE,
        # --name value
        r"(?<![\w-])--?(?P<name>[a-z][\w.-]*)[ \t]+(?!-)" + VALUE,
        # X-Name: value, and lines of YAML and TOML. A name with a dot is a key of which a message is told.
        r"(?<![\w.-])(?P<name>[\w-]+[_-](?:key|token)|(?:[\w-]*[_-])?(?:password|passwd|passphrase|pwd|secret))"
        r"(?::| ?=)[ \t]+" + VALUE,
    )
]
"""The patterns of a secret in a text; where one has a name, only a name of a secret makes it one."""
FLAG = re.compile(r"--?([a-z][\w.-]*)", re.IGNORECASE)

OVERRIDE = re.compile(r"(?P<key>(?:\+\+?|~)?[\w./@:$-]+)=(?P<value>.*)", re.DOTALL)
OPENING = r"(?<![^\s{\[,:])[{\[]"  # a bracket that begins a value
PIECE = re.compile(  # of the value of an override: a bracket, a comma, or what is between them
    rf"{OPENING}|[\]}},]|(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\$\{{[^}}]*\}}|\\.|(?!{OPENING})[^\]}},])+",
    re.DOTALL,
)
# Also the first and the last in choice(1,2).
NUMBER = re.compile(r"(\w+\()?[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?\)?", re.IGNORECASE)
SHORTEST = 8  # characters of a secret that is looked for in messages: a shorter one might be a word of theirs

_known = dict[str, str]()
"""The secrets that were redacted, and the overrides with one, each with what is shown in its place."""


def redacted(config: Any, key: str = "", within: str | None = None) -> Any:
    """Returns a config of plain values, or a part of one, with its secrets redacted.

    Args:
        key: the dotted key of the part.
        within: the kind of secret that the keys around it name, see `secret_kind`.
    """
    kind = secret_kind(key) or within
    if isinstance(config, Mapping):
        kind = None if "_target_" in config else kind  # a block that is called so, and no secret in parts
        return {name: redacted(value, f"{key}.{name}".lstrip("."), kind) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value, key, kind) for value in config]
    if isinstance(config, str):
        return redacted_string(config, kind)
    return MARK if kind == "password" and type(config) in (int, float) else config


def redacted_command(words: Iterable[str]) -> list[str]:
    """Returns the words of a command, Hydra's overrides or others, with their secrets redacted."""
    result, kind = list[str](), None
    for word in words:
        result.append(redacted_literal(word, kind) if kind and not word.startswith("-") else redacted_word(word))
        flag = FLAG.fullmatch(word)
        kind = secret_kind(flag[1]) if flag else None
    return result


def redacted_text(text: str) -> str:
    """Returns a message without the secrets that this process knows, and without those that it has by its form."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _known[secret])
    return redacted_string(text)


def secret_kind(key: str) -> str | None:
    """Returns `password` or `token` where a dotted key is named like one of them, else None."""
    name = "_".join(WORD.findall(key.rpartition(".")[2])).lower()
    if PASSWORD.search(name):
        return "password"
    return "token" if WHOLLY.match(key) or TOKEN.search(NO_SECRET.sub("", name)) else None


def redacted_string(text: str, kind: str | None = None) -> str:
    """Returns `MARK` for a string under a key of a kind of secret, else the string without the secrets in it."""
    if kind is None:
        for pattern in IN_TEXT:
            text = pattern.sub(redacted_match, text)
        return text
    if not text or text == MARK or INTERPOLATION.fullmatch(text):
        return text
    if len(text) >= SHORTEST:
        _known[text] = MARK
    return MARK


def redacted_match(match: re.Match[str]) -> str:
    """Returns the replacement of a match of `IN_TEXT`."""
    name = match.groupdict().get("name")
    before = match[0].removesuffix(match["secret"])
    return before + redacted_literal(match["secret"], "password" if name is None else secret_kind(name))


def redacted_literal(literal: str, kind: str | None) -> str:
    """Redacts a value as it is typed in an override or a text, and keeps the quotes that may stand around it."""
    if NUMBER.fullmatch(literal.rstrip(":")):  # as "=0: it has to be" of a message
        return MARK if kind == "password" else literal
    if literal.lower() in ("null", "true", "false"):
        return literal
    quote = literal[0] if len(literal) > 1 and literal[0] == literal[-1] and literal[0] in "'\"" else ""
    return quote + redacted_string(literal[1:-1] if quote else literal, kind) + quote


def redacted_word(word: str) -> str:
    """Returns a word of a command with its secrets redacted; as it was where there are none."""
    override = OVERRIDE.fullmatch(word)
    if override is None:
        return redacted_string(word)
    value = redacted_value(override["value"], override_key(word))
    if MARK not in value:
        return word
    result = f"{override['key']}={value}"
    _known[word.lstrip("+~")] = result.lstrip("+~")
    return result


def redacted_value(typed: str, key: str) -> str:
    """Redacts the value of an override; in a mapping or a list, each text under the keys that lead to it."""
    shown, inner, kind = "", key, secret_kind(key)
    around = list[tuple[str, str, str | None]]()  # the open brackets, each with the key and the kind of all inside
    for piece in PIECE.findall(typed):
        if piece in "{[":
            around.append((piece, inner, kind))
        elif piece in "]}" and around:
            _, inner, kind = around.pop()
        elif piece not in "]},":
            if around and around[-1][0] == "{" and ":" in piece:
                name, _, piece = piece.partition(":")
                name = name.strip(" '\"")
                bracket, outer, within = around[-1]
                if name == "_target_":  # a block that is called so, and no secret in parts
                    within = None
                    around[-1] = bracket, outer, None
                inner = f"{outer}.{name}"
                kind = secret_kind(inner) or within
                shown += f"{name}: "
            piece = redacted_literal(piece.strip(), kind)
        shown += piece
    # A bracket without its end may be a part of the secret itself.
    return MARK if around and secret_kind(key) else shown


def override_key(word: str) -> str:
    """Returns the key of an override, without the signs before it that add it or leave it out."""
    return word.partition("=")[0].lstrip("+~")


def redacted_keys(config: Any, key: str = "") -> list[str]:
    """Returns the dotted keys in a config of plain values whose secrets were redacted."""
    if isinstance(config, Mapping):
        return [name for inner, value in config.items() for name in redacted_keys(value, f"{key}.{inner}".lstrip("."))]
    return [key] if MARK in str(config) else []


def redacted_keys_of_command(words: Iterable[str]) -> list[str]:
    """Returns the keys of a command whose secrets were redacted, and that it does not give again."""
    words = list(words)
    given = [override_key(word) for word in words if MARK not in word]
    keys = [override_key(word) for word in words if MARK in word]
    return [key for key in keys if not any(f"{other}.".startswith(f"{key}.") for other in given)]


def secret_values(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the secrets in a config of plain values, each under the path of its keys; a list whole if it has one."""

    def differing(value: Any, shown: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(value, Mapping):
            for key in value:
                yield from differing(value[key], shown[key], (*path, key))
        elif value != shown:
            yield path, value

    return differing(config, redacted(config), ())
