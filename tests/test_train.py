"""train.py as a user runs it: as a program where signals and processes matter, through its `main` elsewhere."""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from solq.commands.flags import command_line
from solq.data import shapes
from solq.data.transforms import TrainTransform
from solq.training.checkpoint import checkpoints, load_checkpoint

REPOSITORY = Path(__file__).parent.parent

# Nothing is left to the preset, which is tuned for other things.
MODEL = (
    "--model.backbone resnet10 --model.backbone-norm group --model.no-two-stage --model.dropout 0 --model.width 64 "
    "--model.encoder-layers 1 --model.decoder-layers 2 --model.feedforward 64 "
    "--model.vector-hidden 64 --model.num-queries 10 --model.num-coefficients 32 --model.mask-size 32"
)
SMALL = (
    "--device cpu --scales 64 --max-size 64 --eval-scale 64 --batch-size 4 --workers 0 --log-every 1 "
    "--lr 5e-4 --lr-backbone 5e-4 --model.lr-points 5e-5 --lr-drop 0.8 --clip-norm 1 --warmup-steps 0 --ema-decay 0 "
    f"--seed 3 --no-crop --save-every 100 {MODEL}"
).split()
# Everything with a state of its own: dropout, several sizes, worker processes, an average of the weights.
STATE = "--steps 16 --save-every 4 --workers 1 --scales 48 64 --model.dropout 0.1 --ema-decay 0.9"
STATEFUL = [*SMALL, *STATE.split()]


@pytest.fixture(scope="module")
def data(shapes_folder: Path) -> Path:
    return shapes_folder


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(data, tmp_path / "data")


def log(output: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what differs from run to run, the time that it took."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


# ---- as a program


def start(*flags: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`python train.py FLAGS` in a process group of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *map(str, flags)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Its output, and its errors if it was to end in one. If it hangs, it says where."""
    try:
        out, err = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise TimeoutError("\n".join(process.communicate())) from None
    assert process.returncode == code, out + err
    return out + err if code else out


def wait_for_steps(process: subprocess.Popen[str], output: Path, steps: int) -> None:
    """Return when the running process has logged so many steps."""
    end = time.monotonic() + 500
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if (output / "log.jsonl").read_text().count("\n") >= steps:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError(f"no {steps} steps in {output}")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    text = finish(start(*STATEFUL, "--data", data, "--output", output))
    assert "AP, IoU 0.50:0.95" in text
    assert str(output / "predictions.png") in text
    return output


def test_what_a_run_leaves(whole: Path, data: Path) -> None:
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, 17))
    losses = {f"loss_{kind}{layer}" for kind in ("ce", "bbox", "giou", "vector") for layer in ("", "_0")}
    for line in lines:
        assert set(line) == {"step", "loss", "grad_norm", "lr", "skipped_images", "non_finite_costs"} | losses
        assert line["non_finite_costs"] == 0
        weighted = sum(line[name] * {"ce": 2, "bbox": 5, "giou": 2}.get(name.split("_")[1], 1) for name in losses)
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
    assert [path.stem for path in checkpoints(whole / "checkpoints")] == ["step_00000016", "step_00000012"]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert len(metrics) == 24
    results = json.loads((whole / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {11, 12, 13}
    assert (whole / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "tensorboard").iterdir())


def test_learning_rates(whole: Path) -> None:
    """A step at 80 % of the run, of which the log has the rate of most layers."""
    assert [line["lr"] for line in log(whole)] == pytest.approx([5e-4] * 13 + [5e-5] * 3)


def test_average_of_the_weights(whole: Path) -> None:
    """The average is what is evaluated and handed on, and it is not the last weights."""
    state = load_checkpoint(checkpoints(whole / "checkpoints")[0])
    name = "class_embed.0.weight"
    with safe_open(whole / "model.safetensors", "pt") as file:
        exported = file.get_tensor(name)
    assert torch.equal(exported, state["ema"][f"module.{name}"])
    assert not torch.equal(exported, state["model"][name])


def test_kill_9_in_the_middle_and_resume(whole: Path, data: Path, tmp_path: Path) -> None:
    """The resumed run has the very losses of the run that nothing interrupted, to the last bit."""
    flags = (*STATEFUL, "--data", data, "--output", tmp_path / "run")
    process = start(*flags)
    wait_for_steps(process, tmp_path / "run", 6)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # what a kill in the middle of a line leaves
    text = finish(start(*flags, "--resume"))
    assert f"continuing {tmp_path / 'run'} after step " in text
    assert log(tmp_path / "run") == log(whole)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == json.loads(
        (whole / "metrics.json").read_text()
    )


def test_sigterm_then_a_checkpoint_cut_short(whole: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM saves and exits with 0; if what it saved is damaged, the checkpoint before is used, and said so."""
    flags = (*STATEFUL, "--data", data, "--output", tmp_path / "run")
    process = start(*flags)
    wait_for_steps(process, tmp_path / "run", 5)
    os.killpg(process.pid, signal.SIGTERM)  # the processes that load images get it too, as from a job scheduler
    text = finish(process)
    done = log(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {done} by SIGTERM: continue with --resume --output {tmp_path / 'run'}" in text
    newest, before = checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.stem == f"step_{done:08d}"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    newest.with_suffix(".unfinished").write_bytes(content[:1000])
    text = finish(start(*flags, "--resume"))
    assert f"checkpoint {newest} is damaged" in text
    assert f"continuing {tmp_path / 'run'} after step {int(before.stem.removeprefix('step_'))}\n" in text
    assert log(tmp_path / "run") == log(whole)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.unfinished"))


def test_error_while_images_are_loaded(own_data: Path, tmp_path: Path) -> None:
    """It ends the run, and the processes that load images, which its traceback holds on to."""
    for image in (own_data / "train2017").iterdir():
        cut_short(image)
    process = start(*SMALL, "--workers", "2", "--strict", "--data", own_data, "--output", tmp_path / "run")
    text = finish(process, code=1)
    assert text.splitlines()[-1].startswith("error: ")
    assert "restore the file or remove it" in text.splitlines()[-1]
    assert "Traceback" not in text


def test_two_processes_are_one(data: Path, tmp_path: Path, main: "Main") -> None:
    """Same batches, same losses, same detections, each image once. One of the images is damaged."""
    folder = shutil.copytree(data, tmp_path / "data")
    cut_short(folder / "train2017" / "000000000004.jpg")
    flags = [*SMALL, "--steps", "4", "--boundary-ap", "--data", folder, "--output"]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29731")
    two = start(*flags, tmp_path / "two", launcher=launcher)
    main(*flags, tmp_path / "one")
    finish(two)
    for line_of_one, line_of_two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert line_of_two == pytest.approx(line_of_one, rel=1e-4, abs=1e-6)
    assert log(tmp_path / "one")[-1]["skipped_images"] > 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for entries in results:
        assert sorted(entry["image_id"] for entry in entries) == [11] * 70 + [12] * 70 + [13] * 70
    scores = [sorted(entry["score"] for entry in entries) for entries in results]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


# ---- through main()


@dataclass
class Ended:
    out: str
    err: str
    code: int | str | None

    @property
    def error(self) -> str:
        """The one line that the run ended with."""
        assert isinstance(self.code, str), f"no error but {self}"
        assert self.code.startswith("error: ")
        assert "\n" not in self.code
        return self.code


Main = Callable[..., Ended]


def load_train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", REPOSITORY / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train = load_train()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Run train.py's `main` with flags; with `ok=False` it has to end in an error."""
    logger, handlers, threads = logging.getLogger(), logging.getLogger().handlers[:], torch.get_num_threads()

    def run(*flags: str | Path, ok: bool = True) -> Ended:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            train.main(command_line(train.__doc__))
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        ended = Ended(captured.out, captured.err, code)
        assert (code == 0) == ok, ended
        return ended

    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    logger.handlers[:] = handlers


def cut_short(image: Path) -> None:
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 3])


def test_ctrl_c_saves_and_exits(data: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    count_targets, calls = train.SetCriterion.count_targets, iter(range(99))

    def press(*args: Any) -> torch.Tensor:
        if next(calls) == 2:  # of one call in each step
            signal.raise_signal(signal.SIGINT)
        return count_targets(*args)

    monkeypatch.setattr(train.SetCriterion, "count_targets", staticmethod(press))
    before = signal.getsignal(signal.SIGINT)
    flags = [*SMALL, "--data", data, "--output", tmp_path / "run", "--steps", "5"]
    ended = main(*flags)
    assert f"stopped after step 3 by SIGINT: continue with --resume --output {tmp_path / 'run'}" in ended.out
    assert [path.stem for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
    main(*flags, "--resume")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_accumulated_parts_are_one_batch(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four images an epoch is one step of all of them, in one part or in two; they are not mirrored here."""
    monkeypatch.setattr(
        "solq.training.loaders.TrainTransform", lambda **settings: TrainTransform(**settings, flip=False)
    )
    shapes.generate(tmp_path / "data", num_train=4, num_val=1, image_size=64)
    for parts in (1, 2):
        flags = ["--data", tmp_path / "data", "--output", tmp_path / str(parts), "--accumulate", parts, "--steps", 3]
        main(*SMALL, *flags)
    for one, two in zip(log(tmp_path / "1"), log(tmp_path / "2"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_overfitting_eight_images(tmp_path: Path, main: Main) -> None:
    """Measured: box AP 1.00, mask AP 0.52 and 0.92 at an IoU of one half, in half a minute of one core."""
    shapes.generate(tmp_path / "data", num_train=8, num_val=1, image_size=64)
    recipe = (
        "--val-split train2017 --steps 300 --batch-size 8 --warmup-steps 20 --log-every 10 "
        "--model.vector-loss-weight 10 --lr 2e-3 --lr-backbone 2e-3 --model.lr-points 2e-4 --clip-norm 5 "
        "--model.two-stage --model.feedforward 128 "
        "--model.vector-hidden 256 --model.num-queries 12 --model.num-coefficients 36 --model.mask-size 16"
    )
    main(*SMALL, *recipe.split(), "--data", tmp_path / "data", "--output", tmp_path / "run")
    lines = log(tmp_path / "run")
    for name, factor in {"loss_ce": 10, "loss_bbox": 20, "loss_giou": 10, "loss_vector": 1.5, "loss": 2}.items():
        assert lines[-1][name] < lines[0][name] / factor, name
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["box/AP"] > 0.9
    assert metrics["mask/AP"] > 0.35
    assert metrics["mask/AP50"] > 0.7


def test_one_step_on_photographs(coco_tiny: Path, tmp_path: Path, main: Main) -> None:
    """The recipe of the r50 preset on COCO's own files, with a small model and small images."""
    flags = (
        "--preset r50 --device cpu --steps 1 --backbone-weights none --model.backbone resnet10 --workers 0 "
        f"--scales 96 128 --max-size 192 --eval-scale 96 {MODEL}"
    )
    main(*flags.split(), "--data", coco_tiny, "--output", tmp_path / "run")
    (line,) = log(tmp_path / "run")
    assert 0 < line["loss"] < 100
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert len(state["class_names"]) == 91  # COCO's ids are the labels
    assert state["class_names"][90] == "toothbrush"
    assert (tmp_path / "run" / "predictions.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 with loss scaling is for GPUs without bfloat16")
def test_float16(data: Path, tmp_path: Path, main: Main) -> None:
    flags = ["--device", "cuda", "--precision", "float16", "--steps", "4"]
    main(*SMALL, *flags, "--data", data, "--output", tmp_path / "run")
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert state["scaler"]["scale"] > 0


def test_mixed_precision(data: Path, tmp_path: Path, main: Main) -> None:
    flags = [*SMALL, "--steps", "3", "--data", data, "--output"]
    main(*flags, tmp_path / "exact")
    main(*flags, tmp_path / "rounded", "--precision", "bfloat16")
    for exact, rounded in zip(log(tmp_path / "exact"), log(tmp_path / "rounded"), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)
        assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize("coding", ["--model.mask-branch separate", "--model.mask-branch none", "--model.two-stage"])
def test_other_models(coding: str, data: Path, tmp_path: Path, main: Main) -> None:
    main(*SMALL, *coding.split(), "--steps", "2", "--data", data, "--output", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ("mask/AP" in metrics) == ("none" not in coding)


# ---- a loss that is not finite


@pytest.mark.parametrize("every", [1, 3])
def test_loss_that_is_not_finite(every: int, data: Path, tmp_path: Path, main: Main, monkeypatch: Any) -> None:
    """The message names the images of the first such step, even if it is noticed later."""
    poisoned: list[list[int]] = []

    class Poisoned(train.SetCriterion):
        def forward(self, outputs: Any, targets: Any, num_boxes: Any) -> Any:
            losses = super().forward(outputs, targets, num_boxes)
            if 5 in targets.image_ids.tolist():
                poisoned.append(targets.image_ids.tolist())
                losses["loss_ce"] = losses["loss_ce"] * float("nan")
            return losses

    monkeypatch.setattr(train, "SetCriterion", Poisoned)
    flags = ["--steps", "9", "--log-every", every, "--save-every", "9", "--data", data, "--output", tmp_path / "run"]
    error = main(*SMALL, *flags, ok=False).error
    images = error.split("of images ")[1].split(". No checkpoint")[0]
    assert sorted(map(int, images.split(", "))) == sorted(poisoned[0])
    assert "continue with --resume" in error
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_learning_rate_that_is_far_too_high(data: Path, tmp_path: Path, main: Main) -> None:
    flags = ["--lr", "1e30", "--clip-norm", "1e30", "--steps", "9", "--data", data, "--output", tmp_path / "run"]
    error = main(*SMALL, *flags, ok=False).error
    assert "is not finite; its batch is of images" in error
    assert "lower the learning rate" in error


# ---- bad input: one line, before training starts


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def train_file(folder: Path) -> Path:
    return folder / "annotations" / "instances_train2017.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: train_file(d).unlink(), r"instances_train2017.json"),
        (lambda d: (d / "annotations" / "instances_val2017.json").unlink(), r"instances_val2017.json"),
        (lambda d: train_file(d).write_text("no JSON"), r"instances_train2017.json is not JSON"),
        (lambda d: train_file(d).write_text("[1, 2]"), r"instances_train2017.json is not in COCO's format"),
        (lambda d: (train_file(d).unlink(), train_file(d).mkdir()), r"instances_train2017.json cannot be read"),
        (lambda d: edit(train_file(d), lambda c: c["annotations"][3].update(image_id=999)), r"image 999"),
        (lambda d: edit(train_file(d), lambda c: c["images"].clear()), r"instances_train2017.json has no images"),
        (lambda d: edit(train_file(d), lambda c: c["annotations"].clear()), r"has no instance to learn from"),
        (lambda d: (d / "train2017" / "000000000002.jpg").unlink(), r"000000000002.jpg"),
        (lambda d: shutil.rmtree(d / "val2017"), r"val2017"),
        (lambda d: edit(train_file(d), lambda c: c["categories"][0].update(name="disk")), r"different categories"),
    ],
    ids=[
        "train_missing",
        "val_missing",
        "not_json",
        "not_coco",
        "unreadable",
        "missing_image_of_annotation",
        "empty_split",
        "no_annotation",
        "image_file_missing",
        "folder_missing",
        "other_categories",
    ],
)
def test_damaged_datasets(
    damage: Callable[[Path], object], message: str, own_data: Path, tmp_path: Path, main: Main
) -> None:
    damage(own_data)
    ended = main(*SMALL, "--data", own_data, "--output", tmp_path / "run", ok=False)
    assert message in ended.error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_category_ids_with_gaps(own_data: Path, tmp_path: Path, main: Main) -> None:
    def spread(content: dict[str, Any]) -> None:
        for entry in content["categories"]:
            entry["id"] = entry["id"] * 1000 + 7
        for entry in content["annotations"]:
            entry["category_id"] = entry["category_id"] * 1000 + 7

    for split in ("train", "val"):
        edit(own_data / "annotations" / f"instances_{split}2017.json", spread)
    main(*SMALL, "--steps", "1", "--data", own_data, "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {entry["category_id"] for entry in results} <= {label * 1000 + 7 for label in range(1, 7)}
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert len(state["class_names"]) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_images_are_skipped_and_counted(workers: int, own_data: Path, tmp_path: Path, main: Main) -> None:
    """Five of ten, so that whole batches are; one for validation. `--strict` stops at the first."""
    for number in (1, 3, 5, 7, 9, 12):
        cut_short(own_data / ("train2017" if number < 11 else "val2017") / f"{number:012d}.jpg")
    flags = [*SMALL, "--batch-size", "1", "--steps", "10", "--data", own_data, "--workers", workers]
    main(*flags, "--output", tmp_path / "run")
    lines = log(tmp_path / "run")
    assert len(lines) == 10
    assert lines[-1]["skipped_images"] == 5
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {11, 13}
    error = main(*flags, "--output", tmp_path / "strict", "--strict", ok=False).error
    assert ".jpg cannot be used" in error
    assert "restore the file or remove it" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--foo 3", "--foo"),
        ("--preset r18", "r18"),
        ("--batch-size 0", "batch_size is 0"),
        ("--accumulate 3", "must be a multiple of accumulate"),
        ("--resume", "holds no run to continue"),
        ("--model.num-heads 5", "must be a multiple of n_heads"),
        ("--backbone-weights nowhere.pth", "nowhere.pth: no such file"),
        ("--backbone-weights imagenet", "resnet10 has no ImageNet weights"),
        ("--init-weights nowhere.pt", "nowhere.pt: no such file"),
        ("--model.mask-coding pca", "the pca mask coding has to be fitted first"),
        ("--model.mask-coding-weights train.py", "train.py"),
        ("--model.freeze-detector", "leaves nothing to train without --model.mask-branch separate"),
        ("--data nowhere", "nowhere"),
        pytest.param(
            "--device cuda",
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_wrong_settings(flags: str, message: str, data: Path, tmp_path: Path, main: Main) -> None:
    ended = main(*SMALL, "--data", data, "--output", tmp_path / "run", *flags.split(), ok=False)
    assert message in ended.error
    assert not (tmp_path / "run" / "log.jsonl").exists()


# ---- checkpoints that cannot be continued


@pytest.fixture
def started(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(whole, tmp_path / "run")


def test_checkpoints_that_cannot_be_continued(started: Path, own_data: Path, main: Main) -> None:
    flags = [*STATEFUL, "--data", own_data, "--output", started]
    before = (started / "log.jsonl").read_text()
    assert "holds a run already: add --resume" in main(*flags, ok=False).error
    error = main(*flags, "--resume", "--batch-size", "2", ok=False).error
    assert "is of a run with batch_size 4 but now it is 2" in error
    error = main(*flags, "--resume", "--model.width", "128", ok=False).error
    assert "is of a run with model.width 64 but now it is 128" in error
    for split in ("train", "val"):
        path = own_data / "annotations" / f"instances_{split}2017.json"
        edit(path, lambda content: content["categories"][0].update(name="disk"))
    error = main(*flags, "--resume", ok=False).error
    assert "the checkpoint was trained on" in error
    assert "disc" in error
    for path in checkpoints(started / "checkpoints"):
        path.write_bytes(path.read_bytes()[:100])
    assert "is damaged or not a checkpoint" in main(*flags, "--resume", ok=False).error
    assert (started / "log.jsonl").read_text() == before


def test_killed_before_the_first_checkpoint(started: Path, whole: Path, data: Path, main: Main) -> None:
    """There is nothing to continue, so the run starts again, as it did."""
    shutil.rmtree(started / "checkpoints")
    (started / "metrics.json").unlink()
    ended = main(*STATEFUL, "--data", data, "--output", started, "--resume", "--steps", "2")
    assert "holds no checkpoint yet: starting again from step 0" in ended.out
    for again, first in zip(log(started), log(whole)[:2], strict=True):
        assert again == pytest.approx(first, rel=1e-4)


def test_a_finished_run_can_be_made_longer(started: Path, data: Path, main: Main) -> None:
    flags = ["--data", data, "--output", started, "--resume", "--steps", "18", "--lr", "1e-5"]
    ended = main(*STATEFUL, *flags)
    assert "after step 16" in ended.out
    lines = log(started)
    assert [line["step"] for line in lines[16:]] == [17, 18]
    assert [line["lr"] for line in lines[16:]] == pytest.approx([1e-6, 1e-6])  # the new rate, after its drop


def test_full_disk(data: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = torch.save, iter(range(99))

    def fail(*args: Any) -> None:
        if next(count) > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(torch, "save", fail)
    flags = ["--steps", "4", "--save-every", "2", "--data", data, "--output", tmp_path / "run"]
    error = main(*SMALL, *flags, ok=False).error
    assert "step_00000004.pt cannot be written" in error
    assert "No space left on device" in error
    assert "free some space" in error
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_checkpoint(path)["step"] == 2


def test_detector_first_then_its_masks(started: Path, data: Path, tmp_path: Path, main: Main) -> None:
    """A separate mask branch is trained on a finished detector, which stays as it is (paper, Table 2)."""
    newest = checkpoints(started / "checkpoints")[0]
    flags = ["--model.mask-branch", "separate", "--init-weights", newest, "--model.freeze-detector", "--steps", "2"]
    main(*SMALL, *flags, "--data", data, "--output", tmp_path / "masks")
    before = load_checkpoint(newest)["model"]
    after = load_checkpoint(checkpoints(tmp_path / "masks" / "checkpoints")[0])["model"]
    shared = [key for key in after if key in before]
    assert len(shared) > 100
    assert all(torch.equal(after[key], before[key]) for key in shared)
    lines = log(tmp_path / "masks")
    assert lines[1]["loss_mask"] != lines[0]["loss_mask"]
