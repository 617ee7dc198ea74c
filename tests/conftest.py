"""Fixtures shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_strict():
    """The same numbers in every order of tests, and torch.empty filled with NaN, so that an element that
    nobody writes is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["one tile", "many tiles"])
def workspace(request, monkeypatch):
    """Runs a test with the usual workspace and with one so small that every loop has several tiles of 64 columns."""
    from fused_mos._backends import tiled

    if request.param == "many tiles":
        monkeypatch.setitem(tiled.WORKSPACE_BYTES, "cpu", 16 * 1024)
        monkeypatch.setattr(tiled, "MAX_ROWS", 32)
        monkeypatch.setattr(tiled, "MIN_GRADIENT_ROWS", 1)  # also where its blocks are of one token
    return request.param
