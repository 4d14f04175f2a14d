"""What every test shares: shapes checked at run time, Hypothesis without deadlines, fern."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Before the first import of our packages: shapes in signatures are then checked on each call.
install_import_hook(["nerf", "pruning"], "beartype.beartype")

settings.register_profile("prunefield", deadline=None)
settings.load_profile("prunefield")

DATA_VARIABLE = "PRUNEFIELD_DATA"


@pytest.fixture(scope="session")
def fern_folder() -> Path:
    """The real fern scene, which cannot be part of the project."""
    data = os.environ.get(DATA_VARIABLE)
    if not data:
        pytest.skip(
            f"{DATA_VARIABLE} is not set: it must name a folder that holds nerf_llff_data/fern "
            "(`prunefield fetch fern -o FOLDER` makes one)"
        )
    folder = Path(data) / "nerf_llff_data" / "fern"
    if not folder.is_dir():
        pytest.skip(f"{DATA_VARIABLE}={data} holds no nerf_llff_data/fern")
    return folder
