"""What a model under evaluation can be given as: a policy's source, a server, or where its weights lie."""

from __future__ import annotations

from lightning_rlvr.models import Checkpoint, PolicySource, Pretrained
from lightning_rlvr.rollout import Served
from lightning_rlvr.store import user_path
from lightning_rlvr.types import UserError


def policy_source(model: PolicySource | Served | str) -> PolicySource | Served:
    """Return the source, or server, that `model` is or means.

    A text is a checkpoint (.ckpt), a folder in Hugging Face format, the folder of a run (its exported policy, or else
    its last checkpoint), or, where there is no such file or folder, a name for `Pretrained`.

    Raises: UserError if a folder is none of these, or a checkpoint is missing.
    """
    if isinstance(model, PolicySource | Served):
        return model
    path = user_path(model, "models")
    if path.suffix == ".ckpt":
        if not path.is_file():
            why = "that is a folder" if path.is_dir() else "no such file"
            raise UserError(f"a checkpoint must be a file, got {model!r}: {why}. Set models.")
        return Checkpoint(str(path))
    if not path.is_dir():
        return Pretrained(model)
    for folder in (path, path / "policy"):
        if (folder / "config.json").is_file():
            return Pretrained(str(folder))
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return Checkpoint(str(last))
    raise UserError(
        f"a model's folder must hold config.json (Hugging Face format), policy/ or checkpoints/last.ckpt (a run), got "
        f"{model!r}: it holds {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}. Set models."
    )
