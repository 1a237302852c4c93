"""`doctor` tells a package that is installed and does not import, one that crashes and one that hangs, and goes on."""

import sys
from pathlib import Path

import pytest

from mixtral_recipes.executors import checks, probes
from mixtral_recipes.executors.probes import Answer
from mixtral_recipes.executors.slurm.profile import cluster
from mixtral_recipes.system import machine


def test_what_imports_says_its_answer() -> None:
    answers = probes.ask([{"a": "answer = 1 + 1", "b": "import json"}, {"c": "answer = 'both\\nlines'"}])
    assert answers == {"a": Answer(True, "2"), "b": Answer(True, ""), "c": Answer(True, "lines")}


def test_a_failure_is_told_and_the_rest_is_asked_in_a_new_process() -> None:
    answers = probes.ask(
        [
            {
                "first": "import sys; sys.left_behind = True",
                "broken": "import not_installed_here",
                "after": "import sys; answer = hasattr(sys, 'left_behind')",
            }
        ]
    )
    assert answers["first"].good
    assert answers["broken"] == Answer(False, "ModuleNotFoundError: No module named 'not_installed_here'")
    assert answers["after"] == Answer(True, "False")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("import os; os.write(2, b'undefined symbol: f\\n'); os.abort()", "undefined symbol: f"),
        ("import os; os._exit(3)", "exit code 3"),
        ("raise SystemExit('no GPU here')", "SystemExit: no GPU here"),
        ("import time; time.sleep(60)", "no answer within 5 s"),
    ],
)
def test_a_crash_and_a_hang_are_told_and_the_rest_is_asked(code: str, said: str) -> None:
    answers = probes.ask([{"bad": code, "after": "print('noise'); answer = 'here'"}], timeout=5)
    assert answers == {"bad": Answer(False, said), "after": Answer(True, "here")}


def test_doctor_tells_what_is_installed_and_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "nemo_run"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise ImportError('lib{package}.so is missing')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    found = {check.name: check for check in checks.check_machine()}
    for package in ("torch", "nemo_run"):
        assert found[package].verdict == "bad"
        assert f"is installed but cannot be imported: ImportError: lib{package}.so is missing" in found[package].finding
        assert found[package].mend.startswith(f"pip install --force-reinstall {package}==")
    assert found["megatron-core"].verdict == "bad"  # it cannot do without torch
    assert found["CUDA"].verdict != "good"
    assert found["Python"].verdict == "good"


def test_doctor_asks_about_nothing_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "package_version", lambda package: None)
    monkeypatch.setattr(probes, "ask", lambda groups: pytest.fail("asked") if groups else {})
    found = {check.name: check for check in checks.check_machine()}
    assert found["torch"].finding == found["nemo_run"].finding == found["megatron-core"].finding == "not installed"
    assert found["Transformer Engine"].verdict == "note"


@pytest.mark.parametrize(
    ("answer", "verdict", "finding", "mend"),
    [
        (
            Answer(True, '["layers: PyTorch; attention: sdpa", ["pip it"]]'),
            "note",
            "layers: PyTorch; attention: sdpa",
            "pip it",
        ),
        (Answer(True, '["attention: fused (cuDNN 9.24.0)", []]'), "good", "attention: fused (cuDNN 9.24.0)", ""),
        (Answer(False, "EnvironmentProblem: does not load"), "bad", "EnvironmentProblem: does not load", "BAD above"),
    ],
)
def test_doctor_says_what_a_gpu_computes_with(answer: Answer, verdict: str, finding: str, mend: str) -> None:
    (check,) = checks._kernels(answer)
    assert check.verdict == verdict
    assert check.finding.startswith(finding)
    assert mend in check.mend


def test_without_a_gpu_there_are_no_kernels_to_name() -> None:
    assert checks._kernels(Answer(True, "")) == checks._kernels(None) == []


@pytest.mark.parametrize(
    ("installed", "there", "verdict", "finding"),
    [
        ("2.20", "cc", "good", "found, with"),
        ("2.20", "", "bad", "no gcc or clang on PATH: fused kernels"),
        (None, "", "note", "no gcc or clang on PATH: fused kernels"),
    ],
)
def test_a_gpu_wants_a_c_compiler(
    installed: str | None, there: str, verdict: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", there)
    monkeypatch.setattr(checks, "package_version", lambda package: installed)
    (check,) = checks._compiler(Answer(True, "1 x NVIDIA H200"))
    assert check.verdict == verdict
    assert check.finding.startswith(finding)


def test_a_gpu_wants_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *name: str(tmp_path))
    (check,) = checks._compiler(Answer(True, "1 x NVIDIA H200"))
    assert check.finding.startswith(f"no {tmp_path}/Python.h")
    assert checks._compiler(Answer(True, "")) == checks._compiler(None) == []


def test_a_gpu_without_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a driver that is stood in for."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    (check,) = checks._kernels(probes.ask([{"kernels": checks._ON_TORCH["kernels"]}])["kernels"])
    assert (check.verdict, check.finding) == ("note", "layers: PyTorch; attention: sdpa")
    assert "Transformer Engine is not installed: no FP8" in check.mend


def test_a_cluster_behind_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"ssh": 'while shift; do l=${1-$l}; done; eval "$l"', "sinfo": "echo 'debug|up|2|1:00'"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / ".bash_profile").write_text(f"echo Welcome; PATH={programs}:$PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def found(**settings: str) -> dict[str, tuple[str, str]]:
        checked = checks.check_cluster(cluster(ssh="me@login", **settings))
        return {check.name: (check.verdict, check.finding) for check in checked}

    good = found(job_dir=f"{tmp_path}/jobs", venv=sys.prefix)
    assert good["job folder"] == ("good", f"{tmp_path}/jobs: writable")
    version = machine.package_version("mixtral-recipes")
    assert good["venv"] == ("good", f"{sys.prefix}, mixtral-recipes {version}")
    bad = found(job_dir="/dev/null/jobs", venv="/nowhere")
    assert bad["job folder"][0] == "bad"
    assert bad["job folder"][1].endswith("Not a directory")
    assert bad["venv"] == ("bad", "/nowhere: not there")
    monkeypatch.setattr(checks, "package_version", lambda name: "9.9")
    assert found(job_dir=f"{tmp_path}/jobs", venv=sys.prefix)["venv"][0] == "note"
    (programs / "sinfo").write_text("#!/bin/bash\nexit 1\n")
    assert found(job_dir="/jobs", venv="/v") == {"Slurm": ("bad", "no answer")}
