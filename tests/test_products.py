"""Products with 16-bit weights in float32, as tensor cores make them, against float64."""

import pytest
import torch
from torch import Tensor

from hifiprune.engine import products


@pytest.fixture(params=[False, True])
def tensor_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go the way of a GPU, whose product with a float32 result is made here by float32 copies."""

    def exact(left: Tensor, right: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        return left.float() @ right.float()

    if request.param:
        monkeypatch.setattr(products, "by_tensor_cores", lambda *_: True)
        monkeypatch.setattr(products, "mm_float32", exact)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_those_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(7, 64, dtype=dtype), torch.randn(64, 5, dtype=torch.bfloat16)
    wanted = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs()
    out = torch.full((7, 5), torch.nan)
    products.multiply(left, right, out)
    assert ((out - wanted).abs() <= 2**-15 * size).all()  # a bfloat16 left side alone would be 2**-9 off
    total = torch.ones(7, 5)
    products.add_product(total, left, right, 0.5)
    assert ((total - 1 - wanted / 2).abs() <= 2**-15 * size).all()


def test_two_halves_have_sixteen_bits() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    upper, lower = products.split(values, torch.bfloat16)
    assert ((upper.double() + lower.double() - values.double()).abs() <= 2**-16 * values.double().abs()).all()
    (same,) = products.split(upper, torch.bfloat16)
    assert same is upper
