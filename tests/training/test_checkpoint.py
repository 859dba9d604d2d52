"""Checkpoints: written whole or not at all, and read without running code from them."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from solq.training.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint


def state(step: int) -> dict[str, object]:
    return {"step": step, "model": {"weight": torch.full((100_000,), float(step))}, "names": ["a", "b"], "ema": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 7, state(7))
    assert path == tmp_path / "checkpoints" / "step_00000007.pt"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], state(7)["model"]["weight"])
    assert (loaded["step"], loaded["names"], loaded["ema"]) == (7, ["a", "b"], None)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save_checkpoint(tmp_path, step, state(step))
    (tmp_path / "step_00001001.pt.unfinished").write_bytes(b"left by a process that was killed")
    save_checkpoint(tmp_path, 2000, state(2000))
    assert sorted(os.listdir(tmp_path)) == ["step_00001000.pt", "step_00002000.pt"]
    assert [path.stem for path in checkpoints(tmp_path)] == ["step_00002000", "step_00001000"]
    assert load_newest(tmp_path)["step"] == 2000


def test_none_is_not_an_error(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_newest_is_reported_and_the_one_before_used(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    newest = save_checkpoint(tmp_path, 2, state(2))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    assert load_newest(tmp_path)["step"] == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"checkpoint {newest} is damaged")
    assert "\n" not in message


def test_all_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"step_00000001.pt is damaged or not a checkpoint") as error:
        load_newest(tmp_path)
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: no such file"):
        load_checkpoint(tmp_path / "nowhere.pt")
    for content in ({"weights": 1}, [1, 2]):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other.pt has no entry 'model'"):
            load_checkpoint(tmp_path / "other.pt")
    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")


# ---- writing fails


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 200 kB, which half a checkpoint is: a write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_fails_half_way(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=r"step_00000002.pt cannot be written .* continue with --resume") as error:
        save_checkpoint(tmp_path, 2, state(2))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["step_00000001.pt"]
    assert load_newest(tmp_path)["step"] == 1


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device.*free some space"):
        save_checkpoint(tmp_path, 2, state(2))
    assert os.listdir(tmp_path) == ["step_00000001.pt"]


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """kill -9 when the file is complete but not yet in its place: the checkpoint before is still the newest."""
    save_checkpoint(tmp_path, 1, state(1))
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from solq.training.checkpoint import save_checkpoint\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(Path(sys.argv[1]), 2, {'step': 2, 'model': torch.zeros(100_000)})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt", "step_00000002.pt.unfinished"]
    assert load_newest(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, 3, state(3))
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt", "step_00000003.pt"]
