"""Settings: the published recipe, the presets, what the command line makes of them, and what is refused."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from solq.commands.flags import command_line
from solq.commands.parsing import _one_line
from solq.models.solq.config import SOLQConfig
from solq.training.config import Preset, TrainConfig, check_continues, check_settings
from solq.training.presets import preset


def test_defaults_are_the_published_model_and_recipe() -> None:
    model = SOLQConfig()
    assert (model.width, model.num_heads, model.encoder_layers, model.decoder_layers) == (384, 8, 6, 6)
    assert (model.feedforward, model.dropout, model.num_queries, model.num_levels) == (1024, 0.1, 300, 4)
    assert (model.num_points, model.num_classes, model.vector_hidden) == (4, 91, 1024)
    config = TrainConfig()
    assert (config.lr, config.lr_backbone, model.lr_points, config.weight_decay) == (2e-4, 2e-5, 2e-5, 1e-4)
    assert (config.epochs, config.lr_drop[0] * config.epochs, config.batch_size, config.clip_norm) == (50, 40, 32, 0.1)
    assert config.scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (config.max_size, config.eval_scale, model.vector_loss_weight) == (1333, 800, 3.0)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("name", get_args(Preset))
def test_every_preset_is_a_run(name: Preset, cpu: bool) -> None:
    config = preset(name, cpu=cpu)
    check_settings(config)
    assert config.preset == name
    assert config.batch_size >= 1


def test_presets() -> None:
    assert preset("r50", cpu=False) == TrainConfig(preset="r50")
    assert preset("r101", cpu=False).model.backbone == "resnet101"
    swin = preset("swin-l", cpu=False)
    assert (swin.model.backbone, min(swin.scales), max(swin.scales), swin.max_size) == ("swin-l", 416, 1088, 1536)
    assert preset("shapes", cpu=True).backbone_weights == "none"
    with pytest.raises(ValueError, match=r"preset is 'r18', must be one of shapes, r50, r101, swin-l"):
        preset("r18", cpu=True)


@pytest.mark.parametrize(
    ("name", "backbone", "queries", "scales", "crop", "epochs", "drops"),
    [
        ("queryinst-r50", "resnet50", 100, (800, 800), False, 12, [8, 11]),
        ("queryinst-r50-3x", "resnet50", 100, (480, 800), False, 36, [27, 33]),
        ("queryinst-r50-300", "resnet50", 300, (480, 800), True, 36, [27, 33]),
        ("queryinst-r101", "resnet101", 100, (480, 800), False, 36, [27, 33]),
        ("queryinst-r101-300", "resnet101", 300, (480, 800), True, 36, [27, 33]),
    ],
)
def test_rows_of_the_published_model_card(
    name: Preset, backbone: str, queries: int, scales: tuple[int, int], crop: bool, epochs: int, drops: list[int]
) -> None:
    config = preset(name, cpu=False)
    assert (config.model.backbone, config.model.num_queries, config.model.num_stages) == (backbone, queries, 6)
    assert (config.scales[0], config.scales[-1]) == scales
    assert (config.crop, config.epochs, config.max_size, config.eval_scale) == (crop, epochs, 1333, 800)
    assert [round(share * epochs, 9) for share in config.lr_drop] == drops
    assert (config.batch_size, config.lr, config.lr_backbone, config.weight_decay) == (16, 1e-4, 1e-5, 1e-4)
    assert (config.warmup_steps, config.clip_norm, config.ema_decay) == (1000, 0.1, 0.0)


# ---- the command line


def test_flags_change_the_preset() -> None:
    flags = [
        "--preset",
        "r50",
        "--device",
        "cpu",
        "--model.width",
        "64",
        "--scales",
        "64",
        "96",
        "--amp",
        "--data",
        "d",
    ]
    config = command_line(args=flags)
    expected = preset("r50", cpu=True)
    expected = replace(
        expected, device="cpu", model=replace(expected.model, width=64), scales=(64, 96), amp=True, data=Path("d")
    )
    assert config == expected
    assert command_line(args=["--preset=r101", "--device=cpu", "--no-crop"]) == replace(
        preset("r101", cpu=True), device="cpu", crop=False
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--foo 3", "--foo"),
        ("--lr fast", "--lr"),
        ("--steps", "--steps"),
        ("--preset r18", "'r18'"),
        ("--device tpu", "'tpu'"),
        ("--model.backbone vgg", "vgg"),
        ("--model.mask-coding jpeg", "jpeg"),
        ("leftover", "leftover"),
    ],
)
def test_wrong_flags(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line(args=flags.split())
    message = end.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert named in message
    assert "--help" in message
    assert "\n" not in message
    assert "│" not in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rule", ["─", "-"])
def test_boxes_of_tyro_with_and_without_unicode(rule: str) -> None:
    side = " │ " if rule == "─" else "   "
    box = [
        " Title " + 5 * rule,
        f"{side}What is{side}",
        f"{side}wrong.{side}",
        side + 9 * rule + side,
        f"{side}Help{side}",
    ]
    if rule == "-":
        box.insert(1, 9 * rule)
    assert _one_line("\n".join(box)) == "What is wrong."


def test_help_lists_fields_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line("What it does.", ["--help", "--preset", "r50", "--device", "cpu"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text
    for name, value in asdict(preset("r50", cpu=True)).items():
        assert f"--{name.replace('_', '-')}" in text, name
        if isinstance(value, float):
            assert f"default: {value}" in text, name
    for name in asdict(SOLQConfig()):
        assert f"--model.{name.replace('_', '-')}" in text, name


# ---- checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"workers": -1}, "workers is -1, must be at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"scales": ()}, r"scales is \(\)"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 6, "accumulate": 4}, r"batch_size is 6, must be a multiple of accumulate \(4\)"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"model": SOLQConfig(decoder_layers=3, vector_loss_start=3)}, "vector_loss_start is 3, .* the 3 decoder"),
        ({"model": SOLQConfig(vector_loss_start=-1)}, "vector_loss_start is -1, must be 0 to 5"),
        ({"model": SOLQConfig(freeze_detector=True)}, "leaves nothing to train"),
        ({"model": SOLQConfig(num_queries=0)}, "model.num_queries is 0, must be at least 1"),
        ({"model": SOLQConfig(mask_size=0)}, "model.mask_size is 0"),
    ],
)
def test_numbers_that_no_run_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_settings(replace(preset("shapes", cpu=True), **changes))
    assert "\n" not in str(error.value)


def test_what_a_run_can_be_continued_with() -> None:
    config = preset("shapes", cpu=True)
    before = asdict(config)
    check_continues(replace(config, lr=1.0, steps=7, workers=0, resume=True, ema_decay=0.5), before, Path("run"))
    check_continues(replace(config, model=replace(config.model, gradient_checkpointing=True)), before, Path("run"))
    for change in ({"batch_size": 8}, {"seed": 1}, {"accumulate": 2}, {"model": replace(config.model, width=256)}):
        with pytest.raises(ValueError, match=r"^run is of a run with .*: give --resume the settings that"):
            check_continues(replace(config, **change), before, Path("run"))
