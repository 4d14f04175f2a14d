"""What every test shares: shapes checked at run time, Hypothesis without deadlines, fern."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

# Before the first import of our packages: shapes in signatures are then checked on each call.
install_import_hook(["nerf", "pruning"], "beartype.beartype")

settings.register_profile("prunefield", deadline=None)
settings.load_profile("prunefield")

DATA_VARIABLE = "PRUNEFIELD_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our own flags."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the files in tests/golden/ anew instead of comparing with them",
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes minutes, unless it is asked for."""
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether the files in tests/golden/ are to be written anew."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For arguments of a wrong type, to see our own message instead of the type checker's."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


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


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (none of {', '.join(BROWSERS)}): make browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
