"""The expert op against one row at a time."""

from __future__ import annotations

import pytest
import torch

from lamina.convert.experts import expert_linear


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 17])
def test_expert_linear(transposed: bool, biased: bool, dtype: torch.dtype, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, 6, generator=generator).to(dtype)
    weight = torch.randn(5, 4, 6, generator=generator).to(dtype)
    bias = torch.randn(5, 4, generator=generator).to(dtype) if biased else None
    expert = torch.randint(0, 4, (num_rows,), generator=generator)
    given = weight.transpose(1, 2).contiguous() if transposed else weight
    got = expert_linear(rows, given, bias, expert, transposed)
    assert got.shape == (num_rows, 4)
    for row, chosen in enumerate(expert.tolist()):
        want = weight[chosen] @ rows[row] + (0 if bias is None else bias[chosen])
        torch.testing.assert_close(got[row], want, rtol=2e-2, atol=2e-2)


def test_rows_of_other_experts_are_zeros() -> None:
    rows, weight = torch.randn(6, 3), torch.randn(4, 2, 3)
    expert = torch.tensor([0, 3, 1, 2, 1, 0])
    whole = expert_linear(rows, weight, None, expert, False)
    parts = [expert_linear(rows, weight[i : i + 2], None, expert, False, i) for i in (0, 2)]
    assert torch.equal(parts[0] + parts[1], whole)
    assert torch.equal(parts[0][expert >= 2], torch.zeros(2, 2))


def test_expert_linear_fake_matches() -> None:
    torch.library.opcheck(
        expert_linear,
        (torch.randn(3, 6), torch.randn(2, 4, 6), None, torch.tensor([1, 0, 1]), False),
        test_utils=("test_schema", "test_faketensor"),
    )
