"""`solq demo`: a local web page to try a model on pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from PIL import Image

from solq.detections import Detections
from solq.predictor import Predictor, read_rgb

if TYPE_CHECKING:
    import gradio

LEAST_SCORE = 0.05  # what the model finds below it is not kept, so that the slider has something to move over

Found = tuple[Image.Image, Detections] | None  # a picture and all that the model found in it


@dataclass
class DemoConfig:
    """Try a model on a local web page: upload a picture, move the threshold, see the masks."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A file of solq.save, of train.py, or an official SOLQ checkpoint."""
    device: str = "auto"
    host: str = "127.0.0.1"
    """Address to serve; 0.0.0.0 lets other machines see the page."""
    port: int | None = None
    """The first free one from 7860 unless given."""
    threshold: float = 0.4
    """Least score of an object, where the slider starts."""


def demo(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        OSError, ValueError: the checkpoint or the device cannot be used, or the port is taken.
        ImportError: Gradio is not installed.
    """
    if config.port is not None and not 0 < config.port < 2**16:
        raise ValueError(f"port is {config.port}, must be in 1..65535")
    page = build_page(Predictor(config.checkpoint, device=config.device), config.threshold)
    page.launch(server_name=config.host, server_port=config.port, show_error=True)


def build_page(predictor: Predictor, threshold: float = 0.4) -> "gradio.Blocks":
    """The page. A picture is run through the model once; moving the threshold only draws it again.

    Raises:
        ImportError: if Gradio is not installed.
        ValueError: if the threshold is not in the slider's range.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the demo needs Gradio: pip install solq[demo]") from error
    if not LEAST_SCORE <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, must be in {LEAST_SCORE}..1")

    def find(path: str | None, threshold: float) -> tuple[Found, Image.Image | None, list[list[Any]]]:
        if path is None:
            return None, None, []
        try:
            image = read_rgb(path)
            detections = predictor(image, threshold=LEAST_SCORE)
        except (OSError, ValueError) as error:
            raise gradio.Error(str(error)) from error
        assert isinstance(detections, Detections)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        found = picture, detections.to("cpu")
        return found, *show(found, threshold)

    def show(found: Found, threshold: float) -> tuple[Image.Image | None, list[list[Any]]]:
        if found is None:
            return None, []
        picture, detections = found
        seen = detections[detections.scores >= threshold]
        rows = zip(seen.class_names, seen.scores.tolist(), seen.boxes.tolist(), strict=True)
        table = [[name, round(score, 3), *(round(edge) for edge in box)] for name, score, box in rows]
        return detections.draw(picture, threshold), table

    with gradio.Blocks(title="SOLQ", analytics_enabled=False) as page:
        gradio.Markdown("# SOLQ\nInstance segmentation by learned queries. Upload a picture, then move the threshold.")
        found = gradio.State(None)
        with gradio.Row():
            with gradio.Column():
                # A file, not pixels: it is turned as its EXIF entry says, and of any kind that Pillow reads.
                sources = ["upload", "clipboard"]
                picture = gradio.Image(type="filepath", image_mode=None, label="Picture", sources=sources)
                slider = gradio.Slider(LEAST_SCORE, 1, threshold, step=0.01, label="Threshold", elem_id="threshold")
            with gradio.Column():
                result = gradio.Image(show_label=False, interactive=False, elem_id="result")
                headers = ["class", "score", "x0", "y0", "x1", "y1"]
                table = gradio.Dataframe(headers=headers, label="Found", interactive=False, elem_id="found")
        picture.change(find, [picture, slider], [found, result, table], api_name="find")
        slider.change(show, [found, slider], [result, table], api_name="show", show_progress="hidden")
    return page
