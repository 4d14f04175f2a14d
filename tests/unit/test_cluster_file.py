"""sweeps/fern.yaml is a Ray cluster file too: Ray's own checks must accept it."""

from pathlib import Path

import pytest
import yaml

FERN = Path(__file__).parents[2] / "sweeps" / "fern.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ray_accepts_the_cluster_part_and_keeps_the_sweep() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(FERN.read_text()))
    validate_config(prepared)
    assert prepared["metadata"]["sweep"]["name"] == "fern"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ray_refuses_a_sweep_at_the_top_of_a_cluster_file() -> None:
    """Why the sweep lives under `metadata`: Ray allows no other key of ours."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FERN.read_text())
    with pytest.raises(Exception, match="sweep"):
        validate_config(prepare_config({**config, "sweep": config["metadata"]["sweep"]}))
