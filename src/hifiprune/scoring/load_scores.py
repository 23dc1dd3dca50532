"""Scores that were made before, read and checked against the model that they are used on."""

from pathlib import Path

from transformers import PreTrainedModel

from hifiprune.errors import UserError, unknown
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import CRITERIA, load_plugins


def load_scores(path: str | Path) -> Scores:
    """Read scores that were made by a criterion that is known.

    Raises:
        UserError: the file cannot be read, was changed, or names another criterion.
    """
    scores = Scores.load(path)
    if scores.criterion not in CRITERIA:
        load_plugins()
    if scores.criterion not in CRITERIA:
        raise unknown(f"the scores in {path} cannot be used: criterion", scores.criterion, CRITERIA)
    return scores


def check_layout(scores: Scores, model: PreTrainedModel) -> None:
    """Refuse scores of other MLPs than those of `model`, which may be on the meta device.

    Raises:
        UserError: names, widths, parameters of a neuron or the number of all parameters differ.
    """
    sizes = [len(values) for values in scores.values]
    scored = [*zip(scores.names, sizes, scores.parameters_per_neuron, strict=True)]
    there = [(mlp.name, mlp.neurons, mlp.parameters_per_neuron) for mlp in find_mlps(model)]
    total, difference = count_parameters(model), ""
    if len(scored) != len(there):
        difference = f"{len(scored)} MLPs were scored, this model has {len(there)}"
    elif scored != there:
        ours, theirs = next(pair for pair in zip(scored, there, strict=True) if pair[0] != pair[1])
        described = ("{} of {} neurons with {} parameters each".format(*mlp) for mlp in (ours, theirs))
        difference = "{} was scored, this model has {}".format(*described)
    elif scores.total_parameters != total:
        difference = f"a model of {scores.total_parameters:,} parameters was scored, this one has {total:,}"
    if difference:
        raise UserError(f"these scores belong to another model: {difference}; score this model with 'hifiprune score'")
