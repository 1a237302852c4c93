"""Ranks that leave their process group and join one again: as commands do that first agree on a checkpoint."""

import os
import subprocess
import sys

from torch.distributed import TCPStore

CODE = """
import os, time
from mixtral_recipes.system import ranks

for meeting in range(3):
    late = meeting % 2
    if ranks.launched_rank() == late:
        time.sleep(0.5)  # the other one looks for this rank before it has said where it is now
    with ranks.joined() as group:
        print(ranks.gathered((ranks.launched_rank(), meeting), group), flush=True)
"""


def test_a_rank_that_comes_first_does_not_look_where_the_others_were() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            printed, errors = process.communicate(timeout=30)
            assert printed.splitlines() == [str([(0, meeting), (1, meeting)]) for meeting in range(3)], errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def test_an_error_has_one_rank_before_it_however_often_its_process_has_met() -> None:
    code = """
import torch
from mixtral_recipes.system import ranks

for _ in range(3):
    ranks.meet("gloo")
    torch.distributed.destroy_process_group()
raise ValueError("wrong")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[rank0]: ValueError: wrong"
