"""Reads KEY=VALUE on the command line into a dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin

from lmlab.errors import UserError, nearest


@dataclass
class Arguments:
    """The base of a benchmark's settings, which take `lmlab.KEY=VALUE` if they have a field `lmlab`."""

    @classmethod
    def parse(cls, words: list[str], lmlab_keys: Callable[[], set[str]] = set) -> Self:
        """Returns the settings that words give; `lmlab_keys` is called only to find the nearest right name."""
        known = {field.name: field for field in fields(cls)}
        passed_on = known.pop("lmlab", None) is not None
        values: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if passed_on and key.startswith("lmlab."):
                values["lmlab"] = (*values.get("lmlab", ()), word.removeprefix("lmlab."))
            elif key in known and equals:
                values[key] = cls.value(key, value, known[key].type, known[key].default)
            else:
                others = {f"lmlab.{name}" for name in lmlab_keys()} if passed_on else set()
                meant = nearest(key, {*known, *others})
                raise UserError(f'there is no key "{key}".{meant} Keys: {", ".join(known)}.')
        return cls(**values)

    @staticmethod
    def value(key: str, value: str, kind: Any, default: Any) -> Any:
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                options = ", ".join(get_args(kind))
                raise UserError(f'{key} is one of {options}, not "{value}".{nearest(value, get_args(kind))}')
            return value
        try:
            number = kind(value)
        except ValueError:
            raise UserError(f"{key} is a number, not {value}.") from None
        if (kind is int and number < min(1, default)) or (kind is float and not 0 < number < float("inf")):
            raise UserError(f"{key} is more than 0, not {value}.")
        return number

    def words(self) -> list[str]:
        """Returns the fewest words that give these settings."""
        default, values = vars(type(self)()), vars(self) | {"lmlab": ()}
        changed = [f"{key}={value}" for key, value in values.items() if key != "lmlab" and value != default[key]]
        return changed + [f"lmlab.{word}" for word in getattr(self, "lmlab", ())]
