"""What a report says a run ran on."""

import platform

import torch

from mixtral_recipes.training.watch.environment import describe_environment


def test_the_machine_and_the_versions_that_compute() -> None:
    found = describe_environment(torch.device("cpu"))
    assert platform.node() in found["machine"]
    assert (found["device"], found["python"]) == ("CPU", platform.python_version())
    assert torch.__version__.startswith(found["torch"])
    assert "cuda" not in found
