"""An interactive viewer in the browser: models side by side from the mouse's viewpoint.

Each visitor has a thread that renders what he looks at: first coarsely, then finer and finer until
he moves again, so that it answers at once on a CPU too. The only place that imports viser.

viser's camera looks along +z with y down, NeRF's along −z with y up.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from nerf.cameras import Camera, Rays, to_ndc, view_rays
from nerf.devices import Precision
from nerf.field import NerfModel
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings
from nerf.scenes import Scene
from orchestrator.errors import OrchestratorError

HOST = "127.0.0.1"
FIRST_PIXELS = 2_500
FULL_HEIGHT = 540
GAP_EVERY = 250
"""A model's picture so wide has one pixel of black beside the next, one of twice the width two."""
CPU_CHUNK = 1_024
"""Rays between two looks at whether he has moved, which a CPU takes long for."""


@dataclass(frozen=True)
class Viewpoint:
    """Where a visitor looks from.

    Attributes:
        pose: camera to world, NeRF's axes: columns right, up, backwards, position.
        field_of_view: vertical, in radians.
        aspect: width over height of his window.
    """

    pose: Float[np.ndarray, "3 4"]
    field_of_view: float
    aspect: float


@dataclass(frozen=True)
class Frame:
    """One picture of all models, side by side.

    Attributes:
        picture: 8-bit RGB.
        seconds: wall time of each model.
        last: whether it is the finest.
    """

    picture: UInt8[np.ndarray, "height width 3"]
    seconds: tuple[float, ...]
    last: bool


class _UnwantedError(Exception):
    """Nobody looks from there any more."""


class SideBySide:
    """Renders models of one scene from any viewpoint, coarse to fine.

    Args:
        models: on one device.
        scene: the scene that they show.
        precision: arithmetic of the linear layers.
    """

    def __init__(
        self, models: Sequence[NerfModel], scene: Scene, precision: Precision = "float32"
    ) -> None:
        settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self._renderers = [Renderer(model, settings, precision) for model in models]
        self._device = models[0].device
        self._camera = scene.camera

    def frames(
        self,
        viewpoint: Viewpoint,
        height: int = FULL_HEIGHT,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[Frame]:
        """Frames of twice the sides each time, up to the full height.

        Args:
            viewpoint: where from.
            height: of the finest frame, in pixels.
            wanted: asked again and again within a frame; no, and there are no more.
        """

        def go_on(_: int) -> None:
            if not wanted():
                raise _UnwantedError

        chunk = CPU_CHUNK if self._device.type == "cpu" else None
        count = len(self._renderers)
        first = max(8, round((FIRST_PIXELS / max(viewpoint.aspect, 0.1)) ** 0.5))
        while True:
            last = first >= height
            rows = min(first, height)
            columns = max(1, round(rows * viewpoint.aspect / count))
            rays = self.rays(viewpoint, rows, columns)
            pictures, seconds = [], []
            for renderer in self._renderers:
                started = time.perf_counter()
                try:
                    colors = renderer.colors(rays, chunk, go_on)
                except _UnwantedError:
                    return
                colors = torch.nan_to_num(colors).clamp(0, 1)
                pixels = (colors * 255).round().to(torch.uint8).cpu().numpy()
                seconds.append(time.perf_counter() - started)
                pictures.append(pixels.reshape(rows, columns, 3))
            yield Frame(_joined(pictures), tuple(seconds), last)
            if last:
                return
            first *= 2

    def rays(self, viewpoint: Viewpoint, height: int, width: int) -> Rays:
        """Rays through a window of this size; NDC is that of the scene's own camera.

        Args:
            viewpoint: where from.
            height: pixels.
            width: pixels.
        """
        focal = 0.5 * height / float(np.tan(0.5 * viewpoint.field_of_view))
        pose = torch.as_tensor(viewpoint.pose, dtype=torch.float32, device=self._device)
        rays = view_rays(Camera(height, width, focal, ndc=False), pose)
        if not self._camera.ndc:
            return rays
        return Rays(*to_ndc(self._camera, rays.origins, rays.directions), rays.view_directions)


def focus(scene: Scene) -> Float[np.ndarray, "3"]:
    """The point that a scene's camera path looks at: nearest to all of its lines of sight.

    A line through p along the unit vector d is |(1 − d dᵀ)(x − p)| away from x; the sum of the
    squares is least where Σ (1 − d dᵀ) x = Σ (1 − d dᵀ) p.
    """
    paths = scene.spiral.astype(float)
    along = paths[:, :, 2] / np.linalg.norm(paths[:, :, 2], axis=1, keepdims=True)
    across = np.eye(3) - along[:, :, None] * along[:, None, :]
    right = np.einsum("fij,fj->i", across, paths[:, :, 3])
    return np.linalg.lstsq(across.sum(axis=0), right, rcond=None)[0]


def nerf_pose(wxyz: Sequence[float], position: Sequence[float]) -> Float[np.ndarray, "3 4"]:
    """A camera of viser's (unit quaternion; x right, y down, z forward) as NeRF has it."""
    w, x, y, z = (float(v) for v in wxyz)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    axes = rotation * np.array([1.0, -1.0, -1.0])
    return np.concatenate((axes, np.asarray(position, dtype=float)[:, None]), axis=1)


class Viewer:
    """The server; it listens on loopback only.

    Args:
        names: what the models are called, left to right.
        models: the models.
        scene: the scene that they show.
        precision: arithmetic of the linear layers.
        port: to listen on.

    Raises:
        OrchestratorError: viser is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[NerfModel],
        scene: Scene,
        precision: Precision = "float32",
        port: int = 8080,
    ) -> None:
        try:
            import viser  # noqa: PLC0415  an extra
        except ImportError as error:
            raise OrchestratorError(
                "the viewer needs viser, which is not installed: pip install 'prunefield[viewer]'"
            ) from error
        self._names = names
        self._scene = scene
        self._render = SideBySide(models, scene, precision)
        self._lock = threading.Lock()  # one frame at a time: the device is one
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._server: Any = viser.ViserServer(host=HOST, port=port, verbose=False)
        self._server.scene.set_up_direction("+y")
        self._server.gui.set_panel_label("prunefield")
        self._server.on_client_connect(self._welcome)

    @property
    def address(self) -> str:
        """Where the browser finds it."""
        return f"http://{HOST}:{self._server.get_port()}"

    def stop(self) -> None:
        """End the server and the threads that render for visitors."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._server.stop()

    def _welcome(self, client: Any) -> None:
        home = self._scene.poses[self._scene.test[0]].astype(float)
        camera = self._scene.camera
        client.camera.position = home[:, 3]
        # The mouse turns around what is ahead, at the depth that the scene's camera path looks at.
        ahead = float((home[:, 3] - focus(self._scene)) @ home[:, 2])
        client.camera.look_at = home[:, 3] - home[:, 2] * (ahead if ahead > 0 else 1.0)
        client.camera.up_direction = home[:, 1]
        client.camera.fov = 2 * float(np.arctan(0.5 * camera.height / camera.focal))
        told = client.gui.add_markdown("…")
        sharp = client.gui.add_slider(
            "height", min=90, max=1080, step=90, initial_value=FULL_HEIGHT
        )
        moved = threading.Event()
        client.camera.on_update(lambda _: moved.set())
        sharp.on_update(lambda _: moved.set())
        moved.set()
        thread = threading.Thread(
            target=self._serve, args=(client, moved, told, sharp), daemon=True, name="viewer"
        )
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _serve(self, client: Any, moved: threading.Event, told: Any, sharp: Any) -> None:
        """Render for one visitor until he leaves."""
        while not self._stopped.is_set():
            if not moved.wait(timeout=0.5):
                if client.client_id not in self._server.get_clients():
                    return
                continue
            moved.clear()
            try:
                viewpoint = Viewpoint(
                    nerf_pose(client.camera.wxyz, client.camera.position),
                    float(client.camera.fov),
                    float(client.camera.aspect),
                )
            except AssertionError:  # his browser has not said yet where he looks
                moved.wait(0.1)
                moved.set()
                continue
            frames = self._render.frames(
                viewpoint,
                int(sharp.value),
                lambda: not moved.is_set() and not self._stopped.is_set(),
            )
            while not moved.is_set() and not self._stopped.is_set():
                with self._lock:
                    frame = next(frames, None)
                if frame is None or client.client_id not in self._server.get_clients():
                    break
                client.scene.set_background_image(frame.picture, format="jpeg")
                told.content = _told(self._names, frame)


def _told(names: Sequence[str], frame: Frame) -> str:
    height, width = frame.picture.shape[:2]
    places = {1: [""], 2: ["left: ", "right: "]}.get(
        len(names), [f"{i}. from left: " for i in range(1, len(names) + 1)]
    )
    rows = "\n".join(
        f"- {place}**{name}**, {1000 * seconds:,.0f} ms"
        for place, name, seconds in zip(places, names, frame.seconds, strict=True)
    )
    return f"{rows}\n\n{width}×{height} pixels{'' if frame.last else ', becoming sharper …'}"


def _joined(
    pictures: Sequence[UInt8[np.ndarray, "height _width 3"]],
) -> UInt8[np.ndarray, "height width 3"]:
    parts: list[np.ndarray] = [pictures[0]]
    for picture in pictures[1:]:
        gap = picture.shape[1] // GAP_EVERY
        parts += [np.zeros((picture.shape[0], gap, 3), np.uint8), picture[:, gap:]]
    return np.concatenate(parts, axis=1)
