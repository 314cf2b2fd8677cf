"""What the comparison of printed text accepts, and what it refuses."""

from __future__ import annotations

import pytest

from tests.printed import assert_printed_alike

TABLE = "          sequence  Paris\nThe           80.8   80.8\n is            9.9   -0.0\n"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TABLE, "\n" + TABLE.replace("Paris\n", "Paris  \n\n")),  # blanks at ends of lines
        ("82.7", "82.8"),
        ("83.0", "82.9"),
        ("[82.7, -0.1, 1.0]", "[82.8, 0.0, 0.9]"),
        ("-0.0", "0.0"),
        ("0.0", "-0.1"),
        ("  9.9  10.0", " 10.0   9.9"),  # a column aligns to the right
        ("sum 9.9.", "sum 10.0."),  # a sentence does not
        ("1.0e-09", "1.1e-09"),
        ("9.9e-10", "1.0e-09"),
        ("worst by 566% (at ' Paris')", "worst by 567% (at ' Paris')"),
        ("{'a': 0.3, 'b': 0.29}", "{'a': 0.29, 'b': 0.3}"),  # two decimals each
        ("9.95 of 17.9", "9.96 of 18.0"),
        ("model.layers.15.mlp 3.12.4", "model.layers.15.mlp 3.12.4"),
    ],
)
def test_alike(found: str, expected: str) -> None:
    assert_printed_alike(found, expected)
    assert_printed_alike(expected, found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("82.7", "82.9"),  # by two in the last digit
        ("[82.7, 5.1]", "[82.9, 5.1]"),
        ("0.8", "-0.8"),
        ("-0.1", "0.1"),
        ("1.0e-09", "1.0e-08"),
        ("1.0e-09", "1.2e-09"),
        ("565%", "567%"),
        ("{'a': 0.1, 'b': 0.25}", "{'a': 0.2, 'b': 0.25}"),  # 0.10 and 0.20
        ("nan 1.0", "0.0 1.0"),
        ("inf", "1.0"),
        ("30 layers", "31 layers"),  # what is counted
        ("torch.Size([30, 5])", "torch.Size([30, 6])"),
        ("step 1e3", "step 1e4"),
        ("model.layers.15.mlp", "model.layers.16.mlp"),
        ("version 3.12.4", "version 3.12.5"),
        ("float32 1.0", "float64 1.0"),
        ("True", "False"),
        ("France 1.0\nItaly 1.1", "Italy 1.0\nFrance 1.1"),  # another order
        ("Paris 1.0", "paris 1.0"),
        ("1.0 2.0", "1.0"),  # another number of figures
        ("1.0", "1.0 2.0"),
        ("1.0 2.0", "1.0\n2.0"),
        ("1.0, 2.0", "1.0 2.0"),
        ("1", "1.0"),
        ("1%", "1.0"),
        ("The  80.8", "The   80.8"),  # another layout
        ("  a 1.0", "a 1.0"),
        ("a  1.0 b", "a 1.0  b"),
        ("a   9.9 b", "a   10.0  b"),
        ("# 1.0", "2.0 1.0"),
        ("", "1.0"),
        ("1.0", ""),
    ],
)
def test_not_alike(found: str, expected: str) -> None:
    with pytest.raises(AssertionError):
        assert_printed_alike(found, expected)
    with pytest.raises(AssertionError):
        assert_printed_alike(expected, found)


def test_the_lines_that_differ_are_named() -> None:
    with pytest.raises(AssertionError, match=r"found    b 2\.3\nexpected b 2\.0$"):
        assert_printed_alike("a 1.0\nb 2.3", "a 1.1\nb 2.0")
