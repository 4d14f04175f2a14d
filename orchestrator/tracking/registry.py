"""MLflow's model registry: the model of a sweep that is shipped, under the sweep's alias.

The registered model is called like the experiment; each shipped model is a version of it, and the
alias with the sweep's name points at the latest: ``models:/prunefield@fern``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from orchestrator.errors import TrackingError
from orchestrator.tracking import names
from orchestrator.tracking.stores import open_client, quiet


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name: the registered model.
        version: its number.
        alias: that points at it.
    """

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """How MLflow finds it."""
        return f"models:/{self.name}@{self.alias}"


def register(
    uri: str, experiment: str, sweep: str, key: str, sentence: str, files: Iterable[Path] = ()
) -> Registered:
    """Register the logged model of a record; registering it again moves the alias back to it.

    Args:
        uri: the tracking store.
        experiment: the experiment, and the name in the registry.
        sweep: name of the sweep, for the alias.
        key: of the trial or training.
        sentence: why it is shipped, kept as the version's description.
        files: to keep beside the model, such as what was exported of it.

    Raises:
        TrackingError: the store cannot be used, or holds no such model.
    """
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    models = (
        client.search_logged_models([found.experiment_id], f"tags.`{names.KEY}` = '{key}'")
        if found
        else []
    )
    if not models:
        raise TrackingError(
            f"the tracking store {names.shown(uri)} holds no model of {key} in experiment "
            f"{experiment!r}; run the sweep again, which logs what is missing"
        )
    model = models[0]
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", sweep)
    try:
        with quiet():
            for file in files:
                client.log_model_artifact(model.model_id, str(file))
            if not client.search_registered_models(f"name = '{experiment}'"):
                client.create_registered_model(
                    experiment, description="Models that prunefield pruned; one alias a sweep."
                )
            versions = client.search_model_versions(f"name = '{experiment}'")
            same = [v for v in versions if v.tags.get(names.KEY) == key]
            version = (
                same[0]
                if same
                else client.create_model_version(
                    experiment,
                    source=model.artifact_location,
                    run_id=model.source_run_id,
                    tags={names.KEY: key},
                    description=sentence,
                    model_id=model.model_id,
                )
            )
            client.set_registered_model_alias(experiment, alias, version.version)
    except MlflowException as error:
        raise TrackingError(f"the model registry refused {key}: {error}") from error
    return Registered(experiment, str(version.version), alias)
