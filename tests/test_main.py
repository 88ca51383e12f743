"""The way into each command."""

import subprocess
import sys

import pytest

from lightning_rlvr.__main__ import COMMANDS, main


def test_help_names_every_command_and_waits_for_no_library():
    code = "import sys; from lightning_rlvr.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name}  " in said for name in COMMANDS)
    assert said.endswith("False\n")


@pytest.mark.parametrize("words", [[], ["data"], ["fitt", "--config", "x.yaml"]])
def test_what_is_no_command_is_answered_with_those_there_are(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert all(name in error for name in COMMANDS)
    assert " ".join(words[:2]) in error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    assert "--" in capsys.readouterr().out
