"""nemo_run's command line with our tasks: what it reads, what it says, and what it ends with."""

from pathlib import Path
from typing import Any, cast

import fiddle as fdl
import nemo_run as run
import pytest
from megatron.core.inference.sampling_params import SamplingParams
from nemo_run.cli.api import Entrypoint
from nemo_run.cli.config import ConfigSerializer

import mixtral_recipes as llm
from mixtral_recipes.cli import nemo_run_entry
from mixtral_recipes.cli.nemo_run_entry import RecipeContext
from mixtral_recipes.errors import LaunchError, Preempted, RecipeError
from mixtral_recipes.evaluation.from_python import Generated
from mixtral_recipes.executors import nemo_run_jobs

ROOT = Path(__file__).resolve().parents[3]
FACTORY = llm.mixtral_tiny.finetune_recipe


def context(factory: Any = FACTORY, **options: Any) -> RecipeContext:
    return RecipeContext(**{"name": "finetune", "factory": factory, "dryrun": True} | options)


def refusal(command: RecipeContext, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        command.cli_execute(llm.finetune, args)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trainer.max_stepz=4"], "trainer.max_stepz=4: Trainer has no setting 'max_stepz'. Did you mean 'max_steps'?"),
        (["trainer.max_steps=many"], "trainer.max_steps=many must be a whole number."),
        (["trainer=@missing.yaml"], "trainer=@missing.yaml: no such file: missing.yaml."),
        (["executor=torchrun"], "use run.executor=torchrun"),
        (["run.executor.ntasks_per_node=2"], "name an executor, e.g. run.executor=torchrun."),
        (["run.executor=torchrunn"], "leave it out to run on this machine. Did you mean 'torchrun'?"),
        (["run.executor=torchrun", "run.executor.ntask=2"], "No parameter named 'ntask' exists"),
        (["run.executor=torchrun", "run.executor.ntasks_per_node=3"], "trainer.num_nodes x trainer.devices is 1 x 2"),
        (["trainer.devices=3"], "To repair: trainer.strategy.expert_model_parallel_size=1 data.global_batch_size=48"),
    ],
)
def test_what_is_wrong_is_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(context(), args, capsys)
    assert line.startswith("error: ")
    assert said in line
    assert len(line) < 400


def test_and_so_is_a_recipe_that_is_not_named_or_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not set: model, data, trainer; choose a recipe: --factory mixtral_8x7b" in refusal(
        context(None), [], capsys
    )
    command = RecipeContext(name="export")
    assert command.parse_fn(llm.export_ckpt, ["path=x", "dtype=bf16"]).__arguments__ == {"path": "x", "dtype": "bf16"}
    drawn = RecipeContext(name="generate").parse_fn(llm.generate, ["path=x", "inference_params.top_k=1"])
    assert drawn.inference_params == run.Config(SamplingParams, top_k=1)
    assert "mixtral_tini. Did you mean 'mixtral_tiny'?" in refusal(context("mixtral_tini"), [], capsys)


def test_a_setting_is_read_where_nemo_run_alone_cannot(tmp_path: Path) -> None:
    (tmp_path / "trainer.yaml").write_text("max_steps: 7\n")
    found: Any = context(dryrun=False).parse_fn(
        llm.finetune,
        [
            f"trainer=@{tmp_path / 'trainer.yaml'}",
            "trainer.log_every_n_steps=2",
            "log.ckpt.train_time_interval.minutes=5",
            "peft=nemo.collections.llm.peft.lora.LoRA(dim=4)",
            "peft.alpha=8",
            "data=MockDataModule",
            "trainer.callbacks=[TimingCallback, GarbageCollectionCallback(gc_interval_train=10, gc_interval_val=10)]",
        ],
    )
    assert (found.trainer.max_steps, found.trainer.log_every_n_steps) == (7, 2)
    assert found.log.ckpt.train_time_interval.minutes == 5
    assert (found.peft.__fn_or_cls__, found.peft.dim, found.peft.alpha) == (llm.LoRA, 4, 8)
    assert found.data == run.Config(llm.MockDataModule, seq_length=256, micro_batch_size=16, global_batch_size=32)
    assert [each.__fn_or_cls__ for each in found.trainer.callbacks] == [
        llm.TimingCallback,
        llm.GarbageCollectionCallback,
    ]


def test_settings_of_a_default_are_read() -> None:
    found: Any = context(None, dryrun=False).parse_fn(
        llm.evaluate, ["target_cfg=model", "eval_cfg.params.limit_samples=3", "eval_cfg.type=squad"]
    )
    made: Any = fdl.build(found.eval_cfg)
    assert (found.target_cfg, made.type, made.params.limit_samples) == ("model", "squad", 3)


@pytest.mark.parametrize(("error", "code"), [(LaunchError("x"), 2), (Preempted("x"), 75), (ValueError("x"), 1)])
def test_a_run_s_end_is_the_exit_code(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run.cli.RunContext, "_execute_task", fail)
    with pytest.raises(SystemExit) as end:
        context().cli_execute(llm.finetune, [])
    assert end.value.code == code


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_that_nemo_run_exported_is_read(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"recipe.{suffix}"
    ConfigSerializer().dump(FACTORY(), file)
    expected = FACTORY()
    expected.trainer.max_steps = 7
    assert context(yaml=str(file), dryrun=False).parse_fn(llm.finetune, ["trainer.max_steps=7"]) == expected


def test_a_recipe_of_ones_own_package_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "their_lab.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    found: Any = context("their_lab.narrow(name='mine')", dryrun=False).parse_fn(llm.finetune, ["peft.dim=4"])
    peft, trainer = cast(Any, fdl.build(found.peft)), cast(Any, fdl.build(found.trainer))
    assert (found.log.name, type(peft).__name__, peft.dim, trainer.callbacks[0].above) == ("mine", "NarrowLoRA", 4, 5.0)


def test_a_recipe_validates_and_is_for_no_other_task() -> None:
    found: Any = context("mixtral_tiny(num_gpus_per_node=1)", dryrun=False).parse_fn(llm.validate, ["peft.dim=4"])
    assert (found.__fn_or_cls__, found.model_transform.dim, found.trainer.devices) == (llm.validate, 4, 1)
    with pytest.raises(RecipeError, match="is for pretrain, finetune and validate, not for train"):
        context("mixtral_tiny").parse_fn(llm.train, [])


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ([Generated("Where?", "Here.")], "> Where?\nHere.\n\n"),
        (["Here.\x1b[2J"], "Here.\\x1b[2J\n"),
        ({"f1": 5.0, "predictions": {"one": "a"}}, '{\n "f1": 5.0\n}\n'),
        (Path("out/hf"), "out/hf\n"),
    ],
)
def test_what_a_task_returns_is_shown(
    result: Any, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = context(None, name="generate", dryrun=False, skip_confirmation=True)
    monkeypatch.setattr(nemo_run_entry, "_shown", lambda task, show=nemo_run_entry._shown: show(lambda *a, **k: result))
    command.cli_execute(llm.generate, ["path=x", "prompts=['Where?']"])
    assert capsys.readouterr().out.endswith("Launching generate...\n" + shown)


def test_a_recipe_file_is_for_its_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("recipe: mixtral_tiny.pretrain\n")
    assert "is a recipe for pretrain, not for finetune." in refusal(context(yaml=str(file)), [], capsys)


def test_settings_of_a_script_s_own_executor_count() -> None:
    command = context()
    command.executor = run.Config(run.LocalExecutor)  # pyright: ignore[reportAttributeAccessIssue]
    command.parse_args(["executor.ntasks_per_node=2"])
    assert command.executor == run.LocalExecutor(ntasks_per_node=2)


def test_a_script_s_main_is_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nemo_run_jobs.activate()
    monkeypatch.setattr("sys.argv", ["script.py", "--dryrun", "trainer.max_stepz=4"])
    with pytest.raises(SystemExit) as end:
        Entrypoint(llm.finetune, namespace="script", default_factory=FACTORY).main()
    assert end.value.code == 2
    assert "Did you mean 'max_steps'?" in capsys.readouterr().err
