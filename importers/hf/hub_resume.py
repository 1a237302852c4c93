"""Download a large Hub file so that a killed download continues where it stopped, even in another process.

huggingface_hub resumes within one call only: what a failed call received is thrown away, and a shard has gigabytes.
So the bytes are collected in a file of our own beside the cache's blobs and, once their SHA-256 is the published one,
moved to where huggingface_hub looks for the finished blob. The layout of the cache (``models--org--name/blobs/<hash>``)
is documented by huggingface_hub.
"""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.locks import held

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def into_cache(api: "HfApi", repo: str, name: str, commit: str, digest: str, size: int) -> None:
    """Bring a file's blob into the cache, going on with what an earlier attempt left.

    Does nothing where the Hub offers the file through Xet, which keeps its own record of what has arrived. Bytes whose
    hash is wrong are removed; the caller then finds no blob and downloads again.

    Args:
        api: Whose endpoint and token are used.
        repo: Repository id.
        name: File name.
        commit: Full commit hash.
        digest: Published SHA-256, which is also the blob's name.
        size: Published size in bytes.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs" / digest
    if blob.exists():
        return
    headers = build_hf_headers(token=api.token)
    url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)
    metadata = get_hf_file_metadata(url, token=api.token, endpoint=api.endpoint)
    if metadata.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET:
        return
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the Hub, not for whom it points to
    partial = blob.with_name(f"{digest}.mixtral-recipes.incomplete")
    with held(partial), partial.open("ab") as file:
        if blob.exists():  # another process was faster
            partial.unlink(missing_ok=True)
            return
        if file.seek(0, 2) > size:
            file.truncate(0)
        http_get(
            metadata.location,
            file,
            resume_size=file.seek(0, 2),
            headers=headers,
            expected_size=size,
            displayed_filename=name,
        )
        file.flush()
        if sha256(partial) == digest:
            partial.rename(blob)
        else:
            partial.unlink()
