"""A session on a GPU, with commands that stand in for its parts: how they end, and what is made of their results."""

import functools
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script

ROOT = Path(__file__).parents[3]


session = script("gpu_session")


def row(tokens: int, share: float = 0.5, idle: float = 0.01) -> dict[str, Any]:
    return {"tokens_per_second": tokens, "share_of_products": share, "profile": {"idle": idle}}


REPORT = {
    "results": [
        {
            "contenders": {
                "ours bf16": row(40_000, share=0.6, idle=0.02),
                "ours delayed": row(52_000, idle=0.04),
                "ours blockwise": {"failed": "RecipeError: no such card"},
                "transformers grouped_mm": row(20_000),
            },
            "first_losses_agree": True,
            "to_best_other": {"ours bf16": 2.0, "ours delayed": 2.6},
            "to_ours": {"ours bf16": {"ours delayed": 0.77}, "ours delayed": {"ours bf16": 1.3}},
        }
    ]
}


def test_numbers_are_taken_from_a_benchmark() -> None:
    assert session.bf16_to_best_other(REPORT) == 2.0
    assert session.fp8_to_best_other(REPORT) == 2.6
    assert session.fp8_to_bf16(REPORT) == 1.3
    assert session.share_of_products(REPORT) == 0.6
    assert session.idle(REPORT) == 0.04
    assert session.tokens_per_second(REPORT) == 52_000
    assert session.first_losses_agree(REPORT) == 1
    assert session.gained({"em_before": 2.5, "em_after": 95.0}) == 92.5


def ended(result: Any, how: str = "done") -> dict[str, Any]:
    return {"ended": how, "seconds": 1.0, "result": result}


def by_text(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in rows}


def test_verdicts() -> None:
    tests = {
        "tests": {"a::test_learns": "passed", "b::test_resumes[delayed]": "failed", "c::test_x": "skipped"},
        "whole": True,
    }
    rows = by_text(
        session.verdicts(
            {
                "bench-lora": ended(REPORT, "exit 1"),  # one of ours failed; the others count
                "bench-full": ended(REPORT),
                "tests": ended(tests),
                "doctor": ended({"formats": [{"verdict": "good"}, {"verdict": "note"}, {"verdict": "bad"}]}, "exit 2"),
                "bench-32": ended(None, "not done after 560 s"),
                "bench-attention": ended({"skipped": "no GPU"}),
            }
        )
    )
    assert len(rows) == len(session.TARGETS)
    assert rows["LoRA, all linear layers, bf16: times transformers + peft"]["verdict"] == "met"  # 2.0 of >= 2.0
    assert rows["full, FP8: times our bf16"]["verdict"] == "missed"
    assert rows["full, FP8: times our bf16"]["found"] == 1.3
    assert rows["full: idle share of a step"]["verdict"] == "met"
    assert rows["tests/gpu: failures"]["found"] == 1
    assert rows["tests/gpu: failures"]["verdict"] == "missed"
    assert rows["number formats of this card that do not train"]["found"] == 1
    assert rows["number formats of this card that do not train"]["verdict"] == "missed"
    assert rows["stopped, resumed, and bit for bit as without: failures"]["verdict"] == "missed"
    late = rows["LoRA, 32 layers on one card, 4096 tokens: tokens/s"]
    assert (late["verdict"], late["why"]) == ("not measured", "bench-32: not done after 560 s")
    assert rows["LoRA, attention, bf16: times transformers + peft"]["verdict"] == "not measured"
    assert rows["quickstart: exact answers gained, points"]["why"] == "quickstart was not run"


def test_tests_that_were_all_skipped_show_nothing() -> None:
    (one,) = (t for t in session.TARGETS if t.text.startswith("stopped, resumed"))
    tests = {"tests": {"a::test_resumes": "skipped", "a::test_learns": "passed"}, "whole": True}
    (found,) = session.verdicts({"tests": ended(tests)}, (one,))
    assert found["verdict"] == "not measured"
    assert "'resum'" in found["why"]


def test_idle_is_of_the_worst_and_must_stay_below() -> None:
    (one,) = (t for t in session.TARGETS if t.text == "full: idle share of a step")
    assert one.met_by(0.0499)
    assert not one.met_by(0.05)


def test_parts_end_as_they_do_and_leave_what_they_printed(tmp_path: Path) -> None:
    def part(name: str, code: str, limit: int = 60) -> dict[str, Any]:
        file = tmp_path / f"{name}.py"
        file.write_text(code)
        return session.run(session.Part(name, "", limit), f"{file} --out {{out}} --limit {{soon}}", tmp_path)

    good = part("good", "import sys; print('text'); print('{\"ok\": \"%s\"}' % ' '.join(sys.argv[1:]))")
    assert (good["ended"], good["result"]) == ("done", {"ok": f"--out {tmp_path} --limit 45"})
    bad = part("bad", "import sys; sys.stderr.write('what went wrong'); print('no JSON'); sys.exit(3)")
    assert (bad["ended"], bad["result"]) == ("exit 3", None)
    assert (tmp_path / "bad.err").read_text() == "what went wrong"
    slow = part("slow", "import time; print('begun', flush=True); time.sleep(100)", limit=1)
    assert (slow["ended"], slow["result"]) == ("not done after 1 s", None)
    assert slow["seconds"] < 50
    assert json.loads((tmp_path / "slow.json").read_text()) == slow


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "here"])
def test_a_part_that_is_told_to_stop_prints_what_it_has(handler: Any, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, handler)))
    code = """if True:
        import time
        try:
            print("begun", flush=True)
            time.sleep(1000)
        except KeyboardInterrupt:
            print("half")
    """
    with session._start([sys.executable, "-c", code], subprocess.PIPE, None) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        session._stop(process, gently=True)
        assert process.stdout.read() == b"half\n"


def outcome_of(tmp_path: Path, code: str, limit: int) -> dict[str, Any]:
    (tmp_path / "test_it.py").write_text(f"import pytest, time\n{code}")
    command = f"-m pytest -v -p no:cacheprovider --rootdir {tmp_path} -c /dev/null {tmp_path}"
    return session.run(session.Part("tests", "", limit, gives_up=False), command, tmp_path)


def test_outcomes_of_tests(tmp_path: Path) -> None:
    found = outcome_of(
        tmp_path,
        "@pytest.mark.parametrize('how', ['a b', 'c'])\n"
        "def test_good(how): pass\n"
        "def test_bad(): assert False\n"
        "def test_broken(nothing): pass\n"
        "def test_not_here(): pytest.skip('no card')\n",
        limit=100,
    )
    assert (found["ended"], found["result"]["whole"]) == ("exit 1", True)
    outcomes = {name.partition("::")[2]: outcome for name, outcome in found["result"]["tests"].items()}
    assert outcomes == {
        "test_good[a b]": "passed", "test_good[c]": "passed", "test_bad": "failed", "test_broken": "error",
        "test_not_here": "skipped",
    }  # fmt: skip
    assert session.failures()(found["result"]) == 2


IN_ONE_PROCESS = ["t.py::test_resumes PASSED [ 33%]", "t.py::test_bad FAILED [ 66%]", "t.py::test_slow "]
IN_SEVERAL = [
    "t.py::test_resumes ",
    "t.py::test_slow ",
    "[gw0] [  3%] PASSED t.py::test_resumes ",
    "t.py::test_bad ",
    "[gw11] [100%] FAILED t.py::test_bad Fatal Python error: Aborted",
]


@pytest.mark.parametrize("lines", [IN_ONE_PROCESS, IN_SEVERAL], ids=["one process", "several"])
def test_tests_whose_time_is_up_show_failures_only(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "tests.out").write_text("\n".join(["collected 3 items", "", *lines]))
    found = session._result(session.Part("tests", "", 1), tmp_path)
    assert found == {"tests": {"t.py::test_resumes": "passed", "t.py::test_bad": "failed"}, "whole": False}
    assert session.failures()(found) == 1
    with pytest.raises(KeyError, match="tests that were to come"):
        session.failures("resumes")(found)


def test_a_summary_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "bench-lora.json").write_text(json.dumps(ended(REPORT)))
    text = session.summarise(tmp_path)
    assert "bench-lora           1.0 s  done" in text
    assert "met           LoRA, all linear layers, FP8: times transformers + peft: 2.6 (wanted >= 2.4)" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["bench-lora"]["result"] == REPORT
    assert len(summary["targets"]) == len(session.TARGETS)


@pytest.mark.parametrize("part", session.PARTS, ids=lambda part: part.name)
def test_parts_are_commands_that_exist(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for memory in (85, 150):
        words = part.on(memory).format(out="OUT", soon=1).split()
        if words and words[0] != "-m":
            assert (ROOT / words[0]).is_file()
            monkeypatch.setattr(sys, "argv", words)
            assert importlib.import_module(Path(words[0]).stem).arguments().limit == 1
    assert part.limit < 600
    assert part.name in {target.part for target in session.TARGETS}


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(session, "card_gb", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(tmp_path), "tests"])
    assert session.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_small_card_leaves_out_what_it_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(part: Any, command: str, out: Path) -> dict[str, Any]:
        ran.append(command)
        return ended(None) | {"part": part.name}

    monkeypatch.setattr(session, "card_gb", lambda: 85.0)
    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(tmp_path), "bench-full", "bench-32"])
    assert session.main() == 0
    (command,) = ran
    assert command.endswith("--layers 2")
    assert "bench-32: needs a card of 130 GB" in capsys.readouterr().out


def test_parts_share_the_time_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, ran = [0.0], []

    def run(part: Any, command: str, out: Path) -> dict[str, Any]:
        ran.append((part.name, part.limit))
        assert (out / "summary.json").exists() == (len(ran) > 1)  # there after each part
        now[0] += part.limit
        return ended(None) | {"part": part.name}

    monkeypatch.setattr(session, "card_gb", lambda: 150.0)
    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        sys, "argv", ["gpu_session.py", "--out", str(tmp_path), "--within", "500", *["quickstart", "doctor", "tests"]]
    )
    assert session.main() == 0
    assert ran == [("quickstart", 300), ("doctor", 170)]
    assert "tests: not started: --within 500 is used up" in capsys.readouterr().out
