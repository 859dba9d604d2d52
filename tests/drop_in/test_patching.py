"""What patching says of packages that it cannot patch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from solq.drop_in.patching import Patch, Replacement, Versions

RANGE = r"some_package 1\.9 to 2\.3 is known to work$"


def nothing() -> Iterator[Replacement]:
    return iter(())


@pytest.fixture
def patch() -> Patch:
    return Patch(Versions("some_package", "1.9", "2.3"), nothing)


def install(folder: Path, version: str) -> None:
    """As pip would: the package, and the metadata of a distribution by another name."""
    (folder / "some_package").mkdir()
    (folder / "some_package" / "__init__.py").touch()
    metadata = folder / f"some_lite-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-lite\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text("some_package\n")


def test_a_missing_package(patch: Patch) -> None:
    with pytest.raises(ImportError, match=rf"^some_package is not installed: {RANGE}"):
        patch.patch()


def test_a_folder_of_that_name_is_no_package(patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"^some_package is not installed: {RANGE}"):
        patch.patch()


@pytest.mark.parametrize("version", ["0.14.2", "1.8.0.post2"])
def test_a_version_that_is_too_old(patch: Patch, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, version)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"^some-lite {version} is too old: {RANGE}"):
        patch.patch()


@pytest.mark.parametrize("version", ["1.9", "1.10.0rc1", "2.3.4", "3.0.0.dev0"])
def test_a_version_in_which_nothing_is_recognized(
    patch: Patch, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer versions are tried, and refused only when nothing is found."""
    install(tmp_path, version)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"^the installed some_package has no multi-scale .* known here: {RANGE}"):
        patch.patch()
