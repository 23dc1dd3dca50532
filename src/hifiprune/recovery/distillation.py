"""Distillation targets: the teacher's distribution computed during training, or its top tokens cached on disk.

A cached distribution holds the probabilities of the `kept` likeliest tokens and the sum of all others. The target gives
the others that sum in the proportions of the student: divergence and gradient are those between distributions over
the `kept` tokens and one more for all others.
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

from hifiprune.engine.context import memory_explained
from hifiprune.engine.lm_head import Head
from hifiprune.engine.machine import condition
from hifiprune.errors import UserError
from hifiprune.io.atomic import disk_size, nearest_folder
from hifiprune.io.distributed import meet, processes, rank
from hifiprune.io.resume import ResumeFolder
from hifiprune.progress import about, logger, track
from hifiprune.recovery.packing import IGNORED, Packed
from hifiprune.recovery.time_limit import TimeLimit

ROWS_A_FILE = 64
CLEARLY = 3
"""How many times over an estimate must exceed the time limit for it to be called too small."""
FLOOR = -1e4
"""Log-probability that is zero in every dtype, without being infinite."""


@runtime_checkable
class Target(Protocol):
    """Target distribution of some tokens."""

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Return the target's logits for a slice of tokens, given the student's `own` logits."""


@dataclass(frozen=True)
class WholeTarget:
    """The teacher's full distribution, from its final hidden state `[tokens, hidden]`."""

    hidden: Float[Tensor, "tokens hidden"]
    head: Head

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Return the teacher's logits."""
        return self.head.logits(self.hidden[here]).to(own)


@dataclass(frozen=True)
class LikeliestTarget:
    """The cached top tokens of the teacher's distribution at a temperature.

    Attributes:
        values: log-probabilities of the likeliest tokens, the last one of all others together.
        columns: token ids of the likeliest tokens.
        temperature: temperature of the distribution.
    """

    values: Float[Tensor, "tokens kept_and_others"]
    columns: Int[Tensor, "tokens kept"]
    temperature: float

    @classmethod
    def of(cls, logits: Float[Tensor, "rows vocabulary"], kept: int, temperature: float) -> "LikeliestTarget":
        """Select what is cached of the teacher's logits."""
        logs = (logits / temperature).log_softmax(-1)
        likeliest, columns = logs.topk(kept)
        others = logs.scatter(1, columns, -torch.inf).logsumexp(1, keepdim=True)
        return cls(torch.cat((likeliest, others), 1).clamp_(min=FLOOR), columns, temperature)

    def logits(self, here: slice, own: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Return the logits of the cached distribution, with all other tokens in the proportions of `own`."""
        values, columns = self.values[here].to(own), self.columns[here].long()
        found = (own / self.temperature).scatter_(1, columns, -torch.inf)
        found += values[:, -1:] - found.logsumexp(1, keepdim=True)
        return found.scatter_(1, columns, values[:, :-1]).mul_(self.temperature)


@dataclass(frozen=True)
class Teacher:
    """The dense model as the teacher.

    Attributes:
        model: the model, frozen, in evaluation mode, in any floating dtype.
    """

    model: PreTrainedModel

    @torch.no_grad()
    def states(self, tokens: Tensor, positions: Tensor, *, every: bool = False) -> list[Tensor]:
        """Return `hidden_states` of the teacher."""
        return hidden_states(self.model, tokens, positions, every=every)


def hidden_states(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, *, every: bool = False
) -> list[Float[Tensor, "rows positions hidden"]]:
    """Return the hidden state after the last norm, the input of the head; if requested also those after every block."""
    output = model.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=every or None
    )
    return [*output.hidden_states[1:-1], output.last_hidden_state] if every else [output.last_hidden_state]


@dataclass(frozen=True)
class CachedTeacher(Dataset[dict[str, Tensor]]):
    """Packed rows with the cached teacher distribution at every position whose next token is a label.

    Each row also has `guide_values`, float16 `[positions, kept + 1]`, and `guide_columns`, int32 `[positions, kept]`.

    Attributes:
        rows: packed rows that the teacher has seen.
        kept: number of likeliest tokens that are cached.
        place: returns the path of the file that holds the rows from an index on.
    """

    rows: Packed
    kept: int
    place: Callable[[int], Path]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
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
        """Return the first row of each missing file."""
        return [first for first in range(0, len(self), ROWS_A_FILE) if not self.place(first).is_file()]

    def bytes(self, firsts: Sequence[int]) -> int:
        """Return the size of the files in bytes."""
        numbers = [number for first in firsts for number in self._numbers(first)]
        return (6 * self.kept + 2) * sum(int(guided(self.rows[number]["labels"]).sum()) for number in numbers)

    def _numbers(self, first: int) -> range:
        """Return the indices of the rows in a file."""
        return range(first, min(first + ROWS_A_FILE, len(self)))

    @torch.no_grad()
    def write(self, first: int, teacher: Teacher, temperature: float, path: Path) -> None:
        """Run the teacher on the rows of one file and write it."""
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


def cache_teacher(
    rows: Packed,
    teacher: Teacher,
    model_hash: str,
    kept: int,
    temperature: float,
    seconds_of: Callable[[int], float],
    resume_folder: ResumeFolder,
    limit: TimeLimit,
) -> CachedTeacher:
    """Cache a teacher's distributions for all rows, each process its share.

    Args:
        rows: packed rows to be trained on.
        teacher: the dense model.
        model_hash: hash of its weights.
        kept: number of likeliest tokens that are cached.
        temperature: temperature of the distributions.
        seconds_of: estimates the seconds in which the teacher reads that many tokens.
        resume_folder: finished parts, from which the same command resumes.
        limit: time limit of the run.

    Raises:
        UserError: there is no room on the disk, or far from enough time.
        OutOfTimeError: the time limit passed meanwhile.
    """
    model, device = teacher.model, teacher.model.device
    facts = [model_hash, str(model.dtype), kept, temperature, rows.digest()]
    found = CachedTeacher(rows, kept, lambda first: resume_folder.path("teacher", *facts, first, suffix=".safetensors"))
    missing, free = found.missing(), shutil.disk_usage(nearest_folder(resume_folder.folder)).free
    needed = found.bytes(missing)
    if needed > free:
        raise UserError(
            f"cache-teacher {kept} takes {disk_size(needed)} beside the output, where {disk_size(free)} are free; "
            "use a smaller one"
        )
    if missing:
        seconds = seconds_of(ROWS_A_FILE * len(missing) * rows.length) / processes()
        if seconds > CLEARLY * max(limit.left, 1.0):
            raise UserError(
                f"caching the teacher for {len(rows)} rows takes {about(seconds)}, and "
                f"max-minutes is {limit.minutes:g}: give more of them, or leave out --cache-teacher"
            )
        logger.info(
            f"Asking the dense model about {len(rows):,} rows; its {kept} likeliest tokens take {disk_size(needed)} on "
            f"the disk until all is done: {about(seconds)}{condition(device)}."
        )
    meet(device, resume_folder.make)  # all have seen the same files missing
    with memory_explained(model, rows.length):
        for first in track(limit.within(missing[rank() :: processes()]), "caching teacher logits"):
            resume_folder.write(found.place(first), partial(found.write, first, teacher, temperature))
    meet(device)
    return found


def guided(labels: Int[Tensor, "*rows positions"]) -> Bool[Tensor, "*rows positions"]:
    """Return the mask of positions whose next token is a label."""
    return torch.nn.functional.pad(labels[..., 1:] != IGNORED, (0, 1))
