"""Confidence intervals and the sign test."""

import pytest

from phi3v.report.statistics import confidence_interval, interval_of_change, sign_test
from phi3v.report.templates import format_number


def test_statistics():
    # Wilson's interval for 8 of 10 and 0 of 10, as in Brown, Cai and DasGupta (2001)
    assert confidence_interval([1] * 8 + [0] * 2)[:2] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert confidence_interval([0.0] * 10)[:2] == pytest.approx((0, 0.2775), abs=1e-4)
    low, high, method = confidence_interval([0.25, 0.75] * 200)  # standard error 0.0125
    assert (low, high) == pytest.approx((0.4755, 0.5245), abs=0.004) and method.startswith("bootstrap")
    with pytest.raises(ValueError):
        confidence_interval([])
    assert sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(1, 9) == pytest.approx(22 / 1024) and sign_test(5000, 100) < 1e-6
    assert list(map(format_number, (0, 4e-5, 0.123456, 999, 21573.4, 3.2e7))) == [
        "0", "4e-05", "0.1235", "999", "21,573", "32M"
    ]  # fmt: skip


def test_the_interval_of_a_change():
    # Bonett and Price: 53 examples of which 16 rose and 1 fell, so 15/55 -+ 1.96 sqrt((19/55 - (15/55)^2) / 55)
    low, high, method = interval_of_change([1.0] * 16 + [-1.0] + [0.0] * 36)
    assert (low, high, method) == (pytest.approx(0.1351, abs=1e-4), pytest.approx(0.4103, abs=1e-4), "Bonett and Price")
    low, high, _ = interval_of_change([0.0] * 50)
    assert -high == low < 0
    assert interval_of_change([1.0])[:2] == (pytest.approx(-0.7335, abs=1e-4), 1.0)
    low, high, method = interval_of_change([0.25, -0.25] * 200)  # standard error 0.0125
    assert (low, high) == pytest.approx((-0.0245, 0.0245), abs=0.004) and method.startswith("bootstrap")
    with pytest.raises(ValueError):
        interval_of_change([])
