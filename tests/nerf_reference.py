"""NeRF one number at a time, in float64: what the tests compare the fast code with.

Nothing here imports `nerf`; networks come in as dictionaries of arrays, named as in nerf-pytorch.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn


def slow_encoding(x, octaves):
    """[x, sin x, cos x, sin 2x, cos 2x, …], three numbers each."""
    features = list(x)
    for octave in range(octaves):
        features += [math.sin(2**octave * v) for v in x]
        features += [math.cos(2**octave * v) for v in x]
    return features


def slow_stratified(n, near, far, us=None):
    """One ray's samples; `us` places each within its stratum."""
    even = [near + (far - near) * i / (n - 1) for i in range(n)]
    if us is None:
        return even
    placed = []
    for i, u in enumerate(us):
        low = even[0] if i == 0 else (even[i - 1] + even[i]) / 2
        high = even[-1] if i == n - 1 else (even[i] + even[i + 1]) / 2
        placed.append(low + u * (high - low))
    return placed


def slow_importance(t, weights, us):
    """One ray's importance samples: for each u, walk along the CDF until it is passed."""
    edges = [(a + b) / 2 for a, b in itertools.pairwise(t)]
    masses = [w + 1e-5 for w in weights[1:-1]]
    total = sum(masses)
    cdf = [0.0]
    for mass in masses:
        cdf.append(cdf[-1] + mass / total)
    drawn = []
    for u in us:
        k = 0
        while k < len(masses) and cdf[k + 1] <= u:
            k += 1
        if k == len(masses):
            drawn.append(edges[-1])
            continue
        mass = cdf[k + 1] - cdf[k]
        # NeRF's guard against dividing by an empty bin.
        share = (u - cdf[k]) / (mass if mass >= 1e-5 else 1.0)
        drawn.append(edges[k] + share * (edges[k + 1] - edges[k]))
    return drawn


def slow_render_weights(density, t, length):
    """One ray's w = Tα, the transmittance as a running product (without NeRF's 1e-10 in it)."""
    weights, transmittance = [], 1.0
    for i, sigma in enumerate(density):
        delta = t[i + 1] - t[i] if i + 1 < len(t) else 1e10
        through = math.exp(-max(sigma, 0.0) * delta * length)
        weights.append(transmittance * (1 - through))
        transmittance *= through
    return weights


def slow_composite(weights, raw_rgb, white):
    """One ray's colour."""
    color = [
        sum(w / (1 + math.exp(-raw[c])) for w, raw in zip(weights, raw_rgb, strict=True))
        for c in range(3)
    ]
    return [c + 1 - sum(weights) for c in color] if white else color


def their_names(field):
    """A `Field`'s weights as float64 arrays under nerf-pytorch's names."""
    theirs = {
        "trunk": "pts_linears",
        "density": "alpha_linear",
        "feature": "feature_linear",
        "view": "views_linears.0",
        "rgb": "rgb_linear",
    }
    named = {}
    for name, tensor in field.state_dict().items():
        module, rest = name.split(".", 1)
        named[f"{theirs[module]}.{rest}"] = tensor.double().cpu().numpy()
    return named


def slow_network(weights, point, direction, *, skip=4, point_octaves=10, direction_octaves=4):
    """(density, raw colour) at one point, by concatenating as the original does."""

    def linear(name, x):
        return weights[f"{name}.weight"] @ np.array(x) + weights[f"{name}.bias"]

    input_pts = slow_encoding(point, point_octaves)
    input_views = slow_encoding(direction, direction_octaves)
    h, layer = input_pts, 0
    while f"pts_linears.{layer}.weight" in weights:
        h = np.maximum(linear(f"pts_linears.{layer}", h), 0)
        if layer == skip:
            h = np.concatenate((input_pts, h))
        layer += 1
    density = linear("alpha_linear", h)[0]
    h = np.concatenate((linear("feature_linear", h), input_views))
    h = np.maximum(linear("views_linears.0", h), 0)
    return float(density), linear("rgb_linear", h).tolist()


def slow_pass(weights, ray, t, *, white=False, noise=None, **encoding):
    """Colour and render weights of one ray (origin, direction, view direction) by one network."""
    origin, direction, view = ray
    densities, colors = [], []
    for i, distance in enumerate(t):
        point = [o + distance * d for o, d in zip(origin, direction, strict=True)]
        density, raw = slow_network(weights, point, view, **encoding)
        densities.append(density + (noise[i] if noise is not None else 0.0))
        colors.append(raw)
    length = math.sqrt(sum(d * d for d in direction))
    render_weights = slow_render_weights(densities, t, length)
    return slow_composite(render_weights, colors, white), render_weights


class NaiveNerf(nn.Module):
    """nerf-pytorch's network (with view directions), written out: its names, its concatenations."""

    def __init__(self, depth=8, width=256, point_octaves=10, direction_octaves=4, skip=4):
        super().__init__()
        self.octaves, self.skip = (point_octaves, direction_octaves), skip
        points, views = 3 + 6 * point_octaves, 3 + 6 * direction_octaves
        self.pts_linears = nn.ModuleList(
            nn.Linear(points if i == 0 else width + points * (i == skip + 1), width)
            for i in range(depth)
        )
        self.views_linears = nn.ModuleList([nn.Linear(width + views, width // 2)])
        self.feature_linear = nn.Linear(width, width)
        self.alpha_linear = nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(width // 2, 3)

    @staticmethod
    def embed(x, octaves):
        parts = [x]
        for octave in range(octaves):
            parts += [torch.sin(x * 2.0**octave), torch.cos(x * 2.0**octave)]
        return torch.cat(parts, -1)

    def forward(self, points, directions):
        input_pts = self.embed(points, self.octaves[0])
        input_views = self.embed(directions, self.octaves[1])
        h = input_pts
        for i, layer in enumerate(self.pts_linears):
            h = torch.relu(layer(h))
            if i == self.skip:
                h = torch.cat([input_pts, h], -1)
        alpha = self.alpha_linear(h)
        h = torch.cat([self.feature_linear(h), input_views], -1)
        h = torch.relu(self.views_linears[0](h))
        return torch.cat([self.rgb_linear(h), alpha], -1)
