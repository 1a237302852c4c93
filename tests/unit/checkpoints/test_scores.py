"""What a model scored, kept in its folder."""

from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.format.integrity import damage_of
from mixtral_recipes.checkpoints.format.manifest import write_manifest

SQUAD = {"exact_match": 91.0, "f1": 92.5, "count": 100}


def test_scores_of_other_weights_are_not_believed(tmp_path: Path) -> None:
    record = scores.merged({}, {"after": {"squad": SQUAD}}, [])
    scores.write(tmp_path, "abc", record)
    assert scores.read(tmp_path, "abc")["scores"] == {"after": {"squad": SQUAD}}
    assert scores.read(tmp_path, "abd") == {}
    for clumsy in ({"after": []}, {"after": {"squad": {"f1": "x"}}}, {"after": {"perplexity": {}}}):
        scores.write(tmp_path, "abc", {**record, "scores": clumsy})
        assert scores.read(tmp_path, "abc") == {}


def test_what_is_measured_again_replaces_what_it_was_and_the_rest_stays() -> None:
    first = scores.merged({}, {"before": {"squad": SQUAD}, "after": {"squad": SQUAD}}, [{"question": "Who?"}])
    second = scores.merged(first, {"after": {"squad": {"f1": 1.0}, "loss": {"val_loss": 2.0}}}, [])
    assert second["scores"] == {"before": {"squad": SQUAD}, "after": {"squad": {"f1": 1.0}, "loss": {"val_loss": 2.0}}}
    assert second["samples"] == [{"question": "Who?"}]


def test_tasks_are_measured_one_by_one() -> None:
    first = scores.merged({}, {"after": {"tasks": {"a": {"acc": 0.1}, "b": {"acc": 0.2}}}}, [])
    second = scores.merged(first, {"after": {"tasks": {"b": {"acc": 0.5}}}}, [])
    assert second["scores"] == {"after": {"tasks": {"a": {"acc": 0.1}, "b": {"acc": 0.5}}}}


def test_a_checkpoint_with_scores_beside_its_lineage_is_whole(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    write_manifest(tmp_path, "adapter")
    scores.write(tmp_path, "abc", scores.merged({}, {"after": {}}, []))
    assert damage_of(tmp_path) is None
    (tmp_path / "other.json").touch()
    assert "other.json: is not listed in the manifest" in (damage_of(tmp_path) or "")


def test_the_table_has_a_column_for_each_model_and_a_row_for_each_measure() -> None:
    tasks = {"pick": {"acc": 0.5, "acc_stderr": 0.1, "exact_match (strict)": 0.25, "exact_match_stderr (strict)": 0.2}}
    text = {"data": "/x/wiki.txt", "perplexity": 12.345, "bits_per_byte": 0.75}
    columns, rows = scores.table(
        {
            "after": {"squad": SQUAD, "tasks": tasks, "perplexity": text},
            "before": {"loss": {"val_loss": 1.5, "val_loss_by_source": {"a": 1.25}}},
        }
    )
    assert columns == ["before", "after"]
    assert rows == [
        ["validation loss", "1.5000", "-"],
        ["validation loss, a", "1.2500", "-"],
        ["exact match (100 questions)", "-", "91.0 %"],
        ["F1 (100 questions)", "-", "92.5 %"],
        ["perplexity of wiki.txt", "-", "12.35"],
        ["bits per byte of wiki.txt", "-", "0.7500"],
        ["pick: acc", "-", "0.5000 ± 0.1000"],
        ["pick: exact_match (strict)", "-", "0.2500 ± 0.2000"],
    ]


def test_scores_of_other_data_do_not_stand_beside_new_ones() -> None:
    def loss(data: str, value: float) -> dict[str, Any]:
        return {"loss": {"data": data, "val_loss": value}}

    kept = {"scores": {"before": loss("a", 7.0) | {"tasks": {"mine": {"acc": 1.0}}}, "after": loss("a", 1.0)}}
    assert scores.merged(kept, {"after": loss("a", 0.5)}, [])["scores"]["before"] == kept["scores"]["before"]
    found = scores.merged(kept, {"after": loss("b", 2.0)}, [])["scores"]
    assert found == {"before": {"tasks": {"mine": {"acc": 1.0}}}, "after": loss("b", 2.0)}
