"""Fetching scenes from a real server on loopback that misbehaves on demand."""

import hashlib
import io
import json
import stat
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from nerf.errors import DownloadError
from nerf.scenes import PUBLIC_SCENES, SceneSettings, fetch_scene, load_scene, public, transfer
from orchestrator.cli import main


def png(seed, width=24, height=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def poses():
    rows = []
    for view in range(9):
        matrix = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.1 * view, 0, 0], [128, 192, 150]])
        rows.append([*matrix.T.ravel(), 2.0, 9.0])
    file = io.BytesIO()
    np.save(file, np.array(rows))
    return file.getvalue()


def llff_files(name, root="nerf_llff_data/"):
    files = {f"{root}{name}/poses_bounds.npy": poses()}
    for view in range(9):
        files[f"{root}{name}/images_8/image{view:03d}.png"] = png(view)
        files[f"{root}{name}/images/IMG_{view}.JPG"] = b"a large photo"
    files[f"{root}{name}/sparse/0/cameras.bin"] = b"colmap"
    return files


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


class Server:
    """Serves `files` and keeps a log of requests.

    Attributes:
        files: contents by name.
        ranges: whether it can resume.
        etags: whether it names versions.
        break_after: bytes after which it hangs up, for each of the next requests.
        statuses: answers to the next requests, before it behaves.
        log: (name, Range header, status) of each request.
    """

    def __init__(self):
        self.files, self.ranges, self.etags = {}, True, True
        self.break_after, self.statuses, self.log = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, request):
        name, asked = request.path.lstrip("/"), request.headers.get("Range")
        status = self.statuses.pop(0) if self.statuses else 200 if name in self.files else 404
        content = self.files.get(name, b"")
        etag = f'"{hashlib.sha256(content).hexdigest()[:12]}"'
        start = 0
        same = request.headers.get("If-Range", etag) == etag
        if status == 200 and asked and self.ranges and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(content) else 416
        self.log.append((name, asked, status))
        request.send_response(status)
        if status not in (200, 206):
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if status == 206:
            whole = len(content)
            request.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if self.etags:
            request.send_header("ETag", etag)
        body = content[start:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.break_after:
            body = body[: self.break_after.pop(0)]
        request.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)
    server = Server()
    monkeypatch.setenv("PRUNEFIELD_MIRROR", server.url)
    yield server
    server.close()


@pytest.fixture
def room(server):
    """A server that has the scene `room`, among others."""
    server.files["nerf_llff_data.zip"] = zipped({**llff_files("room"), **llff_files("trex")})
    return server


def names(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def test_a_scene_arrives_whole_and_loads(room, tmp_path):
    folder = fetch_scene("room", tmp_path)
    assert folder == tmp_path / "nerf_llff_data" / "room"
    expected = [".prunefield-fetch.json"]
    expected += [f"images_8/image{view:03d}.png" for view in range(9)] + ["poses_bounds.npy"]
    assert names(folder) == expected
    assert load_scene(SceneSettings(folder)).images.shape == (9, 16, 24, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["nerf_llff_data"]


def test_the_command_fetches_and_names_the_terms(room, tmp_path, capsys):
    assert main(["fetch", "room", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "nerf_llff_data" / "room")
    assert PUBLIC_SCENES["room"].terms in said.err


def test_an_argument_overrides_the_mirror_of_the_environment(room, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEFIELD_MIRROR", "http://127.0.0.1:1/nothing")
    assert fetch_scene("room", tmp_path, base_url=f"{room.url}/").is_dir()


def test_everything_unpacks_everything(room, tmp_path):
    usual = names(fetch_scene("room", tmp_path))
    every = names(fetch_scene("room", tmp_path, everything=True))
    assert set(every) - set(usual) == {"sparse/0/cameras.bin"} | {
        f"images/IMG_{view}.JPG" for view in range(9)
    }
    assert len(room.log) == 2
    fetch_scene("room", tmp_path)
    assert len(room.log) == 2


def test_what_is_there_is_not_fetched_again(room, tmp_path):
    folder = fetch_scene("room", tmp_path)
    fetch_scene("room", tmp_path)
    assert len(room.log) == 1
    (folder / "poses_bounds.npy").write_bytes(b"")
    fetch_scene("room", tmp_path)
    assert len(room.log) == 2
    assert (folder / "poses_bounds.npy").read_bytes() == poses()


def test_a_kept_archive_serves_the_other_scenes(room, tmp_path):
    fetch_scene("room", tmp_path, keep_archive=True)
    fetch_scene("trex", tmp_path)
    assert len(room.log) == 1


def test_progress_counts_up_to_the_total(room, tmp_path):
    seen = []
    room.break_after = [1000]
    fetch_scene("room", tmp_path, progress=seen.append)
    size = len(room.files["nerf_llff_data.zip"])
    assert {step.archive for step in seen} == {"nerf_llff_data.zip"}
    assert {step.total for step in seen} == {size}
    done = [step.done for step in seen]
    assert done == sorted(done)
    assert 1000 in done
    assert done[-1] == size


def test_someone_elses_scene_is_left_alone(room, tmp_path):
    folder = tmp_path / "nerf_llff_data" / "room"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DownloadError, match="is there already but prunefield did not fetch it"):
        fetch_scene("room", tmp_path)
    assert names(folder) == ["notes.txt"]


# Interruptions


def test_an_interrupted_download_goes_on_within_the_call(room, tmp_path):
    room.break_after = [1000, 500]
    folder = fetch_scene("room", tmp_path)
    assert [(asked, status) for _, asked, status in room.log] == [
        (None, 200),
        ("bytes=1000-", 206),
        ("bytes=1500-", 206),
    ]
    assert (folder / "poses_bounds.npy").read_bytes() == poses()


@pytest.mark.parametrize("etags", [True, False])
def test_an_interrupted_download_goes_on_in_a_later_call(room, tmp_path, etags):
    room.etags = etags
    room.break_after = [1000, 0]
    with pytest.raises(DownloadError, match=r"stopped at 1,000 bytes.*run the same command again"):
        fetch_scene("room", tmp_path, attempts=1)
    assert not (tmp_path / "nerf_llff_data").exists()
    fetch_scene("room", tmp_path)
    assert room.log[-1][1:] == ("bytes=1000-", 206)


def test_a_server_that_cannot_resume_sends_everything_again(room, tmp_path):
    room.ranges = False
    room.break_after = [1000]
    folder = fetch_scene("room", tmp_path)
    assert room.log[-1][1:] == ("bytes=1000-", 200)
    assert (folder / "poses_bounds.npy").read_bytes() == poses()


def test_another_version_on_the_server_starts_over(room, tmp_path):
    room.break_after = [1000, 0]
    with pytest.raises(DownloadError):
        fetch_scene("room", tmp_path, attempts=1)
    room.files["nerf_llff_data.zip"] = zipped(llff_files("room", "other/nesting/"))
    folder = fetch_scene("room", tmp_path)
    assert room.log[-1][1:] == ("bytes=1000-", 200)
    assert (folder / "poses_bounds.npy").read_bytes() == poses()


def test_another_length_without_versions_starts_over(room, tmp_path):
    room.etags = False
    room.break_after = [1000, 0]
    with pytest.raises(DownloadError):
        fetch_scene("room", tmp_path, attempts=1)
    room.files["nerf_llff_data.zip"] = zipped(llff_files("room"))
    fetch_scene("room", tmp_path)
    assert [entry[1:] for entry in room.log[-2:]] == [("bytes=1000-", 206), (None, 200)]


def test_a_file_that_shrank_starts_over(room, tmp_path):
    room.etags = False
    room.break_after = [5000, 0]
    with pytest.raises(DownloadError):
        fetch_scene("room", tmp_path, attempts=1)
    room.statuses = [416]
    fetch_scene("room", tmp_path)
    assert [entry[1:] for entry in room.log[-2:]] == [("bytes=5000-", 416), (None, 200)]


def test_a_partial_file_from_elsewhere_is_dropped(room, tmp_path):
    part = tmp_path / ".prunefield-downloads" / "nerf_llff_data.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 700)
    note = {"url": "http://elsewhere/nerf_llff_data.zip", "total": 10**6, "validator": None}
    part.with_name(part.name + ".json").write_text(json.dumps(note))
    fetch_scene("room", tmp_path)
    assert room.log == [("nerf_llff_data.zip", None, 200)]


def test_a_busy_server_is_tried_again(room, tmp_path):
    room.statuses = [503, 429]
    fetch_scene("room", tmp_path)
    assert [status for _, _, status in room.log] == [503, 429, 200]


# What cannot be had


def test_the_larger_archive_is_tried_when_the_small_one_is_absent(server, tmp_path, monkeypatch):
    fern = replace(PUBLIC_SCENES["fern"], hashes={})
    monkeypatch.setitem(PUBLIC_SCENES, "fern", fern)
    server.files["nerf_llff_data.zip"] = zipped(llff_files("fern"))
    fetch_scene("fern", tmp_path)
    assert [entry[::2] for entry in server.log] == [
        ("nerf_example_data.zip", 404),
        ("nerf_llff_data.zip", 200),
    ]


def test_a_server_without_it_is_named(server, tmp_path):
    with pytest.raises(DownloadError) as caught:
        fetch_scene("fern", tmp_path)
    for part in ("nerf_example_data.zip: HTTP 404", "nerf_llff_data.zip: HTTP 404", "PRUNEFIELD_M"):
        assert part in str(caught.value)
    assert not (tmp_path / "nerf_llff_data").exists()


def test_a_refusal_is_named(room, tmp_path):
    room.statuses = [401]
    with pytest.raises(DownloadError, match="answered HTTP 401"):
        fetch_scene("room", tmp_path)


def test_no_server_at_all_is_named(server, tmp_path):
    with pytest.raises(DownloadError, match=r"cannot fetch room: .*no answer"):
        fetch_scene("room", tmp_path, base_url="http://127.0.0.1:1", attempts=2)


@pytest.mark.parametrize("address", ["file:///etc", "ftp://somewhere", "example.org/data"])
def test_other_kinds_of_addresses_are_refused(tmp_path, address):
    with pytest.raises(DownloadError, match="must begin with http"):
        fetch_scene("room", tmp_path, base_url=address)


def test_a_nonsensical_address_is_named(tmp_path):
    with pytest.raises(DownloadError, match="cannot fetch room"):
        fetch_scene("room", tmp_path, base_url=f"http://{'x' * 100}.org", attempts=1)


def test_an_unknown_scene_suggests_the_nearest(tmp_path):
    with pytest.raises(DownloadError, match=r"no public scene 'fren'.*did you mean 'fern'"):
        fetch_scene("fren", tmp_path)


def test_an_unwritable_place_is_named(room, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write room to .*file"):
        fetch_scene("room", tmp_path / "file")


# What came is not what it should be


def nothing_left(tmp_path):
    return not (tmp_path / "nerf_llff_data").exists() and not names(tmp_path)


def test_a_file_of_another_content_is_refused(server, tmp_path):
    server.files["nerf_example_data.zip"] = zipped(llff_files("fern"))
    with pytest.raises(
        DownloadError, match=r"poses_bounds.npy of fern has SHA-256 .* d2933dbdbec7"
    ):
        fetch_scene("fern", tmp_path)
    assert nothing_left(tmp_path)


def with_archive(monkeypatch, server, **known):
    """Make the test server the known host of `room`, so that archive sizes and hashes count."""
    monkeypatch.delenv("PRUNEFIELD_MIRROR")
    archive = public.Archive("nerf_llff_data.zip", server.url, **known)
    scene = replace(PUBLIC_SCENES["room"], archives=(archive,))
    monkeypatch.setitem(PUBLIC_SCENES, "room", scene)


def test_an_archive_of_another_hash_is_refused(room, tmp_path, monkeypatch):
    with_archive(monkeypatch, room, sha256="0" * 64)
    with pytest.raises(DownloadError, match="but 0000"):
        fetch_scene("room", tmp_path)
    assert nothing_left(tmp_path)


def test_an_archive_of_another_size_is_refused_before_it_is_downloaded(room, tmp_path, monkeypatch):
    with_archive(monkeypatch, room, size=12_345)
    with pytest.raises(DownloadError, match="12,345 is known to be right"):
        fetch_scene("room", tmp_path)
    assert nothing_left(tmp_path)


def test_the_right_hash_and_size_are_accepted(room, tmp_path, monkeypatch):
    content = room.files["nerf_llff_data.zip"]
    digest = hashlib.sha256(content).hexdigest()
    with_archive(monkeypatch, room, size=len(content), sha256=digest)
    assert fetch_scene("room", tmp_path).is_dir()


def link(name, to):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, to


DANGERS = {
    "parent": "nerf_llff_data/room/../../../escaped.txt",
    "absolute": "/tmp/prunefield-escaped.txt",
    "backslashes": "nerf_llff_data\\..\\..\\escaped.txt",
    "drive": "C:/escaped.txt",
}


@pytest.mark.parametrize("danger", DANGERS)
def test_an_archive_that_would_escape_is_refused(server, tmp_path, danger):
    files = {**llff_files("room"), DANGERS[danger]: b"gotcha"}
    server.files["nerf_llff_data.zip"] = zipped(files)
    with pytest.raises(DownloadError, match="points outside the archive's folder or is a link"):
        fetch_scene("room", tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_an_archive_with_links_is_refused(server, tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(*link("nerf_llff_data/room/images_8", "/etc"))
        for name, content in llff_files("room").items():
            archive.writestr(name, content)
    server.files["nerf_llff_data.zip"] = file.getvalue()
    with pytest.raises(DownloadError, match="or is a link"):
        fetch_scene("room", tmp_path)
    assert nothing_left(tmp_path)


def test_a_web_page_in_place_of_the_archive_is_named(server, tmp_path):
    server.files["nerf_llff_data.zip"] = b"<html>Quota exceeded</html>"
    with pytest.raises(DownloadError, match=r"not a zip file.*login or quota page"):
        fetch_scene("room", tmp_path)
    assert nothing_left(tmp_path)


def test_a_damaged_archive_is_thrown_away(room, tmp_path):
    content = bytearray(room.files["nerf_llff_data.zip"])
    content[2000:2100] = bytes(100)
    whole, room.files["nerf_llff_data.zip"] = room.files["nerf_llff_data.zip"], bytes(content)
    with pytest.raises(DownloadError, match="cannot be used"):
        fetch_scene("room", tmp_path)
    assert nothing_left(tmp_path)
    room.files["nerf_llff_data.zip"] = whole
    assert fetch_scene("room", tmp_path).is_dir()


def test_an_archive_without_the_scene_is_named(server, tmp_path):
    server.files["nerf_llff_data.zip"] = zipped(llff_files("trex"))
    with pytest.raises(DownloadError, match=r"holds no room/poses_bounds.npy"):
        fetch_scene("room", tmp_path)


def test_an_archive_without_the_photos_is_named(server, tmp_path):
    files = {"nerf_llff_data/room/poses_bounds.npy": poses()}
    server.files["nerf_llff_data.zip"] = zipped(files)
    with pytest.raises(DownloadError, match="none of the photos of room"):
        fetch_scene("room", tmp_path)


def test_other_nestings_and_macos_leftovers(server, tmp_path):
    files = llff_files("room", "some/where/")
    files |= {f"__MACOSX/{name}": b"resource fork" for name in llff_files("room")}
    server.files["nerf_llff_data.zip"] = zipped(files)
    folder = fetch_scene("room", tmp_path)
    assert (folder / "poses_bounds.npy").read_bytes() == poses()


def test_blender_scenes_come_without_their_depth_maps(server, tmp_path):
    root = "nerf_synthetic/ship"
    matrix = np.eye(4).tolist()
    files = {f"{root}/README.txt": b"terms"}
    for split in ("train", "val", "test"):
        frames = [{"file_path": f"./{split}/r_{v}", "transform_matrix": matrix} for v in range(2)]
        content = json.dumps({"camera_angle_x": 0.7, "frames": frames}).encode()
        files[f"{root}/transforms_{split}.json"] = content
        for view in range(2):
            files[f"{root}/{split}/r_{view}.png"] = png(view)
            files[f"{root}/{split}/r_{view}_depth_0001.png"] = png(view)
    server.files["nerf_synthetic.zip"] = zipped(files)
    folder = fetch_scene("ship", tmp_path)
    assert [n for n in names(folder) if n.endswith("png")] == [
        "test/r_0.png", "test/r_1.png", "train/r_0.png", "train/r_1.png",
    ]  # fmt: skip
    assert load_scene(SceneSettings(folder)).train == (0, 1)


def test_the_catalogue_has_the_sixteen_scenes():
    assert len(PUBLIC_SCENES) == 16
    for scene in PUBLIC_SCENES.values():
        assert scene.terms
        assert scene.archives
        assert (len(scene.archives) == 2) == (scene.name in ("fern", "lego"))
