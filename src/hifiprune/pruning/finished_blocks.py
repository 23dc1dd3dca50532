"""Results of a repair, and the blocks that an interrupted one had finished."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hifiprune.io.resume import ResumeFolder
from hifiprune.results import Reconstruction, Refit


@dataclass
class Repair:
    """Result of a repair.

    Attributes:
        refits: refit of each output projection.
        reconstructions: training of each block, if blocks were trained.
    """

    refits: list[Refit] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)

    def add(self, other: "Repair") -> None:
        """Append the results of further blocks."""
        self.refits += other.refits
        self.reconstructions += other.reconstructions


@dataclass(frozen=True)
class FinishedBlock:
    """A repaired block: the tensors that changed, by name, and the results."""

    tensors: dict[str, Tensor]
    repair: Repair

    @torch.no_grad()
    def restore_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the parameters to what they became."""
        for name, parameter in parameters.items():
            parameter.copy_(self.tensors[name])


@dataclass(frozen=True)
class FinishedBlocks:
    """The repaired blocks of a run.

    Attributes:
        resume_folder: folder of the run's parts.
        facts: what a block depends on, JSON-serializable.
    """

    resume_folder: ResumeFolder
    facts: tuple[Any, ...]

    def read(self, block: int) -> FinishedBlock | None:
        """Read a block; None if it is missing or damaged."""

        def load(path: Path) -> FinishedBlock:
            try:
                with safe_open(path, "pt") as file:
                    results = json.loads(file.metadata()["results"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  which is no mapping
            except SafetensorError as error:
                raise ValueError(path) from error
            refits = [Refit(**facts) for facts in results["refits"]]
            return FinishedBlock(
                tensors, Repair(refits, [Reconstruction(**facts) for facts in results["reconstructions"]])
            )

        return self.resume_folder.read(self._path(block), load)

    def write(self, block: int, parameters: Mapping[str, Tensor], repair: Repair) -> None:
        """Write a block."""
        tensors = {name: values.detach().cpu().contiguous() for name, values in parameters.items()}
        metadata = {"results": json.dumps(asdict(repair))}
        self.resume_folder.write(self._path(block), lambda path: save_file(tensors, path, metadata))

    def _path(self, block: int) -> Path:
        return self.resume_folder.path("blocks", *self.facts, block, suffix=".safetensors")
