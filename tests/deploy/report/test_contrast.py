"""Contrast of text in the page, light and dark: WCAG 2.2, success criterion 1.4.3, level AA."""

import re
from pathlib import Path

import pytest

CSS = (Path(__file__).parents[3] / "deploy/report/page/page.css").read_text()
AA = 4.5
TEXT = [  # text colour, background
    *[(ink, back) for ink in ("ink", "muted", "accent", "bad", "good", "warn") for back in ("page", "surface")],
    ("curve", "surface"),
    ("curve-2", "surface"),
    ("curve-3", "surface"),
    *[(f"place-{number}", "surface") for number in range(1, 7)],
]
HUES = ("positive", "negative", "amount")  # of tokens, mixed with the surface


def colours(part):
    found = re.findall(r"--([\w-]+): #(\w{6});", part)
    return {name: tuple(int(value[i : i + 2], 16) for i in (0, 2, 4)) for name, value in found}


LIGHT = colours(CSS.partition("@media")[0])
DARK = LIGHT | colours(CSS.partition("prefers-color-scheme: dark")[2].partition("* {")[0])


def luminance(colour):
    """WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def mixed(a, b, share):
    """color-mix(in srgb, a share, b)."""
    return tuple(x * share + y * (1 - share) for x, y in zip(a, b, strict=True))


def test_contrast_of_known_pairs():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)  # the grey that WCAG cites


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "back"), TEXT)
def test_text_meets_aa(scheme, ink, back):
    assert contrast(scheme[ink], scheme[back]) >= AA


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("hue", HUES)
def test_tokens_meet_aa_at_every_strength(scheme, hue):
    ratios = [contrast(scheme["ink"], mixed(scheme[hue], scheme["surface"], s / 20)) for s in range(21)]
    assert min(ratios) >= AA, ratios


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_selected_row_meets_aa(scheme):
    back = mixed(scheme["accent"], scheme["surface"], 0.14)
    assert min(contrast(scheme[ink], back) for ink in ("ink", "accent", "bad")) >= AA


def test_both_schemes_define_every_colour():
    assert set(colours(CSS.partition("prefers-color-scheme: dark")[2])) >= set(LIGHT) - {"on-accent"}
