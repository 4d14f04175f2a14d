"""LLFF poses and NDC rays by the definitions, in plain floats."""

import math


def unit(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def cross(a, b):
    return [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_poses(table):
    """NeRF's poses and scaled bounds from the rows of poses_bounds.npy, in plain floats.

    Returns for each view [right, up, backwards, position], then nearest and farthest bound.
    """
    views, bounds = [], []
    for row in table.tolist():
        column = [[row[5 * i + j] for i in range(3)] for j in range(5)]
        down, right, backwards, position = column[:4]
        views.append([right, [-v for v in down], backwards, position])
        bounds += row[15:]
    scale = 1 / (min(bounds) * 0.75)
    for view in views:
        view[3] = [v * scale for v in view[3]]
    n = len(views)
    middle = [sum(view[3][i] for view in views) / n for i in range(3)]
    z = unit([sum(view[2][i] for view in views) for i in range(3)])
    x = unit(cross([sum(view[1][i] for view in views) for i in range(3)], z))
    y = unit(cross(z, x))
    moved = []
    for view in views:
        from_middle = [p - m for p, m in zip(view[3], middle, strict=True)]
        moved.append([[dot(axis, v) for axis in (x, y, z)] for v in (*view[:3], from_middle)])
    return moved, min(bounds) * scale, max(bounds) * scale


def slow_ndc_ray(view, row, column, *, height, width, focal):
    """Origin and direction of a pixel's NDC ray, from two points projected by the definition."""
    x, y = (column - width / 2) / focal, (height / 2 - row) / focal
    d = [x * view[0][i] + y * view[1][i] - view[2][i] for i in range(3)]
    to_plane = (-1 - view[3][2]) / d[2]
    start = [o + to_plane * v for o, v in zip(view[3], d, strict=True)]
    sx, sy = 2 * focal / width, 2 * focal / height
    origin = [sx * start[0] / -start[2], sy * start[1] / -start[2], -1.0]
    vanishing = [sx * d[0] / -d[2], sy * d[1] / -d[2], 1.0]
    return origin, [v - o for v, o in zip(vanishing, origin, strict=True)]
