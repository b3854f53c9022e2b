"""Models of the Hugging Face Hub by their names: only the files that loading needs, in the Hub's own cache."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub  # its functions are imported with their first use
from huggingface_hub import constants, errors

from models.checkpoints import orbax
from models.checkpoints.gguf_file import all_parts, first_parts
from models.errors import CheckpointError

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[\w.-]+(/[\w.-]+)*\.gguf))?(@(?P<revision>[\w./-]+))?"
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", f"{orbax.WEIGHTS}/*", orbax.QUANTISED)
_GATED = "accept its terms at {url} with your account"
_TOKEN = "give a token that may read it: HF_TOKEN in the environment, or `hf auth login`"


def is_name(model: str) -> bool:
    """Whether it could be ``org/name``, ``org/name@revision`` or ``org/name/file.gguf@revision``."""
    return _NAME.fullmatch(model) is not None


def fetch(model: str) -> Path:
    """The directory of a model, or the GGUF file that the name ends with, fetched where the cache lacks it.

    Where the cache is, the token, another server than the Hub's and offline mode are as ``huggingface_hub`` reads them
    from its environment: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.

    Args:
      model: as ``is_name`` says; the revision is a branch, a tag or a commit, and main where there is none.

    Raises:
      CheckpointError: there is no such model, revision or file, or it can't be fetched.
    """
    parts = _NAME.fullmatch(model)
    assert parts is not None
    repo, file, revision = parts["repo"], parts["file"], parts["revision"]
    names = _names(repo, revision)
    if file is None and names and not any(fnmatch(name, pattern) for name in names for pattern in _WEIGHTS):
        file = _only_gguf(repo, names)
    if file is None:
        directory = _snapshot(repo, revision, [*orbax.config_files(), *orbax.COMPANIONS, "config.json", *_WEIGHTS])
        has_weights = orbax.family_in(directory) or any(directory.glob("*.safetensors"))
        return directory if has_weights else directory / _only_gguf(repo, [path.name for path in directory.iterdir()])
    path = _snapshot(repo, revision, [all_parts(file)]) / file
    if not path.exists():
        raise CheckpointError(f"{repo} has no file {file!r}{_known(names or [])}")
    return path


def _names(repo: str, revision: str | None) -> list[str] | None:
    """Of a model's files; None: the Hub doesn't say."""
    try:
        said = huggingface_hub.HfApi().model_info(repo, revision=revision)
    except Exception:  # there may be a copy in the cache; if not, fetching says why
        return None
    return [file.rfilename for file in said.siblings or []]


def _only_gguf(repo: str, names: list[str]) -> str:
    """The one GGUF file, or the first part of it."""
    first = first_parts(names)
    if len(first) != 1:
        raise CheckpointError(
            f"{repo} has no model*.safetensors and {len(first)} GGUF files, expected one or the other{_known(first)}"
        )
    return first[0]


def _known(names: list[str]) -> str:
    files = [name for name in names if name.endswith(".gguf")]
    more = f" and {len(files) - 10} more" if len(files) > 10 else ""
    named = f"; its GGUF files are {', '.join(sorted(files)[:10])}{more}" if files else "; it has no GGUF files"
    return f"{named}. Name one, such as org/name/file.gguf, or give another model."


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of many kinds: HTTP's, the operating system's, the Hub's own
        raise _told(repo, revision, error) from error


def _told(repo: str, revision: str | None, error: Exception) -> CheckpointError:
    """What went wrong, and what to do about it."""
    named = f"{repo}@{revision}" if revision else repo
    url = f"{constants.ENDPOINT}/{repo}"
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo} is gated: {_GATED.format(url=url)}, and {_TOKEN}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no path {named!r}, and no model of this name at {constants.ENDPOINT}, or it is "
            f"private. Check the name; of a private model, {_TOKEN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {revision!r}. Give a branch, a tag or a commit of {url}.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub can't be reached at {url} ({said})"
        return CheckpointError(
            f"there is no path {named!r}, {why}, and the cache {constants.HF_HUB_CACHE} doesn't have "
            "all of the model's files. Fetch it where there is a network, or give the path of a model."
        )
    return CheckpointError(
        f"can't fetch {named} from {url}: {said} ({type(error).__name__}). Try again: what is there already is kept."
    )
