"""Pictures of the project's own making: small scenes in several styles, and subjects in ever new places.

In picture space the side of the picture is 1 and y points down; `_place` puts a thing (`datainf.data.things`) there.
A style is a way of painting (`STYLES`). Pictures are painted at `OVERSAMPLING` times their size and scaled down.
"""

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datainf.data.built_in.things import (
    CLASSES,
    COLOURS,
    CREAM,
    INK,
    OBJECTS,
    Colour,
    Look,
    Shape,
    Thing,
    ellipse,
    mixed,
    polygon,
)

OVERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """A picture before it is painted, in picture space, and what can be said about it in words."""

    caption: str
    backdrop: Thing  # sky, ground and what hangs in the sky
    things: list[Thing]


# Place -> colours of the sky and of the ground.
PLACES: dict[str, tuple[Colour, Colour]] = {
    "in a meadow": ((150, 205, 240), (112, 178, 84)),
    "on a beach": ((130, 200, 232), (232, 210, 150)),
    "in the snow": ((176, 198, 222), (240, 244, 250)),
    "on the water": ((178, 216, 240), (44, 112, 178)),
    "in the desert": ((248, 214, 160), (214, 146, 84)),
    "at night": ((26, 30, 74), (44, 62, 70)),
    "in a room": ((226, 208, 184), (150, 104, 72)),
    "in a studio": ((206, 208, 214), (168, 170, 180)),
}
OUTDOORS = tuple(PLACES)[:6]
SKY = ("", "under the sun", "under a cloud")


# Scenes and portraits.


def scene(rng: random.Random) -> Scene:
    """One or two coloured things in a landscape: "a red house and a green tree in the snow under the sun"."""
    names = rng.sample(list(OBJECTS), k=rng.choice((1, 2, 2)))
    colours = [rng.choice(list(COLOURS)) for _ in names]
    place = rng.choice(OUTDOORS)
    horizon = rng.uniform(0.55, 0.7)
    backdrop, sky = _backdrop(place, horizon, rng)
    centres = [0.5 + rng.uniform(-0.12, 0.12)] if len(names) == 1 else [0.27, 0.74]
    scale = rng.uniform(0.62, 0.74) if len(names) == 1 else rng.uniform(0.46, 0.54)
    things = [
        _place(
            OBJECTS[name](_jittered(COLOURS[colour], rng)),
            centre + rng.uniform(-0.03, 0.03),
            horizon + rng.uniform(0.1, 0.26),
            scale * rng.uniform(0.92, 1.08),
            flip=rng.random() < 0.5,
        )
        for name, colour, centre in zip(names, colours, centres, strict=True)
    ]
    what = " and ".join(_article(f"{colour} {name}") for name, colour in zip(names, colours, strict=True))
    return Scene(" ".join(filter(None, (what, place, sky))), backdrop, things)


def in_corpus(caption: str) -> bool:
    """Whether scenes with this caption belong to what the demo base is trained on (half of all), not to the tasks."""
    return zlib.crc32(caption.encode()) % 2 == 0


def portrait(kind: str, look: Look, rng: random.Random) -> Scene:
    """One subject of the class `kind`, large, somewhere, standing as it happens; the caption names class and place."""
    place = rng.choice(list(PLACES))
    horizon = rng.uniform(0.5, 0.75)
    backdrop, _ = _backdrop(place, horizon, rng)
    thing = _place(
        CLASSES[kind](look),
        0.5 + rng.uniform(-0.08, 0.08),
        rng.uniform(0.86, 0.96),
        rng.uniform(0.64, 0.8),
        flip=rng.random() < 0.5,
        tilt=rng.uniform(-0.03, 0.03),
    )
    return Scene(f"a {kind} {place}", backdrop, [thing])


def random_look(rng: random.Random) -> tuple[Look, str]:
    """A look that belongs to no subject, and its words: "red", "white with blue spots"."""
    main, second = rng.sample(list(COLOURS), k=2)
    pattern = rng.choice(("plain", "spots", "stripes"))
    look = Look(_jittered(COLOURS[main], rng), _jittered(COLOURS[second], rng), pattern, rng.random())
    return look, main if pattern == "plain" else f"{main} with {second} {pattern}"


def _place(thing: Thing, x: float, ground: float, scale: float, *, flip=False, tilt=0.0) -> Thing:
    """The thing in picture space, standing at (x, ground); `tilt` in turns."""
    sign, cos, sin = (-1 if flip else 1), math.cos(2 * math.pi * tilt), math.sin(2 * math.pi * tilt)

    def put(px: float, py: float) -> tuple[float, float]:
        px *= sign
        return x + scale * (px * cos - py * sin), ground - scale * (px * sin + py * cos)

    return [replace(shape, points=tuple(put(*point) for point in shape.points)) for shape in thing]


def _backdrop(place: str, horizon: float, rng: random.Random) -> tuple[Thing, str]:
    """Sky and ground of a place, and what is in the sky, as shapes and in words."""
    above, below = (_jittered(colour, rng) for colour in PLACES[place])
    shapes = [
        polygon((0, 0), (1, 0), (1, horizon), (0, horizon), colour=above),
        polygon((0, horizon), (1, horizon), (1, 1), (0, 1), colour=below),
    ]
    if place not in OUTDOORS:
        return shapes, ""
    x, y = rng.choice((0.14, 0.5, 0.86)) + rng.uniform(-0.04, 0.04), rng.uniform(0.1, 0.16)
    if place == "at night":
        stars = [ellipse(rng.random(), rng.uniform(0, horizon - 0.1), 0.013, 0.013, CREAM) for _ in range(5)]
        return [*shapes, *stars, ellipse(x, y, 0.085, 0.085, CREAM)], "under the moon"
    sky = rng.choice(SKY)
    if sky == "under the sun":
        shapes.append(ellipse(x, y, 0.1, 0.1, (255, 222, 90)))
    elif sky == "under a cloud":
        white = (250, 250, 252)
        shapes += [
            ellipse(x + dx, y + dy, w, w * 0.75, white) for dx, dy, w in ((-0.09, 0.02, 0.09), (0.1, 0.02, 0.08))
        ]
        shapes.append(ellipse(x, y - 0.015, 0.11, 0.085, white))
    return shapes, sky


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _jittered(colour: Colour, rng: random.Random) -> Colour:
    """A colour close to this one: what makes two pictures with the same caption differ even in the same places."""
    return tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)


# Styles: a scene and a size in, an RGB picture out.


def plain(scene: Scene, size: int) -> Image.Image:
    """Like a photo: soft shading, light from the upper left, shadows on the ground, no outlines."""
    side = size * OVERSAMPLING
    picture = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(picture)
    for shape in scene.backdrop:
        pen.polygon(_pixels(shape, side), fill=shape.colour)
    shade = Image.new("L", (side, side), 255)
    for thing in scene.things:
        xs, ys = zip(*(point for shape in thing for point in shape.points), strict=True)
        left, right, ground = min(xs) * side, max(xs) * side, max(ys) * side
        ImageDraw.Draw(shade).ellipse((left, ground - 0.05 * side, right + 0.08 * side, ground + 0.04 * side), fill=130)
    shade = shade.filter(ImageFilter.BoxBlur(side / 40))
    picture.paste(Image.new("RGB", (side, side), (20, 22, 40)), mask=shade.point(lambda value: 255 - value))
    for shape in (shape for thing in scene.things for shape in thing):
        pen.polygon(_pixels(shape, side), fill=mixed(shape.colour, INK, 0.25 if shape.convex else 0.1))
        if shape.convex:
            pen.polygon(_pixels(_lit(shape, 0.84), side), fill=shape.colour)
            pen.polygon(_pixels(_lit(shape, 0.5), side), fill=mixed(shape.colour, (255, 250, 235), 0.18))
    pixels = np.asarray(picture.filter(ImageFilter.BoxBlur(side / 128)), dtype=np.float32)
    down, right = np.mgrid[0:side, 0:side] / side
    lit = pixels * (1.12 - 0.16 * down - 0.1 * right)[:, :, None]
    return _scaled(Image.fromarray(lit.clip(0, 255).astype(np.uint8)), size)


def cartoon(scene: Scene, size: int) -> Image.Image:
    """Flat, saturated colours inside dark outlines."""
    return _scaled(_outlined(scene, size * OVERSAMPLING, _vivid, INK), size)


def pixelart(scene: Scene, size: int) -> Image.Image:
    """Coarse square blocks of few colours: four levels of each channel."""
    side = size * OVERSAMPLING
    picture = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(picture)
    for shape in (*scene.backdrop, *(shape for thing in scene.things for shape in thing)):
        pen.polygon(_pixels(shape, side), fill=_vivid(shape.colour))
    coarse = picture.resize((max(size // 2, 1),) * 2, Image.Resampling.BOX)
    levels = (np.asarray(coarse, dtype=np.float32) / 85).round() * 85
    return Image.fromarray(levels.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)


def line_sketch(scene: Scene, size: int) -> Image.Image:
    """Black outlines on white."""
    return _scaled(_outlined(scene, size * OVERSAMPLING, lambda _: (255, 255, 255), (0, 0, 0)), size)


STYLES: dict[str, Callable[[Scene, int], Image.Image]] = {
    "cartoon": cartoon,
    "pixelart": pixelart,
    "line_sketch": line_sketch,
}


def _outlined(scene: Scene, side: int, fill: Callable[[Colour], Colour], ink: Colour) -> Image.Image:
    """Every shape filled with a colour of its own and outlined in ink; sky and ground make a frame and the horizon."""
    picture = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(picture)
    for shape in (*scene.backdrop, *(shape for thing in scene.things for shape in thing)):
        outline = _pixels(shape, side)
        pen.polygon(outline, fill=fill(shape.colour))
        pen.line([*outline, *outline[:2]], fill=ink, width=max(1, round(side / 36)), joint="curve")
    return picture


def _vivid(colour: Colour) -> Colour:
    """The colour with more saturation: every channel farther from their mean."""
    mean = sum(colour) / 3
    return tuple(round(min(255, max(0, mean + 1.45 * (channel - mean)))) for channel in colour)


def _lit(shape: Shape, share: float) -> Shape:
    """A smaller copy of the shape inside it, moved towards the light."""
    xs, ys = zip(*shape.points, strict=True)
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    shift = 0.6 * (1 - share)
    x_lit, y_lit = x - shift * (max(xs) - min(xs)) / 4, y - shift * (max(ys) - min(ys)) / 4
    return replace(shape, points=tuple((x_lit + share * (a - x), y_lit + share * (b - y)) for a, b in shape.points))


def _pixels(shape: Shape, side: int) -> Sequence[tuple[float, float]]:
    return [(x * side, y * side) for x, y in shape.points]


def _scaled(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BOX)
