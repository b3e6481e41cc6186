"""Keys that are hard to round: what an offset costs the formats without a zero point."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="rounding needs torch")

from kvtier.tools.bench.rotation import rotation_rows  # noqa: E402


def test_offset_channels_cost_int8_little_and_fp8_more():
    errors = {(row.case, row.metric.removeprefix("error of scores, ")): row for row in rotation_rows()}
    even, offset = "keys: even", "keys: constant loud channels"
    assert 1.2 < errors[offset, "int8"].value / errors[even, "int8"].value < 2
    assert 2 < errors[offset, "fp8"].value / errors[even, "fp8"].value < 3
    assert errors[offset, "int8"].ratio > 10 and errors[offset, "fp8"].ratio > 1.2  # against int4
    assert errors[offset, "int8"].reference_value == pytest.approx(errors[even, "int8"].reference_value, rel=0.01)
