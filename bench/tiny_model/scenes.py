"""Procedural clips: a scene is drawn from a seed, told by a caption, and rendered at any size and at any times.

A scene has a background (texture, photograph, or one photograph dissolving into another) under a moving camera, and up
to two objects (plain shapes or cut-outs of photographs) that move between two key poses. Path and timing are told only
by the caption.
Lengths are in units of the canvas's short side; times run from 0 (first frame) to 1 (last frame).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.tiny_model.photos import Photo

Kind = Literal["one_shape", "two_shapes", "cutout", "camera_texture", "camera_photo", "dissolve"]
KINDS: tuple[Kind, ...] = ("one_shape", "two_shapes", "cutout", "camera_texture", "camera_photo", "dissolve")
SHARES = (0.22, 0.21, 0.15, 0.10, 0.22, 0.10)

COLOURS = {
    "red": (0.88, 0.16, 0.18),
    "orange": (0.96, 0.55, 0.12),
    "yellow": (0.97, 0.87, 0.22),
    "green": (0.18, 0.70, 0.28),
    "cyan": (0.20, 0.80, 0.85),
    "blue": (0.16, 0.34, 0.88),
    "purple": (0.56, 0.22, 0.75),
    "pink": (0.96, 0.50, 0.72),
    "white": (0.96, 0.96, 0.96),
}
GROUNDS = {
    "dark": (0.08, 0.08, 0.12),
    "blue": (0.18, 0.27, 0.45),
    "green": (0.20, 0.38, 0.24),
    "purple": (0.33, 0.22, 0.42),
    "brown": (0.42, 0.32, 0.22),
    "grey": (0.50, 0.50, 0.52),
    "teal": (0.14, 0.40, 0.42),
    "pale": (0.78, 0.76, 0.72),
}
SHAPES = ("circle", "square", "triangle", "star")
LARGEST_TURN = {"circle": 0.0, "square": 0.65, "triangle": 0.85, "star": 0.5}
"""Radians a plain shape may turn: less than half its symmetry angle, or the direction could not be told."""
PATTERNS = ("plain", "striped", "checked", "wavy")
PATHS = ("straight", "in an arc above", "in an arc below")
TIMINGS = ("smoothly", "steadily", "with acceleration", "with deceleration")
ARC_HEIGHT = 0.25
POSITION_MARGIN = 0.16
CAMERA_MOVES = ("pan", "zoom", "turn", "pan and zoom")


@dataclass(frozen=True)
class View:
    """A camera: world point at the canvas's centre, world units across the short side, and its turn in radians."""

    x: float
    y: float
    scale: float
    angle: float


@dataclass(frozen=True)
class Texture:
    """A gradient with a pattern, defined on the whole plane."""

    ground: str
    pattern: str
    gradient_angle: float
    gradient: float
    frequency: float
    angle: float
    amplitude: float


@dataclass(frozen=True)
class Picture:
    """A photograph with its mirror flag and one gain per colour channel."""

    photo: Photo
    mirrored: bool
    gains: tuple[float, float, float]


@dataclass(frozen=True)
class Pose:
    """Where an object is on the canvas (0..1 across each side), how large (in short sides) and how far turned."""

    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Body:
    """A moving object between two poses; `picture` fills it if present, otherwise the colours do."""

    shape: str
    start: Pose
    end: Pose
    start_colour: str
    end_colour: str
    picture: Picture | None
    picture_view: View | None


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows."""

    kind: Kind
    background: Texture | Picture
    dissolves_to: Picture | None
    start_view: View
    end_view: View
    camera: str
    bodies: tuple[Body, ...]
    path: int
    timing: int


def sample_scene(seed: int, photos: Sequence[Photo], aspect: float, kind: Kind | None = None) -> Scene:
    """Draw a scene; `aspect` is the canvas's width over its height, which overlap and arcs depend on."""
    rng = np.random.default_rng(seed)
    drawn: Kind = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
    kind = kind or drawn
    path = int(rng.choice(3, p=(0.4, 0.3, 0.3)))
    timing = int(rng.choice(4, p=(0.4, 0.3, 0.15, 0.15)))
    background = _background(rng, photos, kind)
    dissolves_to = _other_picture(rng, photos, background) if kind == "dissolve" else None
    start_view, end_view, camera = _camera(rng, kind, background)
    bodies = _bodies(rng, photos, kind, aspect)
    return Scene(kind, background, dissolves_to, start_view, end_view, camera, bodies, path, timing)


def caption(scene: Scene) -> str:
    """Tell a scene in one English sentence."""
    timing, path = TIMINGS[scene.timing], PATHS[scene.path]
    ground = _ground_words(scene.background)
    if scene.dissolves_to is not None:
        return f"{ground} dissolving {timing} into {_ground_words(scene.dissolves_to)}"
    objects = " and ".join(_body_words(body) for body in scene.bodies)
    if scene.camera == "still":
        return f"{objects} moving {timing} {path} on {ground}" if objects else f"{ground}, nothing moves"
    moving = f"the camera {scene.camera} {timing} over {ground}"
    return f"{moving} while {objects} is moving {path}" if objects else moving


def position(body: Body, path: int, amount: float, aspect: float) -> tuple[float, float]:
    """Return an object's centre in short sides from the canvas's centre after `amount` (0..1) of its way."""
    wide, high = max(aspect, 1.0), max(1 / aspect, 1.0)
    x0, y0 = (body.start.x - 0.5) * wide, (body.start.y - 0.5) * high
    x1, y1 = (body.end.x - 0.5) * wide, (body.end.y - 0.5) * high
    height = ARC_HEIGHT * math.hypot(x1 - x0, y1 - y0)
    middle = (y0 + y1) / 2
    room = (middle + high / 2 - 0.1) if path == 1 else (high / 2 - 0.1 - middle)
    arc = (0.0, -1.0, 1.0)[path] * min(height, max(room, 0.0)) * 4 * amount * (1 - amount)
    return x0 + (x1 - x0) * amount, y0 + (y1 - y0) * amount + arc


def _background(rng: np.random.Generator, photos: Sequence[Photo], kind: Kind) -> Texture | Picture:
    photographic = {"camera_photo": 1.0, "dissolve": 0.92, "cutout": 0.3, "one_shape": 0.1, "two_shapes": 0.1}
    if rng.random() < photographic.get(kind, 0.0):
        return _picture(rng, photos)
    return Texture(
        ground=list(GROUNDS)[int(rng.integers(len(GROUNDS)))],
        pattern=PATTERNS[int(rng.integers(1 if kind == "camera_texture" else 0, 4))],
        gradient_angle=rng.uniform(0, 2 * math.pi),
        gradient=rng.uniform(0.10, 0.30),
        frequency=rng.uniform(2.5, 6),
        angle=rng.uniform(0, math.pi),
        amplitude=rng.uniform(0.02, 0.06) * (2 if kind == "camera_texture" else 1),
    )


def _picture(rng: np.random.Generator, photos: Sequence[Photo]) -> Picture:
    photo = photos[int(rng.integers(len(photos)))]
    gains = rng.uniform(0.8, 1.15) * rng.uniform(0.85, 1.15, 3)
    return Picture(photo, bool(rng.random() < 0.5), (float(gains[0]), float(gains[1]), float(gains[2])))


def _other_picture(rng: np.random.Generator, photos: Sequence[Photo], first: Texture | Picture) -> Picture:
    while True:
        picture = _picture(rng, photos)
        if not isinstance(first, Picture) or picture.photo is not first.photo:
            return picture


def _camera(rng: np.random.Generator, kind: Kind, background: Texture | Picture) -> tuple[View, View, str]:
    scale = rng.uniform(0.4, 0.95) if isinstance(background, Picture) else rng.uniform(0.8, 1.2)
    reach = 0.5 * max(1 - scale, 0.0) if isinstance(background, Picture) else 0.5
    start = View(rng.uniform(-reach, reach), rng.uniform(-reach, reach), scale, rng.uniform(-0.1, 0.1))
    moving = kind in ("camera_texture", "camera_photo") or (kind == "dissolve" and rng.random() < 0.3)
    if not moving or rng.random() < 0.06:
        return start, start, "still"
    move = CAMERA_MOVES[int(rng.choice(4, p=(0.4, 0.25, 0.15, 0.2)))]
    dx = dy = turn = 0.0
    zoom = 1.0
    words = []
    if "pan" in move:
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.12, 0.45) * scale
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        words.append(f"pans {_direction(dx, dy)}")
    if "zoom" in move:
        zoom = rng.uniform(1.2, 1.8) ** (1 if rng.random() < 0.5 else -1)
        words.append("zooms in" if zoom < 1 else "zooms out")
    if move == "turn":
        turn = rng.uniform(0.15, 0.6) * (1 if rng.random() < 0.5 else -1)
        words.append("turns " + ("clockwise" if turn > 0 else "counterclockwise"))
    end = View(start.x + dx, start.y + dy, start.scale * zoom, start.angle + turn)
    return start, end, " and ".join(words)


def _direction(dx: float, dy: float) -> str:
    across = "right" if dx > 0 else "left"
    along = "down" if dy > 0 else "up"
    if abs(dx) > 2 * abs(dy):
        return across
    return along if abs(dy) > 2 * abs(dx) else f"{along} and {across}"


def _bodies(rng: np.random.Generator, photos: Sequence[Photo], kind: Kind, aspect: float) -> tuple[Body, ...]:
    count = {"one_shape": 1, "two_shapes": 2, "cutout": 1, "camera_texture": 1, "camera_photo": 1, "dissolve": 0}[kind]
    if kind.startswith("camera") and rng.random() < 0.75:
        count = 0
    if kind == "cutout" and rng.random() < 0.3:
        count = 2
    for _ in range(200):
        shapes, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
        bodies = tuple(
            _body(rng, photos if kind == "cutout" and k == 0 else (), SHAPES[shapes[k]], colours, k)
            for k in range(count)
        )
        if count < 2 or not _collide(bodies[0], bodies[1], aspect):
            return bodies
    return bodies[:1]


def _body(rng: np.random.Generator, photos: Sequence[Photo], shape: str, colours: np.ndarray, k: int) -> Body:
    names = list(COLOURS)
    start_colour = names[int(colours[k])]
    end_colour = start_colour if photos or rng.random() < 0.7 else names[int(colours[-1 - k])]
    low, high = (0.16, 0.30) if photos else (0.13, 0.24)
    size = rng.uniform(low, high)
    end_size = size if rng.random() < 0.5 else float(np.clip(size * rng.uniform(0.6, 1.6), 0.11, 0.32))
    while True:
        x0, y0, x1, y1 = rng.uniform(POSITION_MARGIN, 1 - POSITION_MARGIN, 4)
        if 0.2 < math.hypot(x1 - x0, y1 - y0) < 0.7:
            break
    largest = 1.0 if photos else LARGEST_TURN[shape]
    turn = rng.uniform(-largest, largest) if rng.random() < 0.5 else 0.0
    angle = rng.uniform(-0.3, 0.3) if photos else rng.uniform(0, 2 * math.pi)
    picture = _picture(rng, photos) if photos else None
    scale = rng.uniform(0.25, 0.5)
    view = View(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), scale, 0.0) if photos else None
    start, end = Pose(x0, y0, size, angle), Pose(x1, y1, end_size, angle + turn)
    return Body(shape, start, end, start_colour, end_colour, picture, view)


def _collide(a: Body, b: Body, aspect: float) -> bool:
    """Say whether one object ever covers more than about half of the other, on any path."""
    for path in range(3):
        for amount in np.linspace(0, 1, 9):
            xa, ya = position(a, path, float(amount), aspect)
            xb, yb = position(b, path, float(amount), aspect)
            size_a = a.start.size + (a.end.size - a.start.size) * amount
            size_b = b.start.size + (b.end.size - b.start.size) * amount
            if math.hypot(xa - xb, ya - yb) < max(size_a, size_b):
                return True
    return False


def _body_words(body: Body) -> str:
    if body.picture is None:
        words = f"a {body.start_colour} {body.shape}"
    else:
        words = f"a {body.shape} showing {body.picture.photo.subject}"
    turn, growth = body.end.angle - body.start.angle, body.end.size / body.start.size
    extra = []
    if abs(turn) > 0.25:
        extra.append("turning " + ("clockwise" if turn > 0 else "counterclockwise"))
    if growth > 1.15:
        extra.append("growing")
    if growth < 0.87:
        extra.append("shrinking")
    if body.end_colour != body.start_colour:
        extra.append(f"becoming {body.end_colour}")
    return f"{words} {' and '.join(extra)}" if extra else words


def _ground_words(background: Texture | Picture) -> str:
    if isinstance(background, Texture):
        return f"a {background.pattern} {background.ground} background"
    return f"a photograph of {background.photo.subject}"
