"""Products with one matrix in a layout of its own are those that torch has."""

from __future__ import annotations

import pytest
import torch

from gradpen import _products
from gradpen._products import times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 130])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (512, 512), (1, 7), (7, 1)])
def test_products_with_a_weight_and_its_transpose(shape, rows, dtype):
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    for matrix in (weight, weight.T):
        product, u = times(matrix), torch.randn(rows, matrix.shape[0], dtype=dtype)
        for _ in range(2):
            found = product(u)
            assert not found.requires_grad
            torch.testing.assert_close(found, u @ matrix.detach(), rtol=1e-4, atol=1e-4)
        wider = torch.randn(rows, matrix.shape[0] + 3, dtype=dtype)[:, : matrix.shape[0]]  # rows that lie apart
        torch.testing.assert_close(product(wider), wider @ matrix.detach(), rtol=1e-4, atol=1e-4)


def test_few_rows_take_the_layout_only_if_it_is_there():
    weight = torch.randn(64, 64)
    product, few = times(weight.T), torch.randn(3, 64)
    for u in (few, torch.randn(64, 64), few):
        torch.testing.assert_close(product(u), u @ weight.T)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_layout_is_for_float32_where_there_is_onednn(monkeypatch):
    weight = torch.randn(64, 32)
    assert _products._can_be_laid_out(weight) and _products._can_be_laid_out(weight.T)
    assert not _products._can_be_laid_out(weight.double())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not _products._can_be_laid_out(weight)
    u = torch.randn(32, 32)
    assert torch.equal(times(weight.T)(u), u @ weight.T)


def test_matrices_whose_rows_lie_apart_or_on_each_other():
    u = torch.randn(20, 64)
    for matrix in (torch.randn(64, 40)[:, ::2], torch.randn(64, 1).expand(64, 30), torch.randn(1, 30).expand(64, 30)):
        torch.testing.assert_close(times(matrix)(u), u @ matrix, rtol=1e-4, atol=1e-4)
