"""`Scores`: the importance of every neuron, with all that is needed to allocate widths and to refuse a wrong model."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hifiprune.errors import UserError
from hifiprune.output import replacing

FORMAT = "hifiprune-scores-1"


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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: a tensor an MLP, everything else as JSON in its metadata."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("values", "means")}
        tensors = dict(zip(self.names, self.values, strict=True))
        if self.means:
            tensors |= {f"{name}.mean": mean for name, mean in zip(self.names, self.means, strict=True)}
        metadata = {"hifiprune": json.dumps({"format": FORMAT, **facts}, sort_keys=True)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores that `save` wrote.

        Raises:
            UserError: the file is missing, is no safetensors file, or holds no scores.
        """
        if not Path(path).is_file():
            raise UserError(f"scores file {path} does not exist; make it with 'hifiprune score MODEL --output {path}'")
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("hifiprune", "{}"))
                if facts.pop("format", None) != FORMAT:
                    raise UserError(f"{path} holds no scores in the format {FORMAT}; make it with 'hifiprune score'")
                values = [file.get_tensor(name) for name in facts["names"]]
                named = [f"{name}.mean" for name in facts["names"]]
                means = [file.get_tensor(name) for name in named] if named[0] in file.keys() else None  # noqa: SIM118
            return cls(values=values, means=means, **facts)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is no readable scores file ({error}); make it with 'hifiprune score'") from error

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
