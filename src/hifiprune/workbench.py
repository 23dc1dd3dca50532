"""Scores and measurements that survive an interruption: each is a file, found again by what it was made from."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.compute import Compute, estimate_seconds
from hifiprune.criteria import find_criterion
from hifiprune.evaluation import Reference, measure_windows
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
"""Every metric by window; perplexities as their logarithms."""


@dataclass(frozen=True)
class Workbench:
    """A dense model on which plans are tried out, and a folder for what was found.

    Attributes:
        model: the dense model; it is cut for a while, and is whole again after.
        name: what the user called it.
        model_hash: of its weights.
        folder: keeps scores and measurements.
        compute: device and arithmetic.
        voice: tells of progress.
    """

    model: PreTrainedModel
    name: str
    model_hash: str
    folder: Path
    compute: Compute
    voice: Voice

    def score(
        self, windows: Int[Tensor, "windows positions"], wanted: dict[str, Request], seed: int
    ) -> dict[str, Scores]:
        """Scores for each request, under its label; made together unless they are there from before."""
        paths = {label: self.folder / "scores" / f"{label}-seed{seed}.safetensors" for label in wanted}
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
        """Scores from an earlier run, if they were made from the same model, windows and options."""
        criterion, options = find_criterion(request[0]), request[1]
        if not path.is_file():
            return None
        scores = Scores.load(path)
        data = hash_tokens(windows) if criterion.statistic else ""
        same = (scores.criterion, scores.model_hash, scores.data_hash, scores.settings["options"])
        return scores if same == (criterion.name, self.model_hash, data, criterion.used(options)) else None

    def measure(self, plans: Sequence[Plan | None], texts: Sequence[Held]) -> list[list[Measured]]:
        """Metrics of every plan on every text, of the dense model for None; what is there from before is not redone."""
        table = [[self._path(plan, text) for text in texts] for plan in plans]
        todo = {
            path: (plan, text)
            for plan, row in zip(plans, table, strict=True)
            for text, path in zip(texts, row, strict=True)
            if not path.is_file()
        }
        total = len({path for row in table for path in row})
        seconds = sum(self._seconds(text) for _, text in todo.values())
        self.voice.say(
            f"Measuring: {len(todo)} of {total} measurements are to be made, about {duration(seconds)} if the machine "
            "is idle; interrupted, the same command goes on where it stopped."
        )
        references: dict[str, Reference] = {}
        for path in self.voice.track("measuring")(list(todo)):
            plan, text = todo[path]
            if text.fidelity and text.source not in references:
                references[text.source] = Reference.of(self.model, text.windows, self.compute.batch_size)
            with cut(self.model, plan) if plan else nullcontext():
                values = measure_windows(
                    self.model, text.windows, references.get(text.source), batch_size=self.compute.batch_size
                )
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({name: each.tolist() for name, each in values.items()}))
        return [[json.loads(path.read_text()) for path in row] for row in table]

    def _path(self, plan: Plan | None, text: Held) -> Path:
        kept = [indices.tolist() for indices in plan.kept] if plan else None
        made_of = [self.model_hash, str(self.model.dtype), hash_tokens(text.windows), text.fidelity, kept]
        return self.folder / "cells" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]}.json"

    def _seconds(self, text: Held) -> float:
        """Rough time of a measurement: a forward pass, and with every metric about half as much again."""
        windows, device = text.windows, self.compute.resolved_device
        passes = estimate_seconds(
            self.model.config, windows.numel(), windows.shape[1], device, self.model.dtype, backwards=0
        )
        return passes * (1.5 if text.fidelity else 1.1)
