"""The data command as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_recipes.cli.main import run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": f"It is {n}"}) + "\n" for n in range(40)))
    return path


TINY = ["--tokenizer", "embedded://mixtral_tiny"]


def test_prepare_check_and_show(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {n}."}) + "\n" for n in range(20)))
    assert run(["data", "prepare", str(text), "-o", str(tmp_path / "c.bin"), "--workers", "1", "--json", *TINY]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["documents"] == 20
    assert (tmp_path / "c.bin").stat().st_size == 2 * made["tokens"]

    assert run(["data", "check", str(pairs), "--json", "--seq-length", "64", *TINY]) == 0
    captured = capsys.readouterr()
    assert "prompts and answers (prompt -> completion)" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["records"] == {"train": 38, "validation": 2}

    assert run(["data", "show", str(pairs), "-n", "2", "--seq-length", "64", *TINY]) == 0
    assert "<s>Say 0[[ It is 0</s>]]" in capsys.readouterr().out


def test_check_fails_where_records_are_unusable(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pairs.open("a") as file:
        file.write('{"prompt": "x"}\n')
    assert run(["data", "check", str(pairs), *TINY]) == 2
    captured = capsys.readouterr()
    assert f"{pairs}:41: error: unusable: 'completion' is missing" in captured.out
    assert "1 record(s) cannot be used" in captured.err


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(tmp_path / "nothing.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["data", "show", "embedded://squad", "--tokenizer", "mistral://mixtral"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["prepare"], ["check"], ["show"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys; from mixtral_recipes.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'megatron', 'nemo_run', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "data", *command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_show_writes_a_page_of_what_is_learned_context_and_cut(pairs: Path, tmp_path: Path) -> None:
    with pairs.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 60 + "<b>", "completion": "end"}) + "\n")
    page = tmp_path / "x.html"
    line = ["data", "show", str(pairs), "--html", str(page), "-n", "41", "--seq-length", "16", "data.val_proportion=0"]
    assert run([*line, *TINY]) == 0
    text = page.read_text()
    assert f"{pairs}:1: " in text
    assert "<span class=learned> It is 0&lt;/s&gt;</span>" in text
    assert text.count("<span class=cut>long") + text.count("<span class=cut> long") == 1
    assert "&lt;b&gt;</span>" in text
    assert "<b>" not in text


SUMMARIES = "data.columns={'input': 'dialogue', 'output': 'summary'}"


@pytest.mark.parametrize("command", ["data check", "data stats", "data show", "plan --recipe mixtral_tiny --data"])
def test_data_is_looked_at_with_the_settings_it_is_trained_with(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "summaries.jsonl"
    data.write_text("".join(json.dumps({"dialogue": f"q {n}", "summary": "a"}) + "\n" for n in range(40)))
    options = [] if command.startswith("plan") else TINY
    assert run([*command.split(), str(data), *options, SUMMARIES, "data.val_proportion=0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if command == "data stats":
        assert found["rows"]["records"] == [40]
    elif command != "data show":
        assert (found["data"]["samples"] if "data" in found else found["records"]["train"]) == 30


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("data stats {0} {0}x {0}y", "no more than two data sets"),
        ("data stats {0} data.learns=all", "no setting 'learns'"),
        ("data check {0} data.seq_length=64", "use --seq-length 64 instead."),
        ("plan --recipe mixtral_tiny --data {0} --data {0} data.learn=last", "need a single --data"),
        ("plan --recipe mixtral_tiny --data {0} data.learns=last", "no setting 'learns'"),
    ],
)
def test_settings_that_no_data_takes_are_one_line(
    command: str, wrong: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.format(pairs).split()) == 2
    assert wrong in capsys.readouterr().err


def test_stats_compare_two_sets(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(pairs.read_text().splitlines(keepends=True)[:10]))
    assert run(["data", "stats", str(pairs), str(other), "--json", *TINY]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows["records"] == [40, 10]
    assert rows["prompts in both"] == [10, 10]
    assert rows["tokens learned"][0] > rows["tokens learned"][1] > 0


def test_settings_name_the_fields_of_an_unknown_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "samsum.jsonl"
    path.write_text("".join(json.dumps({"dialogue": f"d{n}", "summary": f"s{n}"}) + "\n" for n in range(4)))
    assert run(["data", "check", str(path)]) == 2
    assert "dialogue, summary, which is not a known format" in capsys.readouterr().err
    names = "data.columns={'input': 'dialogue', 'output': 'summary'}"
    assert run(["data", "check", str(path), names]) == 0
    assert "prompts and answers (dialogue -> summary)" in capsys.readouterr().err
    assert run(["finetune", "--recipe", "mixtral_tiny", "--data", str(path), names, "--dry-run"]) == 0
    assert "prompts and answers (dialogue -> summary)" in capsys.readouterr().err
    assert run(["data", "show", str(path), "data.text_key=dialogue", "--seq-length", "8", *TINY]) == 0
    assert "documents (dialogue)" in capsys.readouterr().err
