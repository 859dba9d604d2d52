"""The command `solq`: what can be done with a trained model, a command each."""

import importlib
import logging
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command's settings and its function are, imported only when it is called, and what it does."""

    module: str
    settings: str
    function: str
    summary: str


COMMANDS = {
    "predict": Command("solq.commands.predict", "PredictConfig", "predict", "find the objects of images and videos"),
    "eval": Command("solq.commands.eval", "EvalConfig", "evaluate_checkpoint", "score a model on a dataset"),
    "export": Command(
        "solq.commands.export", "ExportConfig", "export", "write a model for other programs (torch.export, ONNX)"
    ),
    "figures": Command("solq.commands.figures", "FiguresConfig", "figures", "draw the paper's pictures"),
    "demo": Command("solq.commands.demo", "DemoConfig", "demo", "try a model on a local web page"),
    "info": Command("solq.commands.info", "InfoConfig", "info", "show versions and test the kernels: for bug reports"),
    "fit-coding": Command("solq.commands.fit_coding", "FitCoding", "fit_coding", "fit a PCA or sparse mask coding"),
}


def main() -> None:
    """Run the command named first; what is wrong with the input ends it with one line and status 1."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(help_text())
        return
    if name == "--version":
        from solq import __version__

        print(f"solq {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}, but {', '.join(COMMANDS)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = COMMANDS[name]
    try:
        import torch
        import tyro

        from solq.commands.flags import one_line_complaints

        module = importlib.import_module(command.module)
        with one_line_complaints():
            settings = tyro.cli(getattr(module, command.settings), prog=f"solq {name}", args=arguments)
        getattr(module, command.function)(settings)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory ({_first_line(error)}): make the batch or the images smaller")
    except (OSError, ValueError, ImportError) as error:  # of the input or the machine: the message says what to do
        sys.exit(f"error: {_first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: solq COMMAND … (solq COMMAND --help lists its settings)", "", *lines])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    main()
