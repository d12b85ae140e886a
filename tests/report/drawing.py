"""Read an SVG picture back: elements by id, and the points that their paths go through."""

from __future__ import annotations

import re
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    """The picture's root; fails when it is not well-formed."""
    return ElementTree.fromstring(svg)


def by_id(svg: str, pattern: str) -> dict[str, ElementTree.Element]:
    """Elements whose whole id fits a pattern, in the order of the file."""
    found: dict[str, ElementTree.Element] = {}
    for element in parse(svg).iter():
        name = element.get("id", "")
        if re.fullmatch(pattern, name):
            assert name not in found, f"{name} is there twice"
            found[name] = element
    return found


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    """Points of all paths and uses inside an element, in points from the top left."""
    found = []
    for part in element.iter():
        if part.tag == f"{SVG}path":
            numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", part.get("d", ""))]
            found += list(zip(numbers[::2], numbers[1::2], strict=True))
        elif part.tag == f"{SVG}use":
            found.append((float(part.get("x", "nan")), float(part.get("y", "nan"))))
    return found


def box(element: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what an element draws."""
    xs, ys = zip(*points(element), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def style(element: ElementTree.Element) -> str:
    """Style of the first path inside an element."""
    return next(part for part in element.iter() if part.tag == f"{SVG}path").get("style", "")


def words(svg: str) -> list[str]:
    """Every text of the picture: it stays text."""
    return ["".join(t.itertext()) for t in parse(svg).iter() if t.tag == f"{SVG}text"]
