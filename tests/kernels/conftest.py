"""What holds for every test of kernels: the same numbers each time, and memory that holds none before it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def the_same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def outputs_begin_as_nan() -> Iterator[None]:
    """Fill what `empty` gives with NaN, and integers with their largest: an element that is not written shows."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and (torch.ones(1).new_empty(3, dtype=torch.int8) == 127).all()
    yield
    torch.use_deterministic_algorithms(False)
