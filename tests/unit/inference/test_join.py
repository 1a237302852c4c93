"""The layout of a model that generates is that of the processes there are."""

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.model import join
from mixtral_recipes.layout.topology import Topology


def test_another_number_of_processes_than_were_started() -> None:
    with pytest.raises(RecipeError, match=r"^--devices 2, but 1 process\(es\) were started"):
        join(Topology(world_size=2))


@pytest.mark.parametrize("sizes", [{"context_parallel_size": 2}, {"virtual_pipeline_model_parallel_size": 2}])
def test_layouts_that_cannot_generate(sizes: dict[str, int]) -> None:
    pipeline = {"pipeline_model_parallel_size": 2} if "virtual_pipeline_model_parallel_size" in sizes else {}
    with pytest.raises(RecipeError, match="does not support interleaved pipelines or context parallelism"):
        join(Topology(world_size=2, **sizes, **pipeline))
