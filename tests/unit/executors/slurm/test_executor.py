"""A slurm_executor in a nemo_run experiment: what its jobs ask for, and what is set on it afterwards."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from nemo_run.run.torchx_backend.packaging import package

import mixtral_recipes as llm
from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning
from mixtral_recipes.executors import plugins
from mixtral_recipes.executors.nemo_run_jobs import check
from mixtral_recipes.executors.slurm.executor import for_recipe, slurm_executor, with_full_paths
from mixtral_recipes.executors.slurm.profile import Cluster
from mixtral_recipes.executors.slurm.scheduler import write_job


def job(task: Any, executor: Any, *added: Any) -> Path:
    """The folder of a task's job as nemo_run and our scheduler make it; nothing is submitted."""
    task, executor = check(task, executor)
    executor.assign("exp", str(Path.cwd() / "exp"), "one", "one")
    for plugin in added:
        plugin.setup(task, executor)
    Path(executor.job_dir).mkdir(parents=True)
    app = package("one", task, executor, serialize_to_file=True)
    write_job(app.roles[0], executor, executor.job_details)
    return Path(executor.job_dir)


def script(*arguments: Any) -> str:
    folder = job(*arguments)
    text = (folder / "sbatch.sh").read_text()
    shutil.rmtree(folder)
    return text


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tiny(devices: int = 1) -> Any:
    return llm.mixtral_tiny.finetune_recipe(num_nodes=1, num_gpus_per_node=devices)


def test_a_recipe_for_gpus_asks_for_them() -> None:
    recipe = llm.mixtral_8x7b.pretrain_recipe()
    executor = slurm_executor(recipe.trainer.num_nodes, 8, container_image="i.sif")
    text = script(recipe, executor)
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "export TORCH_NCCL_AVOID_RECORD_STREAMS=1" in text
    assert "apptainer exec --nv " in text
    assert f"--bind {Path.cwd() / 'runs'}:{Path.cwd() / 'runs'}" in text
    assert "gpus" not in script(tiny(), slurm_executor(1, 1))


def test_a_file_that_no_container_sees_is_named(tmp_path: Path) -> None:
    """A container starts without it, and the job fails after it has waited its turn."""
    recipe = tiny()
    recipe.data.dataset_root = "/corpora/mine/data.jsonl"
    recipe.resume.restore_config.path = f"hf://{tmp_path}/elsewhere/base"

    def unseen(**settings: Any) -> dict[str, str]:
        with warnings.catch_warnings(record=True, action="always") as caught:
            script(recipe, slurm_executor(1, 1, **settings))
        told = [str(warning.message) for warning in caught]
        return {text.partition("=")[0]: text for text in told if "the job's container mounts" in text}

    found = unseen(container_image="i.sqsh", mounts=[str(tmp_path)])
    assert list(found) == ["data.dataset_root"]
    assert "mounts = ['/corpora/mine:/corpora/mine']" in found["data.dataset_root"]
    for mount in ("/corpora", "/elsewhere:/corpora:ro", "/x:/y,/corpora/mine:/corpora/mine"):
        assert not unseen(container_image="i.sqsh", mounts=[str(tmp_path), mount])
    assert len(unseen(container_image="i.sqsh")) == 2
    assert list(unseen(container_image="i.sif")) == ["data.dataset_root"]  # Apptainer mounts /tmp


def test_a_folder_of_a_command_that_no_container_sees_is_named() -> None:
    executor = slurm_executor(1, 1, container_image="i.sqsh", mounts=["/models"])
    with pytest.warns(MixtralRecipesWarning, match="^/exports/tuned is not inside any folder that the job"):
        for_recipe(executor, None, Path("/runs"), ("export", "/runs/tune", "/exports/tuned", "--base", "/models/base"))


@pytest.mark.parametrize("image", [None, "i.sif", "i.sqsh"])
def test_a_job_looks_where_its_submitter_keeps_things(
    image: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the image, whose folders may be read-only, nor in the default folder, which may hold other imports."""
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", "ours")
    monkeypatch.setenv("HF_HOME", "~/hub")
    settings: dict[str, Any] = {"container_image": image} if image else {"venv": "/v"}
    text = script(tiny(), slurm_executor(1, 1, **settings))
    assert f"export MIXTRAL_RECIPES_HOME={tmp_path / 'ours'}\n" in text
    assert (f"export HF_HOME={Path.home() / 'hub'}\n" in text) is (image is None)
    assert (f"{tmp_path / 'ours'}:{tmp_path / 'ours'}" in text) is (image is not None)
    assert ('MIXTRAL_RECIPES_HOME="$MIXTRAL_RECIPES_HOME"' in text) is (image is not None)  # not the image's own
    text = script(tiny(), slurm_executor(1, 1, env={"MIXTRAL_RECIPES_HOME": "/theirs"}, **settings))
    assert "export MIXTRAL_RECIPES_HOME=/theirs\n" in text
    assert str(tmp_path / "ours") not in text.replace("mkdir -p", "")


@pytest.mark.parametrize(("image", "home"), [(None, ""), ("i.sif", ""), ("i.sqsh", "/scratch/home")])
def test_a_job_behind_ssh_has_its_own_places(image: str | None, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", "/here")
    settings: dict[str, Any] = {"container_image": image} if image else {"venv": "/v"}
    made: Any = slurm_executor(1, 1, ssh="me@there", job_dir="/scratch", **settings)
    assert made.job_details.profile().env.get("MIXTRAL_RECIPES_HOME", "") == home
    assert made.job_details.folders == ([home] if home else [])


@pytest.mark.parametrize("image", ["i.sif", "i.sqsh"])
def test_no_container_mounts_a_folder_with_a_comma(image: str) -> None:
    recipe = tiny()
    recipe.log.log_dir = "/runs/a,b"
    with pytest.raises(LaunchError, match="'/runs/a,b' contains a comma"):
        script(recipe, slurm_executor(1, 1, container_image=image))
    shutil.rmtree("exp")
    script(recipe, slurm_executor(1, 1, venv="/v"))


def test_what_is_set_on_the_executor_counts() -> None:
    executor = slurm_executor(1, 1, env={"NCCL_DEBUG": "WARN", "OMP_PROC_BIND": "true"})
    executor.env_vars["NCCL_DEBUG"] = "IN FO"
    executor.time, executor.retries = "00:09:00", 3
    text = script(tiny(), executor)
    assert "export NCCL_DEBUG='IN FO'\nexport OMP_PROC_BIND=true\n" in text
    assert "#SBATCH --time=00:09:00\n" in text
    assert '-lt 3 ]; then again failed "$code"' in text
    assert "export HF_HOME=/h\n" in script(run.Script(inline="true", env={"HF_HOME": "/h"}), slurm_executor(1, 1))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("setup_lines", "echo", "setup_lines='echo' has no effect in the script that slurm_executor writes"),
        ("signal", "10@60", "signal='10@60' has no effect"),
        ("array", "0-3", "array='0-3' has no effect"),
        ("launcher", "torchrun", "launcher=Torchrun"),
        ("ntasks_per_node", 8, "ntasks_per_node=8 has no effect"),
        ("time", "soon", "time='soon' is not allowed"),
        ("env_vars", {"SOME_TOKEN": "s"}, "SOME_TOKEN is not known to be harmless"),
    ],
)
def test_what_the_script_does_not_take_is_refused(name: str, value: Any, told: str) -> None:
    executor = slurm_executor(1, 1)
    setattr(executor, name, value)
    with pytest.raises(LaunchError) as refused:
        job(tiny(), executor)
    assert told in str(refused.value)


def test_nemos_plugins_reach_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k3y")
    logger = run.Config(llm.WandbLogger, project="p")
    text = script(
        tiny(), slurm_executor(1, 1, secrets=()), plugins.PerfEnvPlugin(), plugins.FaultTolerancePlugin(),
        plugins.PreemptionPlugin(preempt_time=100),
        plugins.NsysPlugin(start_step=1, end_step=2),
    )  # fmt: skip
    assert "export TORCH_NCCL_HIGH_PRIORITY=1\n" in text
    assert '-lt 2 ]; then again failed "$code"' in text
    assert "#SBATCH --signal=TERM@100\n" in text
    assert "--no-python nsys profile" in text
    assert " python -m mixtral_recipes.executors.rank /" in text
    assert "fn_or_script\ncode=" in text
    fitting = plugins.ConfigValidationPlugin(validate_wandb=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    wandb = plugins.WandbPlugin(name="x", logger_fn=lambda name: logger)
    folder = job(tiny(2), slurm_executor(1, 2, secrets=(), container_image="i"), wandb, fitting)
    holding = [path.name for path in folder.rglob("*") if path.is_file() and "k3y" in path.read_text(errors="replace")]
    assert holding == ["secrets.env"]


BEHIND_SSH = Cluster(name="far", ssh="me@login", job_dir="/scratch/jobs", venv="/scratch/venv")


@pytest.mark.parametrize(
    ("setting", "text", "place"),
    [
        ("resume.restore_config.path", "mistralai/Mixtral-8x7B-v0.1", None),
        ("resume.restore_config.path", "hf://mistralai/Mixtral-8x7B-v0.1", None),
        ("resume.restore_config.path", "mistralai/Mixtral-8x7B-v0.1@refs/pr/3", None),
        ("resume.restore_config.path", "nemo://mistralai/Mixtral-8x7B-v0.1", None),
        ("resume.restore_config.path", "hf://here.jsonl", "hf:here.jsonl"),
        ("resume.restore_config.path", "nemo://./away", "nemo:away"),
        ("resume.restore_config.path", "runs/first", "runs/first"),
        ("resume.restore_config.path", "~/first", None),
        ("resume.restore_config.adapter_path", "my/runs/first", "my/runs/first"),
        ("data.dataset_root", "rajpurkar/squad", None),
        ("data.dataset_root", "here.jsonl", "here.jsonl"),
        ("data.dataset_root", "./away.jsonl", "away.jsonl"),
        ("tokenizer", "here.jsonl", "here.jsonl"),
        ("tokenizer", "mistral://mixtral-8x7b", None),
        ("data.chat_template", "here.jsonl", "here.jsonl"),
        ("data.chat_template", "[INST]{{ a/b/c }}[/INST]", None),
    ],
)
def test_files_are_named_by_full_paths_and_the_hubs_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, text: str, place: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").touch()
    recipe = llm.mixtral_8x7b.finetune_recipe()
    recipe.data = run.Config(llm.ChatDataModule)
    *owner, name = setting.split(".")
    for site, start in ((Cluster(name="near"), tmp_path), (BEHIND_SSH, Path("/scratch/jobs"))):
        part = recipe
        for step in owner:
            part = getattr(part, step)
        setattr(part, name, text)
        found = with_full_paths(recipe, site)
        for step in setting.split("."):
            found = getattr(found, step)
        scheme, _, relative = (place or "").rpartition(":")
        assert found == (f"{scheme and scheme + '://'}{start / relative}" if place else text)
