"""The public scenes that can be fetched, and where they are.

As public documentation has it; none of these addresses could be tried from where this was written,
so sizes and hashes are what the hosts' own pages say:

- `nerf_example_data.zip` (fern and lego, the small one): on the UCSD server named in the authors'
  `download_example_data.sh` (github.com/bmild/nerf) and in dozens of projects since. No hash is
  published.
- `nerf_llff_data.zip` (8 forward-facing scenes) and `nerf_synthetic.zip` (8 Blender scenes): the
  authors keep them on Google Drive, in a folder that moved in 2024 (bmild/nerf issues 211 and 214;
  now drive.google.com/drive/folders/1cK3UDIJqKAAm7zyrxRYVFJ0BRMgrwhh4), which does not serve plain
  downloads of this size. Used here is a third party's copy on Hugging Face (YouLiXiya/nerf), pinned
  to one revision; its pages give the sizes and SHA-256 of both files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

_UCSD = "http://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf"
_HUGGING_FACE = (
    "https://huggingface.co/datasets/YouLiXiya/nerf/resolve/"
    "8bb2c1f48e1ee51a94bce0c1634dd04795f92faa"
)


@dataclass(frozen=True)
class Archive:
    """A zip file on some server.

    Attributes:
        name: the file's name, the same on every mirror.
        base_url: the folder it lies in.
        size: bytes, where known.
        sha256: of the file at `base_url`, where known.
    """

    name: str
    base_url: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublicScene:
    """A scene that can be fetched.

    Attributes:
        name: what to ask for.
        folder: where it goes, below the destination.
        hallmark: the file that tells its folder inside the archive.
        archives: where to get it, in order of preference.
        usual: regular expressions for the files that are needed, relative to the scene's folder.
        terms: under what terms the data comes.
        hashes: SHA-256 of files whose contents are known.
    """

    name: str
    folder: PurePosixPath
    hallmark: str
    archives: tuple[Archive, ...]
    usual: tuple[str, ...]
    terms: str
    hashes: Mapping[str, str] = field(default_factory=dict)


_EXAMPLE = Archive("nerf_example_data.zip", _UCSD)
_LLFF = Archive(
    "nerf_llff_data.zip",
    _HUGGING_FACE,
    1_780_545_599,
    "b8be42c77ce345e647812cb69d1f92d2a85159f2464847e99458e53d13cb1d96",
)
_SYNTHETIC = Archive(
    "nerf_synthetic.zip",
    _HUGGING_FACE,
    1_676_854_825,
    "5e36e96ba8e3564835e9313a47f088aa26eeb88093dcccc695bdb1adec398efd",
)
_IN_EXAMPLE = ("fern", "lego")
_LLFF_TERMS = (
    "Research data without a licence of its own: cite Mildenhall et al. 2019 (LLFF) and 2020 "
    "(NeRF), and do not pass it on."
)
_SYNTHETIC_TERMS = (
    "Rendered from Blend Swap models, each under its maker's Creative Commons licence (see the "
    "README in nerf_synthetic.zip); cite Mildenhall et al. 2020 (NeRF)."
)
_KNOWN_HASHES = {
    "fern": {
        "poses_bounds.npy": "d2933dbdbec7791d4e9041570e5aff649bf934e99ee22d04d92044afe7d26270",
        "images_8/image000.png": "20b3dfe28536170e81221f9fd7bfd6e0aba88c9aaf7d1cc2db02bb342c78c588",
    }
}


def _llff_scene(name: str) -> PublicScene:
    return PublicScene(
        name=name,
        folder=PurePosixPath("nerf_llff_data", name),
        hallmark="poses_bounds.npy",
        archives=(_EXAMPLE, _LLFF) if name in _IN_EXAMPLE else (_LLFF,),
        usual=(r"poses_bounds\.npy", r"images_8/[^/]+"),
        terms=_LLFF_TERMS,
        hashes=_KNOWN_HASHES.get(name, {}),
    )


def _synthetic_scene(name: str) -> PublicScene:
    return PublicScene(
        name=name,
        folder=PurePosixPath("nerf_synthetic", name),
        hallmark="transforms_train.json",
        archives=(_EXAMPLE, _SYNTHETIC) if name in _IN_EXAMPLE else (_SYNTHETIC,),
        # The test folder also holds depth and normal maps, which nothing here reads.
        usual=(r"transforms_(train|test)\.json", r"(train|test)/r_\d+\.png"),
        terms=_SYNTHETIC_TERMS,
        hashes=_KNOWN_HASHES.get(name, {}),
    )


PUBLIC_SCENES: dict[str, PublicScene] = {
    scene.name: scene
    for scene in (
        *map(
            _llff_scene,
            ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex"),
        ),
        *map(
            _synthetic_scene,
            ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship"),
        ),
    )
}
