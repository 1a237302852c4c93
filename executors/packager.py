"""Send the working tree as it is: uncommitted and untracked files included, ignored ones not, with a list of both."""

import os
import subprocess
import tarfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from nemo_run.core.packaging.base import Packager

from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning
from mixtral_recipes.system.files import replacing, sha256, write_json
from mixtral_recipes.system.private import holds_keys

_SKIPPED = {".git", ".venv", "venv", "__pycache__", "node_modules", "build", "dist"}


@dataclass(kw_only=True)
class WorkingTreePackager(Packager):
    """Packs every tracked or unignored file under ``roots``, and ``modules``, into the job folder's ``code``.

    Files that a .gitignore names stay, tracked or not, and so do files that hold keys by their name (``.env``,
    ``id_rsa``, ``*.pem``). A folder that is not a git checkout is packed without its hidden files, environments and
    build folders. What was packed and what stayed, from which commit and with which uncommitted changes, is written to
    ``code.json`` beside the archive.
    """

    #: Folders to pack; a later one wins where both hold a file of the same name.
    roots: list[str] = field(default_factory=list)
    #: Folders of packages, and files of modules, that are packed under their own names.
    modules: list[str] = field(default_factory=list)
    #: Refuse to pack more than this; it is copied for every job.
    max_mib: int = 200

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write ``<job_dir>/<name>.tar.gz`` and return its path; an empty string when there is nothing to pack.

        Raises:
            LaunchError: more than ``max_mib``; the message names the largest files.
        """
        if not self.roots and not self.modules:
            return ""
        archive = Path(job_dir, f"{name}.tar.gz")
        if archive.exists():
            return str(archive)
        manifest: dict[str, object] = {"roots": []}
        packed: dict[str, Path] = {}
        places = [(Path(root), Path()) for root in self.roots]
        packed |= {module.name: module for module in map(Path, self.modules) if module.is_file()}
        places += [(module, Path(module.name)) for module in map(Path, self.modules) if module.is_dir()]
        for root, name_there in places:
            files = working_files(root)
            ignored = tracked_though_ignored(root)
            needed = sorted(str(file) for file in files if file in ignored)
            if needed:
                some = ", ".join(needed[:3]) + " and more" * (len(needed) > 3)
                warnings.warn(
                    f"{root}: {some} are not packed, because git ignores them although it tracks them; remove them "
                    "from .gitignore if the job needs them.",
                    MixtralRecipesWarning,
                    stacklevel=2,
                )
            stay = [str(file) for file in files if holds_keys(file) or _leads_to_keys(root / file) or file in ignored]
            packed |= {str(name_there / file): root / file for file in files if str(file) not in stay}
            manifest["roots"].append({"path": str(root), **git_state(root), "left_out": stay})  # type: ignore[attr-defined]
        self._check_size(packed)
        manifest["files"] = {file: _digest(source) for file, source in sorted(packed.items())}
        write_json(archive.with_name("code.json"), manifest)
        with (
            replacing(archive, private=True) as staging,
            tarfile.open(staging, mode="w:gz", compresslevel=1) as tar,
        ):
            for file, source in sorted(packed.items()):
                tar.add(source, arcname=file, recursive=False, filter=_plain_owner)
        return str(archive)

    def _check_size(self, packed: dict[str, Path]) -> None:
        sizes = {file: source.lstat().st_size for file, source in packed.items()}
        total = sum(sizes.values()) / 2**20
        if total > self.max_mib:
            largest = ", ".join(f"{f} ({sizes[f] / 2**20:.0f} MiB)" for f in sorted(sizes, key=lambda f: -sizes[f])[:3])
            raise LaunchError(
                f"the working tree holds {total:.0f} MiB to pack, more than the limit of {self.max_mib}; largest: "
                f"{largest}. Move large files out of it, or add them to .gitignore."
            )


def working_files(root: Path) -> list[Path]:
    """Files to pack, relative to ``root``: what git tracks or would add, as it is on disk now.

    Symbolic links are kept as links; one that leads outside ``root`` is left out.
    """
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        names = [Path(os.fsdecode(name)) for name in listing.stdout.split(b"\0") if name]
    else:
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [
                f for f in folders if f not in _SKIPPED and not f.startswith(".") and not f.endswith(".egg-info")
            ]
            names += [Path(folder, file).relative_to(root) for file in files if not file.startswith(".")]
            names += [Path(folder, f).relative_to(root) for f in folders if Path(folder, f).is_symlink()]
    inside = root.resolve()
    return [
        name
        for name in dict.fromkeys(names)
        if ((root / name).is_symlink() and (root / name).resolve().is_relative_to(inside)) or (root / name).is_file()
    ]


def tracked_though_ignored(root: Path) -> set[Path]:
    """Files that git tracks and a .gitignore names: who wrote it did not want them to travel. Relative to ``root``."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--ignored", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, check=False)
    return {Path(os.fsdecode(name)) for name in listing.stdout.split(b"\0") if name}


def git_state(root: Path) -> dict[str, object]:
    """Commit and uncommitted paths of a checkout; empty for anything else."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD").strip()
    return {"commit": commit, "uncommitted": git("status", "--porcelain").splitlines()} if commit else {}


def _leads_to_keys(path: Path) -> bool:
    return path.is_symlink() and holds_keys(path.resolve())


def _digest(path: Path) -> str:
    return f"-> {os.readlink(path)}" if path.is_symlink() else sha256(path)


def _plain_owner(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info if info.isfile() or info.issym() else None
