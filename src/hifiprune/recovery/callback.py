"""Trainer callback: reports progress, keeps the time limit, and stops a diverging run."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hifiprune.io.atomic import replacing
from hifiprune.progress import SECONDS_BETWEEN_LINES, about, logger
from hifiprune.recovery.time_limit import OutOfTimeError, TimeLimit
from hifiprune.results import Pair, RecoverResults

CLOCK = "clock.json"
"""File that is written into a training state last, and so marks it as complete."""


class Watch(TrainerCallback):
    """Reports training progress, keeps its clock across interruptions, and stops it when time is up or it diverges."""

    def __init__(self, limit: TimeLimit, tokens_per_step: int, resumed: Path | None = None):
        self.limit, self.tokens = limit, tokens_per_step
        self.look_seconds = 0.0  # of the last look at the held-out rows
        if resumed:
            clock = json.loads((resumed / CLOCK).read_text(encoding="utf-8"))
            limit.before, self.look_seconds = clock["seconds"], clock.get("look_seconds", 0.0)
        self.said = time.monotonic()
        self.first_step = self.looked_at = 0
        self.train_start = self.look_start = self.step_start = self.said
        self.rows_seen = self.batches_done = 0  # of the look and of the optimizer step that are under way
        self.looks = 0
        self.share = 0.0  # of the time for training that is spent
        self.trouble = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Start the clocks of the first look and the first step."""
        self.train_start = self.look_start = self.step_start = time.monotonic()
        self.first_step = self.looked_at = state.global_step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Say how far a look at the held-out rows is; the first one ends with the time limit.

        Raises:
            OutOfTimeError: it did, and nothing was trained.
        """
        self.rows_seen += 1
        self._tell("held-out rows", self.rows_seen, len(more["eval_dataloader"]), self.look_start)
        if state.global_step == 0 and not self.looks and self._agreed(float(self.limit.left <= 0), args):
            self.trouble = self.limit.passed
            raise OutOfTimeError

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any
    ) -> None:
        """Say where training is, now and then; stop if the loss is not finite or the held-out rows get worse."""
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop(control, f"the loss was not finite at step {state.global_step}")
        if "eval_loss" in logs:
            self._look(state, control, logs["eval_loss"])
        elif "loss" in logs and self._is_due():
            logger.info(f"step {state.global_step}{self._left(state)}: loss {logs['loss']:.4f}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Start the clock of an optimizer step."""
        self.step_start, self.batches_done = time.monotonic(), 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Say how far a long step is; leave it unfinished where another batch and a look would not end in time."""
        self.batches_done += 1
        what = f"step {state.global_step + 1}, batches"
        self._tell(what, self.batches_done, args.gradient_accumulation_steps, self.step_start)
        batch = (time.monotonic() - self.step_start) / self.batches_done
        if self.limit.minutes and self._agreed(float(self.limit.left <= batch + self.look_seconds), args):
            control.should_training_stop = True
            control.should_evaluate = control.should_save = state.global_step > self.looked_at
            self.look_start = time.monotonic()
            if not state.global_step:
                self.trouble = self.limit.passed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Stop when the time is up; look at the held-out rows once more at the end. All processes go by one clock.

        Time is up where another step, and the looks that follow, would not end within the limit.
        """
        if self.limit.minutes:
            looks = self.look_seconds * (2 if control.should_evaluate else 1)
            step = time.monotonic() - self.step_start
            spent = self.limit.spent / (self.limit.spent + max(0.0, self.limit.left - self.look_seconds))
            self.share = self._agreed(1.0 if self.limit.left <= step + looks else spent, args)
        self.look_start = time.monotonic()
        if self.share == 1 or state.global_step >= state.max_steps:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        control.should_log |= control.should_evaluate  # on a GPU not every step is

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Keep the clock, last of all: a state without it is not whole."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / CLOCK
        with replacing(path) as temporary:
            temporary.write_text(
                json.dumps({"seconds": self.limit.spent, "look_seconds": self.look_seconds}), encoding="utf-8"
            )

    def _look(self, state: TrainerState, control: TrainerControl, loss: float) -> None:
        now = time.monotonic()
        self.look_seconds, self.rows_seen, self.looks = now - self.look_start, 0, self.looks + 1
        self.looked_at = state.global_step
        if state.global_step == self.first_step:
            self.train_start = now
        looks = held_out_losses(state)
        start = looks[0][1] if looks else loss
        self.said = now
        logger.info(f"step {state.global_step}{self._left(state)}: held-out perplexity {perplexity(loss):.4g}")
        if not math.isfinite(loss):
            self._stop(control, f"the held-out loss was not finite at step {state.global_step}")
        elif len(looks) > 2 and all(later > start for _, later in looks[-2:]):
            self._stop(control, f"the held-out perplexity rose from {perplexity(start):.4g} to {perplexity(loss):.4g}")

    def _stop(self, control: TrainerControl, trouble: str) -> None:
        self.trouble = trouble
        logger.warning(f"Training is stopped: {trouble}.")
        control.should_training_stop = True

    def _agreed(self, value: float, args: TrainingArguments) -> float:
        """Return the value of the first process."""
        if not torch.distributed.is_initialized():
            return value
        shared = torch.tensor(value, device=args.device)
        torch.distributed.broadcast(shared, 0)
        return shared.item()

    def _is_due(self) -> bool:
        """Return whether it is time for another line."""
        due = time.monotonic() - self.said > SECONDS_BETWEEN_LINES
        if due:
            self.said = time.monotonic()
        return due

    def _tell(self, what: str, done: int, total: int, start: float) -> None:
        """Report progress from time to time."""
        if self._is_due():
            left = (time.monotonic() - start) / done * (total - done)
            logger.info(f"{what}: {done} of {total}, {about(left)} left")

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        pace = (time.monotonic() - self.train_start) / done
        left = min(pace * (state.max_steps - state.global_step), self.limit.left)
        return f" of {state.max_steps}, {self.tokens / pace:,.0f} tokens a second, {about(max(0.0, left))} left"


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss in nats; infinite on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def held_out_losses(state: TrainerState) -> list[tuple[int, float]]:
    """Return step and loss of every evaluation on the held-out rows."""
    return [(int(entry["step"]), entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]


def is_better(state: TrainerState) -> bool:
    """Return whether the held-out loss was ever below that at the start."""
    losses = [loss for _, loss in held_out_losses(state)]
    return any(loss < losses[0] for loss in losses)


def describe(state: TrainerState, trouble: str) -> RecoverResults:
    """Return what came of a training, which may have ended before the first look at the held-out rows."""
    looks = held_out_losses(state)
    best = min(looks, key=lambda look: look[1], default=None)
    return RecoverResults(
        held_out_perplexity=Pair(
            before=perplexity(looks[0][1]) if best else None,
            after=perplexity(min(best[1], looks[0][1])) if best else None,
        ),
        best_step=best[0] if best else 0,
        steps=state.global_step,
        trouble=trouble or None,
        losses=[(int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry],
        held_out_losses=looks,
        teacher_hash=None,
        pruning=None,
    )
