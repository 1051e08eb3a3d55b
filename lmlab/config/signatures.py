"""What a target takes as arguments, read in its source: to import it may take seconds."""

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Any, Optional, Union

from hydra._internal.utils import _locate

# Packages whose functions take what their source says; elsewhere decorators or metaclasses may change that.
READ = ("lmlab.", "lightning.")
PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (bool, float, int, str, dict, list, Sequence)}
PLAIN |= {"Any": Any, "Optional": Optional, "Union": Union}


def parameters(target: str) -> Mapping[str, Parameter]:
    """The parameters of a function or a class, by its dotted name.

    Annotations of plain types are as they are; others are empty where the target was not imported.

    Raises:
        ImportError, AttributeError, ValueError: there is no such thing.
    """
    found = read(target) if target.startswith(READ) else None
    return inspect.signature(_locate(target)).parameters if found is None else found


def read(target: str) -> dict[str, Parameter] | None:
    """The parameters as the source of the target says them; None where it does not define the target."""
    node = definition(target)
    if isinstance(node, ast.FunctionDef):
        return {parameter.name: parameter for parameter in declared(node.args)}
    if not isinstance(node, ast.ClassDef):
        return None
    if any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
        fields = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
        return {line.target.id: parameter(line.target.id, line.annotation, line.value) for line in fields}  # type: ignore[union-attr]
    made = next((line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == "__init__"), None)
    if made:
        _, *others = declared(made.args)
        return {parameter.name: parameter for parameter in others}
    return None if node.bases else {}


def definition(target: str) -> ast.stmt | None:
    """Where a thing is defined: in the module that its name says, or in the one that this has it from."""
    module, _, name = target.rpartition(".")
    for node in tree(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(f"{node.module}.{alias.name}")
    return None


@cache
def tree(module: str) -> list[ast.stmt]:
    """The statements of a module, which is not imported; none if it can't be found."""
    package, *parts = module.split(".")
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return []
    place = Path(spec.origin).parent.joinpath(*parts)
    file = next((file for file in (place.with_name(f"{place.name}.py"), place / "__init__.py") if file.is_file()), None)
    return ast.parse(file.read_text(encoding="utf-8")).body if file else []


def declared(arguments: ast.arguments) -> Iterator[Parameter]:
    """Parameters as a function declares them."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    for one, default in zip(positional, [*missing, *arguments.defaults], strict=True):
        yield parameter(one.arg, one.annotation, default)
    if arguments.vararg:
        yield Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL)
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield parameter(one.arg, one.annotation, default, Parameter.KEYWORD_ONLY)
    if arguments.kwarg:
        yield Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)


def parameter(
    name: str, annotation: ast.expr | None, default: ast.expr | None, kind: Any = Parameter.POSITIONAL_OR_KEYWORD
) -> Parameter:
    """A parameter from its nodes in the source; a default is not evaluated, and stands as `...`."""
    meaning: Any = Parameter.empty
    if annotation is not None and {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} <= {*PLAIN}:
        meaning = eval(ast.unparse(annotation), {"__builtins__": {}}, PLAIN)
    return Parameter(name, kind, default=Parameter.empty if default is None else ..., annotation=meaning)
