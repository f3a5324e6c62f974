"""A run killed inside a save, inside an evaluation and anywhere ends as an undisturbed one."""

import signal

import pytest
import torture


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path):
    torture.torture(tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_run_that_is_stopped_again_and_again(tmp_path, number):
    torture.torture(tmp_path, kills=3, number=number)
