"""Downloads from the Hugging Face hub that fail soon and say why."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_rlvr.types import UserError

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
REACH_SECONDS = 10.0


def download(name: str, revision: str | None, *, gguf_file: str | None, weights: bool) -> Path:
    """Return the local folder of a hub model; what is complete in the hub's own cache needs no network.

    Args:
        name: owner/model.
        revision: branch, tag or commit; None is the default branch.
        gguf_file: download this one for weights and tokenizer.
        weights: whether the weights must be there too.

    Raises: UserError if the model is neither cached nor to be had, within seconds when offline.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if _complete(folder, gguf_file, weights):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass
    try:
        # One request without retries: transformers' own look-up would try for half a minute offline.
        info = HfApi().model_info(name, revision=revision, timeout=REACH_SECONDS)
        files = [sibling.rfilename for sibling in info.siblings or []]
        patterns = [*SMALL_FILES, *_weight_patterns(files, gguf_file, weights)]
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise _missing(name, revision, error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests")):
            raise _missing(name, revision, error) from error
        raise


def _missing(name: str, revision: str | None, error: Exception) -> UserError:
    place = name if revision is None else f"{name} at revision {revision}"
    first_line = str(error).strip().partition("\n")[0]
    return UserError(
        f"name must be a model that can be had, got {name!r}: looked for the folder {Path(name).absolute()}, the "
        f"hub's cache and huggingface.co/{place} ({type(error).__name__}: {first_line}). "
        "Set model.policy.init_args.name (in evaluate: models) to a local folder, or go online."
    )


def _weight_patterns(files: list[str], gguf_file: str | None, weights: bool) -> list[str]:
    """Choose one of the formats that a repository holds."""
    if gguf_file is not None:
        return [gguf_file]
    if not weights:
        return []
    return ["*.safetensors"] if any(file.endswith(".safetensors") for file in files) else ["*.bin"]


def _complete(folder: Path, gguf_file: str | None, weights: bool) -> bool:
    """Whether a cached folder holds all that is asked for: a download may have been cut short."""
    if gguf_file is not None:
        return (folder / gguf_file).is_file()
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not weights:
        return tokenizer
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return tokenizer and all((folder / shard).is_file() for shard in shards)
    single = ("model.safetensors", "pytorch_model.bin")
    return tokenizer and any((folder / file).is_file() for file in single)
