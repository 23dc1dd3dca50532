"""`Scores`: the importance of every neuron, with all that is needed to allocate widths and to refuse a wrong model."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import Count, checked

FORMAT = "hifiprune-scores-1"


class ScoresFacts(TypedDict):
    """What scores say of themselves in the metadata of their file."""

    format: Literal["hifiprune-scores-1"]
    names: Annotated[list[str], Field(min_length=1)]
    parameters_per_neuron: list[Count]
    total_parameters: Count
    criterion: str
    objective: float | None
    model_hash: str
    data_hash: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """Importance of the neurons of a model, one tensor an MLP in layer order; more is more important.

    Attributes:
        values: float32 `[neurons]` for each MLP.
        names: path of each MLP in the model.
        parameters_per_neuron: parameters that go with one neuron of each MLP.
        total_parameters: of the dense model, tied weights counted once.
        criterion: name of the criterion.
        objective: mean objective over the windows in nats, such as the output entropy; None without one.
        model_hash: SHA-256 of the dense weights as float32.
        data_hash: SHA-256 of the calibration windows; empty for criteria that need none.
        settings: how the scores were made (windows, positions, seed, source, dtype).
        means: float32 `[neurons]` mean activations for each MLP, where the criterion collects them.
    """

    values: list[Float[Tensor, "_"]]
    names: list[str]
    parameters_per_neuron: list[int]
    total_parameters: int
    criterion: str
    objective: float | None
    model_hash: str
    data_hash: str
    settings: dict[str, Any] = field(default_factory=dict)
    means: list[Float[Tensor, "_"]] | None = None

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write one safetensors file: a tensor an MLP, everything else as JSON in its metadata.

        Args:
            path: of the file.
            overwrite: replace a file that hifiprune wrote; others never are.

        Raises:
            RunError: another file is there, or it cannot be written.
        """
        facts = {key: value for key, value in asdict(self).items() if key not in ("values", "means")}
        tensors = dict(zip(self.names, self.values, strict=True))
        if self.means:
            tensors |= {f"{name}.mean": mean for name, mean in zip(self.names, self.means, strict=True)}
        metadata = {"hifiprune": json.dumps({"format": FORMAT, **facts}, sort_keys=True)}
        with replacing(path, overwrite=overwrite) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores that `save` wrote.

        Raises:
            UserError: the file is missing, is no safetensors file, holds no scores, or was changed.
        """
        path = local_path(path)
        if not path.exists():
            raise UserError(f"scores file {path} does not exist; make it with 'hifiprune score MODEL --output {path}'")
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("hifiprune", "")
                if f'"{FORMAT}"' not in text:
                    raise UserError(f"{path} holds no scores in the format {FORMAT}; make it with 'hifiprune score'")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable scores file ({error}); make it with 'hifiprune score'") from error
        facts: ScoresFacts = checked(text, ScoresFacts, str(path))
        names = facts["names"]
        mean_names = [f"{name}.mean" for name in names] if f"{names[0]}.mean" in tensors else []
        if trouble := _trouble(facts, tensors, mean_names):
            raise UserError(f"{path} was changed since hifiprune wrote it ({trouble}); make it with 'hifiprune score'")
        values, means = ([tensors[name] for name in order] for order in (names, mean_names))
        arguments: dict[str, Any] = {name: value for name, value in facts.items() if name != "format"}
        return cls(values=values, means=means or None, **arguments)

    def require_model(self, model_hash: str) -> None:
        """Refuse scores of another model.

        Raises:
            UserError: the hashes differ.
        """
        if self.model_hash != model_hash:
            raise UserError(
                f"these scores belong to another model: they were made from weights {self.model_hash[:12]}, "
                f"this model's are {model_hash[:12]}; score this model with 'hifiprune score'"
            )

    def require_finite(self) -> None:
        """Refuse scores that are NaN or infinite.

        Raises:
            UserError: a layer's scores are not all finite.
        """
        for name, values in zip(self.names, self.values, strict=True):
            if not torch.isfinite(values).all():
                raise UserError(f"the scores of {name} contain NaN or infinite values; score the model again")


def _trouble(facts: ScoresFacts, tensors: dict[str, Tensor], mean_names: list[str]) -> str:
    """Say what of a scores file cannot be; nothing if all of it can."""
    names = facts["names"]
    if len({*names}) != len(names) or len(facts["parameters_per_neuron"]) != len(names):
        return f"{len({*names})} different names of {len(names)}, {len(facts['parameters_per_neuron'])} sizes"
    if strange := sorted(tensors.keys() ^ {*names, *mean_names}):
        return f"the tensor {strange[0]} is {'not named' if strange[0] in tensors else 'missing'}"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.ndim != 1 or not len(tensor):
            return f"{name} is {tensor.dtype} {list(tensor.shape)} and should be float32 [neurons]"
    for name, mean_name in zip(names, mean_names, strict=False):
        if tensors[name].shape != tensors[mean_name].shape:
            return f"{mean_name} has {len(tensors[mean_name])} values for {len(tensors[name])} neurons"
    return ""
