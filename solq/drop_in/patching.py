"""Replace attributes of another codebase, and put them back exactly as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any, NamedTuple

_ABSENT = object()


class Versions(NamedTuple):
    """The oldest and the newest version of a package that the tests were run with, as "major.minor"."""

    package: str
    oldest: str
    newest: str
    evidence: str = "is known to work"

    def __str__(self) -> str:
        return f"{self.package} {self.oldest} to {self.newest} {self.evidence}"

    def check(self) -> None:
        """Raise an ImportError for a package that is missing or too old; newer versions are tried."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ImportError(f"{self.package} is not installed: {self}")
        for distribution in packages_distributions().get(self.package, []):
            if _release(version(distribution)) < _release(self.oldest):
                raise ImportError(f"{distribution} {version(distribution)} is too old: {self}")


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(".")[:2])


class Replacement(NamedTuple):
    """The attribute `name` of a module or class `owner`, to be replaced by `new`."""

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
        known_to_work: name and versions of the package.
        find: imports the needed modules of the package and yields the replacements.
    """

    def __init__(self, known_to_work: Versions, find: Callable[[], Iterator[Replacement]]) -> None:
        self.known_to_work, self.find = known_to_work, find
        self._applied: list[Replacement] = []
        self._originals: list[object] = []

    def patch(self) -> list[str]:
        """Apply the replacements, unless that is done already, and return the full names of the replaced attributes.

        Raises:
            ImportError: the package is not installed, is too old, or has nothing that could be replaced.
        """
        if not self._applied:
            self.known_to_work.check()
            replacements = list(self.find())
            if not replacements:
                package = self.known_to_work.package
                raise ImportError(
                    f"the installed {package} has no multi-scale deformable attention known here: {self.known_to_work}"
                )
            for owner, name, new in replacements:
                self._originals.append(vars(owner).get(name, _ABSENT))  # unbound, such as a staticmethod
                setattr(owner, name, new)
            self._applied = replacements
        return [str(replacement) for replacement in self._applied]

    def unpatch(self) -> None:
        """Put the original objects back."""
        for (owner, name, _), original in zip(self._applied, self._originals, strict=True):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._applied, self._originals = [], []

    @contextmanager
    def patched(self) -> Iterator[list[str]]:
        """Patch inside the context; a package that was patched before it stays so after it."""
        was_patched = bool(self._applied)
        try:
            yield self.patch()
        finally:
            if not was_patched:
                self.unpatch()
