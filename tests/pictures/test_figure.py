"""Figures as SVG: the same text for the same data, readable alone and inside a page."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from arkv.pictures.figure import FULL, add_legend, add_title, new_figure, to_image, to_svg

pytest.importorskip("matplotlib")


def drawn(title: str) -> str:
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=FULL, label="a line", marker="o")
    add_title(figure, title)
    add_legend(figure)
    return to_svg(figure, title)


def test_the_same_data_give_the_same_file() -> None:
    assert drawn("one") == drawn("one")


def test_a_title_with_marks_of_xml_is_a_title() -> None:
    root = ElementTree.fromstring(drawn('1 < 2 & "three"'))
    assert root.get("aria-label") == '1 < 2 & "three"'


def test_ink_is_the_pages_and_no_name_of_a_group_stands_twice_in_a_page() -> None:
    root = ElementTree.fromstring(drawn("one"))
    assert root.get("fill") == "currentColor"
    groups = [group for group in root.iter("{http://www.w3.org/2000/svg}g") if group.get("id")]
    assert not groups
    styles = " ".join(node.get("style", "") for node in root.iter())
    assert FULL not in styles
    assert "stroke: currentColor" in styles


def test_a_long_title_does_not_leave_the_figure() -> None:
    figure = new_figure(4, 3)
    figure.subplots().plot([1, 2])
    add_title(figure, "a long title " * 20)
    to_image(figure)
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1
