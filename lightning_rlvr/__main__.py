"""`python -m lightning_rlvr`: which commands there are, and the way into each.

What a command needs is imported once it is asked for: torch, Lightning and transformers take seconds.
"""

import sys
import warnings
from collections.abc import Sequence

PROGRAM = "python -m lightning_rlvr"
COMMANDS = {
    "fit": "train a policy",
    "validate": "sample and judge the validation questions",
    "test": "sample and judge the test questions",
    "predict": "sample responses to the prediction questions, and write them",
    "score": "write the semantic entropy of the training questions, for the curriculum",
    "evaluate": "take models through benchmarks: pass@k, avg@k, maj@k with intervals",
    "data check": "check the questions of a config without loading a model",
    "preflight": "say what a config takes before it is run: memory by part, updates, disk",
    "compare": "replay one rollout batch under many objectives",
    "sweep": "do every run of an experiment",
    "report": "make the tables and figures of a sweep or of one run",
}


def overview() -> str:
    """Return what `--help` says."""
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Train language models with verifiable rewards and watch their entropy.",
            "",
            *(f"  {name:<10}  {what}" for name, what in COMMANDS.items()),
            "",
            "COMMAND --help has the options of a command; fit --config FILE --print_config every key of a config.",
            "",
        ]
    )


def start(words: Sequence[str]) -> None:
    """Run the command that the words begin with."""
    match words:
        case ["compare", *rest]:
            from lightning_rlvr import compare

            compare.main(rest)
        case ["evaluate", *rest]:
            from lightning_rlvr import evaluation

            evaluation.main(rest)
        case ["data", "check", *rest]:
            from lightning_rlvr.cli import check_data

            sys.exit(check_data(rest))
        case ["preflight", *rest]:
            from lightning_rlvr.cli import check_before

            sys.exit(check_before(rest))
        case ["report", *rest]:
            from lightning_rlvr.report import command as report

            report.main(rest)
        case ["sweep", *rest]:
            from lightning_rlvr.cli import fit_config
            from lightning_rlvr.sweep import command as sweep

            sweep.main(rest, fit_config)
        case _:
            from lightning_rlvr.cli import run

            run(words)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what the user can put right ends in one message and exit status 2."""
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(overview())
        return
    known = any(words[: len(name.split())] == name.split() for name in COMMANDS)
    if not known and not (words and words[0].startswith("-")):  # LightningCLI takes a --config before the command
        said = f"not {' '.join(words[:2])!r}" if words else "and none is given"
        sys.stderr.write(f"error: the command must be one of {', '.join(COMMANDS)}, {said}. See {PROGRAM} --help.\n")
        sys.exit(2)
    from lightning_rlvr.types import UserError

    for harmless in (
        r"Found \d+ module\(s\) in eval mode",  # on purpose: dropout would make the policy's ratio random
        r"The '\w+' does not have many workers",  # questions are already in memory
        r"Using ModelCheckpoint with manual optimization",  # saved after the update, as meant
        r"It is recommended to use `self.log\(.*sync_dist=True",  # what is logged has been reduced over all ranks
        r"LightningCLI's args parameter",  # `data check` takes its own options off first
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=harmless)
    try:
        start(words)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # before the trainer has started, which handles it itself
        sys.exit(130)


if __name__ == "__main__":
    main()
