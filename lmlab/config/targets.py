"""Blocks of a config that name what is to be called: their values are held against what it takes, and it is called."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from inspect import Parameter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt
from hydra._internal.utils import _locate  # hydra.utils.get_object also logs what it raises
from omegaconf import DictConfig, OmegaConf

from lmlab.config import signatures
from lmlab.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    Sequence: "a list",
    Callable: "a function",
    NoneType: "null",
    Any: "anything",
}
BOUNDS = {
    Ge: "{0.ge} or more",
    Gt: "more than {0.gt}",
    Le: "{0.le} at most",
    Lt: "less than {0.lt}",
    Len: "{0.min_length} of them",
}


PUSH = ("push", "push_license", "push_private", "push_series")
"""The keys of the group logger that are no loggers, see `schema.Push`."""


FILES, HUB = "lmlab.data.sources.load_files", "lmlab.data.sources.load_hub"
SHARE = "lmlab.data.options.Share"
"""The class that declares the keys of a source of a mixture which say its share."""


def sources(data: DictConfig | None) -> dict[str, tuple[DictConfig, DictConfig]]:
    """Returns the block of each source of a mixture as that of a data set, and the keys that say its share.

    A source without a target is a data set of the hub where it has a path, and else one of files.
    """
    found = {}
    for name, source in ((data and data.get("sources")) or {}).items():
        if not isinstance(source, DictConfig):
            raise UserError(
                f"data.sources.{name}: it has to be the block of a data set. In a shell:\n"
                "'data.sources={web: {train: web.txt, weight: 3}, books: {train: books.txt, weight: 1}}'"
            )
        if not re.fullmatch(r"\w+", str(name), re.ASCII):
            raise UserError(f'data.sources: "{name}" names no source. A name is made of letters, digits and _.')
        share = [key for key in map(str, source) if key in signatures.parameters(SHARE)]
        block = OmegaConf.create({"_target_": HUB if "path" in source else FILES})
        block.merge_with(OmegaConf.masked_copy(source, [key for key in map(str, source) if key not in share]))
        found[str(name)] = (block, OmegaConf.masked_copy(source, share))
    return found


def source_blocks(data: DictConfig) -> list[tuple[str, DictConfig]]:
    """Returns the block of each source of a mixture as the config has it, with its dotted key."""
    return [(f"data.sources.{name}", block) for name, block in (data.get("sources") or {}).items()]


def blocks(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Yields the blocks of a config that name a target, with their dotted keys."""
    for name in ("data", "tokenizer", "model", "objective", "distill", "adapter", "optim", "trainer"):
        if name in cfg:
            yield name, cfg[name]
    yield from ((f"data.sources.{name}", block) for name, (block, _) in sources(cfg.get("data")).items())
    for group in ("callbacks", "logger"):
        for name, block in (cfg.get(group) or {}).items():
            if block and name not in PUSH:
                yield f"{group}.{name}", block


def build(block: DictConfig, key: str, **given: Any) -> Any:
    """Calls the target of a block with its values.

    Args:
        key: the block's dotted name.
        given: more arguments, each passed on where the target has a parameter for it.
    """
    function = target(block, key)
    return function(**arguments(block, key, **given))


def target(block: DictConfig, key: str, get: Callable[[str], Any] = _locate) -> Any:
    """Returns what `get` finds under the name that a block has as `_target_`: by default the imported object.

    Raises:
        UserError: there is no such thing.
    """
    name = block.get("_target_") if isinstance(block, DictConfig) else None
    if name is None:
        raise UserError(f"{key} has no _target_: it is a new block, or its name is misspelt.")
    try:
        return get(name)
    except (ImportError, AttributeError, ValueError) as error:
        cause = error.__cause__
        why = f"{type(cause).__name__}: {first_line(cause)}" if cause else first_line(error)
        raise UserError(f"{key}._target_={name} can't be imported: {why}.") from error


def takes(block: DictConfig, key: str) -> Mapping[str, Parameter]:
    """Returns the parameters of a block's target; where it can be, without importing it."""
    return target(block, key, signatures.parameters)


def arguments(block: DictConfig, key: str, declared: str | None = None, **given: Any) -> dict[str, Any]:
    """Checks the values of a block, and returns them as arguments of its target.

    Args:
        key: the block's dotted name; empty for a whole config.
        declared: the import path of the class that declares the block's keys, if the block has no target.
        given: more arguments, each passed on where there is a parameter for it. A block can't have them.

    Raises:
        UserError: a key that is none, a value that is not of the annotated type, or a missing one.
    """
    parameters = signatures.parameters(declared) if declared else takes(block, key)
    meanings = signatures.meanings(declared or block._target_)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values: dict[str, Any] = OmegaConf.to_container(block)  # type: ignore[assignment]
    values.pop("_target_", None)
    names = {name: f"{key}.{name}".lstrip(".") for name in [*parameters, *values]}
    shares = signatures.parameters(SHARE) if key.startswith("data.sources.") else ()
    own = [name for name in [*parameters, *shares] if name not in given]
    for name, value in values.items():
        if name in given or not (anything or name in parameters):
            close = nearest(names[name], [f"{key}.{known}".lstrip(".") for known in own])
            own_target = not declared and not block._target_.startswith(signatures.READ)
            more = f"\nIf the file of an option sets it, ~{names[name]} leaves it out." if own_target else ""
            raise UserError(f'there is no key "{names[name]}".{close} Keys: {", ".join(own) or "none"}.{more}')
        if name in parameters:
            check_value(names[name], value, parameters[name].annotation, meanings.get(name, ""))
    values |= {name: value for name, value in given.items() if anything or name in parameters}
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in values:
            raise UserError(f"{names[name]} has to be given: add {names[name]}=… to the command.")
    return values


def check_value(key: str, value: Any, annotation: Any, meaning: str = "") -> None:
    """Refuses the value of a key that is not of the annotated type, as far as lmlab can say what this is.

    Types are strict: no text is taken for a number. A whole number may stand for any number.
    """
    kind = describe(annotation)
    if kind is None or fits(value, annotation):
        return
    close = nearest(str(value), choices(annotation))
    more = f"\nA mapping is, in a shell, '{key}={{KEY: VALUE}}'." if KINDS[dict] in kind else f"\n{meaning}".rstrip()
    raise UserError(f"{key}={json.dumps(value, ensure_ascii=False, default=str)}: it has to be {kind}.{close}{more}")


def fits(value: Any, annotation: Any) -> bool:
    """Returns whether a value is of an annotated type; True for an annotation that `describe` has no words for."""
    from pydantic import ValidationError

    if describe(annotation) is None:
        return True
    try:
        adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@cache
def adapter(annotation: Any) -> "TypeAdapter[Any]":
    """Returns what validates values of an annotated type. pydantic is imported here, as `--help` needs none of it."""
    from pydantic import TypeAdapter

    return TypeAdapter(annotation)


def describe(annotation: Any) -> str | None:
    """Returns the values that an annotation allows, in words; None where it says more than lmlab knows words for.

    >>> describe(Annotated[int, Ge(1)] | None)
    'a whole number, 1 or more, or null'
    """
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join(map(str, inner))}"
    if kind is Annotated:
        bounds = [BOUNDS[type(bound)].format(bound) for bound in inner[1:] if type(bound) in BOUNDS]
        plain = describe(inner[0])
        return plain and ", ".join([plain, *bounds])
    if kind is Callable:
        return KINDS[kind]
    if kind not in (*KINDS, Union, UnionType):
        return None
    words = [describe(one) for one in inner]
    if None in words:
        return None
    if kind in (list, Sequence) and words:
        return f"{KINDS[kind]} of which each is {words[0]}"
    return KINDS.get(kind) or ", or ".join(filter(None, words))


def choices(annotation: Any) -> list[str]:
    """Returns the values that an annotation lists one by one, as a person types them."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for inner in get_args(annotation) for value in choices(inner)]
