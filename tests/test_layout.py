"""Products of rows, however they lie in memory."""

from __future__ import annotations

import pytest
import torch

from gradpen import _layout


@pytest.fixture(params=[False, True], ids=["by_sample", "by_feature"])
def rows(request):
    tensors = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    return [_layout.by_feature(tensor) if request.param else tensor for tensor in tensors]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_by_feature_is_another_layout_of_the_same_rows():
    rows = torch.randn(5, 7)
    turned = _layout.by_feature(rows)
    assert torch.equal(turned, rows) and turned.t().is_contiguous()
    assert _layout.lies_by_feature(turned) and not _layout.lies_by_feature(rows)
    assert not _layout.lies_by_feature(torch.randn(5, 1))


def test_products_lie_as_their_rows_do(rows):
    h, total = rows
    matrix = torch.randn(6, 6, dtype=torch.float64)
    for found, expected in (
        (_layout.times(h, matrix), h @ matrix),
        (_layout.times(h, matrix.t()), h @ matrix.t()),
        (_layout.plus_times(total, h, matrix), total + h @ matrix),
    ):
        close(found, expected)
        assert _layout.lies_by_feature(found) == _layout.lies_by_feature(h)


def test_a_product_may_lie_as_other_rows_do():
    delta, weight = torch.randn(20, 3), torch.randn(3, 6)
    found = _layout.times(delta, weight, like=_layout.by_feature(torch.empty(20, 6)))
    torch.testing.assert_close(found, delta @ weight)
    assert _layout.lies_by_feature(found)


@pytest.mark.parametrize("bias", [True, False])
def test_affine(rows, bias):
    weight = torch.randn(4, 6, dtype=torch.float64)
    offset = torch.randn(4, dtype=torch.float64) if bias else None
    for by_feature in (False, True):
        found = _layout.affine(rows[0], weight, offset, by_feature=by_feature)
        close(found, torch.nn.functional.linear(rows[0], weight, offset))
        assert _layout.lies_by_feature(found) == by_feature


def test_sums_over_rows(rows):
    a, b = rows
    close(_layout.dot(a, b), (a * b).sum())
    close(_layout.row_sq_norms(a), (a * a).sum(1))
