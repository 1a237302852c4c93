"""What `llm.generate` and `llm.evaluate` do: evaluation and generation with NeMo's arguments."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.evaluation.asked import Asked
from mixtral_recipes.evaluation.evaluate import evaluate as evaluate_model
from mixtral_recipes.evaluation.recorded import keep
from mixtral_recipes.evaluation.recorded_data import trained_by, trained_on
from mixtral_recipes.evaluation.samples import AFTER
from mixtral_recipes.inference.chat import answering
from mixtral_recipes.inference.generate import generate as continuations
from mixtral_recipes.inference.model import InferenceModel, every_process, join
from mixtral_recipes.inference.prompts import read
from mixtral_recipes.inference.prompts import tokens as as_tokens
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.inference.text import encoded
from mixtral_recipes.settings.evaluation import EvaluationConfig, EvaluationTarget
from mixtral_recipes.system.files import refuse_unwritable, write_json
from mixtral_recipes.system.ranks import launched_rank
from mixtral_recipes.training import distributed

_MEGATRONS_DEFAULT = 30  # tokens, where SamplingParams says nothing


@dataclass(frozen=True)
class Generated:
    """One answer, with the names of Megatron's InferenceRequest."""

    prompt: str
    generated_text: str


def sampling_of(given: Any, seed: int = 0) -> Sampling:
    """How tokens are drawn, from Megatron's SamplingParams; None takes the likeliest 30. A `Sampling` is itself.

    Of those ``top_k=1`` takes the likeliest token, and 0 in ``top_k`` and ``top_p`` means all.

    Raises:
        RecipeError: probabilities are asked for, which are not returned; or a value out of range.
    """
    if given is None:
        return Sampling(_MEGATRONS_DEFAULT, seed=seed)
    if isinstance(given, Sampling):
        return given
    if not hasattr(given, "num_tokens_to_generate"):
        raise RecipeError(
            f"generate: inference_params is a {type(given).__name__}; pass Megatron's SamplingParams, or "
            "mixtral-recipes' Sampling."
        )
    if getattr(given, "return_log_probs", False) or getattr(given, "top_n_logprobs", 0):
        raise RecipeError(
            "inference_params.return_log_probs and top_n_logprobs are not supported: only texts are returned."
        )
    tokens = given.num_tokens_to_generate
    return Sampling(
        _MEGATRONS_DEFAULT if tokens is None else tokens,
        temperature=0.0 if given.top_k == 1 else given.temperature,
        top_k=given.top_k,
        top_p=given.top_p or 1.0,
        seed=seed,
    )


def prompts_of(prompts: Sequence[str] | None, input_dataset: str | Path | None) -> list[str]:
    """The prompts to continue.

    Raises:
        RecipeError: neither is given, or a prompt is not text.
        DataError: names the line of a record without an ``input``.
    """
    if input_dataset is None:
        if isinstance(prompts, str):
            raise RecipeError(
                f"generate: prompts={prompts[:40]!r} is a single text; pass a list of texts, prompts=[...]."
            )
        if not prompts:
            raise RecipeError("generate: pass prompts or input_dataset.")
        if (other := next((one for one in prompts if not isinstance(one, str)), None)) is not None:
            raise RecipeError(
                f"generate: the prompt {str(other)[:40]!r} is a {type(other).__name__}; prompts must be texts."
            )
        return list(prompts)
    return read(Path(input_dataset), "input", plain=False)


def generate(
    checkpoint: Path,
    prompts: list[str],
    sampling: Sampling,
    batch_size: int,
    *,
    add_bos: bool = False,
    chat: bool = False,
    dtype: str | None = None,
) -> list[str]:
    """Continuations of prompts, in their order; all ranks of a job call it together, or one process alone."""
    try:
        model = InferenceModel.load(checkpoint, join(every_process()), dtype=dtype)
        tokens = [
            as_tokens(model.tokenizer, text, chat=True) if chat else encoded(model.tokenizer, text, special=add_bos)
            for text in prompts
        ]
        how = answering(sampling, model.tokenizer) if chat else replace(sampling, continues=True)
        return [one.text for one in continuations(model, tokens, how, batch_size=batch_size)]
    finally:
        distributed.shut_down()


def model_of(target: EvaluationTarget | str | Path) -> str | Path:
    """The model that is to be evaluated, as it was named.

    Raises:
        RecipeError: none is.
    """
    path = target.api_endpoint.nemo_checkpoint_path if isinstance(target, EvaluationTarget) else target
    if path is None:
        raise RecipeError("evaluate: set the checkpoint with EvaluationTarget(ApiEndpoint(nemo_checkpoint_path=...)).")
    return path


def evaluate(checkpoint: Path, config: EvaluationConfig) -> dict[str, Any]:
    """Ask a model held-out questions, or run tasks of lm-evaluation-harness; all ranks of a job call it together.

    Raises:
        EnvironmentProblem: ``output_dir`` cannot be made; nothing is measured.
        RecipeError: there is no task of that name, a parameter has no effect, or the data set has none of SQuAD's
            questions.
    """
    if not isinstance(config, EvaluationConfig):
        raise RecipeError(f"evaluate: eval_cfg is a {type(config).__name__}; pass an EvaluationConfig(...).")
    output = Path(config.output_dir).expanduser().absolute() if config.output_dir is not None else None
    if output is not None:
        refuse_unwritable(output)
    params = config.params
    on_squad = config.type == "squad"
    read = ("data",) if on_squad else ("include_path", "num_fewshot")
    unread = [f"extra[{name!r}]" for name in params.extra if name not in read]
    if params.max_new_tokens is not None and not on_squad:
        unread.append("max_new_tokens")
    if unread:
        raise RecipeError(f"evaluate: params.{unread[0]} has no effect with type={config.type!r}; leave it out.")
    asked = Asked(
        data=params.extra.get("data") or _held_out_by(checkpoint) if on_squad else None,
        loss=False,
        questions=params.limit_samples,
        tasks=() if on_squad else tuple(config.type.split(",")),
        include_path=Path(params.extra["include_path"]).expanduser() if "include_path" in params.extra else None,
        few_shot=params.extra.get("num_fewshot"),
        limit=params.limit_samples,
        batch_size=params.batch_size,
        max_new_tokens=params.max_new_tokens or 24,
    )
    try:
        evaluation = evaluate_model(checkpoint, asked, join(every_process()))
    finally:
        distributed.shut_down()
    scores = evaluation.scores[AFTER]
    if on_squad and "squad" not in scores:
        raise RecipeError(
            f"evaluate: type='squad' needs SQuAD questions, but {asked.data} has none, or limit_samples is 0; set a "
            "SQuAD data set in params.extra['data']."
        )
    found = {**scores["squad"], "predictions": evaluation.predictions} if on_squad else scores["tasks"]
    if launched_rank() == 0:
        keep(checkpoint, None, evaluation, lambda text: None)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "results.json", {"config": asdict(config)} | found)
    return found


def _held_out_by(checkpoint: Path) -> str | None:
    """The Hub's SQuAD, unless the model's run trained on a SQuAD of its own."""
    run = trained_by(lineage.of_checkpoint(checkpoint))
    return None if trained_on(run, "SquadDataModule") else "squad"
