"""Draws scenes: float pixels [3, T, H, W] in [-1, 1], anti-aliased over about one pixel."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.tiny_model.photos import Photo, sample_photo
from bench.tiny_model.scenes import (
    COLOURS,
    GROUNDS,
    Body,
    Kind,
    Picture,
    Scene,
    Texture,
    View,
    caption,
    position,
    sample_scene,
)


def clip(
    seed: int, photos: Sequence[Photo], width: int, height: int, times: Tensor, kind: Kind | None = None
) -> tuple[Tensor, str]:
    """Return the clip [3, T, H, W] that a seed stands for, and its caption."""
    scene = sample_scene(seed, photos, width / height, kind)
    return render(scene, width, height, times), caption(scene)


def render(scene: Scene, width: int, height: int, times_T: Tensor) -> Tensor:
    """Draw a scene at the given times (0 first frame, 1 last), on their device; photographs lie there already."""
    eased_T, device = _ease(scene.timing, times_T.float()), times_T.device
    short = min(width, height)
    y_H1 = ((torch.arange(height, device=device) + 0.5) / short - height / short / 2)[:, None]
    x_1W = ((torch.arange(width, device=device) + 0.5) / short - width / short / 2)[None, :]
    x_THW, y_THW, scale = _look(scene.start_view, scene.end_view, eased_T, x_1W, y_H1)
    frames = _paint(scene.background, x_THW, y_THW, short / scale)
    if scene.dissolves_to is not None:
        other = _paint(scene.dissolves_to, x_THW, y_THW, short / scale)
        frames = torch.lerp(frames.expand_as(other), other, eased_T.view(1, -1, 1, 1))
    frames = frames.expand(3, len(eased_T), height, width)
    for body in scene.bodies:
        frames = _draw_body(frames, body, scene.path, eased_T, x_1W, y_H1, short)
    return frames.clamp(0, 1) * 2 - 1


def _ease(timing: int, t: Tensor) -> Tensor:
    if timing == 0:
        return t * t * (3 - 2 * t)
    if timing == 1:
        return t
    if timing == 2:
        return t * t * (0.4 + 0.6 * t)
    return 1 - (1 - t) ** 2 * (0.4 + 0.6 * (1 - t))


def _look(start: View, end: View, eased_T: Tensor, x_1W: Tensor, y_H1: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the world coordinates under each pixel, [T, H, W] ([1, H, W] if the camera rests), and a typical scale."""
    amount = eased_T[:1] * 0 if start == end else eased_T
    amount = amount.view(-1, 1, 1)
    scale = start.scale * (end.scale / start.scale) ** amount
    angle = start.angle + (end.angle - start.angle) * amount
    x = start.x + (end.x - start.x) * amount + scale * (angle.cos() * x_1W - angle.sin() * y_H1)
    y = start.y + (end.y - start.y) * amount + scale * (angle.sin() * x_1W + angle.cos() * y_H1)
    return x, y, math.sqrt(start.scale * end.scale)


def _paint(ground: Texture | Picture, x: Tensor, y: Tensor, pixels_per_unit: float) -> Tensor:
    if isinstance(ground, Picture):
        sampled = sample_photo(ground.photo, -x if ground.mirrored else x, y, pixels_per_unit)
        return sampled * torch.tensor(ground.gains, device=x.device).view(3, 1, 1, 1)
    slope = (math.cos(ground.gradient_angle) * x + math.sin(ground.gradient_angle) * y) * ground.gradient * 2
    along = math.cos(ground.angle) * x + math.sin(ground.angle) * y
    across = math.cos(ground.angle) * y - math.sin(ground.angle) * x
    omega = 2 * math.pi * ground.frequency
    if ground.pattern == "striped":
        slope = slope + ground.amplitude * torch.tanh(2 * torch.sin(omega * along))
    elif ground.pattern == "checked":
        product = torch.sin(0.7 * omega * along) * torch.sin(0.7 * omega * across)
        slope = slope + ground.amplitude * torch.tanh(3 * product)
    elif ground.pattern == "wavy":
        slope = slope + ground.amplitude * torch.sin(omega * along + 1.5 * torch.sin(0.5 * omega * across))
    return torch.tensor(GROUNDS[ground.ground], device=x.device).view(3, 1, 1, 1) + slope


def _draw_body(
    frames: Tensor, body: Body, path: int, eased_T: Tensor, x_1W: Tensor, y_H1: Tensor, short: int
) -> Tensor:
    aspect = x_1W.shape[1] / y_H1.shape[0]
    places = [position(body, path, amount, aspect) for amount in eased_T.tolist()]
    centres = torch.tensor(places, dtype=torch.float32, device=eased_T.device)
    amount = eased_T.view(-1, 1, 1)
    size = body.start.size + (body.end.size - body.start.size) * amount
    angle = body.start.angle + (body.end.angle - body.start.angle) * amount
    dx, dy = x_1W - centres[:, 0].view(-1, 1, 1), y_H1 - centres[:, 1].view(-1, 1, 1)
    x, y = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    alpha = (0.5 - _distance(body.shape, x, y, size) * short).clamp(0, 1)
    if body.picture is not None and body.picture_view is not None:
        view = body.picture_view
        scale = view.scale / body.start.size
        inside = _paint(body.picture, view.x + x * scale, view.y + y * scale, short / scale)
    else:
        start, end = (torch.tensor(COLOURS[name], device=x.device) for name in (body.start_colour, body.end_colour))
        inside = start.view(3, 1, 1, 1) + (end - start).view(3, 1, 1, 1) * eased_T.view(1, -1, 1, 1)
    return frames + alpha * (inside - frames)


def _distance(shape: str, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Return the signed distance to a shape's outline, negative inside (exact enough near the edge)."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - size
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * size
    if shape == "triangle":
        side = math.sqrt(3) / 2 * x.abs() - 0.5 * y
        return torch.maximum(y, side) - 0.525 * size
    # star: fold the plane into one of ten mirrored sectors, tip at angle 0, notch at pi/5
    wedge = math.pi / 5
    radius = torch.sqrt(x * x + y * y)
    folded = (torch.remainder(torch.atan2(x, -y) + wedge, 2 * wedge) - wedge).abs()
    tip, notch = 1.2 * size, 0.55 * size
    edge_x, edge_y = notch * math.sin(wedge), notch * math.cos(wedge) - tip
    normal = -edge_y * radius * folded.sin() + edge_x * (radius * folded.cos() - tip)
    return normal / torch.sqrt(edge_x**2 + edge_y**2)
