"""Bundles on the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

from dynadapter.files import one_line, read_bytes
from dynadapter.limits import MAX_JSON
from dynadapter.serve.bundle.card import PLACE
from dynadapter.serve.bundle.config import CARD, CONFIG, FILES, MODEL
from dynadapter.serve.bundle.place import is_bundle
from dynadapter.serve.bundle.reading import read

HUB = "hf-hub:"
NEUTRAL = (".gitattributes", ".gitignore", "LICENSE", CARD)
"""Files that a repository may hold before its first bundle."""


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str = "Upload a bundle of dynadapter",
) -> str:
    """Upload a bundle after a check that it is complete and builds a network.

    The commands on the uploaded card contain the repository's name. A repository that holds something else than a
    bundle is an error.

    Args:
        folder: The bundle.
        repo_id: ``owner/name``; created if it does not exist.
        private: Whether a new repository is private; None for the hub's default, which is public.
        token: Access token; None for the one that ``hf auth login`` stored.
        revision: Branch to write to; created if it does not exist.
        license: License on the card, such as ``mit``; None for the license that timm names for the backbone's weights.
        message: Commit message.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The bundle is damaged, or the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    place = Path(os.path.expanduser(folder))
    config, tensors = read(place)
    config.assemble(config.backbone.create(config.num_classes), tensors, str(place / MODEL))
    try:
        text = read_bytes(place / CARD, MAX_JSON).decode("utf-8")
        card = ModelCard(text.replace(PLACE, HUB + repo_id + (f"@{revision}" if revision else "")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{place / CARD} cannot be read ({one_line(error)}); write the bundle again") from error
    if license is not None:
        card.data.license = license  # type: ignore[attr-defined]  # of ModelCardData
    contents: dict[str, Any] = {CARD: card.content.encode()}
    operations = [CommitOperationAdd(name, contents.get(name, place / name)) for name in FILES]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _require_bundle_or_nothing(api, repo_id, revision)
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:  # network, permissions and names each have their own
        raise ValueError(f"{place} could not be uploaded to {repo_id!r}: {_explained(error)}") from error
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def local(place: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle that is given as a folder, or as ``hf-hub:owner/name``.

    Raises:
        ValueError: The bundle cannot be fetched and is not in the cache.
    """
    name = str(place)
    return fetch(name.removeprefix(HUB)) if name.startswith(HUB) else Path(os.path.expanduser(place))


def fetch(name: str) -> Path:
    """Fetch what loading reads of ``owner/name`` or ``owner/name@revision`` into the hub's cache; return the folder."""
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, MODEL]))
    except Exception as error:  # network, permissions and names each have their own
        raise ValueError(f"the bundle {HUB}{name} could not be fetched: {_explained(error)}") from error


def _require_bundle_or_nothing(api: Any, repo_id: str, revision: str | None) -> None:
    """Raise a ValueError if a repository holds something else than a bundle, because an upload would mix both."""
    names = api.list_repo_files(repo_id, revision=revision)
    foreign = [name for name in names if name not in NEUTRAL]
    if not foreign:
        return
    if CONFIG in names and is_bundle(Path(api.hf_hub_download(repo_id, CONFIG, revision=revision))):
        return
    raise ValueError(f"it holds another model ({', '.join(sorted(foreign)[:3])}); give another name")


def _explained(error: Exception) -> str:
    """Return why the hub failed, and what to do."""
    from huggingface_hub import errors

    chain = [one for one in (error, error.__cause__) if one is not None]
    answers = [getattr(one, "response", None) for one in chain]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if isinstance(error, errors.HFValidationError):
        return f"{one_line(error).rstrip('.')}; give OWNER/NAME"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, errors.GatedRepoError):
        return "access has to be requested on its page first; then log in by hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private; check the name, or log in by hf auth login"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "the hub knows no valid token of yours; log in by hf auth login, or set HF_TOKEN"
    if status == 403:
        return "your token has no right to write there; give your own name as OWNER, or a token with write access"
    if status is not None or isinstance(error, ValueError):
        return one_line(error)
    offline = any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain)
    what = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer ({one_line(chain[-1])})"
    return f"{what}; without it nothing is uploaded, and only bundles in the cache can be used; check the network"
