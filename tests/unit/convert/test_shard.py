"""Parts of tensors, and what becomes of them under reshapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.convert.shard import Shard, bounds, merged, positions, reshaped, run, slices


@st.composite
def _factored(draw: st.DrawFn) -> tuple[list[int], list[int], Shard]:
    """Two shapes of the same number of elements, and a part of the first."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    shapes = []
    for _ in range(2):
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(factor)
            else:
                shape[-1] *= factor
        shapes.append(shape)
    dim = draw(st.integers(0, len(shapes[0]) - 1))
    kept = draw(st.sets(st.integers(0, shapes[0][dim] - 1), min_size=1))
    return shapes[0], shapes[1], Shard(dim, np.array(sorted(kept)))


@given(_factored())
def test_a_part_after_a_reshape_has_the_same_elements(
    case: tuple[list[int], list[int], Shard],
) -> None:
    shape, new_shape, shard = case
    x = torch.arange(math.prod(shape)).view(shape)
    if (moved := reshaped(shard, shape, new_shape)) is not None:
        assert torch.equal(moved.of(x.view(new_shape)).flatten(), shard.of(x).flatten())


@pytest.mark.parametrize(
    ("shard", "shape", "new_shape", "expected"),
    [
        (run(2, 6, 12), (1, 5, 12, 8), (1, 5, 96), run(2, 48, 96)),
        (run(2, 48, 96), (1, 5, 96), (1, 5, 12, 8), run(2, 6, 12)),
        (run(1, 3, 6), (5, 6, 8), (1, 5, 6, 8), run(2, 3, 6)),
        (run(2, 4, 12), (1, 5, 96), (1, 5, 12, 8), None),
        (run(3, 0, 4), (1, 5, 12, 8), (1, 5, 96), Shard(2, np.flatnonzero(np.arange(96) % 8 < 4))),
    ],
)
def test_heads_and_features(
    shard: Shard, shape: tuple[int, ...], new_shape: tuple[int, ...], expected: Shard | None
) -> None:
    assert reshaped(shard, shape, new_shape) == expected


@given(st.integers(1, 200), st.integers(1, 8))
def test_shares_are_all_of_it_in_order_and_even(size: int, num_ranks: int) -> None:
    shares = [bounds(size, rank, num_ranks) for rank in range(num_ranks)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(size))
    lengths = {stop - start for start, stop in shares}
    assert max(lengths) - min(lengths) <= 1


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1))
def test_positions_and_slices_find_the_elements(outer: set[int], inner: set[int]) -> None:
    a, b = (np.array(sorted(x)) for x in (outer, inner))
    found = positions(a, b)
    assert (found is not None) == (inner <= outer)
    if found is not None:
        assert a[found].tolist() == b.tolist()
    assert [i for piece in slices(b) for i in range(*piece)] == b.tolist()


def test_users_that_want_parts_of_one_dimension_get_all_of_them() -> None:
    assert merged([run(1, 0, 2), run(1, 4, 6), run(1, 0, 2)]) == Shard(1, np.array([0, 1, 4, 5]))
    assert merged([run(1, 0, 2), None]) is None
    assert merged([run(1, 0, 2), run(0, 0, 2)]) is None
    assert merged([]) is None


def test_a_view_is_one_run_of_the_tensor_s_memory() -> None:
    x = torch.arange(12).view(4, 3)
    view = run(0, 1, 3).view_of(x)
    assert view is not None
    assert view.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert run(1, 0, 2).view_of(x) is None
    assert Shard(0, np.array([0, 2])).view_of(x) is None
    copy = run(0, 1, 3).of(x)
    assert copy.tolist() == view.tolist()
    assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
