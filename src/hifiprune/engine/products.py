"""Matrix products with 16-bit weights in float32: on a GPU by its tensor cores, without the weights' copies in float32.

The product of two bfloat16 numbers is exact in float32, and tensor cores add in float32, so nothing is lost where both
sides are bfloat16. A float32 left side is split into two bfloat16 parts that together have 16 bits.
"""

import torch
from jaxtyping import Float
from torch import Tensor

MIXED = "dtype" in torch.ops.aten.mm.overloads()
"""Whether this version of torch multiplies 16-bit matrices with a float32 result."""


def multiply(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"], out: Tensor) -> None:
    """Write `left.float() @ right.float()`, in float64 if `out` is, into `out`."""
    if not by_tensor_cores(left, right, out):
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
        return
    first, *rest = split(left, right.dtype)
    out.copy_(mm_float32(first, right))
    for part in rest:
        out.add_(mm_float32(part, right))


def add_product(
    total: Float[Tensor, "rows columns"],
    left: Float[Tensor, "rows inner"],
    right: Float[Tensor, "inner columns"],
    scale: float = 1.0,
) -> None:
    """Add `scale * left.float() @ right.float()`, in float64 if `total` is, to `total`."""
    if not by_tensor_cores(left, right, total):
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)
        return
    for part in split(left, right.dtype):
        total.add_(mm_float32(part, right), alpha=scale)


def by_tensor_cores(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Return whether tensor cores compute the product as exactly as it is asked for."""
    narrow = right.dtype == torch.bfloat16 and left.dtype != torch.float64
    return MIXED and right.is_cuda and narrow and out.dtype == torch.float32


def split(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return one tensor of a 16-bit dtype that equals `values`, or two whose sum has twice the bits."""
    upper = values.to(dtype)
    return [upper] if values.dtype == dtype else [upper, (values - upper).to(dtype)]


def mm_float32(left: Tensor, right: Tensor) -> Float[Tensor, "rows columns"]:
    """Multiply two matrices of one 16-bit dtype on a GPU, with a float32 result."""
    product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product
