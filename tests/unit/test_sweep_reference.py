"""The sweep file's reference and JSON Schema: current, complete, at one with the loader."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.errors import SpecError
from orchestrator.spec import read_text
from orchestrator.spec.reference import json_schema, key_of, models, reference
from orchestrator.spec.schema import SweepFile
from tests.unit.sweep_builder import mapping, text

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
AGAIN = "run `make reference`"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_files_in_docs_are_current() -> None:
    assert (ROOT / "docs" / "sweep-file.md").read_text() == reference(), AGAIN
    assert json.loads((ROOT / "docs" / "sweep.schema.json").read_text()) == json_schema(), AGAIN


def test_every_key_is_described() -> None:
    missing = [
        f"{model.__name__}.{name}"
        for model in models(SweepFile)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert missing == []


def test_every_key_has_its_row() -> None:
    page = reference()
    for model in models(SweepFile):
        for name, field in model.model_fields.items():
            assert f"| `{key_of(name, field)}` |" in page


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_editors_accept_our_sweeps(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == []


def test_editors_accept_what_yaml_1_2_makes_of_grouped_digits(
    validator: jsonschema.Draft202012Validator,
) -> None:
    validator.validate(mapping(train__iterations="40_000"))
    assert not validator.is_valid(mapping(train__iterations="many"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prune__0__criteria": "activaton"},
        {"prune__0__criteria": ["random", "magic"]},
        {"prune__0__ratios": 1.5},
        {"prune__0__networks": "all"},
        {"prune__0__schedules": "sideways"},
        {"prune__0__calibration__views": "most"},
        {"prune__0__bits": "int9"},
        {"train__iterations": 0},
        {"train__seeds": [0, -1]},
        {"train__network__depth": 99},
        {"evaluate__renders": "yes"},
        {"scene__format": "photos"},
        {"unknown": 1},
        {"name": None},
        {"prune": None},
        {"resources__prune__gpus": "some"},
    ],
    ids=str,
)
def test_editors_refuse_what_the_loader_refuses(
    changes: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    data = mapping(**changes)
    assert not validator.is_valid(data)
    with pytest.raises(SpecError):
        read_text(text(data), Path("tiny.yaml"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prune__0__ratios": 0.5},
        {"prune__0__schedules": [[0.1, 0.2, 0.3]]},
        {"prune__0__schedules": [0.1, 0.2, 0.3]},
        {"prune__0__schedules": ["uniform", "front-loaded"]},
        {"prune__0__calibration__views": ["all", 3]},
        {"prune": {"sizes": ["500kB", 30_000, "2.5 MiB"]}},
        {"resources__prune__gpus": "auto", "resources__train__gpus": 1},
    ],
    ids=str,
)
def test_editors_accept_what_the_loader_accepts(
    changes: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    data = mapping(**changes)
    read_text(text(data), Path("tiny.yaml"))
    validator.validate(data)


def test_a_cluster_file_is_checked_inside(validator: jsonschema.Draft202012Validator) -> None:
    cluster = {"cluster_name": "c", "provider": {"type": "local"}}
    validator.validate({**cluster, "metadata": {"sweep": mapping()}})
    wrong = mapping(prune__0__ratios=2)
    assert not validator.is_valid({**cluster, "metadata": {"sweep": wrong}})
