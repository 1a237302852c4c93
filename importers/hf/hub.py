"""The Hugging Face Hub: fetch a revision's weight and tokenizer files, checked by hash; upload a finished folder.

huggingface_hub does the transfers (tokens from its usual places, never printed here). This module decides which files
are needed, pins everything to one commit, retries, and refuses bytes that are not the ones published.
"""

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from mixtral_recipes.checkpoints.format.manifest import NAME as MANIFEST
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, in_short
from mixtral_recipes.importers.hf import pickle as pickle_io
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.hf.hub_resume import into_cache
from mixtral_recipes.importers.locations import HubId
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.json_files import MOST_BYTES
from mixtral_recipes.system.schema import Count, Sha256, typed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ATTEMPTS = 6
_FIRST_WAIT_S = 0.5  # doubles with each attempt
_PARALLEL_FILES = 4


type _Sha1 = Annotated[str, Meta(pattern="^[0-9a-f]{40}$")]


@dataclass(frozen=True)
class _Published:
    """What the Hub says a file is."""

    name: str
    size: Count | None
    sha256: Sha256 | None  # of large files
    git_sha1: _Sha1 | None  # of small ones


class _Answer(TypedDict):
    """What it says of a model, as far as it is used."""

    commit: _Sha1
    files: Annotated[list[_Published], Meta(max_length=100_000)]


def download(where: HubId, *, progress: bool = True) -> tuple[Path, str, list[str]]:
    """Bring a model's files into the Hub cache.

    Args:
        where: Repository and revision.
        progress: Let huggingface_hub draw its bars.

    Returns:
        The folder the files are in, the commit they belong to, and the names of what is published and was not fetched.

    Raises:
        CheckpointError: there is no such repository or revision, it is gated, it has no weights, or the bytes received
            are not those published.
        EnvironmentProblem: the Hub cannot be reached and the cache does not hold the model.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    with _quiet(not progress):
        try:
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            commit, published = _described(api, where)
            names = _needed(api, where, commit, published)
            with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
                paths = list(pool.map(lambda name: _fetch(api, where, commit, published[name]), names))
            _remember(api, where)
            return paths[0].parent, commit, sidecars.left_behind(published, names)
        except _network_errors() as error:
            if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
                raise _refused(where, error) from error
            return *_cached(where, error), []


def _described(api: "HfApi", where: HubId) -> tuple[str, dict[str, _Published]]:
    """The commit that a revision stands for, and its files by name; nothing that the Hub says is believed unseen."""
    try:
        info = _patiently(where, lambda: api.model_info(where.repo, revision=where.revision, files_metadata=True))
        siblings = [_plain(sibling) for sibling in info.siblings or []]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, _network_errors()):
            raise
        raise CheckpointError(f"hf://{where.repo}: the Hub's answer does not describe a model.") from error
    said = typed({"commit": info.sha, "files": siblings}, _Answer, f"hf://{where.repo}: the Hub", CheckpointError)
    for file in said["files"]:
        if file.name.startswith("/") or ".." in file.name.split("/") or not file.name.isprintable():
            raise CheckpointError(
                f"hf://{where.repo}: the repository lists a file named {file.name!r}, outside its own folder."
            )
    return said["commit"], {file.name: file for file in said["files"]}


def _plain(sibling: Any) -> dict[str, Any]:
    lfs = sibling.lfs
    hashes = {"sha256": lfs.sha256, "git_sha1": None} if lfs else {"sha256": None, "git_sha1": sibling.blob_id}
    return {"name": sibling.rfilename, "size": sibling.size} | hashes


def _small(file: _Published) -> _Published:
    """A file that is read as a whole, if it is one."""
    if file.size is not None and file.size > MOST_BYTES:
        raise CheckpointError(f"{file.name}: the file on the Hub has {file.size} bytes; the limit is {MOST_BYTES}.")
    return file


def _needed(api: "HfApi", where: HubId, commit: str, published: dict[str, _Published]) -> list[str]:
    """The files an import reads, config.json first: weights of one format, what travels beside them, the lineage."""
    if "config.json" not in published:
        raise CheckpointError(f"hf://{where.repo} has no config.json; it is not a transformers model.")

    def whole(name: str) -> Path:
        return _fetch(api, where, commit, _small(published[name]))

    names = sidecars.travelling(published, lambda name: sidecars.text_of(whole(name)))
    names += [lineage.NAME] if lineage.NAME in published else []
    formats = ((safetensors_io.INDEX, safetensors_io.SINGLE), (pickle_io.INDEX, pickle_io.SINGLE))
    for index, single in formats:
        if index in published:
            weight_map = safetensors_io.read_index(whole(index))
            found = single if single in published else None
            safetensors_io.refuse_two_sets(f"hf://{where.repo}", index, weight_map, found)
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if shard not in published:
                    raise CheckpointError(f"hf://{where.repo}: {index} names {shard}, which is not in the repository.")
            return [*names, index, *shards]
        if single in published:
            return [*names, single]
    raise CheckpointError(f"hf://{where.repo} has no safetensors or .bin weights in the transformers layout.")


def _fetch(api: "HfApi", where: HubId, commit: str, file: _Published) -> Path:
    """One file, from the cache or the Hub, whose hash is the published one; wrong bytes are thrown away once."""
    if file.sha256 and file.size is not None:
        _patiently(where, partial(into_cache, api, where.repo, file.name, commit, file.sha256, file.size))
    for force in (False, True):
        get = partial(api.hf_hub_download, where.repo, file.name, revision=commit, force_download=force)
        path = Path(_patiently(where, get))
        if _is_published(path, file):
            return path
        path.resolve().unlink(missing_ok=True)  # the blob, so that nothing uses it again
        path.unlink(missing_ok=True)
    raise CheckpointError(
        f"hf://{where.repo}@{commit[:12]}: the bytes received for {file.name} were not the ones the Hub publishes, in "
        "both attempts; they were deleted. Check the network or the mirror in HF_ENDPOINT."
    )


def _remember(api: "HfApi", where: HubId) -> None:
    """Let the cache note which commit the revision's name stood for, so that it can be found without a network."""
    with contextlib.suppress(*_network_errors()):
        api.hf_hub_download(where.repo, "config.json", revision=where.revision)


def _is_published(path: Path, file: _Published) -> bool:
    if file.size is not None and path.stat().st_size != file.size:
        return False
    if file.sha256:
        return sha256(path) == file.sha256
    if file.git_sha1:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_sha1
    return True


def _patiently[T](where: HubId, call: Callable[[], T]) -> T:
    """Call with retries for failures of the network or the server; a broken download continues where it stopped."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in [_FIRST_WAIT_S * 2**attempt for attempt in range(_ATTEMPTS - 1)] + [None]:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code < 500 and error.response.status_code != 429:
                raise _refused(where, error) from error
            if wait is None:
                raise
        except _network_errors() as error:
            if wait is None or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failed transfer raises: files and sockets, or the HTTP library huggingface_hub was built on."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return OSError, HTTPError


def _refused(where: HubId, error: Any) -> CheckpointError:
    """A 4xx answer as an error that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"hf://{where.repo}"
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{name} is gated: accept its terms on its page on the Hub (/{where.repo}), then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{name} has no revision {where.revision!r}.")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{name} does not exist, or is private; check the name, or log in with `hf auth login` or HF_TOKEN."
        )
    return CheckpointError(f"{name}: the Hub answered {error.response.status_code}.")


def _cached(where: HubId, error: Exception) -> tuple[Path, str]:
    """The model as the cache has it, when the Hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        raise EnvironmentProblem(
            "the disk is full while downloading; free some space or set HF_HOME to a larger disk."
        ) from error
    try:
        folder = Path(snapshot_download(where.repo, revision=where.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as missing:
        raise EnvironmentProblem(
            f"hf://{where.repo}: the Hub cannot be reached ({in_short(error)}) and the model is not in the cache; "
            "check the network, or pass a local folder."
        ) from missing
    for path in _files_read(folder):
        if not _is_named_by_content(path):
            raise CheckpointError(
                f"hf://{where.repo}: the cached {path.name} is damaged, and the Hub cannot be reached "
                f"({in_short(error)}); delete {path} and try again when the network is back."
            ) from error
    return folder, folder.name


def _files_read(folder: Path) -> list[Path]:
    """The files of a cached snapshot that an import reads."""
    weights, _ = safetensors_io.files_of(folder)
    if not weights:
        weights, _ = safetensors_io.files_of(folder, pickle_io.INDEX, pickle_io.SINGLE)
    return weights + sidecars.of(folder)


def _is_named_by_content(path: Path) -> bool:
    """Whether a cached file has the hash the cache filed it under (SHA-256, or git's SHA-1 for small files)."""
    name = path.resolve().name
    if len(name) == 64:
        return _is_published(path, _Published(path.name, None, name, None))
    return len(name) != 40 or _is_published(path, _Published(path.name, None, None, name))


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Silence huggingface_hub's progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet and not before:
            enable_progress_bars()


def _forget_places(folder: Path) -> None:
    """Leave this machine's folders out of a lineage that is published; its links are hashes and stay as they are."""
    record = lineage.read_or_none(folder)
    if record is not None and not (folder / MANIFEST).is_file():
        lineage.write(folder, record, paths=False)


def upload(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a finished folder to a Hub repository, which is made if need be; of a file, also what belongs to it.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: the Hub refuses (name, permission).
        EnvironmentProblem: it cannot be reached, or you are not logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    _forget_places(folder)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        files = list(lineage.read(folder).files) if folder.is_file() else None
        found = api.upload_folder(
            repo_id=repo,
            folder_path=folder.parent if files else folder,
            allow_patterns=files,
            commit_message="Upload with mixtral-recipes",
        )
        return str(found)
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise CheckpointError(f"--push-to-hub {repo}: {in_short(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        hint = "; log in with `hf auth login`, or set HF_TOKEN to one with write access" if status in (401, 403) else ""
        raise CheckpointError(f"--push-to-hub {repo}: the Hub answered {status}{hint}.") from error
    except _network_errors() as error:
        raise EnvironmentProblem(f"--push-to-hub {repo}: the Hub cannot be reached ({in_short(error)}).") from error
    except RuntimeError as error:  # what huggingface_hub makes of a file it could not send
        raise EnvironmentProblem(
            f"--push-to-hub {repo}: the upload failed ({in_short(error)}); {folder} itself is complete, so upload it "
            "again."
        ) from error
