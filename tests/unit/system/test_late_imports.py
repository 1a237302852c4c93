"""Late imports: nothing is pretended. What a module imports late is, whenever it is looked for, the real thing."""

import importlib
import json
import pickle
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_recipes.system import late_imports

SHOP = """
import stock
import stock.cellar
import counter as till
from stock import Apple, weigh as put_on_scales, cellar as below
from helpers_of_shop import real
from . import bread
from .bread import Loaf, slices
from stock import MISSING_UNTIL_USED

alias = Apple
slices_now = real()


def sell(apple: Apple, loaf: Loaf | None = None, by: "Apple" = None) -> stock.cellar.Barrel:
    import json  # as usual once the body is done

    return Apple, put_on_scales, till, below, stock, bread, json


def is_apple(thing):
    return isinstance(thing, Apple)


def __getattr__(name):
    if name == "from_theirs":
        return "theirs"
    raise AttributeError(name)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package that imports `stock`, `counter` and its own `bread` late."""
    files = {
        "stock/__init__.py": "class Apple: ...\n\n\ndef weigh(): ...\n",
        "stock/cellar.py": "class Barrel: ...\n",
        "counter.py": "",
        "helpers_of_shop.py": "def real():\n    return 4\n",
        "shop/__init__.py": SHOP,
        "shop/bread.py": "class Loaf: ...\n\n\nslices = 12\n",
        "shop/cake.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    package = late_imports.Package("", "", "", {"shop": "stock counter shop"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [late_imports._Finder([package]), *sys.meta_path])
    before = set(sys.modules)
    yield importlib.import_module("shop")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_nothing_late_is_imported_with_the_module(shop: types.ModuleType) -> None:
    assert not {"stock", "stock.cellar", "counter", "shop.bread", "shop.cake"} & set(sys.modules)
    assert shop.slices_now == 4
    assert not any(isinstance(value, late_imports._Later) for value in vars(shop).values())


def test_a_function_finds_the_real_things(shop: types.ModuleType) -> None:
    apple, weigh, till, below, stock, bread, json_ = shop.sell(None)
    assert (apple, weigh) == (sys.modules["stock"].Apple, sys.modules["stock"].weigh)
    assert (stock, stock.cellar, below) == (sys.modules["stock"], *[sys.modules["stock.cellar"]] * 2)
    assert (till, bread, json_) == (sys.modules["counter"], sys.modules["shop.bread"], json)
    assert shop.is_apple(apple())
    assert not shop.is_apple(1)


def test_whoever_looks_from_outside_finds_them_too(shop: types.ModuleType) -> None:
    from_shop = importlib.import_module("shop")
    assert from_shop.Apple is from_shop.alias is importlib.import_module("stock").Apple
    assert shop.slices == 12
    assert shop.cake is sys.modules["shop.cake"]  # a module below, as a package that imports all of itself has it
    assert shop.from_theirs == "theirs"
    assert not hasattr(shop, "pears")
    assert not hasattr(shop, "shop.bread")  # torch.compile asks its packages for dotted names


def test_a_name_that_is_not_there_is_an_import_error_when_it_is_used(shop: types.ModuleType) -> None:
    with pytest.raises(ModuleNotFoundError, match="MISSING_UNTIL_USED"):
        _ = shop.MISSING_UNTIL_USED


def test_type_hints_are_the_real_types(shop: types.ModuleType) -> None:
    hints = typing.get_type_hints(shop.sell)
    stock, bread = importlib.import_module("stock"), importlib.import_module("shop.bread")
    assert hints == {
        "apple": stock.Apple,
        "loaf": bread.Loaf | None,
        "by": stock.Apple,
        "return": importlib.import_module("stock.cellar").Barrel,
    }


def test_instances_go_through_pickle(shop: types.ModuleType) -> None:
    assert type(pickle.loads(pickle.dumps(shop.Apple()))) is shop.Apple


def test_a_package_that_is_not_installed_is_an_import_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lonely.py").write_text("try:\n    import not_installed_here\nexcept ImportError:\n    alone = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = late_imports.Package("", "", "", {"lonely": "not_installed_here"})
    monkeypatch.setattr(sys, "meta_path", [late_imports._Finder([package]), *sys.meta_path])
    assert importlib.import_module("lonely").alone


@pytest.mark.parametrize(("version", "stands_aside"), [("0.11.1", False), ("0.12.0", True)])
def test_another_version_is_left_alone(version: str, stands_aside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(late_imports, "_is_known", late_imports._is_known.__wrapped__)
    folder = importlib.import_module("nemo_run").__path__[0]
    found = late_imports._Finder([late_imports.LATE["nemo_run"]]).find_spec(
        "nemo_run.run.experiment", [f"{folder}/run"]
    )
    assert (found is None) == stands_aside


def child(code: str) -> str:
    """What a fresh process prints; tests themselves import these packages as anyone does."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """
import importlib, json, sys, types
from mixtral_recipes.system import late_imports
{first}
def describe(value):
    if isinstance(value, types.ModuleType):
        return f"module {{value.__name__}}"
    if isinstance(value, type | types.FunctionType):
        return f"{{value.__module__}}.{{value.__qualname__}}"
    return type(value).__name__
for package in ("torch", "nemo_run", "megatron.core", "mixtral_recipes.api"):
    importlib.import_module(package)
wanted = [module for package in late_imports.LATE.values() for module in package.modules]
for module in wanted:
    importlib.import_module(module)
"""
EAGER = """
print(json.dumps({m: {n: describe(v) for n, v in vars(sys.modules[m]).items() if n[:2] != "__"} for m in wanted}))
"""
LATELY = """
for module in wanted:
    names = vars(sys.modules[module])["__builtins__"]
    assert isinstance(names, late_imports._Names), f"{module} is not imported late: another version?"
    assert names.waiting() or module == "megatron.core.inference.moe", f"{module} has nothing to wait for"
def texts(value):  # a late name that something other than an annotation took hold of
    if isinstance(value, late_imports._Later):
        yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, type) and value.__module__ in wanted:
        yield from texts({n: v for n, v in vars(value).items() if n != "__annotations__"})
    elif isinstance(value, types.FunctionType) and value.__module__ in wanted:
        yield from texts(list(value.__defaults__ or ()) + list((value.__kwdefaults__ or {}).values()))
held = [(m, n) for m in wanted for n, v in vars(sys.modules[m]).items() if n != "__builtins__" and list(texts(v))]
assert not held, held
everything = json.loads(sys.stdin.read())
other = {}
for m, names in everything.items():
    for n, was in names.items():
        now = describe(getattr(sys.modules[m], n))
        if now != was:
            other[f"{m}.{n}"] = (was, now)
print(json.dumps(other))
"""


def test_every_name_of_every_late_module_is_what_it_is_without_us() -> None:
    eager = child(LOOK.format(first="") + EAGER)
    assert len(json.loads(eager)) == sum(len(package.modules) for package in late_imports.LATE.values())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK.format(first="late_imports.activate()") + LATELY],
        input=eager.splitlines()[-1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_nemo_run_works_as_ever() -> None:
    child("""
import sys
from mixtral_recipes.system import late_imports
late_imports.activate()
import nemo_run as run
late = ["leptonai", "fastapi", "networkx", "paramiko", "fabric", "omegaconf", "requests"]
assert not [name for name in late if name in sys.modules], [name for name in late if name in sys.modules]

import copy, pickle, typing
import fiddle as fdl
made = fdl.build(run.Config(run.LeptonExecutor, container_image="image", nemo_run_dir="/runs", nodes=2))
assert isinstance(made, run.Executor) and pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
assert "leptonai" not in sys.modules
hints = typing.get_type_hints(run.LeptonExecutor.status)
import leptonai.api.v1.types.job
assert hints["return"] == typing.Optional[leptonai.api.v1.types.job.LeptonJobState]

slurm = run.SlurmExecutor(account="a", partition="p", tunnel=run.SSHTunnel(host="nowhere", user="u", job_dir="/j"))
assert isinstance(slurm.clone(), run.SlurmExecutor) and isinstance(run.LocalExecutor(), run.Executor)
from nemo_run.run.torchx_backend.schedulers import api
assert set(api.REVERSE_EXECUTOR_MAPPING.values()) >= {run.SlurmExecutor, run.LocalExecutor, run.LeptonExecutor}
from torchx.schedulers import get_scheduler_factories
assert {"local_persistent", "slurm_tunnel", "lepton"} <= set(get_scheduler_factories())

import tempfile
from pathlib import Path
with tempfile.TemporaryDirectory() as folder:
    with run.Experiment("one", executor=run.LocalExecutor(), base_dir=folder, log_level="ERROR") as experiment:
        experiment.add(run.Script(inline="echo first"), name="first")
        experiment.run(sequential=True)
        assert all(str(job["status"]).endswith("SUCCEEDED") for job in experiment.status(return_dict=True).values())
assert "networkx" in sys.modules
import nemo_run.core.tunnel.client, fabric
assert nemo_run.core.tunnel.client.Connection is fabric.Connection
""")


def test_megatron_works_as_ever() -> None:
    child("""
import sys
from mixtral_recipes.system import late_imports
late_imports.activate()
from mixtral_recipes.models.config import MixtralConfigTiny
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
late = ["megatron.core.parallel_state", "megatron.core.tensor_parallel", "torch.distributed.tensor", "triton", "sympy"]
assert not [name for name in late if name in sys.modules], [name for name in late if name in sys.modules]

import copy, dataclasses, pickle, typing
hints = typing.get_type_hints(MixtralConfigTiny)
assert hints["num_layers"] is int and set(hints) >= {field.name for field in dataclasses.fields(MixtralConfigTiny)}
config = MixtralConfigTiny()
assert pickle.loads(pickle.dumps(config)).hidden_size == copy.deepcopy(config).hidden_size == 128
assert isinstance(OptimizerConfig(lr=1.0), typing.get_type_hints(type(OptimizerConfig()))["lr"].__class__ | object)

assert "torch.export" not in sys.modules and "torch._meta_registrations" in sys.modules  # this one may calculate
import megatron.core
from megatron.core import mpu, tensor_parallel
assert mpu is megatron.core.parallel_state is sys.modules["megatron.core.parallel_state"]
assert tensor_parallel.ColumnParallelLinear.__module__ == "megatron.core.tensor_parallel.layers"
late_imports.complete("megatron")
from torch.distributed.tensor import DTensor
import megatron.core.utils
assert vars(megatron.core.utils)["DTensor"] is DTensor
assert not [n for m in late_imports.LATE["megatron"].modules if m in sys.modules
            for n in vars(sys.modules[m])["__builtins__"].waiting()]
""")


def test_packages_that_came_before_us_are_left_alone() -> None:
    child("""
import sys, builtins
import nemo_run
from mixtral_recipes.system import late_imports
late_imports.activate()
experiment = sys.modules["nemo_run.run.experiment"]
assert "leptonai" in sys.modules and vars(experiment)["__builtins__"] == vars(builtins)
(finder,) = [f for f in sys.meta_path if isinstance(f, late_imports._Finder)]
late_imports.activate()
assert len([f for f in sys.meta_path if isinstance(f, late_imports._Finder)]) == 1
assert finder.find_spec("nemo_run.core.execution.lepton") is None
""")


@pytest.mark.parametrize("module", ["distributed.checkpoint", "_dynamo"])
def test_a_dry_run_may_import_what_torch_has_in_one_order_only(module: str) -> None:
    child(f"""
import sys
from mixtral_recipes.system import late_imports
late_imports.activate(only_describes=True)
import torch
assert "torch._meta_registrations" not in sys.modules
import torch.{module}
assert torch.{module} is sys.modules["torch.{module}"] and torch.{module}.__file__ == torch.{module}.__spec__.origin
""")


HEAVY = {
    "leptonai", "fastapi", "transformers", "datasets", "networkx", "paramiko", "megatron.core.parallel_state", "sympy",
    "torch.export", "torch._meta_registrations",
}  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes", "show", "mixtral_8x7b.finetune"],
        ["recipes", "diff", "mixtral_8x7b.finetune", "mixtral_8x22b.finetune"],
        ["finetune", "--recipe", "mixtral_tiny", "--dry-run"],
        ["pretrain", "--recipe", "mixtral_8x22b_64k", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_command_that_describes_loads_nothing_that_works(argv: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mixtral_recipes.cli.main", *argv],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0
    assert "torch" in loaded
    assert not loaded & HEAVY
