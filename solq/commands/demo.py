"""`solq demo`: a local web page to try a model on pictures."""

from typing import TYPE_CHECKING, Any

from PIL import Image

from solq.commands.settings import DemoConfig
from solq.data.image import pil_image, read_rgb
from solq.detections import Detections
from solq.predictor import Predictor

if TYPE_CHECKING:
    import gradio

MIN_SCORE = 0.05  # detections of a lower score are not kept; the slider starts here

Found = tuple[Image.Image, Detections] | None  # a picture and all detections in it


def demo(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C."""
    if config.port is not None and not 0 < config.port < 2**16:
        raise ValueError(f"port is {config.port}, must be in 1..65535")
    page = build_page(Predictor(config.checkpoint, device=config.device), config.threshold)
    page.launch(server_name=config.host, server_port=config.port, show_error=True)


def build_page(predictor: Predictor, threshold: float = 0.4) -> "gradio.Blocks":
    """Build the page. A picture runs through the model once; moving the threshold only draws it again.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: the threshold is outside of the slider's range.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the demo needs Gradio: pip install solq[demo]") from error
    if not MIN_SCORE <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, must be in {MIN_SCORE}..1")

    def find(path: str | None, threshold: float) -> tuple[Found, Image.Image | None, list[list[Any]]]:
        if path is None:
            return None, None, []
        try:
            image = read_rgb(path)
            detections = predictor(image, threshold=MIN_SCORE)
        except (OSError, ValueError) as error:
            raise gradio.Error(str(error)) from error
        assert isinstance(detections, Detections)
        found = pil_image(image), detections.to("cpu")
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
                # As a file and not as pixels, so that EXIF rotation and every format of Pillow are handled.
                sources = ["upload", "clipboard"]
                picture = gradio.Image(type="filepath", image_mode=None, label="Picture", sources=sources)
                slider = gradio.Slider(MIN_SCORE, 1, threshold, step=0.01, label="Threshold", elem_id="threshold")
            with gradio.Column():
                result = gradio.Image(show_label=False, interactive=False, elem_id="result")
                headers = ["class", "score", "x0", "y0", "x1", "y1"]
                table = gradio.Dataframe(headers=headers, label="Found", interactive=False, elem_id="found")
        picture.change(find, [picture, slider], [found, result, table], api_name="find")
        slider.change(show, [found, slider], [result, table], api_name="show", show_progress="hidden")
    return page
