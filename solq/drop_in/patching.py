"""Attributes of another codebase, replaced and put back exactly as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any, NamedTuple

_ABSENT = object()


class Replacement(NamedTuple):
    """``owner.name`` is to become `new`; owners are modules and classes."""

    owner: Any
    name: str
    new: object

    def __str__(self) -> str:
        owner = (
            f"{self.owner.__module__}.{self.owner.__qualname__}"
            if isinstance(self.owner, type)
            else self.owner.__name__
        )
        return f"{owner}.{self.name}"


class Patch:
    """The replacements in one package.

    Args:
        package: the name it is imported by.
        known_to_work: the versions, for error messages, as pip would read them.
        find: imports what is needed of the package and yields the replacements.
    """

    def __init__(self, package: str, known_to_work: str, find: Callable[[], Iterator[Replacement]]) -> None:
        self.package, self.known_to_work, self.find = package, known_to_work, find
        self._applied: list[Replacement] = []
        self._originals: list[object] = []

    def patch(self) -> list[str]:
        """Replace, unless done already.

        Returns:
            The full names of all that is replaced now.

        Raises:
            ImportError: if the package is not installed, or has nothing that could be replaced.
        """
        if not self._applied:
            if find_spec(self.package) is None:
                raise ImportError(
                    f"{self.package} is not installed: {self.package}{self.known_to_work} is known to work"
                )
            replacements = list(self.find())
            if not replacements:
                installed = [f"{name} {version(name)}" for name in packages_distributions().get(self.package, [])]
                raise ImportError(
                    f"{' '.join(installed) or self.package} has no multi-scale deformable attention known here: "
                    f"{self.package}{self.known_to_work} is known to work"
                )
            for owner, name, new in replacements:
                self._originals.append(vars(owner).get(name, _ABSENT))  # the very object, a staticmethod for example
                setattr(owner, name, new)
            self._applied = replacements
        return [str(replacement) for replacement in self._applied]

    def unpatch(self) -> None:
        """Put the original objects back, if they are replaced."""
        for (owner, name, _), original in zip(self._applied, self._originals, strict=True):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._applied, self._originals = [], []

    @contextmanager
    def patched(self) -> Iterator[list[str]]:
        """Replace inside the context; what was replaced before it stays so after it."""
        was_patched = bool(self._applied)
        try:
            yield self.patch()
        finally:
            if not was_patched:
                self.unpatch()
