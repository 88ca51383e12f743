"""Questions from Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_rlvr.store import user_path
from lightning_rlvr.tasks.records import Record, Records
from lightning_rlvr.types import UserError

_TIMEOUT = 10.0  # seconds to wait for the Hub's first word


@dataclass(frozen=True)
class HubDataset(Records):
    """Rows of one split of a data set on the Hugging Face Hub, or of a folder written by `save_to_disk`.

    Needs the `datasets` package: pip install lightning_rlvr[datasets].

    Args:
        name: data set on the Hub ("openai/gsm8k"), a local folder, or a format of `datasets` ("json").
        config: configuration of the data set ("main"), if it has several.
        split: split, such as "train" or "test[:100]".
        options: further arguments of `datasets.load_dataset`, such as {revision: ...} or {data_files: ...}.
    """

    name: str
    config: str = ""
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)

    def source(self) -> tuple[str, str]:
        """Return name, config and split for messages and for uids."""
        parts = [part for part in (self.name, self.config, self.split) if part]
        return f"data set {':'.join(parts)}", ":".join(parts)

    def read(self) -> Sequence[Record]:
        """Load the split, from the cache if it is there.

        Raises: UserError if `datasets` is not installed, and, within seconds, if the data set, its config
        or its split does not exist or the Hub cannot be reached.
        """
        datasets = _import_datasets()
        folder = user_path(self.name, "the task's name")
        saved = any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
        try:
            if saved:
                rows = self._pick(datasets.load_from_disk(str(folder)))
            else:
                self._reach(datasets)
                rows = datasets.load_dataset(self._path(), self.config or None, split=self.split, **self.options)
            return [dict(row) for row in rows]
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"name must be a data set that can be loaded, got {self.name!r} with config {self.config!r} "
                f"and split {self.split!r}: {reason}. Set the task's name, config, split or options."
            ) from error

    def _path(self) -> str:
        return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name

    def _pick(self, loaded: Any) -> Any:
        if not isinstance(loaded, dict):
            return loaded
        if self.split not in loaded:
            raise UserError(
                f"split must be in the folder {self.name!r}, got {self.split!r}: it has "
                f"{', '.join(loaded)}. Set the task's split."
            )
        return loaded[self.split]

    def _reach(self, datasets: ModuleType) -> None:
        """Ask the Hub once: `load_dataset` would retry for 23 s where there is no network."""
        local = Path(self._path()).exists() or "/" not in self.name  # names without a slash are formats
        cached = Path(datasets.config.HF_DATASETS_CACHE) / self.name.replace("/", "___")
        if local or cached.exists() or datasets.config.HF_HUB_OFFLINE:
            return
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError

        try:
            HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(self.name, timeout=_TIMEOUT)
        except (HfHubHTTPError, HFValidationError):
            return  # it answered: load_dataset says best what is wrong
        except Exception as error:
            raise UserError(
                f"name must be within reach, got {self.name!r}: no answer from {datasets.config.HF_ENDPOINT} "
                f"({error}) and no copy in {datasets.config.HF_DATASETS_CACHE}. Set the task's name to a "
                "local folder, or use lightning_rlvr.tasks.Files."
            ) from error


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"HubDataset must have the package datasets, but: {error}. "
            "Run `pip install lightning_rlvr[datasets]`, or use lightning_rlvr.tasks.Files."
        ) from error
    return datasets
