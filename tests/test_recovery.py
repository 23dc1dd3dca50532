"""Recovery training on tiny models: what is learned, what is written, and what an interruption leaves."""

import json
import math
import random
import shutil
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils
from transformers.pytorch_utils import Conv1D

import hifiprune as hp
from hifiprune.commands.recover import recover
from hifiprune.config import AllocationConfig
from hifiprune.config.recover import TRAININGS, RecoverConfig, TrainingConfig
from hifiprune.io.hashing import hash_model
from hifiprune.models.families import FAMILIES
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.progress import shown
from hifiprune.recovery.callback import Watch
from hifiprune.recovery.distillation import CachedTeacher
from hifiprune.recovery.lora import with_adapter
from hifiprune.recovery.rows import split
from hifiprune.recovery.time_limit import TimeLimit
from hifiprune.recovery.trainer import TimedTrainer, batches_together
from hifiprune.recovery.trainer import train as run_trainer
from hifiprune.recovery.training_data import Example
from hifiprune.results import Pair, RecoverResults
from hifiprune.run_record import RunRecord
from tests.commands import Interruption, leftovers, refused
from tests.commands import run as run_command
from tests.conftest import save_checkpoint
from tests.families import VARIANTS, family_name, load, tiny_model, tiny_tokens
from tests.naive import logits_of
from tests.processes import command, forked
from tests.test_memory import shape
from tests.test_waiting import Reads, without_waiting

EMPTY: Any = []
QUICK = TrainingConfig(
    max_steps=6, gradient_accumulation_steps=2, seq_len=32, lora_r=4, lora_alpha=8, learning_rate=1e-2,
    evaluate_every=2, held_out=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, one that was pruned from it, and rows to learn from."""
    folder = tmp_path_factory.mktemp("pruned")
    chance = random.Random(0)
    texts = ["".join(chance.choice(("ab", "cd ", "abc")) for _ in range(chance.randint(3, 25))) for _ in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    learn_(save_checkpoint(folder / "dense", initializer_range=0.1), texts)
    hp.prune(str(folder / "dense"), folder / "pruned", hp.PruneConfig(hp.Budget(width=20), criterion="magnitude"))
    return folder


def learn_(folder: Path, texts: list[str]) -> None:
    """Teach a model some of the text, so that there is something that a teacher knows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer("".join(texts)).input_ids)
    windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def run(folder: Path, output: Path, training: TrainingConfig = QUICK, **more: Any) -> RunRecord[RecoverResults]:
    return recover(str(folder / "pruned"), output, str(folder / "data.jsonl"), RecoverConfig(training, **more))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training_lowers_what_it_should(pruned: Path, tmp_path: Path, method: str, share: float) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    training = replace(QUICK, method=method, distill_weight=share, learning_rate=rate, max_steps=16)
    record = run(pruned, tmp_path / "out", training)
    before, after = astuple(record.results.held_out_perplexity)
    assert record.results.steps == 16
    assert after < before
    assert [step for step, _ in record.results.losses] == list(range(1, 17))
    assert min(loss for _, loss in record.results.held_out_losses) == pytest.approx(math.log(after))
    assert record.results.pruning["command"] == "prune"
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == record.to_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.intermediate_size == 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was unfinished is gone"


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt", "falcon"])
def test_maps_of_every_form_are_trained(family: str, pruned: Path, tmp_path: Path) -> None:
    dense, small = save_checkpoint(tmp_path / "dense", family), tmp_path / "small"
    hp.prune(str(dense), small, hp.PruneConfig(hp.Budget(width=20), criterion="magnitude"))
    training = replace(QUICK, distill_weight=0.0, learning_rate=1e-3)  # the dense model itself is random
    recover(str(small), tmp_path / "out", str(pruned / "data.jsonl"), RecoverConfig(training))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (small, tmp_path / "out"))
    assert type(after) is type(before)
    named = dict(before.named_parameters())
    for name, values in after.named_parameters():
        module = after.get_submodule(name.rpartition(".")[0])
        map_weight = isinstance(module, (nn.Linear, Conv1D)) and values.ndim == 2 and "head" not in name
        assert torch.equal(values, named[name]) != map_weight, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_put_on_every_plain_map_of_the_blocks_and_on_nothing_else(variant: str) -> None:
    model = tiny_model(variant, torch.float32)
    wanted = {name for name, module in blocks_of(model).items() if isinstance(module, (nn.Linear, Conv1D))}
    adapted = with_adapter(model, TrainingConfig())
    assert {name for name, module in blocks_of(model).items() if hasattr(module, "lora_A")} == wanted
    assert {kind for layer in adapted.modules() if hasattr(layer, "lora_dropout") for kind in dropouts(layer)} == {0.05}
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(wanted)
    assert all(".lora_" in name for name in trained)


def blocks_of(model: Any) -> dict[str, nn.Module]:
    start = f"{FAMILIES[model.config.model_type].blocks}."
    return {name: module for name, module in model.named_modules() if name.startswith(start)}


def dropouts(layer: Any) -> set[float]:
    return {each.p for each in layer.lora_dropout.values()}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if FAMILIES[family_name(name)].experts])
def test_experts_stay_as_they_are_and_all_other_maps_learn(variant: str, pruned: Path, tmp_path: Path) -> None:
    dense, small = save_checkpoint(tmp_path / "dense", variant), tmp_path / "small"
    hp.prune(str(dense), small, hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    training = TrainingConfig(max_steps=2, seq_len=32, held_out=0.2, distill_weight=0.0, gradient_accumulation_steps=1)
    recover(str(small), tmp_path / "out", str(pruned / "data.jsonl"), RecoverConfig(training))
    before, after = (load(path).state_dict() for path in (small, tmp_path / "out"))
    start = f"{FAMILIES[variant].blocks}."
    changed = {name for name, values in after.items() if not torch.equal(values, before[name])}
    assert changed == {
        f"{name}.weight" for name, module in blocks_of(load(small)).items() if isinstance(module, (nn.Linear, Conv1D))
    }
    assert any(".experts." in name for name in before if name.startswith(start))


def test_an_adapter_that_peft_would_put_on_experts_is_not_kept(pruned: Path, tmp_path: Path) -> None:
    model = str(save_checkpoint(tmp_path / "dense", "deepseek_v2"))
    training, data = replace(QUICK, distill_weight=0.0, max_steps=2), str(pruned / "data.jsonl")
    with pytest.raises(
        hp.UserError, match="peft loads no adapter for gate_proj, up_proj or down_proj of a deepseek_v2"
    ):
        recover(model, tmp_path / "out", data, RecoverConfig(training, keep_adapter=True))
    attention = replace(training, target_modules=("kv_b_proj", "o_proj"))
    recover(model, tmp_path / "out", data, RecoverConfig(attention, keep_adapter=True))
    PeftModel.from_pretrained(load(Path(model)), str(tmp_path / "out" / "adapter"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_of_mixed_widths_is_trained_into_one(pruned: Path, tmp_path: Path, method: str) -> None:
    dense, small = pruned / "dense", tmp_path / "small"
    hp.prune(
        str(dense),
        small,
        hp.PruneConfig(
            hp.Budget(width=20), criterion="magnitude", round_to=1, allocation=AllocationConfig("global", floor=0.5)
        ),
    )
    widths = [layer.mlp.down_proj.in_features for layer in find_checkpoint(str(small)).load().model.layers]
    assert len(set(widths)) > 1
    training = replace(QUICK, method=method, learning_rate=1e-3)
    record = recover(str(small), tmp_path / "out", str(pruned / "data.jsonl"), RecoverConfig(training))
    before, after = astuple(record.results.held_out_perplexity)
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == widths


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    training = replace(QUICK, method=method, distill_weight=0.5, learning_rate=1e-3)
    run(pruned, tmp_path / "whole", training)
    with pytest.raises(hp.UserError, match=r"there is no state of such a run beside .*parts to resume; leave out"):
        run(pruned, tmp_path / "parts", training, resume=True)
    for stop in (3, 5):  # after the states of steps 2 and 4

        def interrupted(self: Watch, args: Any, state: Any, control: Any, stop: int = stop, **_: Any) -> None:
            if state.global_step == stop:
                raise Interruption

        with monkeypatch.context() as patch:
            patch.setattr(Watch, "on_step_end", interrupted)
            with pytest.raises(Interruption):
                run(pruned, tmp_path / "parts", training)
        assert not leftovers(tmp_path)
        assert not (tmp_path / "parts").exists()
    record = run(pruned, tmp_path / "parts", training, resume=True)
    assert [step for step, _ in record.results.losses] == [1, 2, 3, 4, 5, 6]
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_the_merged_model_is_the_one_with_the_adapter(pruned: Path, tmp_path: Path) -> None:
    run(pruned, tmp_path / "out", keep_adapter=True)
    base = AutoModelForCausalLM.from_pretrained(pruned / "pruned")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    merged, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny_tokens(vocabulary=200)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(merged, tokens), adapted(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
        plain = logits_of(AutoModelForCausalLM.from_pretrained(pruned / "pruned"), tokens)
    assert not torch.allclose(logits_of(merged, tokens), plain, atol=1e-3)


@pytest.mark.parametrize(("rate", "said"), [(10.0, "held-out perplexity"), (1e25, "not finite")])
def test_a_run_that_diverges_says_so_and_keeps_what_was_good(
    pruned: Path, tmp_path: Path, rate: float, said: str
) -> None:
    record = run(pruned, tmp_path / "out", replace(QUICK, method="full", learning_rate=rate, max_steps=10))
    assert said in (record.results.trouble or "")
    kept, before = weights_of(tmp_path / "out"), weights_of(pruned / "pruned")
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())


def test_a_teacher_kept_on_disk_is_asked_once_and_teaches_alike(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(QUICK, learning_rate=1e-3, temperature=1.5)
    live = run(pruned, tmp_path / "live", training)
    monkeypatch.setattr("hifiprune.recovery.distillation.ROWS_A_FILE", 8)
    asked: list[int] = []
    write = CachedTeacher.write

    def counted(self: CachedTeacher, first: int, *more: Any) -> None:
        asked.append(first)
        write(self, first, *more)

    def interrupted(self: CachedTeacher, first: int, *more: Any) -> None:
        if len(asked) == 2:
            raise Interruption
        counted(self, first, *more)

    with monkeypatch.context() as patch:
        patch.setattr(CachedTeacher, "write", interrupted)
        with pytest.raises(Interruption):
            run(pruned, tmp_path / "kept", replace(training, cache_teacher=256))  # of 257
        assert asked == [0, 8]
        patch.setattr(CachedTeacher, "write", counted)
        record = run(pruned, tmp_path / "kept", replace(training, cache_teacher=256))
    assert asked == [*range(0, asked[-1] + 8, 8)], "nothing is asked twice"
    assert len(asked) > 2
    for ours, theirs in zip(record.results.losses, live.results.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "live"]


def test_hidden_states_are_matched(pruned: Path, tmp_path: Path) -> None:
    training = replace(QUICK, distill_weight=0.0, learning_rate=3e-3, max_steps=16)
    run(pruned, tmp_path / "labels", training)
    run(pruned, tmp_path / "matched", replace(training, match_hidden=10.0))
    text = " ".join(json.loads(line)["text"] for line in (pruned / "data.jsonl").read_text().splitlines())
    tokens = AutoTokenizer.from_pretrained(pruned / "pruned")(text[:60], return_tensors="pt").input_ids
    states = {}
    for folder in (pruned / "dense", pruned / "pruned", tmp_path / "labels", tmp_path / "matched"):
        with torch.no_grad():
            states[folder.name] = AutoModelForCausalLM.from_pretrained(folder).base_model(tokens).last_hidden_state
    distances = {name: float((state - states["dense"]).norm()) for name, state in states.items()}
    assert distances["matched"] < distances["pruned"]
    assert distances["matched"] < 0.98 * distances["labels"]


def test_a_disk_without_room_for_the_teacher_is_said_before(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=900_000))
    with pytest.raises(hp.UserError, match=r"cache-teacher 200 takes 2\.\d+ MB beside the output, where 900.0 kB"):
        run(pruned, tmp_path / "out", replace(QUICK, cache_teacher=200))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(hp.RunError, match=r"has 100\.0 kB free, the output needs 949\.4 kB"):
        run(pruned, tmp_path / "out", replace(QUICK, method="full"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_three_states_and_the_result_fit_where_the_disk_was_found_large_enough(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes: list[int] = []
    seen: list[int] = []
    monkeypatch.setattr("hifiprune.commands.recover_preflight.check_space", lambda target, needed: seen.append(needed))

    def measured(self: Watch, args: Any, state: Any, control: Any, **_: Any) -> None:
        files = (Path(args.output_dir) / f"checkpoint-{state.global_step}").rglob("*")
        sizes.append(sum(file.stat().st_size for file in files if file.suffix in (".pt", ".safetensors")))

    monkeypatch.setattr(Watch, "on_save", measured)
    run(pruned, tmp_path / "out", replace(QUICK, method=method))
    result = (tmp_path / "out" / "model.safetensors").stat().st_size
    overhead = 150_000  # names and shapes, which weigh little in a real model
    assert 3 * max(sizes) + result < seen[0] + overhead
    assert seen[0] < 1.5 * (3 * max(sizes) + result)


def test_a_disk_that_fills_up_while_a_state_is_kept_is_told(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: Any, **how: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(hp.RunError, match=r"a state of the training could not be kept in"):
        run(pruned, tmp_path / "out")


def test_the_best_state_is_the_one_that_is_written(pruned: Path, tmp_path: Path) -> None:
    """Not the last: what is written is looked at again by going on from it."""
    training = replace(QUICK, method="full", learning_rate=8e-3, distill_weight=0.0, max_steps=14)
    record = run(pruned, tmp_path / "out", training)
    looks = [loss for _, loss in record.results.held_out_losses]
    assert 0 < record.results.best_step < record.results.steps, "or the test could not fail"
    assert looks[-1] > 1.01 * min(looks)
    again = recover(
        str(tmp_path / "out"),
        tmp_path / "again",
        str(pruned / "data.jsonl"),
        RecoverConfig(replace(training, max_steps=1)),
    )
    assert again.results.held_out_perplexity.before == pytest.approx(math.exp(min(looks)), rel=1e-5)


def test_a_time_limit_that_is_not_reached_changes_nothing(pruned: Path, tmp_path: Path) -> None:
    losses = []
    for name, limit in (("free", None), ("limited", 600.0)):
        training = replace(QUICK, max_steps=None, epochs=0.25, max_minutes=limit, learning_rate=1e-3)
        losses.append(run(pruned, tmp_path / name, training).results.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1


def test_the_rate_falls_with_time_where_that_is_spent_sooner_than_the_steps() -> None:
    trainer, weight = TimedTrainer.__new__(TimedTrainer), torch.zeros(1, requires_grad=True)
    trainer.watch, trainer.lr_scheduler = Watch(TimeLimit(10.0), 1), None
    schedule = trainer.create_scheduler(8, torch.optim.SGD([weight], 1.0))
    rates = []
    for share in (0.0, 0.0, 0.9, 0.9):
        trainer.watch.share = share
        schedule.optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    steps = [1 / 8, 2 / 8, 0.9, 0.9]
    assert rates == pytest.approx([(1 + math.cos(math.pi * step)) / 2 for step in steps])


def test_what_is_held_out_is_no_part_of_what_is_trained_on() -> None:
    examples = [Example([10 * number + place % 10 for place in range(35)], [True] * 35) for number in range(20)]
    rows, held = split(examples, replace(QUICK, seq_len=8, held_out=0.2), 200)
    ours, theirs = (
        {token // 10 for row in part.rows for each in row for token in each.tokens} for part in (rows, held)
    )
    assert len(theirs) == 4
    assert not ours & theirs
    rows, held = split(examples[:2], replace(QUICK, seq_len=8, held_out=0.2), 200)
    assert len(rows) > len(held) > 0, "of few and long ones pieces are held out"
    with pytest.raises(hp.UserError, match="writes token 199 where the model's vocabulary has 150"):
        split(examples, replace(QUICK, seq_len=8), 150)


def test_a_padding_token_beyond_the_vocabulary_does_no_harm(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "pruned")
    assert tokenizer.pad_token_id == 257
    recover(
        str(tmp_path / "pruned"),
        tmp_path / "out",
        str(pruned / "data.jsonl"),
        RecoverConfig(replace(QUICK, max_steps=1)),
    )


def test_a_dense_model_that_is_another_by_now_does_not_teach(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned" / "run.json").read_text())
    record["arguments"]["model"] = str(save_checkpoint(tmp_path / "other", initializer_range=0.3))
    (tmp_path / "pruned" / "run.json").write_text(json.dumps(record))
    start, config = (str(tmp_path / "pruned"), tmp_path / "out", str(pruned / "data.jsonl")), RecoverConfig(QUICK)
    with pytest.raises(hp.UserError, match=r"is not the one that .* was pruned from: its weights differ"):
        recover(*start, config)
    found = recover(*start, replace(config, teacher=str(tmp_path / "other"))).results
    assert found.teacher_hash == hash_model(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    assert found.data_hash


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format": "of-another-tool-1"}', "no JSON"])
def test_a_record_that_says_nothing_is_no_record(pruned: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "pruned")
    (tmp_path / "pruned" / "run.json").write_text(text)
    with pytest.raises(hp.UserError, match=r"the dense model is not known from .*: give --teacher"):
        recover(str(tmp_path / "pruned"), tmp_path / "out", str(pruned / "data.jsonl"), RecoverConfig(QUICK))


def test_a_tracker_is_told_of_losses(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append(logs)

    with pytest.raises(hp.UserError, match="tracker 'swanlab' is not installed: pip install swanlab"):
        run(pruned, tmp_path / "out", report_to="swanlab")
    with pytest.raises(hp.UserError, match=r"tracker 'wand' is not known; .* did you mean 'wandb'\?"):
        run(pruned, tmp_path / "out", report_to="wand")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "swanlab", Tracker)
    monkeypatch.setattr(
        "hifiprune.commands.recover_preflight.get_available_reporting_integrations", lambda: ["swanlab"]
    )
    record = run(pruned, tmp_path / "out", report_to="swanlab")
    assert [logs["loss"] for logs in told if "loss" in logs] == [loss for _, loss in record.results.losses]
    assert any("eval_loss" in logs for logs in told)


def test_steps_after_the_last_look_are_looked_at_too(pruned: Path, tmp_path: Path) -> None:
    record = run(pruned, tmp_path / "out", replace(QUICK, max_steps=3, learning_rate=1e-3))
    assert [step for step, _ in record.results.held_out_losses] == [0, 2, 3]


def test_the_control_is_the_dense_model_trained_on_labels(pruned: Path, tmp_path: Path) -> None:
    record = run(pruned, tmp_path / "out", control=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 40
    assert record.arguments["control"]
    assert record.arguments["training"]["distill_weight"] == 0, "as it was trained"
    before, after = astuple(record.results.held_out_perplexity)
    assert after < before


@dataclass
class Clock:
    """A clock that rows and batches advance.

    Attributes:
        seconds: since the start.
        row: that a held-out row takes.
        batch: that a batch of training takes.
        rows: held-out rows that were looked at.
    """

    seconds: float = 0.0
    row: float = 1.0
    batch: float = 60.0
    rows: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Clock":
        look, learn = TimedTrainer.prediction_step, TimedTrainer.training_step

        def looking(trainer: Any, *rest: Any, **how: Any) -> Any:
            self.rows, self.seconds = self.rows + 1, self.seconds + self.row
            return look(trainer, *rest, **how)

        def learning(trainer: Any, *rest: Any, **how: Any) -> Any:
            self.seconds += self.batch
            return learn(trainer, *rest, **how)

        monkeypatch.setattr("time.monotonic", lambda: self.seconds)
        monkeypatch.setattr(TimedTrainer, "prediction_step", looking)
        monkeypatch.setattr(TimedTrainer, "training_step", learning)
        return self


TIMED = replace(QUICK, max_steps=50, max_minutes=10.0, evaluate_every=100)


def test_a_time_limit_bounds_the_whole_run(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(row=8.0).install(monkeypatch)
    with shown(Console(stderr=True, width=400)):
        record = run(pruned, tmp_path / "out", TIMED)
    look, step, writing = 8 * clock.rows / 2, 2 * 60, 2 * record.stages[-3].seconds
    assert [stage.name for stage in record.stages][-3:] == ["loading the weights", "training", "writing"]
    assert record.results.steps == (600 - writing - 2 * look) // step
    assert [number for number, _ in record.results.held_out_losses] == [0, record.results.steps]
    assert clock.seconds <= 600 - writing
    assert clock.seconds > 600 - writing - step
    said = capsys.readouterr().err
    assert "50 steps of 64 tokens, about 1 s" in said, "three passes over 100 rows of 4 ms each"
    assert "It ends with these steps or after 10 minutes in all, whichever comes first." in said
    assert f"held-out rows: 6 of {clock.rows // 2}, about {8 * (clock.rows // 2 - 6)} s left" in said
    assert f"step 1 of 50, 1 tokens a second, about {(600 - look - step) / 60:.0f} min left" in said


def test_the_time_that_writing_takes_is_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock().install(monkeypatch)
    limit = TimeLimit(10.0)
    clock.seconds = 100
    assert (limit.spent, limit.left) == (100, 500)
    limit.writing, limit.before = 90, 50
    assert (limit.spent, limit.left) == (150, 360)
    assert TimeLimit().left == math.inf


def test_steps_end_a_run_where_they_come_before_the_limit(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(row=1.0, batch=20.0).install(monkeypatch)
    training = replace(TIMED, max_steps=3)
    with shown(Console(stderr=True, width=400)):
        assert run(pruned, tmp_path / "out", training).results.steps == 3
    said = capsys.readouterr().err
    assert "step 1 of 3, 2 tokens a second, about 80 s left: loss" in said
    assert "step 2 of 3, 2 tokens a second, about 40 s left: loss" in said


@pytest.mark.parametrize("clock", [Clock(row=200.0), Clock(batch=400.0)], ids=["first look", "first step"])
def test_a_limit_that_passes_before_the_first_step_leaves_the_checkpoint_as_it_was(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    clock.install(monkeypatch)
    words = ("--data", pruned / "data.jsonl", "--max-minutes", 10, "--seq-len", 32, "--gradient-accumulation-steps", 2)
    result = run_command("recover", pruned / "pruned", "--output", tmp_path / "out", *words, "--lora-r", 4)
    assert result.code == 0, result.err
    said = "time limit of 10 minutes passed before the first step, so give a larger --max-minutes"
    assert f"{said}: the checkpoint is written as it was." in result.err
    assert clock.seconds <= 600
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"]["steps"] == 0
    for name, weight in weights_of(pruned / "pruned").items():
        assert torch.equal(weight, weights_of(tmp_path / "out")[name])
    assert "none of which was better than the start" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_limit_that_passes_while_the_data_is_read_or_the_teacher_asked_is_kept_too(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(pruned, tmp_path / "read", replace(TIMED, max_minutes=1e-9))
    assert record.results.held_out_perplexity == Pair(None, None)
    assert torch.equal(*(weights_of(path)["lm_head.weight"] for path in (pruned / "pruned", tmp_path / "read")))
    clock, write = Clock().install(monkeypatch), CachedTeacher.write

    def slowly(*arguments: Any) -> None:
        clock.seconds += 400
        write(*arguments)

    monkeypatch.setattr(CachedTeacher, "write", slowly)
    monkeypatch.setattr("hifiprune.recovery.distillation.ROWS_A_FILE", 2)
    record = run(pruned, tmp_path / "asked", replace(TIMED, cache_teacher=8))
    assert (clock.seconds, record.results.steps) == (800, 0)
    assert (
        record.results.trouble
        == "the time limit of 10 minutes passed before the first step, so give a larger --max-minutes"
    )
    monkeypatch.setattr("hifiprune.commands.cost_model.Estimator.reading", lambda *_, **__: 7200.0)
    with pytest.raises(hp.UserError, match=r"rows takes about 2\.0 h, and max-minutes is 10: give more of them"):
        run(pruned, tmp_path / "refused", replace(TIMED, cache_teacher=8))


def test_a_time_limit_counts_the_time_before_an_interruption(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock().install(monkeypatch)
    training = replace(TIMED, evaluate_every=2)

    def interrupted(self: Watch, args: Any, state: Any, *rest: Any, **how: Any) -> None:
        if state.global_step == 2:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_begin", interrupted)
        with pytest.raises(Interruption):
            run(pruned, tmp_path / "out", training)
    assert 240 < clock.seconds < 300
    clock.seconds += 10_000  # between the two
    record = run(pruned, tmp_path / "out", training)
    assert 2 < record.results.steps <= 4


def test_what_cannot_be_trained_is_refused(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one alone"}\n')
    with pytest.raises(hp.UserError, match="too little data: 1 examples make no row"):
        recover(str(pruned / "pruned"), tmp_path / "out", str(tmp_path / "few.jsonl"), RecoverConfig(QUICK))
    with pytest.raises(hp.UserError, match=r"the dense model is not known from .*: give --teacher"):
        recover(str(pruned / "dense"), tmp_path / "out", str(pruned / "data.jsonl"), RecoverConfig(QUICK))
    with pytest.raises(hp.UserError, match="seq-len 200000 exceeds the model's 64 positions"):
        run(pruned, tmp_path / "out", replace(QUICK, seq_len=200_000))
    with pytest.raises(hp.UserError, match=r"target module 'dwn_proj' is not known; .* did you mean 'down_proj'"):
        run(pruned, tmp_path / "out", replace(QUICK, target_modules=("q_proj", "dwn_proj")))
    with pytest.raises(hp.UserError, match="shard size '5 gigs' must be a number and a unit"):
        run(pruned, tmp_path / "out", shard_size="5 gigs")
    with pytest.raises(hp.UserError, match="dtype float16 loses the small gradients"):
        run(pruned, tmp_path / "out", compute=hp.ComputeConfig(dtype="float16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hifiprune.engine.compute.check_attention", lambda *_: None)  # it runs on GPUs only
        flash = hp.ComputeConfig(attention="flash_attention_2")
    with pytest.raises(hp.UserError, match="in batches of one row only"):
        run(pruned, tmp_path / "out", replace(QUICK, per_device_batch_size=2), compute=flash)
    with pytest.raises(hp.UserError, match=r"output .*dense is the input .*dense; choose another name"):
        run(pruned, pruned / "dense", overwrite=True)
    save_checkpoint(tmp_path / "other", vocab_size=300)
    with pytest.raises(hp.UserError, match="the teacher's vocabulary has 300 tokens, the model's 257"):
        run(pruned, tmp_path / "out", teacher=str(tmp_path / "other"))
    with pytest.raises(hp.UserError, match="cache-teacher 257 must be below the vocabulary, 257"):
        run(pruned, tmp_path / "out", replace(QUICK, cache_teacher=257))
    save_checkpoint(tmp_path / "deep", num_hidden_layers=4)
    with pytest.raises(hp.UserError, match="match-hidden needs a teacher of the same depth"):
        run(pruned, tmp_path / "out", replace(QUICK, match_hidden=1.0), teacher=str(tmp_path / "deep"))
    with pytest.raises(hp.UserError, match=r"target module 'lm_head' is not known"):
        run(pruned, tmp_path / "out", replace(QUICK, target_modules=("q_proj", "lm_head")))
    with pytest.raises(hp.UserError, match="optimizer 8-bit needs bitsandbytes: pip install bitsandbytes"):
        run(pruned, tmp_path / "out", replace(QUICK, optimizer="8-bit"))
    with pytest.raises(hp.UserError, match="--teacher has nothing to teach"):
        run(pruned, tmp_path / "out", replace(QUICK, distill_weight=0.0), teacher=str(pruned / "dense"))
    with pytest.raises(hp.UserError, match="--keep-adapter is for --method lora"):
        run(pruned, tmp_path / "out", replace(QUICK, method="full"), keep_adapter=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "lore"}, "method 'lore' is not known; known are lora, full; did you mean 'lora'"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is not known"),
        ({"learning_rate": 0.0}, "learning-rate 0 must be above 0"),
        ({"max_steps": 0}, "max-steps 0 must be at least 1"),
        ({"distill_weight": 1.5}, r"distill-weight 1.5 must lie in \[0, 1\]"),
        ({"seq_len": 1}, "seq-len 1 must be at least 2"),
        ({"max_minutes": 0.0}, "max-minutes 0 must be above 0"),
        ({"match_hidden": -1.0}, "match-hidden -1 must be at least 0"),
        ({"cache_teacher": 9, "distill_weight": 0.0}, "cache-teacher keeps distributions: give a --distill-weight"),
        ({"cache_teacher": 9, "match_hidden": 0.5}, "and no --match-hidden"),
        ({"seed": -1}, "seed -1 must lie in 0 to 4294967295"),
        ({"held_out": 0.0}, r"held-out 0 must lie in \(0, 1\)"),
    ]
    for values, message in cases:
        with pytest.raises(hp.UserError, match=message):
            TrainingConfig(**values)
    assert not (tmp_path / "out").exists()


def test_labels_need_no_dense_model_and_teaching_says_where_it_is_not(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned" / "run.json").read_text())
    record["arguments"]["model"] = str(tmp_path / "gone")
    (tmp_path / "pruned" / "run.json").write_text(json.dumps(record))
    shutil.copyfile(pruned / "data.jsonl", tmp_path / "data.jsonl")
    with pytest.raises(hp.UserError, match=r"there is no model folder .*gone; give --teacher, to learn"):
        run(tmp_path, tmp_path / "out")
    run(tmp_path, tmp_path / "out", replace(QUICK, distill_weight=0.0, max_steps=1))


def test_a_long_text_is_rows_to_train_on_and_to_hold_out(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abc cd " * 200)
    record = recover(
        str(pruned / "pruned"), tmp_path / "out", str(tmp_path / "long.txt"), RecoverConfig(replace(QUICK, max_steps=1))
    )
    assert record.results.steps == 1


def test_a_look_is_taken_once_when_a_run_goes_on(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Watch, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", interrupted)
        with pytest.raises(Interruption):
            run(pruned, tmp_path / "out")
    record = run(pruned, tmp_path / "out")
    assert [step for step, _ in record.results.held_out_losses] == [0, 2, 4, 6]


def test_what_training_did_not_better_is_the_checkpoint_bit_for_bit(pruned: Path, tmp_path: Path) -> None:
    training = replace(QUICK, method="full", learning_rate=10.0, max_steps=2)
    run(pruned, tmp_path / "out", training, compute=hp.ComputeConfig("cpu", "bfloat16"))
    kept, before = weights_of(tmp_path / "out"), weights_of(pruned / "pruned")
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", pruned / "pruned")]
    assert configs[0] == configs[1]


def test_launchers_that_are_known_to_fail_are_refused(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(hp.UserError, match=r"low-rank changes do not work under FSDP; use .*, or --method full"):
        run(pruned, tmp_path / "out")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(hp.UserError, match="training does not work under DeepSpeed; use torchrun, where"):
        run(pruned, tmp_path / "out", replace(QUICK, method="full"))


def test_the_papers_settings_are_those_of_their_scripts() -> None:
    names = ("method", "learning_rate", "epochs", "gradient_accumulation_steps", "weight_decay", "seq_len")
    rows: dict[str, Any] = {preset: tuple(getattr(each, name) for name in names) for preset, each in TRAININGS.items()}
    assert rows["hfprune-lora"] == ("lora", 4e-4, 2, 32, 0, 1024)
    assert rows["hfprune-full"] == ("full", 1e-4, 3, 32, 0.05, 1024)
    assert rows["sdmprune-lora"] == ("lora", 1e-4, 2, 16, 0.05, 4096)
    assert rows["sdmprune-full"] == ("full", 1e-4, 3, 16, 0.05, 4096)
    ranks = [(TRAININGS[name].lora_r, TRAININGS[name].lora_alpha) for name in ("hfprune-lora", "sdmprune-lora")]
    assert ranks == [(32, 64), (8, 16)]


@pytest.mark.parametrize(("method", "more"), [("lora", ["--lora-dropout", 0]), ("full", ["--cache-teacher", 50])])
def test_two_processes_are_one_with_twice_the_accumulation(
    pruned: Path, tmp_path: Path, method: str, more: list[object]
) -> None:
    flags = [
        "--data", pruned / "data.jsonl", "--method", method, *more, "--distill-weight", 0.5,
        "--learning-rate", 1e-3, "--max-steps", 4, "--evaluate-every", 2, "--seq-len", 32, "--held-out", 0.2,
        "--device", "cpu",
    ]  # fmt: skip
    start = ["recover", pruned / "pruned", *flags]
    one = run_command(*start, "--gradient-accumulation-steps", 4, "--output", tmp_path / "one", "--json")
    assert one.code == 0, one.err
    shared = command(*start, "--gradient-accumulation-steps", 2, "--output", tmp_path / "two", "--json")
    two = forked(tmp_path / "told", shared, 2)
    assert two.codes == [0, 0], two.err
    found = json.loads(two.out)  # one process speaks
    assert two.err.count("held-out perplexity") == 3
    for ours, theirs in zip(found["results"]["held_out_losses"], one.json["results"]["held_out_losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_the_command_shows_presets_and_refuses_what_it_lacks(pruned: Path, tmp_path: Path) -> None:
    show = ("recover", "--show-preset")
    shown = run_command(*show, "--preset", "hfprune-lora", "--lora-r", 8, "--json")
    assert shown.code == 0, shown.err
    assert shown.json == {**asdict(TRAININGS["hfprune-lora"]), "lora_r": 8, "target_modules": []}
    assert "learning-rate" in run_command(*show).out
    refused(run_command("recover", pruned / "pruned", "--output", tmp_path / "out"), "missing option '--data'")
    flags = ("--output", tmp_path / "out", "--data", pruned / "data.jsonl")
    refused(run_command("recover", *flags), "missing argument 'MODEL'")
    full = (*flags, "--method", "full")
    refused(run_command("recover", pruned / "pruned", *full, "--lora-r", 4), "lora-r is for --method lora")
    labels = (*flags, "--distill-weight", 0, "--temperature", 2)
    refused(run_command("recover", pruned / "pruned", *labels), "temperature is that of the divergence")
    refused(run_command("recover", pruned / "pruned", *flags, "--preset", "hfprune"), "did you mean 'hfprune-")
    refused(run_command("recover", pruned / "pruned", *flags), "exceeds the model's 64 positions; use --seq-len 64")
    missing = (*flags[:3], tmp_path / "none.jsonl", "--seq-len", 32)
    refused(run_command("recover", pruned / "pruned", *missing), "none.jsonl does not exist")
    assert not (tmp_path / "out").exists()


def test_the_next_step_of_a_second_training_names_the_dense_model(pruned: Path, tmp_path: Path) -> None:
    flags = ("--data", pruned / "data.jsonl", "--max-steps", 1, "--seq-len", 32, "--gradient-accumulation-steps", 1)
    first = run_command("recover", pruned / "pruned", "--output", tmp_path / "one", *flags)
    assert first.code == 0, first.err
    second = run_command("recover", tmp_path / "one", "--output", tmp_path / "two", *flags)
    assert second.code == 0, second.err
    for result in (first, second):
        assert f"--against {pruned / 'dense'} " in result.out


def test_a_run_is_repeated_from_its_record(pruned: Path, tmp_path: Path) -> None:
    words = (
        *("--data", pruned / "data.jsonl", "--max-steps", 4, "--seq-len", 32, "--learning-rate", 1e-2, "--seed", 3),
        *(
            "--gradient-accumulation-steps",
            2,
            "--evaluate-every",
            2,
            "--held-out",
            0.2,
            "--lora-r",
            4,
            "--lora-alpha",
            8,
        ),
    )
    for name, given in (("one", (pruned / "pruned", *words)), ("two", ("--config", tmp_path / "one" / "run.json"))):
        result = run_command("recover", *given, "--output", tmp_path / name, "--quiet")
        assert result.code == 0, result.err
        assert result.err == "", "nothing but warnings and errors"
    one, two, start = (weights_of(folder) for folder in (tmp_path / "one", tmp_path / "two", pruned / "pruned"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert any(not torch.equal(weight, start[name]) for name, weight in one.items()), "or the test could not fail"
    arguments = [json.loads((tmp_path / name / "run.json").read_text())["arguments"] for name in ("one", "two")]
    assert arguments[0] == arguments[1] | {"output": str(tmp_path / "one")}
    assert arguments[0]["training"]["seed"] == 3
    result = run_command(
        "recover", "--config", tmp_path / "one" / "run.json", "--seed", 4, "--output", tmp_path / "other", "--verbose"
    )
    assert "training ...\n" in result.err
    assert json.loads((tmp_path / "other" / "run.json").read_text())["arguments"]["training"]["seed"] == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_value_is_read_within_a_step(
    method: str, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waiting(monkeypatch)
    step, start, end = torch.optim.AdamW.step, Watch.on_step_begin, Watch.on_step_end
    counted: list[tuple[str, Any]] = []

    def optimize(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():  # a fused optimizer keeps its count of steps on the device
            return step(*arguments, **options)

    def began(*arguments: Any, **options: Any) -> None:
        counted.append(("begin", reads.names.copy()))
        start(*arguments, **options)

    def ended(*arguments: Any, **options: Any) -> None:
        counted.append(("end", reads.names.copy()))
        end(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", optimize)
    monkeypatch.setattr(Watch, "on_step_begin", began)
    monkeypatch.setattr(Watch, "on_step_end", ended)
    with Reads() as reads:
        run(pruned, tmp_path / "out", replace(QUICK, method=method, max_steps=3))
    assert [what for what, _ in counted] == ["begin", "end"] * 3
    assert all(counted[number][1] == counted[number + 1][1] for number in (0, 2, 4))
    assert reads.names, "values are read between them"


def test_a_gpu_trains_by_fused_steps_in_bfloat16_and_is_read_now_and_then(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(pruned / "pruned")
    adapted = with_adapter(load(pruned / "pruned", dtype=torch.bfloat16), QUICK)
    bfloat16 = load(pruned / "pruned", dtype=torch.bfloat16)
    found: dict[str, Any] = {}

    def keep(**settings: Any) -> None:
        found.update(settings)
        raise Interruption

    monkeypatch.setattr("hifiprune.recovery.trainer.TrainingArguments", keep)
    for network, device, mixed in [
        (model, "cpu", False), (model, "cuda", True), (adapted, "cuda", True), (bfloat16, "cuda", False)
    ]:  # fmt: skip
        with pytest.raises(Interruption):
            run_trainer(network, QUICK, EMPTY, EMPTY, tmp_path, Watch(TimeLimit(None), 1), device=device, together=2)
        assert found["bf16"] == mixed, "float32 weights that are trained are computed with in bfloat16"
        assert found["optim"] == ("adamw_torch" if device == "cpu" else "adamw_torch_fused")
        assert (found["logging_steps"] == 1) == (device == "cpu")
        assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 1)


def test_a_gpu_takes_batches_of_a_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.recovery.trainer.free_bytes", lambda _: 64 * 10**9)
    small, large = shape(768, 2048, 12), shape(4096, 11_008, 32)
    default, full = TrainingConfig(), TrainingConfig(method="full")
    assert batches_together(small, default, "cpu") == 1
    assert batches_together(small, replace(default, per_device_batch_size=1), "cuda") == 1, "as it was asked for"
    assert batches_together(small, default, "cuda") == 32
    assert batches_together(small, replace(default, gradient_accumulation_steps=6), "cuda") == 6
    assert batches_together(large, default, "cuda") == 2, "which keep it busy"
    assert batches_together(large, full, "cuda") == 1, "for want of room"
    monkeypatch.setattr("hifiprune.recovery.trainer.free_bytes", lambda _: 8 * 10**9)
    together = batches_together(small, default, "cuda")
    assert together in (2, 4, 8, 16)
    small.config._attn_implementation = "flash_attention_2"
    assert batches_together(small, default, "cuda") == 1, "packed examples are kept apart in one row alone"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_batches_that_go_together_learn_the_same(method: str, pruned: Path, tmp_path: Path) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    training = replace(QUICK, method=method, learning_rate=rate, lora_dropout=0.0, max_steps=2)
    training = replace(training, gradient_accumulation_steps=4)
    run(pruned, tmp_path / "one", training)
    with patch("hifiprune.commands.recover.batches_together", lambda *_: 4):
        run(pruned, tmp_path / "four", training)
    before = weights_of(pruned / "pruned")
    one, four = weights_of(tmp_path / "one"), weights_of(tmp_path / "four")
    change = sum(float((one[name] - before[name]).square().sum()) for name in before)
    off = sum(float((one[name] - four[name]).square().sum()) for name in before)
    assert change > 0
    assert off < 1e-2 * change
