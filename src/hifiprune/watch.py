"""What is told of a training run as it goes on, and what ends it."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hifiprune.output import replacing
from hifiprune.voice import Voice

CLOCK = "clock.json"
"""Written into a state when all else of it is there."""


class Watch(TrainerCallback):
    """Tells how training goes, keeps its clock over interruptions, and ends it when time is up or it diverges."""

    def __init__(self, limit_minutes: float | None, tokens_per_step: int, voice: Voice, resumed: Path | None = None):
        self.limit, self.tokens, self.voice = limit_minutes, tokens_per_step, voice
        self.before = json.loads((resumed / CLOCK).read_text())["seconds"] if resumed else 0.0
        self.start, self.said = time.monotonic(), self.before
        self.first_step = 0
        self.share = 0.0  # of the time limit that is spent
        self.trouble = ""

    @property
    def spent(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.before + time.monotonic() - self.start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Start the clock."""
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any
    ) -> None:
        """Say where training is, now and then; stop if the loss is not finite or the held-out rows get worse."""
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop(control, f"the loss was not finite at step {state.global_step}")
        if "eval_loss" in logs:
            self._look(state, control, logs["eval_loss"])
        elif "loss" in logs and self.spent - self.said > 20:
            self.said = self.spent
            self.voice.say(f"step {state.global_step}{self._left(state)}: loss {logs['loss']:.4f}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Stop when the time is up; look at the held-out rows once more at the end. All processes go by one clock."""
        if self.limit:
            share = torch.tensor(self.spent / (60 * self.limit), device=args.device)
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(share, 0)
            self.share = min(1.0, share.item())
        if self.share == 1 or state.global_step >= state.max_steps:
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Keep the clock, last of all: a state without it is not whole."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / CLOCK
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"seconds": self.spent}))

    def _look(self, state: TrainerState, control: TrainerControl, loss: float) -> None:
        looks = held_out_losses(state)
        start = looks[0][1] if looks else loss
        self.voice.say(f"step {state.global_step}{self._left(state)}: held-out perplexity {perplexity(loss):.4g}")
        if not math.isfinite(loss):
            self._stop(control, f"the held-out loss was not finite at step {state.global_step}")
        elif len(looks) > 2 and all(later > start for _, later in looks[-2:]):
            self._stop(control, f"the held-out perplexity rose from {perplexity(start):.4g} to {perplexity(loss):.4g}")

    def _stop(self, control: TrainerControl, trouble: str) -> None:
        self.trouble = trouble
        self.voice.say(f"Training is stopped: {trouble}.")
        control.should_training_stop = True

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        pace = (time.monotonic() - self.start) / done
        left = 60 * self.limit - self.spent if self.limit else pace * (state.max_steps - state.global_step)
        of = "" if self.limit else f" of {state.max_steps}"
        return f"{of}, {self.tokens / pace:,.0f} tokens a second, about {max(0, left) / 60:.0f} min left"


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def held_out_losses(state: TrainerState) -> list[tuple[int, float]]:
    """Step and loss of every look at the held-out rows."""
    return [(int(entry["step"]), entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
