"""Search, fits and repairs, changes, advice: what is proposed runs and fits."""

import dataclasses

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.cards import card
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides import loading
from mixtral_recipes.planner import advice, calibration, memory, plan, search, speed, verdict
from mixtral_recipes.planner.workload import LINEARS, Workload
from mixtral_recipes.recipes.outline import Question, job_of

H100 = card("h100")


def check(one: search.Candidate, where: cards.Card = H100) -> None:
    assert not violations(one.job.topology, one.job.shape, one.job.batch)
    assert memory.of_job(one.job, where).fits


def test_a_search_finds_layouts_that_run_and_fit_the_fastest_first() -> None:
    found = list(search.search(job_of(Question("mixtral_8x7b", "pretrain")), H100, 64))
    assert len(found) > 50
    for one in found:
        check(one)
    times = [one.time.step for one in found]
    assert times == pytest.approx(sorted(times), rel=1e-3)
    default = speed.of_job(job_of(Question("mixtral_8x7b", "pretrain")), H100).step
    assert times[0] <= default, "the recipe's own layout is one of them"


def test_a_search_of_a_thousand_gpus_misses_nothing_that_fits() -> None:
    job = job_of(Question("mixtral_8x22b", "pretrain", num_nodes=128))
    every = {t for t in search.layouts(1024, job) if not violations(t, job.shape, job.batch)}
    found = {one.job.topology for one in search.search(job, H100, 1024)}
    sample = sorted(every, key=repr)[::40]
    assert len(sample) > 20
    for topology in sample:
        trial = job.on(topology)
        whole = memory.of_job(dataclasses.replace(trial, recompute=search.RECOMPUTED), H100).total
        best = min(memory.of_job(trial, H100).total, whole)
        assert (topology in found) == (best <= search.SAFE * H100.memory_gb), topology.describe()


@pytest.mark.parametrize(
    ("recipe", "scheme", "gpus"),
    [
        ("mixtral_8x7b", "lora", 2),
        ("mixtral_8x7b", "qlora", 1),
        ("mixtral_8x22b", "lora", 4),
        ("mixtral_8x22b", "qlora", 2),
    ],
)
def test_the_smallest_machine(recipe: str, scheme: str, gpus: int) -> None:
    job = job_of(Question(recipe, peft_scheme=scheme))
    found = search.smallest(job, H100)
    assert found is not None
    assert found.job.topology.world_size == gpus
    check(found)
    assert gpus == 1 or not list(search.search(job, H100, gpus // 2))


@pytest.mark.parametrize(
    "asked",
    [
        Question("mixtral_8x7b", peft_scheme="none", num_nodes=1),
        Question("mixtral_8x22b", peft_scheme="none", num_nodes=1),
        Question("mixtral_8x22b", "pretrain", num_nodes=2),
        Question("mixtral_8x22b", num_nodes=1, num_gpus_per_node=1),
    ],
    ids=str,
)
def test_what_cannot_fit_is_refused_with_repairs_that_do(asked: Question) -> None:
    job = job_of(asked)
    text = verdict.refusal(job, H100)
    assert text is not None
    assert "; the largest parts: " in text
    assert "To fit: " in text
    for repair in verdict.repairs(job, H100):
        check(repair.found)
        assert str(repair) in text


def test_an_adapters_job_on_one_card_is_offered_a_base_in_four_bits() -> None:
    text = verdict.refusal(job_of(Question("mixtral_8x7b", num_gpus_per_node=1)), H100)
    assert text is not None
    assert "QLoRA: --peft qlora" in text
    for asked in (
        Question("mixtral_8x7b", num_gpus_per_node=1, peft_scheme="dora"),
        Question("mixtral_8x7b", num_gpus_per_node=1, precision="fp8"),
    ):
        assert "qlora" not in str(verdict.refusal(job_of(asked), H100)), "neither goes with one"


def test_eight_bits_take_twice_the_memory_of_four() -> None:
    job = job_of(Question("mixtral_8x7b", peft_scheme="qlora"))
    assert job.adapters is not None
    eight = dataclasses.replace(job, adapters=dataclasses.replace(job.adapters, bits=8))
    sizes = [memory.of_job(each, H100).weights for each in (job, eight)]
    assert sizes[1] / sizes[0] == pytest.approx(1.9, abs=0.1)


def test_neighbours_two_node_example_is_repaired_into_what_fits() -> None:
    """NeMo's layout on two nodes: EP8 x PP4 are 32, and the nearest layout by its sizes does not fit."""
    job = job_of(Question("mixtral_8x7b", "pretrain"))
    broken = job.on(dataclasses.replace(job.topology, world_size=16))
    with pytest.raises(RecipeError, match="not a multiple of") as refused:
        verdict.check_layout_of(broken, H100)
    settings = dict(
        word.removeprefix("trainer.strategy.").split("=") for word in str(refused.value).split() if "strategy" in word
    )
    assert settings
    repaired = broken.on(dataclasses.replace(broken.topology, **{name: int(size) for name, size in settings.items()}))
    assert not violations(repaired.topology, job.shape, job.batch)
    assert memory.of_job(repaired, H100).fits


@pytest.mark.parametrize(
    ("recipe", "hardware", "says"),
    [
        ("delayed", "a100", "does not support FP8; use --precision bf16"),
        ("mxfp8", "h100", "needs a Blackwell GPU"),
    ],
)
def test_a_format_that_a_card_lacks_is_refused(recipe: str, hardware: str, says: str) -> None:
    job = dataclasses.replace(job_of(Question("mixtral_8x7b")), fp8_recipe=recipe)
    with pytest.raises(RecipeError, match=says):
        verdict.check_formats(job, cards.card(hardware))
    verdict.check_formats(job, cards.card("b200"))


def test_a_repair_on_other_gpus_keeps_the_batch() -> None:
    """Seven processes would need a batch of 133; eight do not."""
    job = job_of(Question("mixtral_8x7b"))
    with pytest.raises(RecipeError, match=r"No layout on 7 .* trainer.devices=8 \(") as refused:
        verdict.check_layout_of(job.on(dataclasses.replace(job.topology, world_size=7)), H100)
    assert "global_batch_size=133" not in str(refused.value)


def test_what_fits_nowhere_is_offered_no_repair() -> None:
    job = job_of(Question("mixtral_8x7b"))
    long = dataclasses.replace(job, batch=dataclasses.replace(job.batch, seq_length=10**8))
    with pytest.raises(RecipeError, match=r"No layout on up to 1,024 H100 SXM 80 GB has enough memory\.$"):
        verdict.check_layout_of(long, H100)


def test_adapters_are_no_choice_for_pretraining() -> None:
    job = job_of(Question("mixtral_8x22b", "pretrain"))
    assert job.pretrains
    few = dataclasses.replace(job.topology, world_size=16, pipeline_model_parallel_size=1, context_parallel_size=1)
    text = verdict.refusal(job.on(dataclasses.replace(few, virtual_pipeline_model_parallel_size=None)), H100)
    assert text is not None
    assert "To fit: " in text
    assert "LoRA" not in text
    assert "LoRA" not in dict(plan.variants(job, H100))
    assert "LoRA" in dict(plan.variants(job_of(Question("mixtral_8x22b", peft_scheme="none")), H100))


def test_fp8_is_offered_where_it_can_be_trained() -> None:
    offered = {
        scheme: dict(plan.variants(job_of(Question("mixtral_8x7b", peft_scheme=scheme)), H100))
        for scheme in ("lora", "qlora")
    }
    assert "FP8" in offered["lora"]
    assert "FP8" not in offered["qlora"]


def test_little_room_is_warned_of() -> None:
    job = job_of(Question("mixtral_8x7b", "pretrain"))
    taken = memory.of_job(job, H100).total
    assert verdict.warning(job, H100) is None
    assert verdict.warning(job, dataclasses.replace(H100, memory_gb=taken * 1.03)) is not None
    assert verdict.refusal(job, dataclasses.replace(H100, memory_gb=taken * 0.99)) is not None


def test_categories_add_up_and_changes_change() -> None:
    job = job_of(Question("mixtral_8x7b"))
    found = plan.plan(job, H100, 1000, price=2.0).as_json()
    sizes = dict(found["memory_gb"])
    total = sizes.pop("total")
    sizes.pop("capacity")
    assert sum(sizes.values()) == pytest.approx(total, abs=0.01)
    assert found["gpu_hours"] == pytest.approx(found["hours"] * 8, rel=1e-3)
    assert found["price"] == pytest.approx(2 * found["gpu_hours"], rel=1e-3)
    assert found["step_seconds_low"] < found["step_seconds"] < found["step_seconds_high"]
    assert len(found["alternatives"]) == 3
    by_name = {change["change"]: change for change in found["changes"]}
    assert by_name["recompute every layer"]["memory_gb"]["total"] < total
    assert by_name["recompute every layer"]["step_seconds"] > found["step_seconds"]
    assert by_name["QLoRA (4-bit base)"]["memory_gb"]["weights"] < sizes["weights"] / 3


def test_packing_and_epochs_make_steps() -> None:
    job = dataclasses.replace(job_of(Question("mixtral_8x7b")), lengths=200.0)
    packed = dataclasses.replace(job_of(Question("mixtral_8x7b", packed_sequence=True)), lengths=200.0)
    assert plan.steps_for(12_800, job, 2) == 200
    assert plan.steps_for(12_800, packed, 1) == 157  # 1250 packs of 8 a step


def test_nf4_weighs_what_was_measured() -> None:
    """fms-acceleration: 24.66 GB after loading 8x7B; bitsandbytes' own arithmetic says 24.47."""
    job = job_of(Question("mixtral_8x7b", peft_scheme="qlora")).on(Topology(1))
    assert memory.weight_bytes(job, 0) / 1e9 == pytest.approx(24.5, rel=0.01)


def tuned(**changes: object) -> search.Candidate:
    job = job_of(Question("mixtral_8x7b", num_nodes=1, num_gpus_per_node=8))
    assert job.adapters is not None
    return search.candidate(dataclasses.replace(job, **changes), H100)


def test_advice_follows_the_data_and_names_its_source() -> None:
    small = {"samples": 400, "tokens": 80_000, "mean_tokens": 200.0}
    given = {one.setting.partition("=")[0]: one for one in advice.advise(tuned(), H100, small)}
    assert given["peft.dim"].setting == "peft.dim=8"
    assert "--packed" in given
    assert given["data.global_batch_size"].setting == "data.global_batch_size=8"
    assert all(one.source for one in given.values())
    job = tuned().job
    assert job.adapters is not None
    attention = tuned(adapters=dataclasses.replace(job.adapters, targets=LINEARS[:2]))
    assert "peft.target_modules=all-linear" in [one.setting for one in advice.advise(attention, H100, None)]


def test_what_is_measured_is_kept_and_used(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path))
    job = job_of(Question("mixtral_8x7b"))
    before = speed.of_job(job, calibration.corrected(H100)).step
    assert "2.00 x" in calibration.learn("h100", 1.0, 2.0)
    after = speed.of_job(job, calibration.corrected(H100)).step
    assert after > 1.6 * before
    calibration.file().write_text("no json")
    assert calibration.corrected(H100) == H100
    calibration.keep("h100", {"memory_gb": 90.0, "unheard_of": 1.0})
    assert calibration.corrected(H100).memory_gb == 90.0


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA T4", None),
        (None, None),
    ],
)
def test_cards_are_known_by_what_the_driver_calls_them(driver: str | None, name: str | None) -> None:
    assert cards.named(driver) == name


def test_every_card_holds_something_and_is_some_speed() -> None:
    job = job_of(Question("mixtral_8x7b", peft_scheme="qlora"))
    times = {one.name: speed.of_job(job, one).step for one in cards.CARDS.values() if one.name != "cpu"}
    assert times["b200"] < times["h200"] < times["h100"] < times["a100"]
    with pytest.raises(RecipeError, match="Did you mean 'h100'"):
        cards.card("h10")


def test_a_workload_is_hashable_and_compares() -> None:
    one = job_of(Question("mixtral_8x7b"))
    assert hash(one) == hash(job_of(Question("mixtral_8x7b")))
    assert isinstance(one, Workload)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (12, 4)),
        ({"use_precision_aware_optimizer": True}, (10, 4)),
        ({"use_precision_aware_optimizer": True, "store_param_remainders": False}, (12, 4)),
        (dict.fromkeys(("use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype"), True), (6, 4)),
        (dict.fromkeys(("use_precision_aware_optimizer", "main_grads_dtype"), True), (10, 2)),
    ],
)
def test_bytes_of_optimizer_states(settings: dict[str, bool], expected: tuple[int, int]) -> None:
    import torch

    recipe = loading.load("mixtral_8x7b", "pretrain")
    for name, value in settings.items():
        setattr(recipe.optim.config, name, torch.bfloat16 if name.endswith("dtype") else value)
    job = Workload.of(recipe)
    assert (job.state_bytes, job.grad_bytes) == expected
