"""infra/: every file is one that its reader takes, as far as that shows without a cloud."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from orchestrator.spec import load_cluster
from tests.services import KEYS

TREE = Path(__file__).parents[2]
INFRA = TREE / "infra"
CLUSTERS = ("infra/cluster.yaml", "infra/aws.yaml", "infra/gcp.yaml", "sweeps/fern.yaml")
SCRIPTS = ("infra/slurm/sweep.sbatch", "infra/tracking/serve.sh")
KUBERNETES = "1.33"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((TREE / path).read_text())


# --- Ray cluster files -------------------------------------------------------------------------


@pytest.mark.parametrize("path", CLUSTERS)
def test_ray_accepts_the_cluster_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(path))
    validate_config(prepared)
    assert load_cluster(TREE / path)  # and so do we: nothing in it that a shell reads otherwise
    monkeypatch.chdir(TREE)
    for remote, local in read(path)["file_mounts"].items():
        ours = remote.startswith("~/prunefield/") and "/data/" not in remote
        assert not ours or Path(local).exists(), local


@pytest.mark.parametrize("path", CLUSTERS)
def test_ray_is_started_with_a_token_and_its_dashboard_on_loopback(path: str) -> None:
    config = read(path)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert starts
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert all("--dashboard-host=127.0.0.1" in c for c in starts if "--head" in c)
    assert not any("0.0.0.0" in command for command in starts)


@pytest.mark.parametrize("path", ["infra/aws.yaml", "infra/gcp.yaml"])
def test_gpu_workers_are_spot_and_come_from_zero_under_an_on_demand_head(path: str) -> None:
    config = read(path)
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    assert head["resources"]["CPU"] == 0

    def is_spot(node: dict[str, Any]) -> bool:
        return (
            node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
            or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
        )

    assert is_spot(gpu["node_config"])
    assert not is_spot(head["node_config"])


def test_ray_makes_the_nodes_that_the_aws_file_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of what `ray up` asks of AWS before it has a machine, of moto's AWS."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    (tmp_path / ".ssh").mkdir()
    for name, value in {
        **KEYS, "HOME": str(tmp_path), "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)  # Ray waits for AWS to make up its mind
    with mock_aws():
        config = AWSNodeProvider.fillout_available_node_types_resources(
            prepare_config(read("infra/aws.yaml"))
        )
        kinds = config["available_node_types"]
        assert kinds["gpu"]["resources"].items() >= {"CPU": 16, "GPU": 1}.items()
        assert kinds["head"]["resources"]["CPU"] == 0
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, role in (("head", "head"), ("gpu", "worker")):
            tags = {"ray-node-type": role, "ray-user-node-type": kind, "ray-launch-config": "0"}
            provider.create_node(config["available_node_types"][kind]["node_config"], tags, 1)
        found = boto3.client("ec2", config["provider"]["region"]).describe_instances()
        head, gpu = (i for r in found["Reservations"] for i in r["Instances"])
    assert (head["InstanceType"], gpu["InstanceType"]) == ("m7i.xlarge", "g6.4xlarge")
    assert (head.get("InstanceLifecycle"), gpu.get("InstanceLifecycle")) == (None, "spot")
    assert head["SecurityGroups"] == gpu["SecurityGroups"] != []


def test_the_same_packages_are_mounted_wherever_code_is() -> None:
    for path in CLUSTERS:
        mounts = read(path)["file_mounts"]
        for package in ("nerf", "pruning", "orchestrator", "sweeps"):
            assert mounts[f"~/prunefield/{package}"] == package


# --- Kubernetes --------------------------------------------------------------------------------

GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {"type": "object", "required": ["spec"]},
}
CLUSTER_SPEC: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"idleTimeoutSeconds": {"type": "integer"}, "env": {"type": "array"}},
        },
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template"],
            "properties": GROUP,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "template", "maxReplicas", "minReplicas"],
                "properties": {
                    **GROUP,
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer"},
                    "minReplicas": {"type": "integer"},
                    "maxReplicas": {"type": "integer"},
                },
            },
        },
    },
}
JOB_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "required": ["entrypoint", "rayClusterSpec"],
    "properties": {
        "entrypoint": {"type": "string"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
        "backoffLimit": {"type": "integer"},
        "submitterPodTemplate": {"type": "object", "required": ["spec"]},
        "rayClusterSpec": CLUSTER_SPEC,
    },
}


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a KubeRay resource that these files use, in the words of its ray.io/v1 CRD."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        },
    }


def pods_of(part: Any) -> list[dict[str, Any]]:
    """Every pod template somewhere inside."""
    if isinstance(part, list):
        return [pod for item in part for pod in pods_of(item)]
    if not isinstance(part, dict):
        return []
    if "containers" in part.get("spec", {}):
        return [part]
    return [pod for item in part.values() for pod in pods_of(item)]


@pytest.mark.parametrize(
    ("path", "kind", "spec", "pods"),
    [("raycluster", "RayCluster", CLUSTER_SPEC, 2), ("rayjob", "RayJob", JOB_SPEC, 3)],
)
def test_kubernetes_takes_the_resources_and_their_pods(
    path: str, kind: str, spec: dict[str, Any], pods: int
) -> None:
    data = read(f"infra/kuberay/{path}.yaml")
    jsonschema.validate(data, resource(kind, spec))
    found = pods_of(data)
    assert len(found) == pods
    for pod in found:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        for container in pod["spec"]["containers"]:
            names = {entry["name"]: entry for entry in container["env"]}
            assert names["RAY_AUTH_MODE"]["value"] == "token"
            assert "secretKeyRef" in names["RAY_AUTH_TOKEN"]["valueFrom"]


def test_the_kuberay_schemas_refuse_a_misspelt_key() -> None:
    data = read("infra/kuberay/raycluster.yaml")
    data["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, resource("RayCluster", CLUSTER_SPEC))


def strict(schema: Any) -> Any:
    """A resource definition's schema, with keys that Kubernetes would drop taken as mistakes."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: strict(value) for key, value in schema.items()}
    if kept.get("type") == "object" and "properties" in kept:
        if not kept.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    elif kept.get("x-kubernetes-int-or-string"):
        kept.pop("type", None)
    return kept


def schema_file(name: str) -> Path:
    """One of the schemas that their projects publish; megabytes, so they are not kept here."""
    folder = os.environ.get("PRUNEFIELD_SCHEMAS")
    if not folder:
        pytest.skip(
            "PRUNEFIELD_SCHEMAS is not set: it must name a folder with ray.io_rayclusters.yaml and "
            "ray.io_rayjobs.yaml of KubeRay (helm-chart/kuberay-operator/crds), compose-spec.json "
            "of compose-spec (schema) and compute.v1.json of google-api-python-client "
            "(googleapiclient/discovery_cache/documents)"
        )
    return Path(folder) / name


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kuberay_takes_the_resources_by_its_own_definitions(kind: str) -> None:
    definition = yaml.safe_load(schema_file(f"ray.io_{kind}s.yaml").read_text())
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    whole = strict(version["schema"]["openAPIV3Schema"])
    whole["properties"]["metadata"] = {"type": "object"}
    data = read(f"infra/kuberay/{kind}.yaml")
    jsonschema.validate(data, whole)
    data["spec"]["rayVersio"] = "2"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, whole)


def as_json_schema(part: Any) -> Any:
    """Google's description of an interface as JSON Schema, unknown keys as mistakes."""
    if isinstance(part, list):
        return [as_json_schema(item) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return {"$ref": f"#/definitions/{part['$ref']}"}
    kept = {key: as_json_schema(value) for key, value in part.items() if key != "id"}
    if kept.get("format") == "int64":  # as a string, since JSON's numbers are not exact enough
        kept["type"] = ["string", "integer"]
    elif kept.get("type") == "any":
        del kept["type"]
    if "properties" in kept:
        kept.setdefault("additionalProperties", False)
    other = {"required", "format", "minimum", "maximum"}  # not as JSON Schema has them
    return {key: value for key, value in kept.items() if key not in other}


def test_google_cloud_takes_the_machines_by_its_own_description() -> None:
    schemas = json.loads(schema_file("compute.v1.json").read_text())["schemas"]
    definitions = {name: as_json_schema(schema) for name, schema in schemas.items()}
    schema = {"$ref": "#/definitions/Instance", "definitions": definitions}
    for kind in read("infra/gcp.yaml")["available_node_types"].values():
        jsonschema.validate(kind["node_config"], schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(kind["node_config"] | {"machinType": "n2"}, schema)


def test_compose_takes_the_stack_by_its_own_schema() -> None:
    schema = json.loads(schema_file("compose-spec.json").read_text())
    jsonschema.validate(read("infra/tracking/compose.yaml"), schema)


# --- the tracking stack ------------------------------------------------------------------------

TEXT_OR_LIST = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
COMPOSE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "properties": {
        "name": {"type": "string"},
        "volumes": {"type": "object"},
        "services": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["image"],
                "properties": {
                    "image": {"type": "string"},
                    "command": TEXT_OR_LIST,
                    "environment": {
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                    },
                    "ports": {"type": "array", "items": {"type": "string"}},
                    "volumes": {"type": "array", "items": {"type": "string"}},
                    "healthcheck": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "test": TEXT_OR_LIST,
                            "interval": {"type": "string"},
                            "retries": {"type": "integer"},
                        },
                    },
                    "depends_on": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "properties": {
                                "condition": {"enum": ["service_healthy", "service_started"]}
                            },
                            "required": ["condition"],
                        },
                    },
                    "restart": {"enum": ["unless-stopped", "always", "no", "on-failure"]},
                },
            },
        },
    },
}


def test_the_compose_file_listens_on_loopback_and_holds_no_secret() -> None:
    stack = read("infra/tracking/compose.yaml")
    jsonschema.validate(stack, COMPOSE)
    assert set(stack["services"]) == {"postgres", "s3", "mlflow", "optuna-dashboard"}
    assert int(stack["services"]["postgres"]["image"].partition(":")[2]) >= 15
    for service in stack["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in stack["volumes"] or (INFRA / "tracking" / source).exists()
        assert set(service.get("depends_on", ())) <= set(stack["services"])
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "SECRET" in name:
                assert value.startswith("${"), name
    # Every variable is in the example, and none of the secrets has a value there.
    wanted = set(re.findall(r"\$\{(\w+)", (INFRA / "tracking/compose.yaml").read_text()))
    example = (INFRA / "tracking/example.env").read_text()
    given = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    assert set(given) == wanted
    assert {name for name, value in given.items() if value} == {"AWS_ACCESS_KEY_ID"}


# --- scripts and the image ---------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_parse_and_run_by_themselves(path: str) -> None:
    script = TREE / path
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("path", SCRIPTS)
def test_shellcheck_has_nothing_to_say(path: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", str(TREE / path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_is_there_and_asks_for_extras_that_exist() -> None:
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "CMD"}
    assert {step[0] for step in steps} <= known
    assert steps[0][0] == "FROM"
    sent = set((TREE / ".dockerignore").read_text().splitlines())
    assert "*" in sent  # nothing but what is named: no data, no results, no environment
    for step in steps:
        if step[0] == "COPY":
            assert all((TREE / source).exists() for source in step[1:-1]), step
            assert {f"!{source}" for source in step[1:-1]} <= sent, step
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras is not None
    import tomllib

    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    assert set(extras.group(1).split(",")) <= set(project["optional-dependencies"])
    python = re.search(r"FROM python:3\.(\d+)", text)
    assert python is not None
    assert 11 <= int(python.group(1)) <= 13
    users = [step[1] for step in steps if step[0] == "USER"]
    assert users
    assert users[-1] != "root"
