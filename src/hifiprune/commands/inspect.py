"""What a checkpoint is, told without loading its weights."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hifiprune.config.groups import Budget
from hifiprune.deployment.compatibility import Answer, deployment
from hifiprune.errors import UserError
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import dense_of, record_of
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.plan import ModelShape


@dataclass(frozen=True)
class PossibleWidth:
    """MLP width for a pruning ratio, exact and rounded, and the ratio that the rounded one reaches, where possible."""

    width: int | None
    width_rounded_to_128: int | None
    ratio_reached: float | None


@dataclass(frozen=True, kw_only=True)
class InspectResults:
    """What a checkpoint is: its MLPs, parameters by part, width by pruning ratio, origin, and engines if asked for."""

    model: str
    architecture: str
    model_type: str
    mlps: int
    neurons_per_mlp: int | list[int]
    neurons: int
    parameters: dict[str, int]
    weight_bytes: int
    widths: dict[str, PossibleWidth]
    heads: int
    pruned_from: str | None
    deployment: list[Answer] | None = None


def inspect(model: str, *, deploy: bool = False) -> InspectResults:
    """Return architecture, MLPs, parameters by part and the width at 10-50%, without loading weights.

    Args:
        model: local folder, hub id or GGUF file.
        deploy: tell also, as `deployment`, which inference engines take it and in which formats; see
            `hifiprune.deployment.compatibility`.

    Raises:
        UserError: it cannot be read, is not supported, or is a GGUF file where engines are asked for.
    """
    checkpoint = find_checkpoint(model)
    engines = deployment(checkpoint) if deploy else None
    skeleton = checkpoint.skeleton()
    mlps = find_mlps(skeleton)
    neurons = [mlp.neurons for mlp in mlps]
    total = count_parameters(skeleton)
    modules = {each.module for mlp in mlps for each in mlp.projections}
    in_mlps = sum(parameter.numel() for module in modules for parameter in module.parameters())
    ends = {p for m in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()) for p in m.parameters()}
    in_ends = sum(parameter.numel() for parameter in ends)
    equal = len(set(neurons)) == 1
    return InspectResults(
        model=model,
        architecture=type(skeleton).__name__,
        model_type=skeleton.config.model_type,
        mlps=len(mlps),
        neurons_per_mlp=neurons[0] if equal else neurons,
        neurons=sum(neurons),
        parameters={
            "total": total,
            "mlps": in_mlps,
            "embeddings_and_head": in_ends,
            "attention_and_norms": total - in_mlps - in_ends,
        },
        weight_bytes=checkpoint.weight_bytes,
        widths=_possible_widths(shape_of(skeleton)) if equal or any(mlp.is_expert for mlp in mlps) else {},
        heads=skeleton.config.get_text_config().num_attention_heads,
        pruned_from=dense_of(record_of(checkpoint)),
        deployment=engines,
    )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the sizes that turn a budget into a width; `model` may be on the meta device.

    Raises:
        UserError: its MLPs differ in size.
    """
    mlps = find_mlps(model)
    sizes = [(mlp.neurons, mlp.parameters_per_neuron) for mlp in mlps]
    return ModelShape.from_sizes(sizes, count_parameters(model), experts=any(mlp.is_expert for mlp in mlps))


def _possible_widths(shape: ModelShape) -> dict[str, PossibleWidth]:
    widths = {}
    for percent in (10, 20, 30, 40, 50):
        exact, rounded = (_possible_width(shape, Budget(ratio=percent / 100), step) for step in (1, 128))
        reached = None if rounded is None else shape.ratio_at(rounded)
        widths[f"{percent}%"] = PossibleWidth(exact, rounded, reached)
    return widths


def _possible_width(shape: ModelShape, budget: Budget, round_to: int) -> int | None:
    try:
        width = shape.width_at(budget, round_to)
        shape.check_experts("uniform", width)
        return width
    except UserError:
        return None
