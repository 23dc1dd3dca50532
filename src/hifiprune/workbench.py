"""Scores and measurements that survive an interruption: each is a file, found again by what it was made from."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.compute import Compute, estimate_seconds
from hifiprune.criteria import find_criterion
from hifiprune.evaluation import Reference, Tasks, measure_windows, zero_shot
from hifiprune.hashing import hash_tokens
from hifiprune.output import replacing
from hifiprune.plan import Plan
from hifiprune.preparation import announce_scoring, duration
from hifiprune.scores import Scores
from hifiprune.scoring import Request, score_all
from hifiprune.surgery import cut
from hifiprune.texts import Held
from hifiprune.voice import Voice

Measured = dict[str, list[float]]
"""Every metric by window, perplexities as their logarithms; or the value of every task."""


@dataclass(frozen=True)
class Workbench:
    """A dense model on which plans are tried out, and a folder for what was found.

    Attributes:
        model: the dense model; it is cut for a while, and is whole again after.
        name: what the user called it.
        model_hash: of its weights.
        tokenizer: of the model, for tasks.
        folder: keeps scores and measurements.
        compute: device and arithmetic.
        voice: tells of progress.
    """

    model: PreTrainedModel
    name: str
    model_hash: str
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    compute: Compute
    voice: Voice

    def scores_path(self, label: str, seed: int) -> Path:
        """Where the scores called `label` are kept."""
        return self.folder / "scores" / f"{label}-seed{seed}.safetensors"

    def score(
        self, windows: Int[Tensor, "windows positions"], wanted: dict[str, Request], seed: int
    ) -> dict[str, Scores]:
        """Scores for each request, under its label; made together unless they are there from before."""
        paths = {label: self.scores_path(label, seed) for label in wanted}
        found = {label: scores for label in wanted if (scores := self._reread(paths[label], windows, wanted[label]))}
        missing = {label: request for label, request in wanted.items() if label not in found}
        if missing:
            self.voice.say(announce_scoring(self.name, self.model, windows, list(missing.values()), self.compute))
            made = score_all(
                self.model,
                windows,
                list(missing.values()),
                batch_size=self.compute.batch_size,
                recompute=self.compute.recompute,
                track=self.voice.track(f"scoring, seed {seed}"),
                model_hash=self.model_hash,
            )
            for label, scores in zip(missing, made, strict=True):
                scores.save(paths[label])
                found[label] = scores
        return found

    def _reread(self, path: Path, windows: Int[Tensor, "windows positions"], request: Request) -> Scores | None:
        """Scores from an earlier run, if they were made from the same model, windows and options in the same dtype."""
        criterion, options = find_criterion(request[0]), request[1]
        if not path.is_file():
            return None
        scores = Scores.load(path)
        data = hash_tokens(windows) if criterion.statistic else ""
        dtype = str(self.model.dtype).removeprefix("torch.")
        wanted = (criterion.name, self.model_hash, data, dtype, criterion.used(options))
        settings = scores.settings
        made = (scores.criterion, scores.model_hash, scores.data_hash, settings["compute_dtype"], settings["options"])
        return scores if made == wanted else None

    def measure(self, plans: Sequence[Plan | None], what: Sequence[Held | Tasks]) -> list[list[Measured]]:
        """Every plan measured on every text and by every set of tasks, the dense model for None.

        What is there from before is not made again, and equal plans are measured once.
        """
        table = [[self._path(plan, each) for each in what] for plan in plans]
        todo = {
            path: (plan, each)
            for plan, row in zip(plans, table, strict=True)
            for each, path in zip(what, row, strict=True)
            if not path.is_file()
        }
        total = len({path for row in table for path in row})
        seconds = sum((self._seconds(each) for _, each in todo.values() if isinstance(each, Held)), start=0.0)
        tasks = " and the time of the tasks" if any(isinstance(each, Tasks) for each in what) else ""
        self.voice.say(
            f"Measuring: {len(todo)} of {total} measurements are to be made, about {duration(seconds)}{tasks} if the "
            "machine is idle; interrupted, the same command goes on where it stopped."
        )
        references: dict[str, Reference] = {}
        for path in self.voice.track("measuring")(list(todo)):
            plan, each = todo[path]
            if isinstance(each, Held) and each.fidelity and each.source not in references:
                references[each.source] = Reference.of(self.model, each.windows, self.compute.batch_size)
            with cut(self.model, plan) if plan else nullcontext():
                found = self._run_tasks(each) if isinstance(each, Tasks) else self._read(each, references)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found))
        return [[json.loads(path.read_text()) for path in row] for row in table]

    def _read(self, text: Held, references: dict[str, Reference]) -> Measured:
        values = measure_windows(
            self.model, text.windows, references.get(text.source), batch_size=self.compute.batch_size
        )
        return {name: each.tolist() for name, each in values.items()}

    def _run_tasks(self, tasks: Tasks) -> Measured:
        size = self.compute.batch_size
        found = zero_shot(
            self.model, self.tokenizer, tasks.names, include_path=tasks.include_path, limit=tasks.limit, batch_size=size
        )
        return {name: [estimate.value] for name, estimate in found.items()}

    def _path(self, plan: Plan | None, what: Held | Tasks) -> Path:
        """Named by all that the measurement depends on."""
        kept = [indices.tolist() for indices in plan.kept] if plan else None
        if isinstance(what, Held):
            facts: list[Any] = [hash_tokens(what.windows), what.fidelity]
        else:
            facts = [list(what.names), str(what.include_path), what.limit]
        made_of = [self.model_hash, str(self.model.dtype), *facts, kept]
        return self.folder / "cells" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]}.json"

    def _seconds(self, text: Held) -> float:
        """Rough time of a measurement: a forward pass, and with every metric about half as much again."""
        windows, device = text.windows, self.compute.resolved_device
        passes = estimate_seconds(
            self.model.config, windows.numel(), windows.shape[1], device, self.model.dtype, backwards=0
        )
        return passes * (1.5 if text.fidelity else 1.1)
