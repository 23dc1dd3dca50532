"""What a model in training learns from the dense one: its distribution as it goes, or the likeliest of it from disk.

A distribution that was kept has the probabilities of the `kept` likeliest tokens and the sum of all others. The target
then gives the others that sum in the proportions of the model in training: the divergence is that between distributions
over `kept` tokens and one for all others, and so is its gradient.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hifiprune.engine.compute import Compute, estimate_seconds
from hifiprune.engine.context import memory_explained
from hifiprune.engine.lm_head import Head
from hifiprune.engine.machine import condition
from hifiprune.errors import UserError
from hifiprune.io.atomic import disk_size, nearest_folder
from hifiprune.io.distributed import meet, processes, rank
from hifiprune.io.resume import Unfinished
from hifiprune.progress import about
from hifiprune.recovery.packing import IGNORED, Packed
from hifiprune.recovery.time_limit import TimeLimit

ROWS_A_FILE = 64
CLEARLY = 3
"""How many times over an estimate must exceed the time limit for it to be called too small."""
FLOOR = -1e4
"""Log-probability that is zero in every dtype, without being infinite."""


@runtime_checkable
class Target(Protocol):
    """What the distribution of some tokens should be."""

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Of a slice of the tokens, for which the model in training has logits of its `own`."""


@dataclass(frozen=True)
class WholeTarget:
    """The teacher's distribution, from its final hidden state `[tokens, hidden]`."""

    hidden: Float[Tensor, "tokens hidden"]
    head: Head

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """The teacher's logits."""
        return self.head.logits(self.hidden[here]).to(own)


@dataclass(frozen=True)
class LikeliestTarget:
    """What was kept of the teacher's distribution at a temperature.

    Attributes:
        values: log-probabilities of the likeliest tokens, and last of all others together.
        columns: which tokens are the likeliest.
        temperature: of the distribution.
    """

    values: Float[Tensor, "tokens kept_and_others"]
    columns: Int[Tensor, "tokens kept"]
    temperature: float

    @classmethod
    def of(cls, logits: Float[Tensor, "rows vocabulary"], kept: int, temperature: float) -> "LikeliestTarget":
        """What to keep."""
        logs = (logits / temperature).log_softmax(-1)
        likeliest, columns = logs.topk(kept)
        others = logs.scatter(1, columns, -torch.inf).logsumexp(1, keepdim=True)
        return cls(torch.cat((likeliest, others), 1).clamp_(min=FLOOR), columns, temperature)

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits of the kept distribution, with all others in the proportions of `own`."""
        values, columns = self.values[here].to(own), self.columns[here].long()
        found = (own / self.temperature).scatter_(1, columns, -torch.inf)
        found += values[:, -1:] - found.logsumexp(1, keepdim=True)
        return found.scatter_(1, columns, values[:, :-1]).mul_(self.temperature)


@dataclass(frozen=True)
class Teacher:
    """The dense model, whose distribution is the target.

    Attributes:
        model: frozen, in evaluation mode, in any floating dtype.
    """

    model: PreTrainedModel

    @torch.no_grad()
    def states(self, tokens: Tensor, positions: Tensor, *, every: bool = False) -> list[Tensor]:
        """As `hidden_states` of the model."""
        return hidden_states(self.model, tokens, positions, every=every)


def hidden_states(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, *, every: bool = False
) -> list[Float[Tensor, "rows positions hidden"]]:
    """The state after the last norm, the input of the head; where asked, those after every block before it."""
    output = model.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=every or None
    )
    return [*output.hidden_states[1:-1], output.last_hidden_state] if every else [output.last_hidden_state]


@dataclass(frozen=True)
class Remembered(Dataset[dict[str, Tensor]]):
    """Packed rows with what was kept of the teacher's distribution at the tokens before those that are learned.

    Each row has `guide_values`, float16 `[positions, kept + 1]`, and `guide_columns`, int32 `[positions, kept]`, too.

    Attributes:
        rows: that the teacher was asked about.
        kept: how many of the likeliest tokens.
        place: of the file that has rows from a number on.
    """

    rows: Packed
    kept: int
    place: Callable[[int], Path]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row."""
        row = self.rows[index]
        first = index // ROWS_A_FILE * ROWS_A_FILE
        with safe_open(self.place(first), "pt") as file:
            ends = file.get_tensor("ends").tolist()
            here = slice(*ends[index - first : index - first + 2])
            parts = {"guide_values": file.get_slice("values")[here], "guide_columns": file.get_slice("columns")[here]}
        learned = guided(row["labels"])
        for name, part in parts.items():
            row[name] = part.new_zeros(len(learned), part.shape[1])
            row[name][learned] = part
        return row

    def missing(self) -> list[int]:
        """First rows of the files that are not there."""
        return [first for first in range(0, len(self), ROWS_A_FILE) if not self.place(first).is_file()]

    def bytes(self, firsts: Sequence[int]) -> int:
        """How much disk files take."""
        numbers = [number for first in firsts for number in self._numbers(first)]
        return (6 * self.kept + 2) * sum(int(guided(self.rows[number]["labels"]).sum()) for number in numbers)

    def _numbers(self, first: int) -> range:
        """Of the rows in a file."""
        return range(first, min(first + ROWS_A_FILE, len(self)))

    @torch.no_grad()
    def write(self, first: int, teacher: Teacher, temperature: float, path: Path) -> None:
        """Ask the teacher about the rows of one file."""
        head, parts, ends = Head.of(teacher.model), [], [0]
        for index in self._numbers(first):
            row = {name: each[None].to(teacher.model.device) for name, each in self.rows[index].items()}
            hidden = teacher.states(row["input_ids"], row["position_ids"])[-1][guided(row["labels"])]
            for some in hidden.split(head.slice_rows):
                found = LikeliestTarget.of(head.logits(some), self.kept, temperature)
                parts.append((found.values.to("cpu", torch.float16), found.columns.to("cpu", torch.int32)))
            ends.append(ends[-1] + len(hidden))
        values, columns = (torch.cat(each) for each in zip(*parts, strict=True))
        save_file({"values": values, "columns": columns, "ends": torch.tensor(ends)}, path)


def remember(
    rows: Packed,
    teacher: Teacher,
    model_hash: str,
    kept: int,
    temperature: float,
    compute: Compute,
    unfinished: Unfinished,
    limit: TimeLimit,
) -> Remembered:
    """Keep what a teacher says of all rows, each process its part.

    Raises:
        UserError: there is no room on the disk, or far from enough time.
        OutOfTimeError: the time limit passed meanwhile.
    """
    model, voice, device = teacher.model, unfinished.voice, torch.device(compute.resolved_device)
    facts = [model_hash, str(model.dtype), kept, temperature, rows.digest()]
    found = Remembered(rows, kept, lambda first: unfinished.path("teacher", *facts, first, suffix=".safetensors"))
    missing, free = found.missing(), shutil.disk_usage(nearest_folder(unfinished.folder)).free
    needed = found.bytes(missing)
    if needed > free:
        raise UserError(
            f"cache-teacher {kept} takes {disk_size(needed)} beside the output, where {disk_size(free)} are free; "
            "use a smaller one"
        )
    if missing:
        tokens = ROWS_A_FILE * len(missing) * rows.length
        seconds = estimate_seconds(model.config, tokens, rows.length, str(model.device), model.dtype, backwards=0)
        seconds /= processes()
        if seconds > CLEARLY * max(limit.left, 1.0):
            raise UserError(
                f"asking the dense model about {len(rows)} rows takes {about(seconds)}, and "
                f"max-minutes is {limit.minutes:g}: give more of them, or leave out --cache-teacher"
            )
        voice.say(
            f"Asking the dense model about {len(rows):,} rows; its {kept} likeliest tokens take {disk_size(needed)} on "
            f"the disk until all is done: {about(seconds)}{condition(model.device)}."
        )
    meet(device, unfinished.make)  # all have seen the same files missing
    with memory_explained(model, rows.length):
        for first in voice.track("asking the dense model")(limit.within(missing[rank() :: processes()])):
            unfinished.write(found.place(first), partial(found.write, first, teacher, temperature))
    meet(device)
    return found


def guided(labels: Int[Tensor, "*rows positions"]) -> Bool[Tensor, "*rows positions"]:
    """Where the next token is learned."""
    return torch.nn.functional.pad(labels[..., 1:] != IGNORED, (0, 1))
