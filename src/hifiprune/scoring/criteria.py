"""Named criteria: which objective a pass differentiates, what it collects, and where that comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from hifiprune.config.groups import SDMPRUNE_SETTINGS, CriterionOptions
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.engine.sliced_objective import Kernel
from hifiprune.errors import UserError, unknown
from hifiprune.scoring import neuron_statistics as st
from hifiprune.scoring.objectives import CrossEntropy, Distillation, Entropy, SampledLabel

PLUGINS = "hifiprune.criteria"
"""Group of entry points that name modules which register criteria."""
HFPRUNE, SDMPRUNE = "arXiv 2603.08083", "arXiv 2506.11120"


Objective = Callable[[CriterionOptions], tuple[Kernel, ...]]


def _entropy(options: CriterionOptions) -> tuple[Kernel, ...]:
    return (Entropy(),)


def _cross_entropy(options: CriterionOptions) -> tuple[Kernel, ...]:
    return (CrossEntropy(),)


def _self_distillation(options: CriterionOptions) -> tuple[Kernel, ...]:
    settled = options.for_ratio(min(SDMPRUNE_SETTINGS))
    assert settled.alpha is not None
    assert settled.temperature is not None
    return (Distillation(settled.alpha, settled.temperature),)


def _own_labels(options: CriterionOptions) -> tuple[Kernel, ...]:
    samples = options.label_samples
    return tuple(SampledLabel(options.seed, number, samples) for number in range(samples))


@dataclass(frozen=True)
class Criterion:
    """How neurons are scored; more is more important.

    Attributes:
        name: what it is called.
        summary: one line on what it measures.
        reference: its source.
        objective: makes the kernels that a pass differentiates from the options; None without a gradient.
        statistic: what is collected; None needs no data.
        finish: turns the sums into scores.
        uses_projections: whether the statistic reads inputs and output gradients of the projections.
        two_stages: whether a light cut by cross-entropy comes first.
        options: names of the options that matter to it.
        across_layers: whether scores of different layers are on one scale.
    """

    name: str
    summary: str
    reference: str
    objective: Objective | None = None
    statistic: st.Statistic | None = None
    finish: st.Finish = st.as_summed
    uses_projections: bool = False
    two_stages: bool = False
    options: tuple[str, ...] = ()
    across_layers: bool = True

    @property
    def collects_means(self) -> bool:
        """Whether mean activations come with the scores."""
        return self.statistic is st.moments

    def used(self, options: CriterionOptions) -> dict[str, Any]:
        """Return the options that matter to it."""
        return {name: getattr(options, name) for name in self.options}


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "hfprune",
            "first-order change of the output entropy, sum of |h dH/dh|: the paper's exact definition",
            f"{HFPRUNE}, eq. 3-4",
            _entropy,
            st.absolute,
        ),
        Criterion("entropy", "the same as hfprune", f"{HFPRUNE}, eq. 3-4", _entropy, st.absolute),
        Criterion("entropy-square", "output entropy, sum of (h dH/dh)^2", HFPRUNE, _entropy, st.square),
        Criterion(
            "cross-entropy",
            "plain Taylor pruning: loss of the next token, sum of |h dC/dh|",
            "arXiv 1906.10771",
            _cross_entropy,
            st.absolute,
        ),
        Criterion(
            "cross-entropy-square",
            "loss of the next token, sum of (h dC/dh)^2: the empirical Fisher information",
            "arXiv 1906.10771",
            _cross_entropy,
            st.square,
        ),
        Criterion(
            "cross-entropy-weight",
            "loss of the next token, Taylor importance of the weights: SDMPrune's first stage",
            SDMPRUNE,
            _cross_entropy,
            st.weight_absolute,
            uses_projections=True,
        ),
        Criterion(
            "self-distillation",
            "SDMPrune: light cut by cross-entropy, then divergence from the dense model, in weight form",
            SDMPRUNE,
            _self_distillation,
            st.weight_absolute,
            uses_projections=True,
            two_stages=True,
            options=("alpha", "temperature", "light_cut"),
        ),
        Criterion(
            "fisher",
            "labels drawn from the model itself, sum of (h dC/dh)^2: KL divergence to second order, diagonal, in nats",
            "arXiv 1801.05787, with labels from the model",
            _own_labels,
            st.square,
            st.as_divergence,
            options=("label_samples", "seed"),
        ),
        Criterion(
            "fisher-abs",
            "the same labels, sum of |h dC/dh|",
            "arXiv 1801.05787",
            _own_labels,
            st.absolute,
            options=("label_samples", "seed"),
        ),
        Criterion(
            "wanda-sp",
            "activation norm times mean absolute outgoing weight",
            "arXiv 2306.11695, structured as in arXiv 2312.11983",
            statistic=st.moments,
            finish=st.wanda,
        ),
        Criterion(
            "flap",
            "variance of the activation times squared norm of the outgoing weights, standardised",
            "arXiv 2312.11983",
            statistic=st.moments,
            finish=st.flap,
            across_layers=False,
        ),
        Criterion(
            "minitron",
            "mean magnitude of the activation, l2 norm over windows",
            "arXiv 2407.14679",
            statistic=st.squared_mean_magnitude,
            finish=st.minitron,
        ),
        Criterion("magnitude", "l2 norm of a neuron's weights; no data", "arXiv 1608.08710", finish=st.magnitude),
        Criterion(
            "ppm", "peak-to-peak of a neuron's incoming weights; no data", "arXiv 2512.22671", finish=st.peak_to_peak
        ),
        Criterion(
            "random",
            "uniform noise; no data",
            "the control",
            finish=st.random,
            options=("seed",),
            across_layers=False,
        ),
    )
}


def describe_criteria() -> list[dict[str, str]]:
    """Return name, needs, summary and source of every criterion; the default is marked."""
    load_plugins()
    return [
        {
            "name": criterion.name,
            "needs": _needs(criterion),
            "summary": criterion.summary + " (default)" * (criterion.name == DEFAULT_CRITERION),
            "reference": criterion.reference,
        }
        for criterion in CRITERIA.values()
    ]


def _needs(criterion: Criterion) -> str:
    if criterion.statistic is None:
        return "weights"
    passes = "forward, backward" if criterion.objective else "forward"
    return f"2 x ({passes})" if criterion.two_stages else passes


def find_criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in CRITERIA:
        load_plugins()
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA[name]


def register_criterion(
    name: str,
    summary: str,
    reference: str = "",
    *,
    objective: Objective | None = None,
    statistic: st.Statistic | None = None,
    uses_projections: bool = False,
    options: tuple[str, ...] = (),
    across_layers: bool = True,
) -> Callable[[st.Finish], st.Finish]:
    """Register a criterion whose scores the decorated function makes, in Python and for `--criterion`.

    The function is called with the sums of the statistic, an MLP and the sample, and returns a score for each neuron. A
    package whose entry point in the group `hifiprune.criteria` names the module that registers criteria is imported
    when one of them, or the list, is asked for.

    Args:
        name: name of the criterion.
        summary: one line on what it measures.
        reference: its source.
        objective: objectives that a pass differentiates, by the criterion's options; none for a forward pass alone.
        statistic: what is summed over windows, see `hifiprune.scoring.neuron_statistics`; none reads no text.
        uses_projections: whether the statistic reads inputs and output gradients of the projections.
        options: names of the options that matter to it.
        across_layers: whether scores of different layers are on one scale.

    Raises:
        UserError: there is a criterion of this name, or an objective without a statistic.
    """
    if name in CRITERIA:
        raise UserError(f"criterion '{name}' is registered already; choose another name")
    if objective and statistic is None:
        raise UserError(f"criterion '{name}' has an objective, and nothing that is collected; give a statistic")

    def register(finish: st.Finish) -> st.Finish:
        CRITERIA[name] = Criterion(
            name,
            summary,
            reference,
            objective,
            statistic,
            finish,
            uses_projections,
            options=options,
            across_layers=across_layers,
        )
        return finish

    return register


@cache
def load_plugins() -> None:
    """Import the packages that register criteria of their own.

    Raises:
        UserError: one cannot be imported.
    """
    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            raise UserError(
                f"the criteria of {point.value} cannot be imported ({type(error).__name__}: {error}); correct or "
                "uninstall the package"
            ) from error
