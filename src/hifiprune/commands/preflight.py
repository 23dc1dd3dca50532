"""What is asked of `score` and `prune`: settled, and checked before the work begins."""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hifiprune.calibration import Calibration
from hifiprune.commands.inspect import shape_of
from hifiprune.commands.presets import Preset, settle
from hifiprune.errors import UserError, unknown
from hifiprune.io.text_sources import SELF
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import Shape
from hifiprune.progress import note
from hifiprune.pruning.allocate import allocate
from hifiprune.pruning.cut import require_bias
from hifiprune.pruning.iterative import Course
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.load_scores import check_layout

REPAIRS = ("none", "ridge")


def kept_resident(calibration: Calibration | None, course: Course | None = None, compensate: bool = False) -> str:
    """What of this is done with weights in memory only."""
    if calibration and any(part.source == SELF for part in calibration.parts):
        return "text is sampled from the model"
    if course and course.sharing.allocation == "searched":
        return "widths are searched"
    if course and course.steps > 1:
        return "models are scored in steps"
    return "biases are compensated" if compensate else ""


def width_for(skeleton: PreTrainedModel, course: Course, scores: Scores | None) -> tuple[Shape, int]:
    """The sizes of a model, and the width of its MLPs, or of most of them.

    Raises:
        UserError: the budget cannot be met, the widths could not be saved, steps would remove nothing, or scores made
            before do not fit the model.
    """
    if scores:
        scores.require_finite()
        check_layout(scores, skeleton)
    shape = shape_of(skeleton)
    width = shape.width_at(course.budget, course.round_to)
    shape.check_experts(course.sharing.allocation, width)
    if course.steps > shape.neurons - width:
        most = shape.neurons - width
        raise UserError(f"steps {course.steps} must be at most {most}: that many neurons of each MLP go, one a step")
    if course.sharing.allocation != "uniform" and (reason := family_of(skeleton.config).one_width):
        raise UserError(f"{reason}: --allocation uniform")
    return shape, width


def check_data(criterion: str, calibration: Calibration | None) -> None:
    """Refuse a criterion that reads text where there is none."""
    if find_criterion(criterion).statistic and calibration is None:
        raise UserError(f"criterion '{criterion}' needs data: give --calibration, or --scores made before")


def check_compensation(checkpoint: Checkpoint, scores: Scores | None, criterion: str) -> None:
    """Refuse biases to be compensated where there are none, or no mean activations."""
    require_bias(find_mlps(checkpoint.skeleton()))
    if not (scores.means if scores else find_criterion(criterion).collects_means):
        raise UserError(f"criterion '{criterion}' has no mean activations for biases; use flap")


def settle_system(
    preset: str,
    asked: dict[str, Any],
    calibration: Calibration | None,
    *,
    scored: bool,
    bias_compensation: bool,
) -> Preset:
    """What a preset, and what is asked for in place of its parts, come to with this text."""
    if asked["repair"] is None and (calibration is None or bias_compensation):
        asked = asked | {"repair": "none"}  # the default gives way
        if calibration is None and settle(preset).repair != "none":
            note("Without --calibration there is no text to repair with: the cut stays a plain one.")
    system = settle(preset, **asked)
    check_texts(system, calibration, scored=scored, bias_compensation=bias_compensation)
    return system


def text_for(system: Preset, calibration: Calibration | None, *, scored: bool) -> Calibration | None:
    """The calibration, its windows begun as the system's are, if anything is to be read; says where nothing is."""
    if calibration and not scored and not reads_text(system):
        note(f"Criterion '{system.criterion}' needs no text and nothing is repaired: the text is not read.")
        return None
    return calibration and replace(calibration, bos=calibration.bos and system.bos)


def scored_by(scores: Scores, system: Preset, *, asked: bool) -> Preset:
    """The same with scores that were made before, which a criterion that was asked for must have made."""
    if asked and scores.criterion != system.criterion:
        raise UserError(
            f"the scores were made by '{scores.criterion}', and '{system.criterion}' is asked for: leave out --scores, "
            "or --criterion and --preset"
        )
    return replace(system, criterion=scores.criterion)


def check_texts(system: Preset, calibration: Calibration | None, *, scored: bool, bias_compensation: bool) -> None:
    """Whether there is a text for each step that reads one, and a use for the one that is given."""
    if system.repair not in REPAIRS:
        raise unknown("repair", system.repair, REPAIRS)
    fits = system.repair != "none" or system.allocation == "searched"
    if not scored:
        check_data(system.criterion, calibration)
    elif calibration and not fits:
        raise UserError("give one of --calibration and --scores, not both; both only to repair or search")
    if system.repair != "none" and calibration and calibration.num_samples < 2:
        raise UserError("repair needs at least 2 windows, of which it holds one out: --num-samples 2, or --repair none")
    if system.repair != "none" and calibration is None:
        raise UserError("repair needs text to fit to: give --calibration, or --repair none")
    if fits and calibration is None:
        raise UserError("a search for widths needs text to measure on: give --calibration, or another --allocation")
    if system.repair != "none" and bias_compensation:
        raise UserError("repair refits biases itself: give one of --repair and --bias-compensation, not both")


def reads_text(system: Preset) -> bool:
    """Whether anything that is to be done reads the calibration text."""
    needs_data = find_criterion(system.criterion).statistic is not None
    return needs_data or system.repair != "none" or system.allocation == "searched"


def check_steps(course: Course, scores: Scores | None, calibration: Calibration | None) -> None:
    """Refuse steps that have nothing to score on."""
    if course.steps > 1 and scores:
        raise UserError(f"{course.steps} steps score the model anew: leave out --scores")
    if course.steps > 1 and calibration is None:
        raise UserError(f"{course.steps} steps need text to score on anew: give --calibration")


def stability_of(wanted: float | None, course: Course, criterion: str, *, scored: bool) -> Stability | None:
    """What ends scoring early, where that is asked for; widths that will be searched are judged by one threshold."""
    if wanted is None:
        return None
    if scored or course.steps > 1:
        raise UserError("until-stable is for one scoring of the model: leave it out, or --scores and --steps")
    sharing = (
        replace(course.sharing, allocation="global") if course.sharing.allocation == "searched" else course.sharing
    )
    stability = Stability(wanted, partial(allocate, budget=course.budget, round_to=course.round_to, sharing=sharing))
    stability.check([criterion])
    return stability
