"""The flags that a dataclass declares, those of its parts included."""

import dataclasses
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.conf import Fixed, arg

from megatron_mimo.settings.marks import Bound


@dataclass(frozen=True, slots=True)
class Declared:
    """A flag, as its field declares it.

    Attributes:
        name: Name in kebab case, without leading dashes.
        path: Names of the fields that lead to it from the outermost dataclass; its own is the last.
        owner: Dataclass that has the field.
        kind: Type of its values, without None and without marks.
        marks: Marks of the annotation, beside the type.
        default: Value where the flag is left out; `dataclasses.MISSING` for a required flag.
        is_optional: Whether the value may be None.
    """

    name: str
    path: tuple[str, ...]
    owner: type
    kind: Any
    marks: tuple[Any, ...]
    default: Any
    is_optional: bool = False

    @property
    def item_kind(self) -> Any:
        """Type of each value of a flag that takes several; else that of its value."""
        return get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind

    def value(self, config: Any) -> Any:
        """The flag's value in an object of the outermost dataclass."""
        return reduce(getattr, self.path, config)

    def marked[M](self, kind: type[M]) -> list[M]:
        """The marks of a kind."""
        return [mark for mark in self.marks if isinstance(mark, kind)]

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Ranges that its numbers must be in."""
        return tuple(mark for mark in self.marks if isinstance(mark, Bound))

    @property
    def metavar(self) -> str | None:
        """Placeholder of the value in help texts; None for that of the type."""
        return _last(mark.metavar for mark in _arguments(self.marks))


def declared(root: Any) -> tuple[Declared, ...]:
    """Every flag of a dataclass in the order of its fields, those of nested dataclasses in place.

    Args:
        root: Dataclass of settings.
    """
    return _all(root)


@cache
def _all(root: Any) -> tuple[Declared, ...]:
    return tuple(_declared(root, ()))


def _declared(root: Any, path: tuple[str, ...]) -> Iterator[Declared]:
    hints = get_type_hints(root, include_extras=True)
    for field in dataclasses.fields(root):
        kind, marks = _strip(hints[field.name])
        here = (*path, field.name)
        if Fixed in marks:
            continue  # Not a flag: it follows from others.
        if dataclasses.is_dataclass(kind):
            yield from _declared(kind, here)
            continue
        name = _last(mark.name for mark in _arguments(marks))
        yield Declared(
            name=field.name.replace("_", "-") if name is None else name,
            path=here,
            owner=root,
            kind=kind,
            marks=marks,
            default=_default(field),
            is_optional=_may_be_none(hints[field.name]),
        )


def values(config: Any) -> dict[str, Any]:
    """Every flag's value in a dataclass's object, by the flag's name."""
    return {flag.name: flag.value(config) for flag in declared(type(config))}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def _arguments(marks: Iterable[Any]) -> Iterator[Any]:
    """Arguments of the annotation for tyro."""
    settings: Any = type(arg())  # The type has no public name.
    return (mark for mark in marks if isinstance(mark, settings))


def _last(texts: Iterable[str | None]) -> str | None:
    """The text of the outermost annotation, which comes last."""
    return next((text for text in reversed(list(texts)) if text is not None), None)


def _may_be_none(hint: Any) -> bool:
    """Whether None is one of the types of an annotation, however deep."""
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return any(_may_be_none(inner) for inner in get_args(hint))
    return hint is type(None)


def _strip(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations and without None, and the annotations."""
    marks: tuple[Any, ...] = ()
    while True:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            marks += tuple(more)
        elif get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
            options = [option for option in get_args(hint) if option is not type(None)]
            hint = Union[tuple(options)]  # noqa: UP007 (of a tuple)
        else:
            return hint, marks
