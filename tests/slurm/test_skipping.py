"""Without Slurm's programs the tests here skip and say what to install; in CI they fail."""

import pytest
import slurm_cluster
from slurm_site import need


@pytest.fixture(autouse=True)
def _without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "TOOLS", ("no-such-program",))


def test_skips_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no no-such-program here; apt-get install .* slurm-wlm munge$"):
        need()


@pytest.mark.parametrize("value", ["true", "1"])
def test_fails_in_ci(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.fail.Exception, match=r"slurmdbd mariadb-server$"):
        need(accounting=True)
