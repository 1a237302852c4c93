"""How often `train_step` waits for the device, whatever the number of layers and microbatches, and for what it says so.

On a GPU each read waits until all that was asked of it is done. Of the reads below, those of `cpu/` do not happen
there; the experts' token counts are on the host by then, where the dispatcher of tokens has put them.
"""

import pytest

from tests.distributed.harness import launch
from tests.distributed.waits import data_wait_of_a_slow_module, reads_of_a_step

NOT_OF_A_GPU = ("cpu/", "experts.py:forward", "small_run.py")


@pytest.mark.parametrize("target_modules", [None, ["linear_qkv", "linear_fc1"]], ids=["full", "lora"])
def test_only_the_losses_and_the_norm_are_read(target_modules: list[str] | None) -> None:
    reads = launch(1, reads_of_a_step, 3, 3, target_modules)[0]
    assert {place: count for place, count in reads.items() if not any(part in place for part in NOT_OF_A_GPU)} == {
        "training/step.py:reduce_sums": 1,
        "optimizer/clip_grads.py:get_grad_norm_fp32": 1,
    }


def test_slow_data_is_seen() -> None:
    assert launch(1, data_wait_of_a_slow_module, 2, 0.2)[0] >= 2 * 0.2
