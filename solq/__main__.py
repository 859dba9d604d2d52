"""The command `solq`, with a sub-command for each thing that can be done with a trained model."""

import importlib
import logging
import sys
from typing import NamedTuple

from solq.errors import first_line


class Command(NamedTuple):
    """A sub-command: its class in solq.commands.settings, its module and function in solq.commands, what it does."""

    settings: str
    module: str
    function: str
    summary: str


COMMANDS = {
    "predict": Command("PredictConfig", "predict", "predict", "find the objects in images and videos"),
    "eval": Command("EvalConfig", "eval", "evaluate_checkpoint", "score a model on a dataset"),
    "export": Command("ExportConfig", "export", "export", "write a model for other programs (torch.export, ONNX)"),
    "figures": Command("FiguresConfig", "figures", "figures", "draw the paper's pictures"),
    "demo": Command("DemoConfig", "demo", "demo", "try a model on a local web page"),
    "info": Command("InfoConfig", "info", "info", "show versions and test the kernels: for bug reports"),
    "fit-coding": Command("FitCodingConfig", "fit_coding", "fit_coding", "fit a PCA or sparse mask coding"),
}


def main() -> None:
    """Run the command named first; a mistake in the input ends it with one line and status 1."""
    name, flags = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(help_text())
        return
    if name == "--version":
        from solq import __version__

        print(f"solq {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}, but {', '.join(COMMANDS)}")
    import tyro

    from solq.commands import settings
    from solq.commands.parsing import one_line_errors

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = COMMANDS[name]
    with one_line_errors():
        config = tyro.cli(getattr(settings, command.settings), prog=f"solq {name}", args=flags)
    import torch  # only here, so that neither --help nor a mistake in the flags waits for it

    try:
        getattr(importlib.import_module(f"solq.commands.{command.module}"), command.function)(config)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory ({first_line(error)}): make the batch or the images smaller")
    except (OSError, ValueError, ImportError) as error:  # mistakes of the input or the machine say what to do
        sys.exit(f"error: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def help_text() -> str:
    """List the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: solq COMMAND … (solq COMMAND --help lists its settings)", "", *lines])


if __name__ == "__main__":
    main()
