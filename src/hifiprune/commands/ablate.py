"""The test of a criterion: neurons are really removed, a few at a time, and the damage compared with their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.prepare import check_tokens, load_hashed, prepare
from hifiprune.config.files import to_dict
from hifiprune.config.study import AblateConfig
from hifiprune.engine.compute import compute_dtype, limit_batch
from hifiprune.engine.context import check_windows, frozen, memory_explained
from hifiprune.engine.divergence import small_divergence
from hifiprune.engine.hooks import BlockCall
from hifiprune.engine.machine import condition
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.evaluation.ranks import correlation
from hifiprune.evaluation.text import held_windows
from hifiprune.io.atomic import replacing
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.lineage import commits_of
from hifiprune.progress import about, logger, note, track
from hifiprune.results import Estimate
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.load_scores import check_layout, load_scores
from hifiprune.study_results import AblateResults, AblationTrial, Correlation, Correlations

PER_LAYER = 16  # single neurons tried in a layer: enough to rank them
Trial = tuple[int, tuple[int, ...]]
"""A layer and the neurons of it that are removed."""


@exclusive
def ablate(model: str, output: str | Path, config: AblateConfig) -> RunRecord[AblateResults]:
    """Remove single neurons and random groups of them, measure the true KL divergence, and rank it against scores.

    The neurons are a stratified sample: at evenly spaced ranks of the first scores, in evenly spaced layers. What a
    criterion predicts for a group is the sum of its scores.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made: `ablate.json` and plots.
        config: options.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    compute = config.compute
    record: RunRecord[AblateResults] = RunRecord("ablate", {"model": model, "output": str(output), **to_dict(config)})
    loaded_scores = _load_scores(config.scores)
    checkpoint, target, skeleton = prepare(
        model, output, [config.text], config.scores, compute=compute, folder=True, overwrite=config.overwrite
    )
    record.commits = commits_of(checkpoint)
    if (dtype := compute_dtype(compute, checkpoint)).itemsize < torch.float32.itemsize:
        note(f"In {dtype} most of what a single neuron does drowns in rounding; float32 is better.")
    for layer_scores in loaded_scores.values():
        check_layout(layer_scores, skeleton)
    resume_folder = ResumeFolder.beside(target, "ablate")
    first = next(iter(loaded_scores.values()))
    trials = sample(first, config.neurons, config.groups, config.group_size, config.seed)
    windows = held_windows(config.text, checkpoint.tokenizer())
    compute = limit_batch(compute, len(windows), "windows")
    check_tokens(checkpoint, windows)
    checkpoint.fetch()
    dense, model_hash = load_hashed(checkpoint, compute, record)
    for layer_scores in loaded_scores.values():
        layer_scores.require_model(model_hash)
    resume_folder, data = resume_folder.of(dense, model_hash), hash_tokens(windows)
    paths = {trial: resume_folder.path("trials", data, *trial) for trial in trials}
    measured = {trial: resume_folder.read_json(path) for trial, path in paths.items()}
    missing = [trial for trial, divergence in measured.items() if divergence is None]
    estimator = Estimator(checkpoint, compute, loaded=True)
    cost = estimator.reading(windows.numel() * len(missing), windows.shape[1])
    logger.info(
        f"Removing {config.neurons} single neurons and {config.groups} groups of {config.group_size} in turn, "
        f"{len(missing)} of them still to do, on {len(windows)} windows of {windows.shape[1]} tokens: {about(cost)}"
        f"{condition(estimator.device)}. Interrupted, the same command goes on where it stopped."
    )
    with record.stage("ablating"):
        bench = Bench(dense, windows, {layer for layer, _ in trials}, compute.batch)
        for trial in track(missing, "ablating"):
            measured[trial] = {"kl": bench.divergence(trial)}
            resume_folder.write_json(paths[trial], measured[trial])
    record.reused_parts = len(resume_folder.reused)
    divergences = [measured[trial]["kl"] for trial in trials]
    record.results = AblateResults(model_hash, *correlate(trials, divergences, loaded_scores))
    with replacing(target, overwrite=config.overwrite) as folder:
        from hifiprune.reports.plots import draw_ablation

        folder.mkdir()
        draw_ablation(record.results, folder)
        record.save(folder / "ablate.json")
    resume_folder.remove()
    return record


def sample(scores: Scores, neurons: int, groups: int, group_size: int, seed: int) -> list[Trial]:
    """Draw single neurons at evenly spaced ranks of `scores` and random groups, in evenly spaced layers.

    Raises:
        UserError: there are not as many neurons.
    """
    widths = [len(values) for values in scores.values]
    narrowest = min(widths)
    if neurons > len(widths) * narrowest:
        raise UserError(f"neurons {neurons} is more than the model's {len(widths)} layers of {narrowest}; try fewer")
    if groups and group_size > narrowest:
        raise UserError(f"group-size {group_size} is more than the {narrowest} neurons of a layer; try a smaller one")
    chance = torch.Generator().manual_seed(seed)
    count = min(len(widths), -(-neurons // min(PER_LAYER, narrowest)))
    layers = torch.linspace(0, len(widths) - 1, count).round().int().tolist() if count > 1 else [len(widths) // 2]
    trials: list[Trial] = []
    for number, layer in enumerate(layers):
        here = len(range(number, neurons, count))
        edges = [place * widths[layer] // here for place in range(here + 1)]
        ranks = [int(torch.randint(*stratum, (1,), generator=chance)) for stratum in pairwise(edges)]
        trials += [(layer, (index,)) for index in scores.values[layer].argsort()[ranks].tolist()]
    for number in range(groups):
        layer = layers[number % count]
        chosen = torch.randperm(widths[layer], generator=chance)[:group_size]
        trials.append((layer, tuple(sorted(chosen.tolist()))))
    return trials


class Bench:
    """The dense model's inner states on a few windows, from which each trial starts at its own layer."""

    def __init__(
        self, model: PreTrainedModel, windows: Int[Tensor, "windows positions"], layers: set[int], batch_size: int
    ):
        check_windows(model, windows, batch_size, least=2)
        self.model = model
        self.starts: list[Start] = []
        with frozen(model):
            self.chain = verified_chain(model)
            for batch in windows.split(batch_size):
                with memory_explained(model, batch.numel()):
                    hidden, calls = self.chain.embed(batch.to(model.device, torch.int64))
                    inputs: dict[int, Tensor] = {}
                    final = self.chain.run_from(0, hidden, calls, inputs=inputs)
                    blocks = {self.chain.mlps[layer].block for layer in layers}
                    self.starts.append(Start(calls, {block: inputs[block] for block in blocks}, final))

    @torch.no_grad()
    def divergence(self, trial: Trial) -> float:
        """Compute the mean KL(dense || pruned) over all positions, in nats."""
        layer, neurons = trial
        removed, block = torch.tensor(neurons, device=self.model.device), self.chain.mlps[layer].block
        parts = []
        with frozen(self.model):
            for start in self.starts:
                with memory_explained(self.model, start.final.shape[:2].numel()):
                    pruned = self.chain.run_from(block, start.inputs[block], start.calls, removed=(layer, removed))
                    parts.append(small_divergence(start.final, pruned, self.chain.head))
        return float(torch.cat(parts).mean())


@dataclass(frozen=True)
class Start:
    """A batch in the dense model: the blocks' calls, the inputs of some blocks, and the final hidden state."""

    calls: list[BlockCall]
    inputs: dict[int, Tensor]
    final: Tensor


def correlate(
    trials: Sequence[Trial], divergences: Sequence[float], scores: dict[str, Scores]
) -> tuple[dict[str, dict[str, Correlations]], list[AblationTrial]]:
    """Return the rank correlation of each criterion's scores with the measured divergences, and the trials."""
    single = [number for number, (_, neurons) in enumerate(trials) if len(neurons) == 1]
    grouped = [number for number, (_, neurons) in enumerate(trials) if len(neurons) > 1]
    truth = torch.tensor(divergences, dtype=torch.float64)
    predicted = {
        name: torch.tensor(
            [float(criterion.values[layer][list(neurons)].double().sum()) for layer, neurons in trials]
        ).double()
        for name, criterion in scores.items()
    }
    layers = [layer for layer, _ in trials]
    correlations = {
        name: {
            kind: Correlations(
                all_layers=_plain(correlation(values[chosen], truth[chosen], [0] * len(chosen))),
                within_layers=_plain(correlation(values[chosen], truth[chosen], [layers[n] for n in chosen])),
            )
            for kind, chosen in (("single", single), ("groups", grouped))
            if len(chosen) > 2
        }
        for name, values in predicted.items()
    }
    return correlations, [
        AblationTrial(layer, list(neurons), kl, {name: float(values[number]) for name, values in predicted.items()})
        for number, ((layer, neurons), kl) in enumerate(zip(trials, divergences, strict=True))
    ]


def _plain(estimate: Estimate) -> Correlation:
    """Replace NaN, which JSON does not know, by None."""
    return Correlation(*(None if x is None or isnan(x) else x for x in (estimate.value, estimate.low, estimate.high)))


def _load_scores(paths: Sequence[str | Path]) -> dict[str, Scores]:
    """Load scores by criterion; files of one criterion are told apart by their names."""
    if not paths:
        raise UserError("give at least one --scores file; make it with 'hifiprune score'")
    loaded = [(Path(path), load_scores(path)) for path in paths]
    for _, scores in loaded:
        scores.require_finite()
    criteria = [scores.criterion for _, scores in loaded]
    named = {s.criterion if criteria.count(s.criterion) == 1 else path.stem: s for path, s in loaded}
    if len(named) != len(paths):
        raise UserError(f"the scores {', '.join(map(str, paths))} have the same names; rename one")
    return named
