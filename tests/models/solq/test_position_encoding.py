"""The position encodings against the published formula, one number at a time."""

import math

import torch

from solq.models.solq.position_encoding import sine_box_encoding, sine_position_encoding


def feature(angle: float, index: int, features: int, temperature: float = 10000.0) -> float:
    """Feature `index` of an angle: sine and cosine in turn, both of a pair at the same frequency."""
    scaled = angle / temperature ** (2 * (index // 2) / features)
    return math.sin(scaled) if index % 2 == 0 else math.cos(scaled)


def test_every_element_of_a_padded_map() -> None:
    """Rows and columns are counted within the image, half a pixel is subtracted, y comes before x."""
    width, valid = 8, (3, 4)  # rows and columns of the image, in a map of 5×6
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0, :3, :4] = False
    mask[1] = False
    encoded = sine_position_encoding(mask, width)
    assert encoded.shape == (2, 8, 5, 6)
    assert encoded.dtype == torch.float32
    for image, (rows, columns) in enumerate([valid, (5, 6)]):
        for y in range(rows):
            for x in range(columns):
                for axis, (position, last) in enumerate([(y, rows), (x, columns)]):
                    angle = (position + 1 - 0.5) / (last + 1e-6) * 2 * math.pi
                    for index in range(width // 2):
                        expected = feature(angle, index, width // 2)
                        assert math.isclose(encoded[image, axis * 4 + index, y, x], expected, abs_tol=1e-5)


def test_temperature_and_dependence_on_one_axis_each() -> None:
    mask = torch.zeros(1, 4, 7, dtype=torch.bool)
    encoded = sine_position_encoding(mask, 4, temperature=20.0)[0]
    assert torch.equal(encoded[:2], encoded[:2, :, :1].expand(2, 4, 7))  # y only
    assert torch.equal(encoded[2:], encoded[2:, :1].expand(2, 4, 7))  # x only
    angle = 0.5 / 7 * 2 * math.pi
    assert math.isclose(encoded[2, 0, 0], math.sin(angle), abs_tol=1e-5)
    twice = sine_position_encoding(mask, 8, temperature=16.0)[0]
    assert math.isclose(twice[6, 0, 0], math.sin(angle / 16.0**0.5), abs_tol=1e-5)


def test_padding_does_not_change_what_an_image_sees() -> None:
    alone = sine_position_encoding(torch.zeros(1, 3, 4, dtype=torch.bool), 16)
    mask = torch.ones(1, 8, 5, dtype=torch.bool)
    mask[:, :3, :4] = False
    assert torch.equal(sine_position_encoding(mask, 16)[..., :3, :4], alone)


def test_every_element_of_box_encodings() -> None:
    boxes = torch.tensor([[[0.1, 0.9, 0.25, 0.5], [0.0, 1.0, 0.3, 0.7]]])
    encoded = sine_box_encoding(boxes, 6)
    assert encoded.shape == (1, 2, 24)
    for query in range(2):
        for coordinate in range(4):
            angle = boxes[0, query, coordinate].item() * 2 * math.pi
            for index in range(6):
                expected = feature(angle, index, 6)
                assert math.isclose(encoded[0, query, coordinate * 6 + index], expected, abs_tol=1e-5)
