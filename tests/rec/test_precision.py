"""What a recipe's precision means on devices with and without bfloat16."""

import logging

import pytest
import torch

from rec import precision
from rec.precision import autocast, dtype_of, is_bf16


@pytest.fixture(params=[True, False], ids=["has-bf16", "has-not"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: request.param)
    precision._warn_if_emulated.cache_clear()
    yield request.param
    precision._warn_if_emulated.cache_clear()


def test_auto_is_bf16_where_the_device_multiplies_it(has_bf16):
    assert (is_bf16("auto"), is_bf16("bf16"), is_bf16("fp32"), is_bf16("fp16")) == (has_bf16, True, False, False)
    assert dtype_of("auto") == (torch.bfloat16 if has_bf16 else torch.float32)


def test_products_are_computed_in_it(has_bf16):
    matrix = torch.ones(8, 8)
    with autocast(matrix.device, "auto"):
        assert (matrix @ matrix).dtype == dtype_of("auto")


def test_emulated_bf16_is_said_once(has_bf16, caplog):
    with caplog.at_level(logging.WARNING):
        is_bf16("auto"), is_bf16("bf16"), is_bf16("bf16")
    assert len(caplog.records) == (0 if has_bf16 else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")
def test_cpu_is_asked_for_its_instructions():
    from torch import cpu

    if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported():
        assert precision.multiplies_bf16()
    elif not cpu._is_avx512_supported() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not precision.multiplies_bf16()
