"""Scheme: parsing, printing, what its fields mean, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

import halfbyte as hb
from halfbyte.scheme import NAMES


def test_parse_and_print():
    scheme = hb.Scheme.parse("w8a8")
    assert (scheme.weight_bits, scheme.activation_bits, str(scheme)) == (8, 8, "w8a8")
    assert hb.Scheme.parse(scheme) is scheme
    assert scheme == hb.Scheme(8, 8) and len({scheme, hb.Scheme(8, 8)}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_back(name):
    scheme = hb.Scheme.parse(name)
    assert str(scheme) == name and hb.Scheme(**dataclasses.asdict(scheme)) == scheme
    assert hb.kernels(scheme.op), "its op has kernels"
    assert repr(scheme).startswith("Scheme(weight_bits=")


def test_the_names_are_what_the_grammar_allows():
    allowed = set()
    for w, a, g, z, nf4, ag in itertools.product(
        (4, 8), (8, 16), (0, 32, 64, 128), (False, True), (False, True), (0, 32, 64, 128)
    ):
        if nf4 and (w, a, z) != (4, 16, False) or nf4 and not g:
            continue
        if ag and (a != 8 or (g and g != ag)):
            continue
        name = f"w{w}a{a}" + f"_g{g}" * (g > 0) + "+asym" * z + "+nf4" * nf4 + f"+ag{ag}" * (ag > 0)
        allowed.add(name)
        assert hb.Scheme(w, a, g, z, nf4, ag) == hb.Scheme.parse(name)
    assert allowed == set(NAMES) and len(NAMES) == len(allowed)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("w4a8+asym_g32", "w4a8_g32+asym"),
        ("w4a8+ag64+asym_g64", "w4a8_g64+asym+ag64"),
        ("w4a16+nf4_g128", "w4a16_g128+nf4"),
    ],
)
def test_suffixes_come_in_any_order(text, canonical):
    assert str(hb.Scheme.parse(text)) == canonical and hb.Scheme.parse(text) == hb.Scheme.parse(canonical)


@pytest.mark.parametrize(
    ("name", "per_token", "fold", "groups"),
    [
        ("w8a8", True, 0, 1),
        ("w4a8_g32", True, 32, 4),
        ("w4a8+ag64", False, 64, 1),
        ("w4a8_g128+asym+ag128", False, 128, 1),
        ("w8a16", False, 128, 1),
        ("w4a16_g64", False, 64, 2),
    ],
)
def test_what_the_fields_mean(name, per_token, fold, groups):
    scheme = hb.Scheme.parse(name)
    assert (scheme.per_token, scheme.fold_group, scheme.groups(100)) == (per_token, fold, groups)
    assert scheme.op == name[: len("w8a16") if "a16" in name else len("w8a8")].join(("linear_", ""))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hb.Scheme.parse("w8a8").weight_bits = 4


REFUSED = [
    "", "w8", "w8a8 ", "W8A8", "w08a8", "w9a9", "w8a8_g7", "w8a8_g", "w4a8_g256", "w4a8_g0", "w4a8__g32",
    "w4a8_g32_g32", "w4a8_g32_g64", "w4a8+asym+asym", "w4a8+ag", "w4a8+ag16", "w4a8_g32+ag64", "w4a16+ag32",
    "w4a16+nf4", "w8a16_g32+nf4", "w4a8_g32+nf4", "w4a16_g32+asym+nf4", "w4a16_g32+sym", "w3a8", "w4a4",
    "w4a8_asym", "w4a8+g32", "w4a8\n", "int8", 8, None, ("w8a8",),
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=repr)
def test_what_does_not_run_is_refused(text):
    with pytest.raises(hb.SchemeError, match="the nearest that run are w.*a scheme is w") as error:
        hb.Scheme.parse(text)
    assert repr(text) in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, hb.HalfbyteError)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("w4a8_g7", "w4a8_g"),
        ("w4a16+nf4", r"w4a16_g\d+\+nf4"),
        ("w4a8_g32+ag64", r"w4a8_g\d+\+ag"),
        ("w4a", "w4a8"),
    ],
)
def test_the_nearest_are_near(text, nearest):
    with pytest.raises(hb.SchemeError, match=f"the nearest that run are .*{nearest}"):
        hb.Scheme.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 3, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 4},
        {"weight_bits": 4, "activation_bits": 8, "group": 16},
        {"weight_bits": 4, "activation_bits": 8, "nf4": True, "group": 32},
        {"weight_bits": 4, "activation_bits": 16, "activation_group": 32},
        {"weight_bits": 4, "activation_bits": 8, "group": 32, "activation_group": 64},
    ],
    ids=str,
)
def test_a_combination_that_does_not_run_cannot_be_made(fields):
    with pytest.raises(hb.SchemeError, match=f"w{fields['weight_bits']}a{fields['activation_bits']}"):
        hb.Scheme(**fields)
