"""The folder that benchmarks write into."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SCRIPT = "import temporary, time\nwith temporary.temporary_folder() as f: print(f, flush=True); time.sleep(60)"


def test_it_is_gone_where_sigterm_ends_the_benchmark() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.terminate()
        assert process.wait(60) == 143
    assert not folder.exists()
