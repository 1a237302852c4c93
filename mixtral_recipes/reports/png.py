"""A run's charts as PNG files for papers, drawn by matplotlib."""

from pathlib import Path
from typing import Any

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.reports.charts import smooth
from mixtral_recipes.reports.record import RunRecord, read_run

_DPI = 300
_SIZE = (3.4, 2.4)  # inches: one column


def write_pngs(folder: Path, output: Path | None = None) -> list[Path]:
    """Write loss.png, learning_rate.png, gradient_norm.png, throughput.png and expert_load.png.

    Args:
        folder: The run's folder.
        output: Where to write; None takes ``figures`` in the run's folder.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
        RecipeError: the folder is no run's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentProblem("PNG files need matplotlib; run `pip install matplotlib`.") from error
    run = read_run(folder)
    output = output or folder / "figures"
    output.mkdir(parents=True, exist_ok=True)
    drawings = {
        "loss": _loss,
        "learning_rate": lambda axes, run: _line(axes, run.series("lr"), "learning rate"),
        "gradient_norm": lambda axes, run: _line(axes, run.series("grad_norm"), "gradient norm"),
        "throughput": lambda axes, run: _line(axes, run.series("tokens_per_second"), "tokens/s"),
        "expert_load": _expert_load,
    }
    written = []
    for name, draw in drawings.items():
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        draw(figure.subplots(), run)
        written.append(output / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _loss(axes: Any, run: RunRecord) -> None:
    losses = run.series("loss")
    axes.plot(*_columns(losses), color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(*_columns(smooth(losses, max(2, len(losses) // 25))), color="C0", linewidth=1.2, label="training")
    if run.validations:
        axes.plot(*_columns(run.validation_losses()), "o-", color="C3", markersize=3, linewidth=1, label="validation")
    axes.legend(frameon=False, fontsize=7)
    _label(axes, "loss per token")


def _line(axes: Any, points: list[tuple[float, float]], name: str) -> None:
    axes.plot(*_columns(points), linewidth=1)
    _label(axes, name)


def _expert_load(axes: Any, run: RunRecord) -> None:
    load = run.expert_load()
    if load:
        shown = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        axes.figure.colorbar(shown, ax=axes, label="over an even share")
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)


def _label(axes: Any, name: str) -> None:
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(name, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
