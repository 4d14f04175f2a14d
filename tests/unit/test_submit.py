"""What `prunefield submit` ships, asks, quotes and refuses; no cluster is needed for it."""

import http.server
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nerf.scenes import SceneSettings, scene_fingerprint, write_demo_scene
from orchestrator import auth, launch, submit
from orchestrator.bundle import digest_of, make_bundle
from orchestrator.cli import main
from orchestrator.errors import ClusterError, SceneError, SpecError
from orchestrator.job import copied_output
from orchestrator.provenance import git_commit
from orchestrator.spec import cluster_part, load, load_cluster, read_text, relocated
from tests.unit.sweep_builder import mapping, text

TREE = Path(__file__).parents[2]


def cluster(sweep: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "cluster_name": "lab",
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "ubuntu"},
        "file_mounts": {"~/prunefield/nerf": "nerf"},
        **parts,
    }
    return config | ({} if sweep is None else {"metadata": {"sweep": sweep}})


# --- the bundle --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a scene in LLFF's format, and photos in it that nobody reads."""
    folder = tmp_path_factory.mktemp("data")
    scene = write_demo_scene(folder / "scenes" / "room")
    shutil.copytree(scene / "images", scene / "images_2")
    return folder


def test_a_bundle_holds_the_code_as_it_is_the_sweep_and_what_is_read_of_the_scene(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEFIELD_DATA", str(data))
    written = text(mapping(scene={"path": "scenes/room", "format": "llff", "factor": 1}))
    sweep = read_text(written, tmp_path / "tiny.yaml")
    bundle = make_bundle(sweep, tmp_path / "bundle")
    assert (bundle.folder / "sweep.yaml").read_text() == written
    for package in ("nerf", "pruning", "orchestrator"):
        for source in (TREE / package).rglob("*.py"):
            assert (bundle.folder / source.relative_to(TREE)).read_bytes() == source.read_bytes()
    assert not list(bundle.folder.rglob("__pycache__"))
    said = json.loads((bundle.folder / "bundle.json").read_text())
    assert said == {"name": "tiny", "hash": sweep.hash, "commit": git_commit(TREE)}
    shipped = bundle.folder / "data" / "scenes" / "room"
    settings = SceneSettings(path=shipped, format="llff", factor=1)
    assert scene_fingerprint(settings) == scene_fingerprint(sweep.scene)
    assert (shipped / "images").is_dir()
    assert not (shipped / "images_2").exists()
    # The same again is the same bundle; another byte is another.
    assert make_bundle(sweep, tmp_path / "again").digest == bundle.digest
    (shipped.parent / "more").write_text("x")
    assert digest_of(bundle.folder) != bundle.digest


def test_a_scene_that_cannot_travel_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    up = read_text(text(mapping(scene={"path": "../scenes/room"})), tmp_path / "tiny.yaml")
    with pytest.raises(SpecError, match=r"scene\.path.*without `\.\.`"):
        make_bundle(up, tmp_path / "a")
    gone = read_text(text(mapping(scene={"path": "scenes/none"})), tmp_path / "tiny.yaml")
    with pytest.raises(SceneError, match="does not exist"):
        make_bundle(gone, tmp_path / "b")
    monkeypatch.setattr("orchestrator.bundle.MAX_BYTES", 1000)
    monkeypatch.setenv("PRUNEFIELD_DATA", str(data))
    large = read_text(text(mapping(scene={"path": "scenes/room"})), tmp_path / "tiny.yaml")
    with pytest.raises(SceneError, match="more than Ray takes"):
        make_bundle(large, tmp_path / "c")


def test_an_absolute_scene_stays_where_it_is(data: Path, tmp_path: Path) -> None:
    path = str(data / "scenes" / "room")
    sweep = read_text(text(mapping(scene={"path": path})), tmp_path / "tiny.yaml")
    assert not (make_bundle(sweep, tmp_path / "bundle").folder / "data").exists()


def test_a_worker_finds_the_scene_where_its_own_machine_has_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "scenes").mkdir(parents=True)
    shutil.copytree(data / "scenes" / "room", here / "scenes" / "room")
    monkeypatch.setenv("PRUNEFIELD_DATA", str(here))
    sweep = read_text(text(mapping(scene={"path": "scenes/room"})), tmp_path / "tiny.yaml")
    assert sweep.scene.path == here / "scenes" / "room"
    assert relocated(sweep, tmp_path) == sweep
    shutil.rmtree(here)
    monkeypatch.setenv("PRUNEFIELD_DATA", str(data))
    assert relocated(sweep, tmp_path).scene.path == data / "scenes" / "room"


def test_a_scene_that_prunefield_makes_is_in_the_storage_folder_of_each_machine(
    tmp_path: Path,
) -> None:
    sweep = read_text(text(mapping(scene={"format": "demo"})), tmp_path / "tiny.yaml")
    for machine in ("driver", "worker"):
        sweep = relocated(sweep, tmp_path / machine)
        assert sweep.scene.path == tmp_path / machine / "scenes" / "demo"


# --- what reaches a shell ----------------------------------------------------------------------

HOSTILE = (
    "x; touch /tmp/owned",
    "$(id)",
    "`id`",
    "a b",
    "-oProxyCommand=id",
    "a\nb",
    "a'b",
    "&",
    "",
)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "place",
    [
        ("cluster_name",),
        ("head_node_type",),
        ("auth", "ssh_user"),
        ("auth", "ssh_private_key"),
        ("provider", "head_ip"),
        ("provider", "worker_ips", 0),
        ("docker", "image"),
        ("docker", "container_name"),
        ("file_mounts", "~/prunefield/nerf"),
    ],
)
def test_metacharacters_in_a_cluster_file_are_refused(
    place: tuple[str | int, ...], value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cluster(mapping(), docker={"image": "prunefield", "container_name": "ray"})
    config["provider"]["worker_ips"] = ["10.0.0.2"]
    config["head_node_type"] = "head"
    part: Any = config
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    for command in ("validate", "submit"):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr().err
        assert str(place[0]) in said
        assert "reaches a shell" in said
    with pytest.raises(SpecError, match="reaches a shell"):
        load_cluster(path)


def test_a_mount_point_with_metacharacters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster(mapping(), file_mounts={"~/a; id": "nerf"})))
    with pytest.raises(SpecError, match=r"file_mounts .*reaches a shell"):
        load(path)


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1), max_size=4))
def test_arguments_of_ray_submit_survive_the_shell_it_hands_them_to(arguments: list[str]) -> None:
    # Ray joins them with blanks; a shell then splits the line.
    assert shlex.split(" ".join(launch.quoted(arguments))) == arguments


def test_the_home_folder_is_left_to_the_shell_there() -> None:
    assert launch.quoted(["~/a b; id"]) == ["~/'a b; id'"]
    assert launch.quoted(["~root"]) == ["'~root'"]


def test_the_cluster_file_keeps_all_but_the_scene() -> None:
    config = cluster(file_mounts={"~/prunefield/nerf": "nerf", "~/prunefield/data/x": "data/x"})
    made = launch.with_bundle(config, "~/.prunefield/bundles/0a", Path("/tmp/bundle"))
    assert list(made["file_mounts"].items()) == [
        ("~/.prunefield/bundles/0a", "/tmp/bundle"),
        ("~/prunefield/nerf", "nerf"),
    ]
    assert {**made, "file_mounts": 0} == {**config, "file_mounts": 0}


@pytest.mark.parametrize(
    ("commands", "port", "dashboard"),
    [
        ([], 6379, "http://127.0.0.1:8265"),
        (["ray stop", "ray start --head --port=7000"], 7000, "http://127.0.0.1:8265"),
        (
            ["ray start --head --dashboard-port 9 --dashboard-host=0.0.0.0 --port 7001"],
            7001,
            "http://127.0.0.1:9",
        ),
        (["ray start --dashboard-host 10.1.2.3"], 6379, "http://10.1.2.3:8265"),
    ],
)
def test_ports_are_those_of_the_heads_command(
    commands: list[str], port: int, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    config = {"head_start_ray_commands": commands}
    assert launch.port_of(config) == port
    assert submit.dashboard_of(config) == dashboard


# --- the script of `ray submit` ----------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a head with code, and a sweep in it that the cluster was made with."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = tmp_path / "prunefield"
    for package in ("nerf", "orchestrator"):
        (tree / package).mkdir(parents=True)
        (tree / package / "__init__.py").touch()
    shutil.copy(submit.__file__, tree / "orchestrator" / "submit.py")
    (tree / "sweeps").mkdir()
    (tree / "sweeps" / "tiny.yaml").write_text("# mine\n" + yaml.safe_dump(cluster(mapping())))
    return tree


def test_the_sweep_is_found_in_the_tree_with_its_comments(head: Path) -> None:
    config = cluster(mapping())
    assert submit.find_tree(config) == head
    submit.check_script(Path(submit.__file__), head, config)
    text_of, source = submit.sweep_of(config, head)
    assert text_of.startswith("# mine")
    assert source == head / "sweeps" / "tiny.yaml"


def test_a_sweep_that_differs_from_the_clusters_is_not_run(head: Path) -> None:
    config = cluster(mapping(train__iterations=7))
    with pytest.raises(submit.RefusedError) as error:
        submit.sweep_of(config, head)
    said = str(error.value)
    assert "differ (in train)" in said
    assert "ray up -y --no-restart sweeps/tiny.yaml" in said
    assert "nothing was run" in said


def test_code_older_than_the_script_is_not_run(head: Path) -> None:
    (head / "orchestrator" / "submit.py").write_text("# of last week\n")
    with pytest.raises(submit.RefusedError, match=r"older .* ray up -y --no-restart sweeps/tiny"):
        submit.check_script(Path(submit.__file__), head, cluster(mapping()))


def test_a_sweep_without_a_file_on_the_head_is_the_metadatas(head: Path) -> None:
    (head / "sweeps" / "tiny.yaml").unlink()
    found, _ = submit.sweep_of(cluster(mapping()), head)
    assert yaml.safe_load(found) == mapping()


def test_a_cluster_without_a_sweep_or_without_code_says_what_to_do(
    head: Path, tmp_path: Path
) -> None:
    with pytest.raises(submit.RefusedError, match=r"ray submit FILE .* sweeps/fern\.yaml"):
        submit.sweep_of(cluster(), head)
    shutil.rmtree(head)
    with pytest.raises(submit.RefusedError, match="file_mounts"):
        submit.find_tree(cluster())
    with pytest.raises(submit.RefusedError, match="prunefield submit"):
        submit.bootstrap_config(tmp_path / "none.yaml")


# --- tokens ------------------------------------------------------------------------------------


@contextmanager
def dashboard(status: int, body: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


VERSION = '{"version": "4", "ray_version": "2.60.0"}'


@pytest.fixture
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token; the environment is put back afterwards."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "given", "token", "mode"),
    [
        (200, None, False, "disabled"),
        (200, None, True, "disabled"),
        (200, "token", True, "token"),
        (401, None, True, "token"),
        (401, "token", True, "token"),
    ],
)
def test_the_mode_is_what_is_said_or_what_the_cluster_asks_for(
    status: int,
    given: str | None,
    token: bool,
    mode: str,
    no_token: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if given is not None:
        monkeypatch.setenv(auth.MODE, given)
    if token:
        (no_token / ".ray").mkdir()
        (no_token / ".ray" / "auth_token").write_text("secret")
    with dashboard(status, VERSION) as address:
        assert auth.settle(address) == mode
    assert os.environ[auth.MODE] == mode


def test_a_token_that_is_missing_or_forbidden_is_asked_for(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dashboard(401, "Unauthorized") as address:
        with pytest.raises(ClusterError, match=r"~/\.ray/auth_token"):
            auth.settle(address)
        monkeypatch.setenv(auth.MODE, "disabled")
        with pytest.raises(ClusterError, match="set RAY_AUTH_MODE=token"):
            auth.settle(address)


def test_what_is_no_dashboard_is_told_from_one(no_token: Path) -> None:
    with (
        dashboard(200, "<html>") as address,
        pytest.raises(ClusterError, match="no Ray cluster answers"),
    ):
        auth.settle(address)
    with dashboard(404, "{}") as address, pytest.raises(ClusterError, match="not a Ray dashboard"):
        auth.settle(address)
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        auth.settle("http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="take no jobs"):
        auth.settle("ray://127.0.0.1:10001")


def test_a_joined_cluster_is_shown_a_token_if_there_is_one(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auth.settle_here() == "disabled"
    monkeypatch.delenv(auth.MODE)
    monkeypatch.setenv(auth.TOKEN, "secret")
    assert auth.settle_here() == "token"


def test_the_log_of_a_job_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    log = tmp_path / "log.txt"
    with copied_output(log):
        sys.stdout.write("connecting as me:hunter2hunter2@host\n")
    assert log.read_text() == "connecting as me:***@host\n"
    assert capsys.readouterr().out == "connecting as me:***@host\n"


# --- the commands ------------------------------------------------------------------------------


def test_submit_without_a_cluster_says_how_to_name_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(text(mapping()))
    assert main(["submit", str(path)]) == 1
    said = capsys.readouterr().err
    assert "--address" in said
    assert "--cluster" in said
    assert cluster_part(load(path)) is None


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_an_unknown_sweep_is_named(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([command, "nowhere"]) == 1
    assert "--tracking" in capsys.readouterr().err
    if command == "status":  # a fresh database takes seconds
        assert main([command, "nowhere", "--tracking", f"sqlite:///{tmp_path}/runs.db"]) == 1
        assert "unknown" in capsys.readouterr().err
    assert main([command, "tiny", "--job", "some-job"]) == 1
    assert "--address" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "logs", "stop", "ui"])
def test_looking_before_the_first_run_makes_nothing(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(text(mapping(storage="out")))
    assert main([command, "tiny.yaml"]) == 1
    said = capsys.readouterr().err
    assert f"no tracking store at {tmp_path / 'out' / 'mlflow.db'} yet" in said
    assert "prunefield run tiny.yaml" in said
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


# --- whether the head's Ray is up ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("listens", "answers", "said"),
    [
        (True, '[ "$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" = 0 ]', launch.UP),  # on loopback alone
        (True, '[ -z "$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" ]', launch.UP),
        (True, "false", launch.OTHER),  # never started anew: it may hold running jobs
        (True, None, launch.OTHER),
        (False, "false", launch.DOWN),
    ],
)
def test_the_probe_says_whether_ray_is_up_on_the_head(
    tmp_path: Path, listens: bool, answers: str | None, said: str
) -> None:
    tools = tmp_path / ".prunefield" / "venv" / "bin"  # not in the path of a login shell
    tools.mkdir(parents=True)
    if answers is not None:
        (tools / "ray").write_text(f"#!/bin/bash\n[ $1 = health-check ] && {answers}\n")
        (tools / "ray").chmod(0o755)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if listens:
            server.listen()
        done = subprocess.run(
            ["bash", "-c", launch.probe(port)],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.strip() == said
    assert all(marker not in launch.probe(port) for marker in (launch.UP, launch.DOWN))
