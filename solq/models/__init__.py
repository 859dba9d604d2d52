"""The models by name. A model is imported when it is built."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solq.models.base import InstanceSegmenter


@dataclass(frozen=True)
class ModelFamily:
    """A model's package, and the names of its classes there.

    The package has the modules `config` (a dataclass, see :class:`solq.models.base.ModelConfig`), `model` (an
    :class:`solq.models.base.InstanceSegmenter`) and `official` (how published files of it are read).
    """

    package: str
    config_name: str
    model_name: str

    @property
    def config(self) -> Any:
        """Import and return the class of the model's settings."""
        return getattr(importlib.import_module(f"{self.package}.config"), self.config_name)

    @property
    def model(self) -> Any:
        """Import and return the class of the model."""
        return getattr(importlib.import_module(f"{self.package}.model"), self.model_name)

    @property
    def official(self) -> Any:
        """Import and return the module with `recognizes`, `infer_config`, `infer_meta` and `official_names`."""
        return importlib.import_module(f"{self.package}.official")


MODELS = {
    "solq": ModelFamily("solq.models.solq", "SOLQConfig", "SOLQ"),
    "queryinst": ModelFamily("solq.models.queryinst", "QueryInstConfig", "QueryInst"),
}


def build(config: Any) -> "InstanceSegmenter":
    """Build the model that a config describes, with random weights.

    Raises:
        ValueError: if the config is of no model.
    """
    for family in MODELS.values():
        if isinstance(config, family.config):
            return family.model(config)
    raise ValueError(f"config is a {type(config).__name__}, must be one of {[f.config_name for f in MODELS.values()]}")
