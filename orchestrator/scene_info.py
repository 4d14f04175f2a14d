"""How a model's scene was read, as its file tells: who measures the model reads it so again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerf.scenes import Scene, SceneSettings

SELDOM = {"bd_factor": float, "white_background": bool, "half_resolution": bool, "test_skip": int}
"""Settings that are told only where they are not as usual, and what each of them is."""


def scene_info(settings: SceneSettings, scene: Scene) -> dict[str, Any]:
    """What a model file says of the scene: which it is, and how it was read."""
    usual = SceneSettings()
    return {
        "name": scene.name,
        "fingerprint": scene.fingerprint,
        "factor": settings.factor,
        "holdout": settings.holdout,
        "ndc": scene.camera.ndc,
        **{
            name: value
            for name in SELDOM
            if (value := getattr(settings, name)) != getattr(usual, name)
        },
    }


def settings_of(
    info: Mapping[str, Any],
    path: Path | None,
    factor: int | None = None,
    holdout: int | None = None,
    ndc: bool | None = None,
) -> SceneSettings:
    """How to read a scene as a model's training did.

    Args:
        info: what the model file says; what it does not say, or says in another type, is as usual.
        path: the scene's folder; None for the demo scene.
        factor: goes before what the file says, as do the next two.
        holdout: see `SceneSettings`.
        ndc: see `SceneSettings`.
    """
    said = info.get("scene")
    kinds = {"factor": int, "holdout": int, "ndc": bool, **SELDOM}
    known = {
        name: said[name]
        for name, kind in kinds.items()
        if isinstance(said, dict) and type(said.get(name)) is kind
    }
    given = {"factor": factor, "holdout": holdout, "ndc": ndc}
    known |= {name: value for name, value in given.items() if value is not None}
    return SceneSettings(path=path, **known)
