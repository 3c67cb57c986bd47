"""Which weights or modules a caller means, by name."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Selection = str | Iterable[str] | Callable[[str, Any], bool]
Choice = Callable[[Sequence[str], Any], bool]


def choice(argument: str, selection: Selection | None, default: bool = False, *, by_owner: bool = False) -> Choice:
    """A function of all names of a thing and the thing itself: whether ``selection`` means it, by one of the names.

    Patterns are those of a shell and match a whole name; with ``by_owner`` also the part before its last dot, the
    module of a parameter. A function gets one full name after the other. ``None`` gives ``default``.

    Raises:
        TypeError: ``selection``, which the caller knows as ``argument``, is none of these.
    """
    if selection is None:
        return lambda names, thing: default
    if callable(selection):
        return lambda names, thing: any(selection(name, thing) for name in names)
    listed = selection if isinstance(selection, Iterable) else [selection]
    patterns = [selection] if isinstance(selection, str) else list(listed)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be name patterns or a function, got {selection!r}")

    def matches(names: Sequence[str], thing: Any) -> bool:
        known = [*names, *(name.rpartition(".")[0] for name in names if by_owner)]
        return any(fnmatchcase(name, pattern) for name in known for pattern in patterns)

    return matches


def included(include: Selection | None, exclude: Selection | None, *, by_owner: bool = False) -> Choice:
    """Whether one of the names is included and none excluded."""
    wanted = choice("include", include, True, by_owner=by_owner)
    unwanted = choice("exclude", exclude, by_owner=by_owner)
    return lambda names, thing: wanted(names, thing) and not unwanted(names, thing)


def reusable(selection: Selection | None) -> Selection | None:
    """The same, which can be read more than once."""
    if selection is None or callable(selection) or isinstance(selection, str) or not isinstance(selection, Iterable):
        return selection
    return list(selection)
