"""What the project's pictures show, as polygons: things in a colour, and subjects with a look of their own.

A thing (a house, a dog) is a list of polygons in a space of its own: about one unit wide and one unit high, standing
on the ground at y = 0 around x = 0, with y pointing up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Colour = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Shape:
    """A polygon in one colour. `convex` ones can be shaded by painting smaller and lighter copies inside them."""

    points: Points
    colour: Colour
    convex: bool = True


Thing = list[Shape]


COLOURS: dict[str, Colour] = {
    "red": (205, 52, 48),
    "blue": (55, 95, 205),
    "green": (60, 155, 75),
    "yellow": (238, 205, 62),
    "orange": (236, 135, 42),
    "purple": (140, 75, 175),
    "pink": (238, 140, 180),
    "white": (242, 240, 234),
    "brown": (140, 92, 58),
    "grey": (140, 140, 146),
}
INK: Colour = (34, 30, 38)
WOOD: Colour = (110, 72, 44)
LEAF: Colour = (62, 140, 62)
GLASS: Colour = (170, 215, 238)
CREAM: Colour = (244, 236, 214)


# Shapes.


def box(left: float, bottom: float, right: float, top: float, colour: Colour) -> Shape:
    return Shape(((left, bottom), (right, bottom), (right, top), (left, top)), colour)


def polygon(*points: tuple[float, float], colour: Colour, convex: bool = True) -> Shape:
    return Shape(points, colour, convex)


def ellipse(x: float, y: float, width: float, height: float, colour: Colour, *, start=0.0, stop=1.0) -> Shape:
    """The ellipse with this centre and these half axes, or its part from one angle to another (in turns)."""
    angles = [2 * math.pi * (start + (stop - start) * k / 24) for k in range(25)]
    return Shape(tuple((x + width * math.cos(a), y + height * math.sin(a)) for a in angles), colour)


def arc(x: float, y: float, width: float, height: float, start: float, stop: float, thick: float, colour: Colour):
    """A bent bar along an ellipse, from one angle to another (in turns): a tail, a handle, a strap."""
    outer = ellipse(x, y, width, height, colour, start=start, stop=stop).points
    inner = ellipse(x, y, width - thick, height - thick, colour, start=start, stop=stop).points
    return Shape(outer + inner[::-1], colour, convex=False)


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """The colour with this share of the other one in it."""
    return tuple(round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))


# Things of scenes: a colour in, shapes out.


def house(colour: Colour) -> Thing:
    roof = mixed(colour, INK, 0.55)
    return [
        box(-0.4, 0, 0.4, 0.56, colour),
        polygon((-0.52, 0.54), (0, 1), (0.52, 0.54), colour=roof),
        box(-0.1, 0, 0.1, 0.34, WOOD),
        box(-0.33, 0.22, -0.17, 0.42, GLASS),
        box(0.17, 0.22, 0.33, 0.42, GLASS),
    ]


def tree(colour: Colour) -> Thing:
    return [
        box(-0.08, 0, 0.08, 0.5, WOOD),
        ellipse(-0.18, 0.6, 0.22, 0.2, colour),
        ellipse(0.18, 0.6, 0.22, 0.2, colour),
        ellipse(0, 0.76, 0.27, 0.24, colour),
    ]


def fir(colour: Colour) -> Thing:
    tiers = [polygon((-w, low), (0, low + 0.42), (w, low), colour=colour) for w, low in ((0.36, 0.16), (0.3, 0.36))]
    return [box(-0.07, 0, 0.07, 0.2, WOOD), *tiers, polygon((-0.22, 0.6), (0, 1), (0.22, 0.6), colour=colour)]


def car(colour: Colour) -> Thing:
    wheels = [ellipse(x, 0.13, r, r, c) for x in (-0.3, 0.3) for r, c in ((0.13, INK), (0.055, CREAM))]
    return [
        polygon((-0.32, 0.38), (-0.2, 0.68), (0.18, 0.68), (0.34, 0.38), colour=mixed(colour, INK, 0.25)),
        polygon((-0.24, 0.4), (-0.16, 0.61), (-0.03, 0.61), (-0.03, 0.4), colour=GLASS),
        polygon((0.03, 0.4), (0.03, 0.61), (0.14, 0.61), (0.25, 0.4), colour=GLASS),
        polygon((-0.56, 0.13), (-0.56, 0.4), (0.5, 0.42), (0.58, 0.3), (0.58, 0.13), colour=colour),
        *wheels,
    ]


def boat(colour: Colour) -> Thing:
    return [
        box(-0.025, 0.2, 0.025, 0.98, WOOD),
        polygon((0.05, 0.32), (0.05, 0.95), (0.45, 0.34), colour=CREAM),
        polygon((-0.05, 0.32), (-0.05, 0.8), (-0.34, 0.34), colour=CREAM),
        polygon((-0.55, 0.28), (0.55, 0.28), (0.36, 0), (-0.36, 0), colour=colour),
    ]


def flower(colour: Colour) -> Thing:
    petals = [
        ellipse(0.21 * math.cos(a), 0.72 + 0.21 * math.sin(a), 0.14, 0.14, colour)
        for a in (2 * math.pi * k / 6 for k in range(6))
    ]
    return [
        box(-0.03, 0, 0.03, 0.6, LEAF),
        ellipse(-0.15, 0.2, 0.14, 0.07, LEAF),
        ellipse(0.15, 0.26, 0.14, 0.07, LEAF),
        *petals,
        ellipse(0, 0.72, 0.13, 0.13, WOOD),
    ]


def balloon(colour: Colour) -> Thing:
    ropes = [polygon((s * 0.2, 0.5), (s * 0.1, 0.18), (s * 0.06, 0.18), (s * 0.14, 0.5), colour=WOOD) for s in (-1, 1)]
    stripe = ellipse(0, 0.7, 0.12, 0.32, mixed(colour, CREAM, 0.6))
    return [*ropes, ellipse(0, 0.7, 0.33, 0.32, colour), stripe, box(-0.12, 0.02, 0.12, 0.2, WOOD)]


def mushroom(colour: Colour) -> Thing:
    dots = [ellipse(x, y, 0.075, 0.06, CREAM) for x, y in ((-0.24, 0.56), (0.02, 0.74), (0.26, 0.57))]
    return [
        polygon((-0.16, 0), (0.16, 0), (0.12, 0.5), (-0.12, 0.5), colour=CREAM),
        ellipse(0, 0.42, 0.48, 0.46, colour, stop=0.5),
        *dots,
    ]


def rocket(colour: Colour) -> Thing:
    fins = [polygon((s * 0.16, 0.1), (s * 0.36, 0), (s * 0.17, 0.4), colour=colour) for s in (-1, 1)]
    return [
        *fins,
        polygon((-0.17, 0.1), (-0.2, 0.5), (-0.14, 0.75), (0.14, 0.75), (0.2, 0.5), (0.17, 0.1), colour=CREAM),
        polygon((-0.145, 0.73), (0, 1), (0.145, 0.73), colour=colour),
        ellipse(0, 0.54, 0.1, 0.1, GLASS),
    ]


def umbrella(colour: Colour) -> Thing:
    panel = polygon((-0.16, 0.52), (0, 0.98), (0.16, 0.52), colour=mixed(colour, CREAM, 0.6))
    return [box(-0.03, 0, 0.03, 0.6, WOOD), ellipse(0, 0.52, 0.52, 0.46, colour, stop=0.5), panel]


# Subjects: a look in, shapes out.


@dataclass(frozen=True)
class Look:
    """What sets one subject apart from others of its class: two colours, a pattern, and its build (from 0 to 1)."""

    main: Colour
    second: Colour
    pattern: str = "plain"  # plain, spots or stripes
    build: float = 0.5


def dog(look: Look) -> Thing:
    ear = 0.16 + 0.16 * look.build  # short or long ears
    legs = [box(x, 0, x + 0.1, 0.34, look.main) for x in (-0.34, -0.2, 0.1, 0.24)]
    return [
        arc(-0.36, 0.68, 0.16, 0.24, 0.5, 0.85, 0.08, look.second),
        *legs,
        ellipse(0, 0.42, 0.4, 0.2, look.main),
        *_pattern(look, -0.04, 0.42, 0.26, 0.13),
        ellipse(0.36, 0.72, 0.2, 0.19, look.main),
        ellipse(0.52, 0.66, 0.12, 0.09, look.second),
        ellipse(0.6, 0.69, 0.045, 0.04, INK),
        ellipse(0.4, 0.77, 0.035, 0.04, INK),
        ellipse(0.21, 0.72, 0.08, ear, look.second),
    ]


def cat(look: Look) -> Thing:
    wide = 0.24 + 0.1 * look.build
    ears = [polygon((s * 0.24, 0.72), (s * 0.24, 1.0), (s * 0.04, 0.86), colour=look.second) for s in (-1, 1)]
    eyes = [ellipse(s * 0.1, 0.74, r, 0.05, c) for s in (-1, 1) for r, c in ((0.055, (150, 200, 90)), (0.022, INK))]
    return [
        arc(0.3, 0.3, 0.24, 0.3, -0.25, 0.25, 0.09, look.second),
        ellipse(0, 0.3, wide, 0.31, look.main),
        *_pattern(look, 0, 0.28, wide * 0.7, 0.2),
        *ears,
        ellipse(0, 0.72, 0.27, 0.21, look.main),
        *eyes,
        polygon((-0.04, 0.66), (0.04, 0.66), (0, 0.62), colour=(225, 120, 130)),
        ellipse(-0.13, 0.04, 0.1, 0.05, look.second),
        ellipse(0.13, 0.04, 0.1, 0.05, look.second),
    ]


def backpack(look: Look) -> Thing:
    wide = 0.3 + 0.12 * look.build
    return [
        arc(0, 0.86, 0.15, 0.16, 0, 0.5, 0.06, look.second),
        arc(-wide, 0.42, 0.14, 0.34, 0.2, 0.8, 0.07, look.second),
        arc(wide, 0.42, 0.14, 0.34, -0.3, 0.3, 0.07, look.second),
        _rounded(0, 0.44, wide, 0.46, look.main),
        *_pattern(look, 0, 0.62, wide * 0.75, 0.2),
        _rounded(0, 0.22, wide * 0.72, 0.18, look.second),
        box(-wide * 0.5, 0.29, wide * 0.5, 0.33, INK),
    ]


def vase(look: Look) -> Thing:
    belly, neck = 0.2 + 0.16 * look.build, 0.08 + 0.06 * (1 - look.build)
    half = [(0.14, 0), (belly, 0.2), (belly * 0.95, 0.36), (neck, 0.58), (neck + 0.06, 0.68)]
    stems = [polygon((x, 0.9), (0.02, 0.6), (-0.02, 0.6), colour=LEAF) for x in (-0.2, 0, 0.2)]
    blossoms = [ellipse(x, y, 0.1, 0.09, look.second) for x, y in ((-0.2, 0.88), (0.2, 0.88), (0, 0.96))]
    return [
        *stems,
        *blossoms,
        Shape(tuple(half) + tuple((-x, y) for x, y in reversed(half)), look.main),
        *_pattern(look, 0, 0.26, belly * 0.75, 0.17),
    ]


def teapot(look: Look) -> Thing:
    high = 0.26 + 0.1 * look.build
    return [
        arc(-0.34, high + 0.06, 0.22, 0.22, 0.2, 0.8, 0.07, look.second),
        polygon((0.22, 0.16), (0.6, 0.62), (0.5, 0.66), (0.2, 0.42), colour=look.main),
        ellipse(0, high + 0.02, 0.38, high, look.main),
        *_pattern(look, 0, high, 0.28, high * 0.55),
        ellipse(0, 2 * high - 0.03, 0.22, 0.06, look.second),
        ellipse(0, 2 * high + 0.06, 0.06, 0.06, look.second),
        box(-0.2, 0, 0.2, 0.05, look.second),
    ]


def robot(look: Look) -> Thing:
    wide = 0.22 + 0.12 * look.build
    limbs = [box(s * 0.13 - 0.07, 0, s * 0.13 + 0.07, 0.18, look.second) for s in (-1, 1)]
    limbs += [box(s * (wide + 0.06) - 0.06, 0.24, s * (wide + 0.06) + 0.06, 0.52, look.second) for s in (-1, 1)]
    eyes = [ellipse(s * 0.1, 0.76, 0.055, 0.055, CREAM) for s in (-1, 1)]
    pupils = [ellipse(s * 0.1, 0.76, 0.025, 0.025, INK) for s in (-1, 1)]
    return [
        *limbs,
        box(-0.02, 0.86, 0.02, 0.98, INK),
        ellipse(0, 0.98, 0.05, 0.05, look.second),
        box(-wide, 0.16, wide, 0.58, look.main),
        *_pattern(look, 0, 0.37, wide * 0.8, 0.16),
        box(-0.22, 0.6, 0.22, 0.9, look.main),
        *eyes,
        *pupils,
    ]


def _rounded(x: float, y: float, width: float, height: float, colour: Colour) -> Shape:
    """A rectangle with round corners: a superellipse."""
    angles = [2 * math.pi * k / 32 for k in range(32)]
    bend = [(math.copysign(abs(math.cos(a)) ** 0.45, math.cos(a)), math.sin(a)) for a in angles]
    return Shape(tuple((x + width * c, y + height * math.copysign(abs(s) ** 0.45, s)) for c, s in bend), colour)


def _pattern(look: Look, x: float, y: float, width: float, height: float) -> Thing:
    """Spots or stripes in the second colour, inside the ellipse with this centre and these half axes."""
    if look.pattern == "spots":
        places = ((-0.62, 0.1), (-0.05, 0.62), (0.1, -0.45), (0.68, 0.15))
        return [ellipse(x + a * width, y + b * height, 0.3 * width, 0.36 * height, look.second) for a, b in places]
    if look.pattern == "stripes":
        return [
            box(x + (a - 0.13) * width, y - b * height, x + (a + 0.13) * width, y + b * height, look.second)
            for a, b in ((-0.72, 0.75), (0, 1), (0.72, 0.75))
        ]
    return []


OBJECTS: dict[str, Callable[[Colour], Thing]] = {
    "house": house,
    "tree": tree,
    "fir": fir,
    "car": car,
    "boat": boat,
    "flower": flower,
    "balloon": balloon,
    "mushroom": mushroom,
    "rocket": rocket,
    "umbrella": umbrella,
}
CLASSES: dict[str, Callable[[Look], Thing]] = {
    "dog": dog,
    "cat": cat,
    "backpack": backpack,
    "vase": vase,
    "teapot": teapot,
    "robot": robot,
}
SUBJECTS: dict[str, tuple[str, Look]] = {
    "dog": ("dog", Look((176, 112, 58), (98, 58, 34), "plain", 0.9)),
    "dog2": ("dog", Look((240, 238, 232), (46, 42, 48), "spots", 0.2)),
    "cat": ("cat", Look((232, 140, 52), (176, 84, 30), "stripes", 0.8)),
    "cat2": ("cat", Look((84, 86, 98), (232, 230, 226), "plain", 0.1)),
    "backpack": ("backpack", Look((206, 48, 50), (60, 62, 74), "plain", 0.2)),
    "backpack2": ("backpack", Look((60, 140, 150), (244, 206, 80), "stripes", 0.9)),
    "vase": ("vase", Look((52, 88, 190), (242, 240, 232), "stripes", 0.9)),
    "vase2": ("vase", Look((226, 150, 170), (200, 50, 70), "plain", 0.1)),
    "teapot": ("teapot", Look((244, 240, 230), (60, 100, 190), "spots", 0.9)),
    "teapot2": ("teapot", Look((66, 128, 84), (200, 160, 60), "plain", 0.2)),
    "robot": ("robot", Look((160, 166, 178), (210, 62, 52), "plain", 0.9)),
    "robot2": ("robot", Look((242, 204, 64), (70, 70, 150), "spots", 0.2)),
}
