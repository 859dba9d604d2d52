"""The command line as a user types it: what it writes, what it says, and the status it ends with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import solq
from solq.__main__ import COMMANDS, main
from solq.commands.eval import measure
from solq.commands.predict import image_ids, output_names
from solq.data import shapes
from solq.detections import ModelMeta


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, for the classes of the shapes dataset."""
    classes = ["", *shapes.CLASS_NAMES]
    model = tiny.solq_model(ModelMeta(classes, list(range(len(classes))), 64, 64), num_classes=len(classes))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    solq.save(model, path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str:
    """The status that `solq ARGUMENTS` ends with, or the line it ends with."""
    monkeypatch.setattr(sys, "argv", ["solq", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code if end.code is not None else 0
    return 0


# ---- commands


def test_help_is_quick_and_complete(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.endswith(f"solq {solq.__version__}\n")
    code = "import sys, solq.__main__ as m; m.help_text(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_command(monkeypatch):
    assert str(run(monkeypatch, "predit")).startswith("error: there is no command 'predit', but predict, eval")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(monkeypatch, capsys, name):
    assert run(monkeypatch, name, "--help") == 0
    assert f"usage: solq {name}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["predict", "--help"], ["eval", "--bogus"]])
def test_flags_are_answered_before_torch_is_imported(flags):
    code = (
        "import sys; from solq.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "False"


# ---- predict


def test_predict_writes_pictures_and_results(monkeypatch, capsys, checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.write_image(folder / "7.png", (40, 60), 1)
    tiny.write_image(folder / "12.jpg", (50, 30), 2)
    alone = tiny.write_image(tmp_path / "3.png", (64, 64), 3)
    output, flags = tmp_path / "new" / "output", ["--threshold", 0, "--precision", "float32"]
    assert run(monkeypatch, "predict", checkpoint, folder, alone, *flags, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "in 3 images" in printed
    assert "images per second" in printed
    assert {path.name for path in output.iterdir()} == {"7.jpg", "12.jpg", "3.jpg", "results.json"}
    assert all(max(Image.open(output / name).size) >= 480 for name in ("7.jpg", "12.jpg", "3.jpg"))
    results = json.loads((output / "results.json").read_text())
    assert {(entry["image_id"], entry["file_name"]) for entry in results} == {
        (7, "7.png"),
        (12, "12.jpg"),
        (3, "3.png"),
    }
    predictor = solq.Predictor(checkpoint)
    expected = predictor(alone, threshold=0)
    of_alone = [entry for entry in results if entry["image_id"] == 3]
    assert [entry["category_id"] for entry in of_alone] == expected.labels.tolist()
    decoded = coco_mask.decode([entry["segmentation"] for entry in of_alone])
    assert (torch.from_numpy(decoded).permute(2, 0, 1).bool() != expected.masks).float().mean() < 1e-3


def test_predict_goes_on_after_bad_files_and_says_so(monkeypatch, capsys, checkpoint, tmp_path):
    good = tiny.write_image(tmp_path / "good.png")
    bad, empty = tmp_path / "bad.jpg", tmp_path / "empty"
    bad.write_bytes(good.read_bytes()[:200])
    empty.mkdir()
    output = tmp_path / "output"
    missing = tmp_path / "missing.png"
    assert run(monkeypatch, "predict", checkpoint, bad, empty, missing, good, "--output", output) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4
    assert all(line.startswith("error: ") for line in errors)
    assert "empty holds no images" in errors[0]
    assert "bad.jpg cannot be read as an image" in errors[1]
    assert "missing.png: no such file" in errors[2]
    assert "3 of the files given could not be used" in errors[3]
    assert {path.name for path in output.iterdir()} == {"good.jpg", "results.json"}


def test_predict_refuses_what_cannot_work(monkeypatch, checkpoint, tmp_path):
    image = tiny.write_image(tmp_path / "image.png")
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    not_one = tmp_path / "weights.pth"
    not_one.write_bytes(b"no checkpoint")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((checkpoint, image, "--class-names", names), "class_names has 2 entries"),
        ((checkpoint, image, "--class-names", image), "image.png is no text in UTF-8"),
        ((checkpoint, image, "--class-names", tmp_path / "none.txt"), "none.txt: no such file"),
        ((checkpoint, image, "--dtype", "int8"), "invalid choice 'int8' for argument '--dtype/--precision'"),
        ((checkpoint, image, "--bogus", 3), "Unrecognized options: --bogus"),
        ((checkpoint, image, "--output", tmp_path), "give --output another folder"),
        ((not_one, image), "weights.pth is refused: it is damaged, or a pickle"),
        ((tmp_path / "missing.pth", image), "no such file"),
        ((checkpoint,), "no images are given"),
        ((checkpoint, image, "--threshold", 2), "must be in 0..1"),
    ]
    for arguments, message in cases:
        if "--output" not in arguments:
            arguments = (*arguments, "--output", tmp_path / "output")
        ended = run(monkeypatch, "predict", *arguments)
        assert isinstance(ended, str), message
        assert ended.startswith("error: ")
        assert message in ended
        assert "\n" not in ended


def test_predict_videos(monkeypatch, capsys, checkpoint, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for index in range(7):
        writer.write(np.full((64, 96, 3), 30 * index, np.uint8))
    writer.release()
    (tmp_path / "broken.avi").write_bytes(b"no video")
    output = tmp_path / "output"
    videos = (clip, tmp_path / "broken.avi")
    assert run(monkeypatch, "predict", checkpoint, *videos, "--output", output, "--threshold", 0, "--top-k", 2) == 1
    assert "broken.avi cannot be opened" in capsys.readouterr().err
    written = cv2.VideoCapture(str(output / "clip.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 7
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    results = json.loads((output / "results.json").read_text())
    assert [entry["image_id"] for entry in results] == [frame for frame in range(7) for _ in range(2)]


def test_videos_without_opencv(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    ended = run(monkeypatch, "predict", checkpoint, tmp_path / "clip.mp4", "--output", tmp_path / "output")
    assert ended == "error: videos need OpenCV: pip install solq[video]"


def test_names_and_ids_of_pictures():
    files = [Path("a/1.jpg"), Path("b/1.png"), Path("c/x.png")]
    assert output_names(files, ".jpg") == ["1.jpg", "1-2.jpg", "x.jpg"]
    assert output_names([Path("a/x.mp4"), Path("x.avi")], ".mp4") == ["x.mp4", "x-2.mp4"]
    assert output_names([Path("webcam:1")], ".mp4") == ["webcam1.mp4"]
    assert image_ids(files) == [1, 2, 3]
    assert image_ids([Path("000000000139.jpg"), Path("000000000285.jpg")]) == [139, 285]
    assert image_ids([Path("7.jpg"), Path("007.png")]) == [1, 2]


# ---- eval


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_coco(tmp_path_factory.mktemp("dataset"), shapes.CLASS_NAMES)


def test_eval(monkeypatch, capsys, checkpoint, dataset, tmp_path):
    arguments = ("--data", dataset, "--output", tmp_path, "--boundary", "--per-class", "--workers", 0)
    assert run(monkeypatch, "eval", checkpoint, *arguments) == 0
    printed = capsys.readouterr().out
    for text in ("parameters", "FLOPs", "images/s", "boundary", shapes.CLASS_NAMES[0]):
        assert text in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model = solq.load(checkpoint)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["mask_parameters"] == sum(parameter.numel() for parameter in model.masks.vector_embed.parameters())
    # Multiplications and additions of a perceptron for every query, in each of the decoder's layers.
    weights = sum(layer.weight.numel() for layer in model.masks.vector_embed.layers)
    assert metrics["mask_flops"] == 2 * weights * model.config.num_queries * model.config.decoder_layers
    assert metrics["mask_flops"] < metrics["flops"]
    assert metrics["seconds"] > 0
    assert {"box/AP", "mask/AP", "boundary/AP", f"mask/AP/{shapes.CLASS_NAMES[0]}"} <= metrics.keys()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {0, 1, 2}
    assert all({"category_id", "bbox", "score", "segmentation"} <= entry.keys() for entry in results)


def test_eval_on_other_classes(monkeypatch, checkpoint, dataset, tmp_path):
    content = json.loads((dataset / "annotations" / "instances_val2017.json").read_text())
    content["categories"][0]["name"] = "spoon"
    (dataset / "annotations" / "instances_other.json").write_text(json.dumps(content))
    if not (dataset / "other").exists():
        (dataset / "other").symlink_to(dataset / "val2017")
    ended = str(run(monkeypatch, "eval", checkpoint, "--data", dataset, "--split", "other", "--output", tmp_path))
    assert ended.startswith("error: category 1 of ")
    assert "is 'spoon', but" in ended
    ended = str(run(monkeypatch, "eval", checkpoint, "--data", tmp_path, "--output", tmp_path))
    assert ended.startswith("error: ")
    assert "\n" not in ended


@pytest.mark.parametrize("branch", ["unified", "separate", "none"])
def test_costs_of_a_model_with_learned_queries(branch):
    """As the published one, which has one stage."""
    model = tiny.solq_model(mask_branch=branch)
    costs = measure(model, torch.device("cpu"), torch.float32)
    assert costs["flops"] > costs["mask_flops"]
    assert (costs["mask_flops"] > 0) == (branch != "none")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_eval_refuses_what_cannot_work(monkeypatch, checkpoint, dataset, tmp_path):
    for option, value, least in (("size", 0, 1), ("max-size", 0, 1), ("batch-size", 0, 1), ("workers", -1, 0)):
        ended = run(monkeypatch, "eval", checkpoint, "--data", dataset, "--output", tmp_path, f"--{option}", value)
        assert ended == f"error: {option.replace('-', '_')} is {value}, must be at least {least}"
    (tmp_path / "file").touch()
    monkeypatch.setattr("solq.commands.eval.evaluate", None)  # found before anything is computed
    ended = run(monkeypatch, "eval", checkpoint, "--data", dataset, "--output", tmp_path / "file")
    assert str(ended).startswith("error: [Errno 17] File exists")


def test_eval_without_annotations(monkeypatch, capsys, checkpoint, dataset, tmp_path):
    """As COCO's test-dev: a list of images in another folder, all of whose results are written."""
    images = [{"id": 70 + n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (0, 2)]
    (dataset / "annotations" / "image_info_test-dev.json").write_text(json.dumps({"images": images}))
    arguments = ("--data", dataset, "--split", "test-dev", "--images", dataset / "val2017", "--output", tmp_path)
    assert run(monkeypatch, "eval", checkpoint, *arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {70, 72}
    (dataset / "annotations" / "image_info_test-dev.json").write_text("[]")
    assert "it has no list 'images'" in str(run(monkeypatch, "eval", checkpoint, *arguments))
