"""What nemo_run's own command line (``nemo llm pretrain --factory mixtral_8x7b``) finds: tasks and recipe factories.

nemo_run imports this module through the entry-point group ``nemo_run.cli``. Importing a recipe module registers its
factories; the tasks are registered here.
"""

import importlib

import nemo_run as run

from mixtral_recipes import api
from mixtral_recipes.executors import torchrun as _torchrun  # noqa: F401  # registers run.executor=torchrun
from mixtral_recipes.recipes import data as _data  # noqa: F401  # registers data=mock and data=squad
from mixtral_recipes.recipes.catalog import names

for _name in names():
    importlib.import_module(f"mixtral_recipes.recipes.{_name}")

for _task in (api.train, api.pretrain, api.finetune, api.validate, api.generate, api.evaluate):
    run.cli.entrypoint(_task, namespace="llm")
for _name, _task in {"import": api.import_ckpt, "export": api.export_ckpt}.items():
    run.cli.entrypoint(_task, name=_name, namespace="llm")
