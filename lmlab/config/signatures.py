"""Reads in its source what a target takes as arguments: to import it may take seconds."""

import ast
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from inspect import Parameter
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from annotated_types import Ge, Gt, Le, Len, Lt
from hydra._internal.utils import _locate

READ = ("lmlab.", "lightning.")
"""Packages whose functions take what their source says; elsewhere decorators or metaclasses may change that."""
PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (bool, float, int, str, dict, list, Sequence)}
PLAIN |= {kind.__name__: kind for kind in (Ge, Gt, Le, Len, Lt)}
PLAIN |= {
    "Annotated": Annotated,
    "Any": Any,
    "Callable": Callable,
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
}
"""The names that an annotation may consist of to be evaluated."""


def parameters(target: str) -> Mapping[str, Parameter]:
    """Returns the parameters of a function or a class.

    Annotations of plain types are evaluated; others are empty where the target was not imported. Nor are defaults
    evaluated then: each stands as `...`.

    Args:
        target: its dotted name.

    Raises:
        ImportError, AttributeError, ValueError: there is no such thing.
    """
    declared = read(target) if target.startswith(READ) else None
    return inspect.signature(_locate(target)).parameters if declared is None else declared


@cache
def read(target: str) -> Mapping[str, Parameter] | None:
    """Returns the parameters as the source of the target declares them; None where it does not define the target."""
    node = definition(target)
    if isinstance(node, ast.FunctionDef):
        return compiled(node.args)
    if not isinstance(node, ast.ClassDef):
        return None
    if any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
        fields = [line for line, _ in fields_of(target)]
        names = [ast.arg(ast.unparse(line.target), line.annotation) for line in fields]
        return compiled(ast.arguments([], names, None, [], [], None, [line.value for line in fields if line.value]))
    made = next((line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == "__init__"), None)
    if made:
        _, *others = compiled(made.args).items()
        return dict(others)
    return None if node.bases else {}


def compiled(arguments: ast.arguments) -> Mapping[str, Parameter]:
    """Returns the parameters of a function that declares these arguments."""
    module = ast.parse("def function(): ...")
    function = module.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.args = copy.deepcopy(arguments)
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg) and node.annotation and not is_plain(node.annotation):
            node.annotation = None
    function.args.defaults = [ast.Constant(...) for _ in arguments.defaults]
    function.args.kw_defaults = [default and ast.Constant(...) for default in arguments.kw_defaults]
    namespace: dict[str, Any] = {"__builtins__": {}, **PLAIN}
    exec(compile(ast.fix_missing_locations(module), "", "exec"), namespace)
    return inspect.signature(namespace["function"]).parameters


def is_plain(annotation: ast.expr) -> bool:
    """Returns whether an annotation names nothing but plain types."""
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} <= PLAIN.keys()


def meanings(target: str) -> dict[str, str]:
    """Returns what the fields of a dataclass mean, by the text below each; {} for a target that is not to be read."""
    if not target.startswith(READ):
        return {}
    return {ast.unparse(line.target): text for line, text in fields_of(target) if text}


def fields_of(target: str) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Yields the fields of a dataclass, those of its bases first, each with the text below it.

    A field that a base has too has the place of that, as in the constructor of the class.
    """
    node, fields = definition(target), dict[str, tuple[ast.AnnAssign, str]]()
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            of_base = fields_of(f"{target.rpartition('.')[0]}.{ast.unparse(base)}")
            fields |= {ast.unparse(line.target): (line, text) for line, text in of_base}
        for line, below in pairwise([*node.body, ast.Pass()]):
            if isinstance(line, ast.AnnAssign):
                value = below.value if isinstance(below, ast.Expr) else None
                text = " ".join(str(value.value).split()) if isinstance(value, ast.Constant) else ""
                fields[ast.unparse(line.target)] = line, text
    yield from fields.values()


def definition(target: str) -> ast.stmt | None:
    """Returns the statement that defines a thing, in the module of its name or in the one that this has it from."""
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
    """Returns the statements of a module, which is not imported; none if it can't be found."""
    package, *parts = module.split(".")
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin).parent.joinpath(*parts)
    file = next((file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()), None)
    return ast.parse(file.read_text(encoding="utf-8")).body if file else []
