"""The command in this process: what it shows is captured as pytest captures, nothing has to be started."""

import pytest

from quintic.cli.app import main


def quintic(*arguments):
    """Exit code of ``quintic ARGUMENTS``."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0
