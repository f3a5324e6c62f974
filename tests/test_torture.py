"""A run killed inside a save, inside an evaluation and anywhere ends as an undisturbed one."""

import pytest
import torture


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path):
    torture.torture(tmp_path, kills=3)
