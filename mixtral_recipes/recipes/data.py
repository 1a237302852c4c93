"""The data modules that NeMo's command line names, with NeMo 2.0's values: ``data=mock``, ``data=squad``."""

import nemo_run as run

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.settings.objects import returns_config


@run.cli.factory(target=DataModule)
@returns_config
def mock() -> run.Config[MockDataModule]:
    """Random tokens."""
    return run.Config(MockDataModule, seq_length=4096, global_batch_size=16, micro_batch_size=2)


@run.cli.factory(target=DataModule)
@returns_config
def squad() -> run.Config[SquadDataModule]:
    """SQuAD from the Hub."""
    return run.Config(SquadDataModule, seq_length=4096, global_batch_size=16, micro_batch_size=2)
