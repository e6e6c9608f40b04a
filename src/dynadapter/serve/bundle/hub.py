"""Bundles on the Hugging Face hub."""

import os
from pathlib import Path

from dynadapter.serve.bundle.config import FILES
from dynadapter.serve.bundle.reading import read

HUB = "hf-hub:"


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a bundle of dynadapter",
) -> str:
    """Upload a bundle after checking that it is whole.

    Args:
        folder: The bundle.
        repo_id: ``owner/name``; created if it does not exist.
        private: Whether a new repository is private; None for the hub's default, which is public.
        token: Instead of the one that ``hf auth login`` stored.
        revision: Branch to write to.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The bundle is damaged, or the hub refuses it.
    """
    from huggingface_hub import HfApi

    place = Path(folder).expanduser()
    read(place)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=place,
            allow_patterns=list(FILES),
            revision=revision,
            commit_message=message,
        )
    except Exception as error:  # network, permissions and names each have their own
        raise ValueError(f"{place} could not be uploaded to {repo_id!r} ({_one_line(error)})") from error
    return str(done)


def fetch(name: str) -> Path:
    """Fetch the files of a bundle from the hub into its cache, and return that folder.

    Args:
        name: ``owner/name``, or ``owner/name@revision``.

    Raises:
        ValueError: They cannot be fetched and are not in the cache.
    """
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # network, permissions and names each have their own
        raise ValueError(
            f"the bundle {HUB}{name} could not be fetched ({_one_line(error)}); without a network it has to be in the "
            "cache of the Hugging Face hub, or give a local folder"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
