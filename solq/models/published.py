"""The tensors of a published checkpoint, which tell the architecture by their names and sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PublishedTensors:
    """The weights of a checkpoint by their published names, and the title of the model that they should be of."""

    weights: Mapping[str, Tensor]
    model: str

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor.

        Raises:
            ValueError: if there is no such tensor.
        """
        if name not in self.weights:
            raise ValueError(f"it has no {name}, as {self.model} checkpoint would: use another file")
        return self.weights[name].shape

    def count(self, pattern: str) -> int:
        """Count the different texts in the group of a regular expression that matches the beginning of names."""
        return len({match[1] for name in self.weights if (match := re.match(pattern, name))})
