"""The loss of recovery training against transformers' own, and against plain formulas under autograd in float64."""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hifiprune.engine.sliced_objective import Rows
from hifiprune.recovery.distillation import ROWS_A_FILE, CachedTeacher, LikeliestTarget, Teacher
from hifiprune.recovery.loss import sliced_loss
from hifiprune.recovery.packing import IGNORED, pack
from hifiprune.recovery.trainer import collated
from hifiprune.recovery.training_data import Example
from hifiprune.scoring.objectives import SoftLabels
from tests.families import FORMS, ROUTED, tiny_model, tiny_tokens
from tests.test_waiting import on_meta, without_waiting


def batch(windows: int = 3, positions: int = 11) -> dict[str, Tensor]:
    tokens = tiny_tokens(windows, positions)
    labels = tokens.clone()
    labels[:, :4] = IGNORED
    labels[1] = IGNORED
    return {"input_ids": tokens, "position_ids": torch.arange(positions).expand(windows, -1), "labels": labels}


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model: PreTrainedModel, ours: Tensor, theirs: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs.to(ours), rtol=rtol, atol=0)
    found = gradients_of(model, ours)
    expected = gradients_of(model, theirs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-3 * rtol)


def loss_of(model: PreTrainedModel, kernel: SoftLabels, teacher: Teacher | None = None, **more: Any) -> Tensor:
    with sliced_loss(model.train(), kernel, teacher):
        loss: Tensor = model(**batch(), **more).loss
    model.eval()
    return loss


@pytest.mark.parametrize("variant", FORMS + ROUTED)
@pytest.mark.parametrize("count", [None, 31])
def test_cross_entropy_is_transformers_own(variant: str, count: int | None) -> None:
    model = tiny_model(variant)
    more: dict[str, Any] = {} if count is None else {"num_items_in_batch": count}
    theirs = model(**batch(), **more, use_cache=False).loss  # of logits in float32
    assert_same(model, loss_of(model, SoftLabels(0.0), **more), theirs, rtol=1e-4)


def plain_distillation(student: PreTrainedModel, dense: PreTrainedModel, share: float, heat: float) -> Tensor:
    given = batch()
    labels = given.pop("labels")[:, 1:]
    learned = labels != IGNORED
    logits = student(**given, use_cache=False).logits[:, :-1][learned]
    with torch.no_grad():
        target = dense(**given, use_cache=False).logits[:, :-1][learned]
    soft = functional.kl_div((logits / heat).log_softmax(-1), (target / heat).softmax(-1), reduction="batchmean")
    return (1 - share) * functional.cross_entropy(logits, labels[learned]) + share * heat**2 * soft


@pytest.mark.parametrize("variant", ["llama-tied", "gemma2", "qwen3"])
@pytest.mark.parametrize(("share", "heat"), [(1.0, 1.0), (0.4, 1.0), (1.0, 2.5), (0.3, 0.7)])
def test_distillation_is_the_naive_formula(variant: str, share: float, heat: float) -> None:
    student, dense = tiny_model(variant, intermediate_size=24), tiny_model(variant, seed=4)
    ours = loss_of(student, SoftLabels(share, heat), Teacher(dense))
    assert_same(student, ours, plain_distillation(student, dense, share, heat))


def test_distilling_from_itself_has_no_loss_and_moves_nothing() -> None:
    model = tiny_model("llama-tied")
    loss = loss_of(model, SoftLabels(1.0), Teacher(tiny_model("llama-tied")))
    assert abs(loss.item()) < 1e-12
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients_of(model, loss).values())


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = tiny_model("llama-tied"), Teacher(tiny_model("llama-tied", seed=4))
    whole = gradients_of(model, loss_of(model, SoftLabels(0.5), teacher))
    monkeypatch.setattr("hifiprune.engine.lm_head.SLICE_BYTES", 0)
    monkeypatch.setattr("hifiprune.engine.lm_head.SLICE_ROWS", 5)
    for name, gradient in gradients_of(model, loss_of(model, SoftLabels(0.5), teacher)).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


def test_frozen_heads_get_no_gradient_and_none_is_made() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in gradients_of(model, loss_of(model, SoftLabels(0.0)))


def test_the_model_is_itself_again_after() -> None:
    model = tiny_model("llama")
    before = model(**batch()).loss
    loss_of(model, SoftLabels(0.0))
    assert torch.equal(model(**batch()).loss, before)


def test_an_evaluated_model_gives_the_cross_entropy_of_each_row() -> None:
    model, given = tiny_model("gemma2"), batch()
    with sliced_loss(model, SoftLabels(1.0), Teacher(tiny_model("gemma2", seed=4))):
        found = model(**given)
    logits = model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), given["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(found.logits[:, 0], losses.sum(1))
    assert found.logits[:, 1].tolist() == [7, 0, 7]
    assert found.loss.item() == pytest.approx(losses.sum().item() / 14)


def test_the_likeliest_are_kept_and_the_others_are_one_event() -> None:
    generator = torch.Generator().manual_seed(0)
    own, dense = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64).mul(2).unbind()
    kept, heat = 4, 1.7
    target = LikeliestTarget.of(dense, kept, heat)
    columns = (dense / heat).topk(kept).indices

    def events(logits: Tensor) -> Tensor:
        probabilities = (logits / heat).softmax(-1)
        likeliest = probabilities.gather(1, columns)
        return torch.cat((likeliest, 1 - likeliest.sum(1, keepdim=True)), 1)

    own.requires_grad_()
    naive = heat**2 * functional.kl_div(events(own).log(), events(dense), reduction="none").sum(1)
    (slope,) = torch.autograd.grad(naive.sum(), own)
    logits = own.detach().clone()
    wanted = target.logits(slice(None), logits)
    torch.testing.assert_close(events(wanted), events(dense))
    values = SoftLabels(1.0, heat)(Rows(logits, columns[:, 0], torch.ones(5).double(), wanted, 0, 0, 5))
    torch.testing.assert_close(values, naive)
    torch.testing.assert_close(logits, slope)


def test_certain_teachers_stay_finite() -> None:
    dense = torch.tensor([[200.0, 0, 0, 0]])
    logits = torch.tensor([[0.0, 1, 2, 3]])
    wanted = LikeliestTarget.of(dense, 1, 1.0).logits(slice(None), logits)
    values = SoftLabels(1.0)(Rows(logits, torch.tensor([0]), torch.ones(1), wanted, 0, 0, 1))
    assert values.item() == pytest.approx(-torch.tensor([0.0, 1, 2, 3]).log_softmax(0)[0].item())
    assert logits.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_was_kept_on_disk_teaches_as_the_teacher_does(tmp_path: Path, temperature: float) -> None:
    chance = random.Random(0)
    examples = [
        Example([chance.randrange(61) for _ in range(size)], [index > 1 for index in range(size)])
        for size in [9, 4, 7, 12, 3] * 30
    ]
    rows = pack(examples, 12)
    assert len(rows) > ROWS_A_FILE, "more than one file"
    student, teacher = tiny_model("llama-tied", intermediate_size=24), Teacher(tiny_model("llama-tied", seed=4))
    kept = CachedTeacher(rows, 60, lambda first: tmp_path / f"{first}.safetensors")
    assert kept.missing() == [0, ROWS_A_FILE]
    for first in kept.missing():
        kept.write(first, teacher, temperature, kept.place(first))
    assert not kept.missing()
    sizes = {first: kept.place(first).stat().st_size for first in (0, ROWS_A_FILE)}
    assert kept.bytes([0, ROWS_A_FILE]) == pytest.approx(sum(sizes.values()), rel=0.03)
    assert kept.bytes([ROWS_A_FILE]) == pytest.approx(sizes[ROWS_A_FILE], rel=0.05)
    kernel = SoftLabels(0.6, temperature)
    for index in (0, 5, len(rows) - 1):
        row = {name: each[None] for name, each in kept[index].items()}
        assert all(torch.equal(row[name][0], each) for name, each in rows[index].items())
        live = {name: row[name] for name in rows[index]}
        with sliced_loss(student.train(), kernel, teacher):
            expected = gradients_of(student, student(**live).loss)
        with sliced_loss(student, kernel):
            found = gradients_of(student, student(**row).loss)
        for name, gradient in found.items():  # float16 is what is kept
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=3e-3 * float(expected[name].abs().max()))


@pytest.mark.parametrize("variant", FORMS + ROUTED)
def test_matching_hidden_states_is_the_naive_formula(variant: str) -> None:
    student, dense = tiny_model(variant, intermediate_size=24), tiny_model(variant, seed=4)
    given = batch()
    learned = given.pop("labels")[:, 1:] != IGNORED
    model = student.base_model(**given, output_hidden_states=True, use_cache=False)
    with torch.no_grad():
        target = dense.base_model(**given, output_hidden_states=True, use_cache=False)
    differences = [
        (ours - theirs)[:, :-1][learned].square().sum(-1) / theirs[:, :-1][learned].square().sum(-1)
        for ours, theirs in zip(model.hidden_states[1:], target.hidden_states[1:], strict=True)
    ]
    assert len(differences) == student.config.get_text_config().num_hidden_layers
    naive = 0.7 * torch.stack(differences).mean()
    with sliced_loss(student.train(), SoftLabels(1.0), Teacher(dense), match_hidden=0.7):
        found = student(**batch()).loss
    plain = loss_of(student, SoftLabels(1.0), Teacher(dense))
    assert_same(student, found, plain + naive, rtol=1e-4)


@pytest.mark.parametrize("target", ["labels", "teacher", "likeliest"])
def test_a_gpu_is_not_waited_for_within_a_batch(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever needs a value on the host is refused."""
    without_waiting(monkeypatch)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for meta
    student, dense = on_meta(tiny_model("llama", torch.bfloat16)), on_meta(tiny_model("llama", torch.bfloat16))
    rows = collated([{name: values[row] for name, values in batch().items()} for row in range(3)])
    if target == "likeliest":
        rows["guide_values"], rows["guide_columns"] = torch.zeros(3, 11, 5), torch.zeros(3, 11, 4, dtype=torch.int32)
    moved = {name: values.to("meta") for name, values in rows.items()}
    teacher = Teacher(dense) if target == "teacher" else None
    with sliced_loss(student.requires_grad_().train(), SoftLabels(0.0 if target == "labels" else 0.5), teacher):
        loss: Tensor = student(**moved, num_items_in_batch=moved["labels"].ne(IGNORED).sum()).loss
        loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.eval()
    with sliced_loss(student, SoftLabels(0.0)):
        assert student(**moved).logits.shape == (3, 2)
    moved.pop("places")
    with pytest.raises((RuntimeError, NotImplementedError)), sliced_loss(student, SoftLabels(0.0)):
        student(**moved)


def test_places_are_those_before_a_label() -> None:
    rows = collated([{name: values[row] for name, values in batch().items()} for row in range(3)])
    assert rows["places"].tolist() == [*range(3, 10), *range(22 + 3, 22 + 10)]
    assert all(torch.equal(rows[name], values) for name, values in batch().items())
    model = tiny_model("llama")
    plain, placed = ({**batch()}, rows)
    with sliced_loss(model.eval(), SoftLabels(0.0)):
        assert torch.equal(model(**plain).logits, model(**placed).logits)
