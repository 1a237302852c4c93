"""`doctor --gpu`: what each number format does is told, and a crash, a hang or losses too far apart as well."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import doctor, main
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.executors import checks, precisions, probes
from mixtral_recipes.executors.precisions import Outcome, compared, try_formats, what_is_lacking
from mixtral_recipes.executors.probes import Answer

TINY = {"data.seq_length": 64, "data.micro_batch_size": 2, "data.global_batch_size": 4, "model.config.num_layers": 2}


def outcome(name: str, *losses: float, **fields: Any) -> Outcome:
    return Outcome(
        name, "good", losses=losses, tokens_per_second=21000.4, tokens_per_second_with_warmup=900.0, **fields
    )


@pytest.mark.slow
def test_two_formats_train_on_a_cpu_and_their_losses_are_close() -> None:
    found = try_formats(["fp32", "bf16"], {}, accelerator="auto", steps=3, model=TINY)
    assert [each.verdict for each in found] == ["good", "good"]
    for each in found:
        assert len(each.losses) == 3
        assert each.losses[-1] < each.losses[0]
        assert each.tokens_per_second is not None
    assert found[0].apart is not None
    assert 0 < found[0].apart < precisions.APART
    assert found[1].apart == 0


def test_losses_that_rounding_does_not_explain_are_bad() -> None:
    found = compared([outcome("bf16", 8.0, 7.0), outcome("fp8 delayed", 8.0, 7.01), outcome("mxfp8", 8.0, 7.7)])
    assert [each.verdict for each in found] == ["good", "good", "bad"]
    assert found[1].apart == pytest.approx(0.01 / 7)
    assert "differ from bf16's by 10.0%" in found[2].reason
    assert compared([outcome("bf16", 8.0), outcome("mxfp8", float("nan"))])[1].verdict == "bad"


def test_without_bf16_there_is_nothing_to_compare_with() -> None:
    failed = Outcome("bf16", "bad", "out of memory")
    found = compared([failed, outcome("fp8 delayed", 8.0)])
    assert (found[1].verdict, found[1].apart) == ("good", None)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("warning: x\nerror: trainer.plugins.fp8 needs more.\n", "trainer.plugins.fp8 needs more."),
        (
            "Traceback\ntorch.AcceleratorError: CUDA error: illegal access\n\n",
            "torch.AcceleratorError: CUDA error: illegal",
        ),
        ("", "ended with exit code -11"),
    ],
)
def test_a_format_that_fails_says_why(said: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], -11, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    told: list[str] = []
    (found,) = try_formats(["bf16"], {}, say=told.append)
    assert found.verdict == "bad"
    assert found.reason.startswith(reason)
    assert told == [f"bf16: {found.reason}"]
    monkeypatch.setenv("MIXTRAL_RECIPES_DEBUG", "1")
    assert try_formats(["bf16"], {}, say=told.append) == [found]
    assert told[1:] == [said, f"bf16: {found.reason}"]


def test_a_format_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: int, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "no result within 600 s" in try_formats(["bf16"], {})[0].reason


def test_what_the_card_lacks_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    (found,) = try_formats(["mxfp8"], {"mxfp8": "needs Blackwell"})
    assert (found.verdict, found.reason) == ("note", "needs Blackwell")


def test_every_format_is_what_a_user_would_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' overrides are recipes that can be written down."""
    commands = []
    failed = subprocess.CompletedProcess([], 1, "", "")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or failed)
        try_formats(precisions.FORMATS, {})
    assert len(commands) == len(precisions.FORMATS)
    for command in commands:
        words = command[command.index("pretrain") :]
        assert main.run([*words, "trainer.accelerator=cpu", "--dry-run"]) == 0, words


def test_a_machine_without_a_gpu_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--gpu"]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    told = "--gpu trains on a GPU, but torch finds none on this machine; run mixtral-recipes doctor to see why."
    assert errors == f"error: {told}\n"


def test_what_is_lacking_is_asked_of_the_precisions_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_name = lambda *_: 'H100'\n"
        "torch.cuda.get_device_capability = lambda *_: (9, 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    card, lacks = what_is_lacking()
    assert card == "H100"
    assert not lacks.keys() & {"fp32", "bf16"}
    assert "needs Blackwell" in lacks["mxfp8"]
    assert all(
        "needs Transformer Engine, which is not installed" in lacks[f"fp8 {name}"] for name in ("delayed", "blockwise")
    )


def test_a_driver_that_cannot_be_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ask", lambda groups: {"card": Answer(False, "exit code -6")})
    with pytest.raises(EnvironmentProblem, match="exit code -6"):
        what_is_lacking()


@pytest.fixture
def of_a_card(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    found = [
        outcome("bf16", 7.61, 6.98, apart=0.0, computed_by="layers: Transformer Engine 2.20.2; attention: fused"),
        outcome("fp8 delayed", 7.62, 6.99, apart=0.0014),
        Outcome("fp8 blockwise", "bad", "CUDA error: illegal access"),
        Outcome("mxfp8", "note", "needs Blackwell; this machine has NVIDIA H200"),
    ]
    monkeypatch.setattr(checks, "check_machine", lambda **_: [])
    monkeypatch.setattr(precisions, "what_is_lacking", lambda *_: ("NVIDIA H200", {"mxfp8": "needs Blackwell"}))
    monkeypatch.setattr(precisions, "try_formats", lambda *_, **__: found)
    return found


def test_the_table(of_a_card: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--gpu"]) == 2
    out, errors = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[0][:3] == ["on", "NVIDIA", "H200"]
    assert rows[1] == ["bf16", "ok", "21,000", "900", "7.6100", "6.9800", "0.00%"]
    assert rows[2][:2] == ["fp8", "delayed"]
    assert rows[2][-1] == "0.14%"
    assert out.count("CUDA error: illegal access") == 1
    assert rows[4][:3] == ["mxfp8", "not", "here"]
    assert out.rstrip().endswith("layers: Transformer Engine 2.20.2; attention: fused")
    assert errors.splitlines()[-1] == "error: not ready: fp8 blockwise; see above for how to fix it."


def test_the_json(of_a_card: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--gpu", "--json"]) == 2
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["gpu"] == "NVIDIA H200"
    assert [each["format"] for each in result["formats"]] == [each.format for each in of_a_card]
    assert result["formats"][1]["apart"] == 0.0014
    assert result["formats"][2]["reason"] == "CUDA error: illegal access"


def test_all_well_is_no_error(of_a_card: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    del of_a_card[2]
    assert main.run(["doctor", "--gpu"]) == 0
    assert doctor._number(None, ".1f") == "-"
