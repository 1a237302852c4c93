"""The command line: fast help, one-line errors with exit code 2, and what it resolves."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtral_recipes.cli import main
from mixtral_recipes.overrides import loading
from mixtral_recipes.recipes import catalog
from mixtral_recipes.system import machine

HEAVY = ("torch", "nemo_run", "megatron", "transformers", "fiddle")


def call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main.run(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    broken = {"context": "A box.", "qas": [{"id": "1", "question": "What?"}]}
    (tmp_path / "broken.json").write_text(json.dumps({"data": [{"title": "Boxes", "paragraphs": [broken]}]}))


def modules_after(*argv: str) -> list[str]:
    """The heavy modules a command line loads, asked in a fresh process."""
    code = (
        f"import sys; from mixtral_recipes.cli import main; main.run({list(argv)!r}); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(found.stderr.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["recipes", "list"]], ids=" ".join)
def test_nothing_heavy_is_loaded(argv: list[str]) -> None:
    assert modules_after(*argv) == []


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_help_of_every_command_loads_nothing_heavy(command: str) -> None:
    assert modules_after(command, "--help") == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["--help"], capsys)
    assert code == 0
    assert all(f"  {name} " in out for name in main.COMMANDS)


def test_the_list_has_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["recipes", "list", "--json"], capsys)
    rows = json.loads(out)["recipes"]
    assert code == 0
    assert [row["recipe"] for row in rows] == catalog.names()
    assert "64 GPUs: PP4 VPP8 EP8" in rows[0].values()


# command line -> what its one line says
MENDABLE = {
    "finetun": "unknown command 'finetun'. Did you mean 'finetune'?",
    "runs lst": "unknown command 'runs lst'. Did you mean 'list'? Valid: cancel, list, logs, resume, status.",
    "finetune --executor slrum": "Invalid value for '--executor': 'slrum' is not one of 'direct', 'local', 'slurm'.",
    "finetune --num-nodes 0": "Invalid value for '--num-nodes': Input should be greater than or equal to 1",
    "finetune --pft lora": "No such option: --pft",
    "finetune --recipe mixtral_8x8b": "unknown recipe 'mixtral_8x8b'. Did you mean 'mixtral_8x7b'?",
    "finetune --recipe mixtral_8x7b": "mixtral_8x7b needs 8 GPUs (1 node x 8, TP1 PP1 CP1 EP8 DP8);",
    "pretrain --recipe mixtral_8x22b": "mixtral_8x22b needs 128 GPUs (16 nodes x 8,",
    "finetune --recipe mixtral_tiny trainer.accelerator=gpu": "--dry-run to check it here, or trainer.accelerator=cpu.",
    "import embedded://mixtral_tiny --public": "--public has no effect without --push-to-hub; leave it out.",
    "export some-run out --public": "--public has no effect without --push-to-hub; leave it out.",
    "generate some-run hello --devices 100000": "Invalid value for '--devices': Input should be less than or equal to",
    "serve some-run --batch-size 1000000000": "Invalid value for '--batch-size': Input should be less than or equal to",
    "finetune --data missing.json": "missing.json: no such file or folder",
    "finetune --data broken.json": "broken.json:1: paragraphs[0].qas[0]: 'answers' must be a list",
    "finetune trainer.max_step=1": "Trainer has no setting 'max_step'. Did you mean 'max_steps'?",
    "finetune --recipe mixtral_tiny trainer.max_step=1": "Trainer has no setting 'max_step'. Did you mean 'max_steps'?",
    "finetune --num-gpus-per-node 1 --nproc-per-node 2": "are the same setting; use only one.",
    "plan --num-gpus-per-node 8 --nproc-per-node 4": "are the same setting; use only one.",
    "finetune --recipe mixtral_tiny --nproc-per-node 3": "micro_batch_size x data-parallel size = 16 x 3; use 48.",
    "finetune --recipe mixtral_tiny --nproc-per-node 3 trainer.strategy.expert_model_parallel_size=2": (
        "world size 3 is not a multiple of expert TP x EP x PP"
    ),
    "finetune --recipe mixtral_tiny --precision int4": "precision='int4' is not supported.",
    "finetune --recipe mixtral_8x7b --hardware h300 --dry-run": "'h300' is not a known GPU. Did you mean 'h200'?",
    "finetune --recipe mixtral_8x3b --dry-run": "fine-tuning needs a checkpoint (--restore-from)",
    "pretrain --recipe mixtral_8x7b trainer.num_nodes=2 --dry-run": "(80 of 85 GB on H100 SXM 80 GB)",
    "finetune --recipe mixtral_8x7b --peft none --num-nodes 1 --dry-run": "with 85 GB; the largest parts: optimizer",
    "finetune --recipe mixtral_8x22b --peft none --num-nodes 1 --dry-run": "with 85 GB; the largest parts: optimizer",
    "run missing.yaml": "missing.yaml cannot be read",
    "recipes show mixtral_8x7b.train": "unknown task 'train'. Did you mean 'pretrain'?",
    "recipes diff mixtral_8x7b trainer.max_step=1": "Did you mean 'max_steps'?",
}


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("line", MENDABLE)
def test_an_error_is_one_line_and_exit_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(line.split(), capsys)
    assert code == 2
    assert MENDABLE[line] in err
    assert err.count("error: ") == 1
    assert len(err.strip().splitlines()) == 1
    assert not out


@pytest.mark.parametrize("name", ["recipes", "data", "runs", "clusters"])
def test_a_group_of_commands_alone_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call([name], capsys)
    assert code == 2
    assert f"Usage: mixtral-recipes {name}" in out
    assert not err


@pytest.mark.usefixtures("without_gpu")
def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="unknown recipe"):
        main.run(["finetune", "--recipe", "mixtral_8x8b", "--debug"])


@pytest.mark.usefixtures("without_gpu")
def test_a_layout_for_few_cards_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    job = "finetune --recipe mixtral_8x7b --dry-run --num-gpus-per-node"
    code, _, err = call([*job.split(), "2", "--hardware", "a100"], capsys)
    assert code == 0
    layout = "Layout: TP1 PP1 CP1 EP2 ETP1 DP2. The fastest of 9 layouts that fit 2 A100 SXM 80 GB"
    assert f"{layout}, according to the planner." in err
    code, _, err = call([*job.split(), "8"], capsys)
    assert code == 0
    assert "Layout:" not in err  # the recipe's own


def test_a_newcomer_gets_the_tiny_model_on_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(["finetune", "--dry-run", "--json", "trainer.max_steps=20"], capsys)
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["recipe"] == "mixtral_tiny"
    assert result["dry_run"] is True
    assert "Using --recipe mixtral_tiny, a small Mixtral, on the CPU: no GPU here." in err.splitlines()[0]
    assert "2 process(es), TP1 PP1 CP1 EP2 DP2, 20 steps" in err


def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Catch what would be launched."""
    from mixtral_recipes.executors import launch

    calls: list[tuple[Any, dict[str, Any]]] = []

    def start(recipe: Any, **arguments: Any) -> dict[str, Any]:
        calls.append((recipe, arguments))
        return {"first_loss": 2.0, "last_loss": 1.0}

    monkeypatch.setattr(launch, "launch", start)
    return calls


@pytest.mark.usefixtures("without_gpu")
def test_options_overrides_and_the_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = started(monkeypatch)
    data = tmp_path / "questions.jsonl"
    data.write_text('{"prompt": "Which?", "completion": "That."}\n')
    line = f"finetune --peft dora --data {data} --restore-from hf://x/y --packed --dir {tmp_path} --name mine"
    assert main.run([*line.split(), "trainer.max_steps=3", "peft.dim=4"]) == 0
    ((recipe, arguments),) = calls
    assert arguments["run_dir"] == tmp_path / "mine"
    assert arguments["executor"] == "local"
    assert (recipe.log.log_dir, recipe.log.name) == (str(tmp_path), "mine")
    assert recipe.peft.__fn_or_cls__.__name__ == "DoRA"
    assert (recipe.trainer.max_steps, recipe.peft.dim) == (3, 4)
    assert recipe.data.__fn_or_cls__.__name__ == "FineTuningDataModule"
    assert (recipe.data.dataset_root, recipe.data.columns) == (str(data), {"input": "prompt", "output": "completion"})
    assert recipe.data.packed_sequence_specs.packed_sequence_size == 256
    assert recipe.resume.restore_config.path == "hf://x/y"


@pytest.mark.usefixtures("without_gpu")
def test_one_process_holds_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = started(monkeypatch)
    assert main.run(["finetune", "--executor", "direct"]) == 0
    trainer = calls[0][0].trainer
    assert (trainer.devices, trainer.strategy.expert_model_parallel_size) == (1, 1)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    "records",
    [
        [{"input": "a", "output": "b"}, {"input": "a", "output": "b"}, {"input": "a", "output": ""}],
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
        + [{"messages": [{"role": "who", "content": "a"}]}],
    ],
    ids=["pairs", "chat"],
)
def test_a_broken_record_is_found_before_the_job_starts(
    records: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = started(monkeypatch)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, _, err = call(["finetune", "--data", "data.jsonl"], capsys)
    assert (code, calls) == (2, [])
    assert "data.jsonl:3" in err
    assert err.count("\n") == 1
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:2]))
    assert call(["finetune", "--data", "data.jsonl", "--evaluate", "0"], capsys)[0] == 0
    assert len(calls) == 1


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("form", ["file", "folder", "prefix"])
def test_pretrain_takes_data_as_finetune_does(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = started(monkeypatch)
    if form == "prefix":
        (tmp_path / "mine.bin").touch()
        (tmp_path / "mine.idx").touch()
    else:
        (tmp_path / "mine").mkdir()
        for name in ("a", "b"):
            (tmp_path / "mine" / f"{name}.jsonl").write_text('{"text": "It was a dark night."}\n')
    spec = {"file": "mine/a.jsonl", "folder": "mine", "prefix": "mine"}[form]
    code, _, err = call(["pretrain", "--data", spec], capsys)
    assert code == 0
    assert f"Data: {spec}: {'an indexed corpus' if form == 'prefix' else 'documents (text)'}" in err
    [(recipe, _)] = calls
    own = loading.load("mixtral_tiny", "pretrain").data
    assert recipe.data.paths == [str(tmp_path / spec)]
    for kept in ("seq_length", "micro_batch_size", "global_batch_size"):
        assert getattr(recipe.data, kept) == getattr(own, kept)


@pytest.mark.usefixtures("without_gpu")
def test_a_saved_recipe_runs_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = started(monkeypatch)
    line = ["finetune", "--recipe", "mixtral_tiny", "--dir", str(tmp_path), "--name", "a", "trainer.max_steps=7"]
    assert main.run(line) == 0
    assert main.run([*line, "--to-yaml", "saved.yaml"]) == 0
    assert str(tmp_path) not in Path("saved.yaml").read_text()
    assert main.run(["run", "saved.yaml", "--dir", str(tmp_path), "--name", "a"]) == 0
    assert main.run(["finetune", "--yaml", "saved.yaml", "--dir", str(tmp_path), "--name", "a"]) == 0
    assert main.run(["finetune", "--yaml", "saved.yaml", "--peft", "lora"]) == 2
    assert "--peft cannot be combined with a recipe file; set it in saved.yaml." in capsys.readouterr().err
    assert calls[0][0] == calls[1][0] == calls[2][0]


@pytest.mark.usefixtures("without_gpu")
def test_show_prints_yaml_that_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mixtral_recipes.overrides import loading
    from mixtral_recipes.overrides.yaml_file import read_recipe

    code, out, _ = call(["recipes", "show", "mixtral_8x7b.pretrain", "--yaml"], capsys)
    file = tmp_path / "shown.yaml"
    file.write_text(out)
    assert code == 0
    assert read_recipe(file) == loading.load("mixtral_8x7b", "pretrain")


@pytest.mark.usefixtures("without_gpu")
def test_diff_tells_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["recipes", "diff", "mixtral_8x7b", "trainer.max_steps=9", "--json"], capsys)
    assert code == 0
    assert json.loads(out)["differences"] == [{"path": "trainer.max_steps", "a": 1000, "b": 9}]


def test_completion_of_recipes_and_paths() -> None:
    from mixtral_recipes.cli.options.recipe import complete_override, complete_recipe

    long = [name for name in catalog.names() if name.startswith("mixtral_8x7b_")]
    assert complete_recipe("mixtral_8x7b_") == long != []
    assert "trainer.max_steps=" in complete_override("trainer.max")


def test_the_shell_asks_for_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "_MIXTRAL_RECIPES_COMPLETE": "complete_bash",
        "COMP_WORDS": "mixtral-recipes finetune --recipe mixtral_t",
    }
    environment |= {"COMP_CWORD": "3", "PATH": "/usr/bin:/bin"}
    code = "import sys; sys.argv=['mixtral-recipes']; from mixtral_recipes.cli.main import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert found.stdout.strip() == "mixtral_tiny"


@pytest.mark.parametrize(("gpus", "used"), [(1, 1), (2, 2), (8, 2)])
def test_a_newcomers_job_takes_the_gpus_that_are_there(
    gpus: int, used: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(machine, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    code, _, err = call(["finetune", "--peft", "lora", "--to-yaml", str(tmp_path / "job.yaml")], capsys)
    assert code == 0
    assert f"on {used} of {gpus} GPU(s), NVIDIA H100 80GB HBM3, in bf16." in err
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert (job["trainer"]["devices"], job["trainer"]["strategy"]["expert_model_parallel_size"]) == (used, used)
    assert "bf16" in str(job["trainer"]["plugins"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_very_end_leaves_no_traceback(number: signal.Signals) -> None:
    """As torchrun sends it to a rank that is ending, once another rank has failed."""
    end = (
        f"import atexit, os, sys; atexit.register(lambda: os.kill(os.getpid(), {int(number)})); "
        "from mixtral_recipes.cli.main import main; sys.argv[1:] = ['--version']; main()"
    )
    done = subprocess.run([sys.executable, "-c", end], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-number, "")


@pytest.mark.parametrize(
    ("words", "empty"),
    [
        (["finetune", "--restore-from", "", "--dry-run"], "--restore-from"),
        (["finetune", "--dir=", "--dry-run"], "--dir"),
        (["finetune", "--dry-run", "trainer.max_steps=1", ""], "PATH=VALUE"),
        (["export", "", "out"], "CHECKPOINT"),
        (["data", "check", ""], "DATA"),
    ],
    ids=" ".join,
)
def test_an_empty_word_is_a_variable_that_is_not_set(
    words: list[str], empty: str, without_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(words, capsys)
    assert (code, err) == (2, f"error: {empty} is empty; is a shell variable not set?\n")


def test_a_prompt_may_be_empty() -> None:
    main.check_words(["generate", "MODEL", "", "--stop", "x"])
