"""What is said of a checkpoint that could not be written."""

import errno
import os

from mixtral_recipes.checkpoints.save import _failure


def test_an_error_of_the_disk_says_what_to_do() -> None:
    failure = _failure(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "weights/__3_0.distcp"), 3)
    assert failure.user_can_mend
    assert failure.text == (
        "rank 3: the checkpoint was not saved: weights/__3_0.distcp: File too large; raise `ulimit -f`, or choose "
        "another disk."
    )


def test_a_fault_of_ours_is_told_as_one() -> None:
    failure = _failure(ValueError("no"), 3)
    assert not failure.user_can_mend
    assert failure.text == "rank 3: the checkpoint was not saved: ValueError: no."
