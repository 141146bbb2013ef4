"""Scheme: parsing, printing, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

import halfbyte as hb


def test_parse_and_print():
    scheme = hb.Scheme.parse("w8a8")
    assert (scheme.weight_bits, scheme.activation_bits, str(scheme)) == (8, 8, "w8a8")
    assert hb.Scheme.parse(scheme) is scheme
    assert scheme == hb.Scheme(8, 8) and len({scheme, hb.Scheme(8, 8)}) == 1


def test_the_op_of_every_scheme_has_kernels():
    assert hb.kernels(hb.Scheme.parse("w8a8").op)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hb.Scheme.parse("w8a8").weight_bits = 4


@pytest.mark.parametrize(
    "text", ["", "w8", "w8a8 ", "W8A8", "w4a8_g128", "w08a8", "w9a9", "w8a8_g7", "int8", 8, None]
)
def test_what_does_not_run_is_refused(text):
    with pytest.raises(hb.SchemeError, match="w8a8") as error:
        hb.Scheme.parse(text)
    assert repr(text) in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, hb.HalfbyteError)


def test_a_combination_that_does_not_run_cannot_be_made():
    with pytest.raises(hb.SchemeError, match="w4a8"):
        hb.Scheme(4, 8)
