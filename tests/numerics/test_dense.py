"""Native dense operations against torch, at every instruction set level and odd sizes."""

from __future__ import annotations

import pytest
import torch

from lamina._native import (
    BoundDenseProgram,
    DenseProgram,
    DenseWorkspace,
    PackedLinear,
    ThreadPool,
    argmax_rows,
    available_isas,
)
from lamina.convert.passes import ops, pack

POOL = ThreadPool(2)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float32: 2e-5}


@pytest.fixture(params=available_isas())
def workspace(request: pytest.FixtureRequest) -> DenseWorkspace:
    return DenseWorkspace(POOL, request.param)


@pytest.fixture(params=DTYPES)
def element(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def _whole(buffer: int, width: int, heads: int = 1) -> tuple[int, int, int, int, int, int]:
    return (buffer, 0, heads * width, width, heads, width)


def _run(
    program: DenseProgram,
    workspace: DenseWorkspace,
    tensors: list[torch.Tensor],
    linears: list[PackedLinear] | None = None,
    vectors: list[torch.Tensor] | None = None,
) -> None:
    lists = [v.float().tolist() for v in vectors or []]
    bound = BoundDenseProgram(program, workspace, linears or [], lists)
    bound.run(len(tensors[0]), [t.data_ptr() for t in tensors])


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    scale = want.float().abs().max().item() + 1e-6
    torch.testing.assert_close(
        got.float() / scale, want.float() / scale, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 13, 16, 17, 29, 50, 193])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 17), (1, 1), (514, 129)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_linear(
    workspace: DenseWorkspace,
    element: str,
    num_rows: int,
    inputs: int,
    outputs: int,
    is_transposed: bool,
) -> None:
    dtype = DTYPES[element]
    x = _random(num_rows, inputs, dtype=dtype)
    weight = _random(outputs, inputs, dtype=dtype, seed=1)
    bias = _random(outputs, dtype=dtype, seed=2)
    residual = _random(num_rows, outputs, dtype=dtype, seed=3)
    with_all, plain = torch.empty_like(residual), torch.empty_like(residual)
    stored = weight.T.contiguous() if is_transposed else weight
    program = DenseProgram(element, 4)
    program.linear(_whole(0, inputs), 0, _whole(2, outputs), _whole(1, outputs))
    program.linear(_whole(0, inputs), 1, _whole(3, outputs))
    linears = [pack(stored, bias, is_transposed, POOL), pack(stored, None, is_transposed, POOL)]
    _run(program, workspace, [x, residual, with_all, plain], linears)
    product = x.double() @ weight.double().T
    _assert_close(plain, product)
    _assert_close(with_all, product + bias.double() + residual.double())


@pytest.mark.parametrize("width", [8, 48, 50, 129])
@pytest.mark.parametrize("kind", ["rms", "rms_once", "layer"])
def test_norms_of_strided_heads(
    workspace: DenseWorkspace, element: str, width: int, kind: str
) -> None:
    dtype = DTYPES[element]
    num_rows, heads = 5, 3
    whole = 3 * _random(num_rows, heads, 2 * width, dtype=dtype) + 0.5
    x = whole[..., width:]
    weight, bias = (_random(width, dtype=dtype, seed=s) for s in (1, 2))
    out = torch.empty(num_rows, heads, width, dtype=dtype)
    program = DenseProgram(element, 2)
    view = (0, width, 2 * width * heads, 2 * width, heads, width)
    program.norm(view, _whole(1, width, heads), 0, 1 if kind == "layer" else -1, 1e-5, kind)
    _run(program, workspace, [whole, out], vectors=[weight, bias])
    if kind == "layer":
        want = ops.layer_norm(x, weight, bias, 1e-5)
    else:
        want = ops.rms_norm(x, weight, 1e-5, kind == "rms_once")
    _assert_close(out, want)


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations_over_the_whole_range(
    workspace: DenseWorkspace, element: str, name: str, is_gated: bool
) -> None:
    dtype = DTYPES[element]
    special = torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 100.0, -100.0, 1e30, -1e30])
    x = torch.cat((torch.linspace(-12, 12, 200), special)).to(dtype).reshape(11, 19)
    gate = _random(11, 19, dtype=dtype)
    out = torch.empty_like(x)
    program = DenseProgram(element, 3)
    program.activation(_whole(0, 19), _whole(1, 19) if is_gated else None, _whole(2, 19), name)
    _run(program, workspace, [x, gate, out])
    want = ops.activation(x, gate if is_gated else None, name)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "relu"])
def test_not_a_number_stays_one(workspace: DenseWorkspace, name: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    out = torch.empty_like(x)
    program = DenseProgram("float32", 2)
    program.activation(_whole(0, 3), None, _whole(1, 3), name)
    _run(program, workspace, [x, out])
    assert out[0, 0].isnan()
    assert out[0, 1] == float("inf")


@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (128, 128), (80, 32), (24, 20)])
def test_rotary(workspace: DenseWorkspace, element: str, width: int, rotated: int) -> None:
    dtype = DTYPES[element]
    num_rows, heads = 6, 5
    x = _random(num_rows, heads, width, dtype=dtype)
    cos, sin = (_random(num_rows, rotated, dtype=dtype, seed=s) for s in (1, 2))
    out = torch.empty_like(x)
    program = DenseProgram(element, 4)
    program.rotary(_whole(0, width, heads), _whole(1, rotated), _whole(2, rotated),
                   _whole(3, width, heads))  # fmt: skip
    _run(program, workspace, [x, cos, sin, out])
    _assert_close(out, ops.rotary(x, cos[:, None], sin[:, None]))


def test_sums_and_copies(workspace: DenseWorkspace, element: str) -> None:
    a, b = (_random(7, 37, dtype=DTYPES[element], seed=s) for s in (0, 1))
    total, copied = torch.empty_like(a), torch.empty_like(a)
    program = DenseProgram(element, 4)
    program.add(_whole(0, 37), _whole(1, 37), _whole(2, 37))
    program.add(_whole(0, 37), None, _whole(3, 37))
    _run(program, workspace, [a, b, total, copied])
    assert torch.equal(total, a + b)
    assert torch.equal(copied, a)


@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_operations_wait_for_each_other(workspace: DenseWorkspace, num_rows: int) -> None:
    """A chain through scratch buffers that are used again, large enough for several threads."""
    size = 256
    x = _random(num_rows, size, dtype=torch.float32)
    weights = [_random(size, size, dtype=torch.float32, seed=s) / 16 for s in range(4)]
    out = torch.empty_like(x)
    program = DenseProgram("float32", 2)
    first, second = program.scratch(size), program.scratch(size)
    program.linear(_whole(0, size), 0, _whole(first, size))
    program.linear(_whole(first, size), 1, _whole(second, size))
    program.activation(_whole(second, size), _whole(first, size), _whole(out_buffer := 1, size),
                       "silu")  # fmt: skip
    program.linear(_whole(second, size), 2, _whole(first, size))
    program.add(_whole(first, size), _whole(out_buffer, size), _whole(second, size))
    program.linear(_whole(second, size), 3, _whole(out_buffer, size), _whole(0, size))
    linears = [pack(w, None, False, POOL) for w in weights]
    a = x @ weights[0].T
    b = a @ weights[1].T
    want = (b @ weights[2].T + torch.nn.functional.silu(b) * a) @ weights[3].T + x
    for _ in range(20):
        _run(program, workspace, [x, out], linears)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("width", [1, 15, 16, 100, 32000])
def test_argmax_finds_the_first_of_equals(isa: str, element: str, width: int) -> None:
    logits = (4 * _random(6, width + 3, dtype=DTYPES[element])).round()[:, :width]
    logits[1] = -torch.inf
    logits[2, width // 2] = torch.inf
    logits[3] = logits[3].abs().neg()
    indices, values = argmax_rows(element, logits.data_ptr(), 6, width, width + 3, isa)
    assert indices == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert values == logits.amax(-1).tolist()
    logits[4, width - 1] = torch.nan
    logits[5, width // 3 :] = torch.nan
    indices, values = argmax_rows(element, logits.data_ptr(), 6, width, width + 3, isa)
    assert indices[4:] == [width - 1, width // 3]
    assert all(value != value for value in values[4:])


def test_wrong_use_is_refused() -> None:
    workspace = DenseWorkspace(POOL)
    program = DenseProgram("float32", 2)
    with pytest.raises(ValueError, match="view of no buffer"):
        program.add(_whole(0, 4), None, _whole(2, 4))
    program.linear(_whole(0, 4), 0, _whole(1, 8))
    fits = pack(torch.zeros(8, 4), None, False, POOL)
    with pytest.raises(ValueError, match="does not fit"):
        BoundDenseProgram(program, workspace, [pack(torch.zeros(4, 4), None, False, POOL)], [])
    half = pack(torch.zeros(8, 4, dtype=torch.bfloat16), None, False, POOL)
    with pytest.raises(ValueError, match="does not fit"):
        BoundDenseProgram(program, workspace, [half], [])
    with pytest.raises(IndexError):
        BoundDenseProgram(program, workspace, [], [])
    bound = BoundDenseProgram(program, workspace, [fits], [])
    with pytest.raises(ValueError, match="2 arguments"):
        bound.run(1, [0])
    with pytest.raises(ValueError, match="unknown name"):
        DenseProgram("float8", 1)
    with pytest.raises(ValueError, match="does not run"):
        DenseWorkspace(POOL, "mmx")
