"""A checkpoint as a model that generates: this rank's part of it, under any layout but interleaved pipelines."""

import atexit
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from mixtral_recipes.checkpoints.format.integrity import verify_together
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage.links import BASE_ELSEWHERE, base_of
from mixtral_recipes.checkpoints.load import load_model
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import CheckpointError, RecipeError, nearest
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.inference.chat import ends_of_turns
from mixtral_recipes.layout.topology import EXPERTS, Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.cached_attention import KeyValueCache
from mixtral_recipes.models.config import MixtralConfig, with_topology
from mixtral_recipes.peft import attach
from mixtral_recipes.peft.quantized.layers import base_format
from mixtral_recipes.system.files import read_json
from mixtral_recipes.system.ranks import launched_size
from mixtral_recipes.system.schema import Count, typed
from mixtral_recipes.training import distributed


class _Ending(TypedDict, total=False):
    eos_token_id: Count | list[Count] | None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def every_process() -> Topology:
    """The layout of a job without given sizes: experts over as many of its processes as can share them."""
    size = launched_size()
    return Topology(world_size=size, expert_model_parallel_size=math.gcd(size, EXPERTS))


def join(topology: Topology) -> Topology:
    """Join the processes that run a model, before anything else is done together; all ranks call it.

    Args:
        topology: The layout asked for.

    Returns:
        The layout without sequence parallelism, since a step of generation is one token.

    Raises:
        RecipeError: the layout cannot generate, or is not that of the processes that were started.
    """
    if topology.virtual_pipeline_model_parallel_size or topology.context_parallel_size > 1:
        raise RecipeError("generation does not support interleaved pipelines or context parallelism; leave them out.")
    topology = dataclasses.replace(topology, sequence_parallel=False)
    place = distributed.ProcessPlace.from_environment()
    if topology.world_size != place.world_size:
        raise RecipeError(
            f"--devices {topology.world_size}, but {place.world_size} process(es) were started; pass the number that "
            "was started. If you started none, remove the launcher's variables from the environment: unset "
            "TORCHELASTIC_RUN_ID."
        )
    distributed.initialize(topology, place, distributed.choose_device("auto", place), seed=0)
    atexit.register(distributed.shut_down)  # a group that outlives the interpreter now and then aborts the process
    return topology


class InferenceModel:
    """One model's part on this rank, and the tokenizer that belongs to it.

    Attributes:
        chunk: This rank's part of the model.
        config: The model's configuration.
        topology: The layout.
        tokenizer: What the checkpoint carries.
        adapted: Whether adapters are attached.
        place: This rank's number among the data-parallel ones, which continue rows of their own.
        places: How many those are.
        end_tokens: The tokens that end a text: the tokenizer's, what generation_config.json or config.json adds,
            and what ends an answer in the chat template.
        device: Where its tensors live.
    """

    def __init__(
        self,
        chunk: Any,
        config: MixtralConfig,
        topology: Topology,
        tokenizer: Any,
        *,
        adapted: bool,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.chunk = chunk
        self.config = config
        self.topology = topology
        self.tokenizer = tokenizer
        self.adapted = adapted
        self.end_tokens = ends | {tokenizer.eos_token_id}
        self.device = next(chunk.parameters()).device
        self._group: Any = parallel_state.get_pipeline_model_parallel_group()
        self._first = parallel_state.is_pipeline_first_stage()
        self._last = parallel_state.is_pipeline_last_stage()
        self.place = parallel_state.get_data_parallel_rank()
        self.places = parallel_state.get_data_parallel_world_size()

    @classmethod
    def load(cls, checkpoint: Path, topology: Topology, *, dtype: str | None = None) -> "InferenceModel":
        """Build the model and read its weights; all ranks call it together.

        Args:
            checkpoint: A checkpoint of ours; an adapter's base is found through its lineage, and quantised if it was
                in training.
            topology: As `join` returned it.
            dtype: "bf16", "fp16" or "fp32"; None takes config.json's.

        Raises:
            CheckpointError: the checkpoint is damaged, has no tokenizer, or an adapter's base is another model.
            RecipeError: an unknown dtype.
        """
        adapters = checkpoint if read_manifest(checkpoint)["kind"] == "adapter" else None
        base = base_of(checkpoint, place_option=BASE_ELSEWHERE) if adapters else checkpoint
        for folder in filter(None, (base, adapters)):
            verify_together(folder)
        published = json.loads((base / "context" / "config.json").read_text())
        named = str(published.get("dtype") or published.get("torch_dtype") or "bfloat16")
        if dtype is not None and dtype not in DTYPES:
            raise RecipeError(f"--dtype {dtype} is not a known dtype.{nearest(dtype, list(DTYPES))}")
        params = DTYPES[dtype] if dtype else getattr(torch, named, torch.bfloat16)
        fields = hf_config.to_megatron(published)
        experts, ranks = fields["num_moe_experts"], topology.expert_model_parallel_size
        if experts % ranks:
            raise RecipeError(f"--ep {ranks} does not divide the model's {experts} experts.")
        config = MixtralConfig(**fields, seq_length=fields["max_position_embeddings"])
        kind = {"bf16": params is torch.bfloat16, "fp16": params is torch.float16}
        config = with_topology(config, topology, params_dtype=params, pipeline_dtype=params, **kind)
        scheme = StoredAdapters(checkpoint).scheme if adapters else None
        quantized = base_format(scheme)
        if quantized is not None:
            config = config.changed(perform_initialization=False)
        (chunk,) = build_model(config, adapters=scheme is not None, base=quantized)
        load_model([chunk], base)
        if scheme is not None:
            attach.apply(dataclasses.replace(scheme, dropout=0.0), [chunk])
            load_model([chunk], checkpoint, adapters_only=True)
        tokenizer = load_tokenizer(checkpoint, error=CheckpointError)
        ends = _end_tokens(checkpoint / "context") | ends_of_turns(tokenizer)
        return cls(chunk.eval(), config, topology, tokenizer, adapted=scheme is not None, ends=ends)

    def prompts(self, tokens: Tensor, lengths: Tensor, cache: KeyValueCache, first: int) -> Tensor:
        """Run prompts from their beginning; all ranks of a pipeline and an expert group step together.

        Args:
            tokens: [rows, tokens]; shorter prompts are padded behind with any token.
            lengths: How many tokens of each row are its prompt's, [rows].
            cache: Gets their keys and values.
            first: The first row's number there.

        Returns:
            Logits of each prompt's next token, [rows, vocabulary], on every rank of the pipeline.
        """
        cache.begin_prompts(first)
        return self._next(tokens, lengths - 1, cache)

    def tokens(self, tokens: list[int], positions: list[int], cache: KeyValueCache) -> Tensor:
        """Run one more token of each of the cache's first rows, with the others as `prompts` does.

        Args:
            tokens: Of each row.
            positions: How many tokens came before, for each row.
            cache: What they were.

        Returns:
            Logits of each row's next token, [rows, vocabulary], on every rank of the pipeline.
        """
        cache.begin_tokens(positions, self.device)
        return self._next(torch.tensor(tokens)[:, None], None, cache)

    def idle(self) -> None:
        """Take part in a step without a row: the others' tokens may need this rank's experts."""
        self._next(torch.zeros(1, 1, dtype=torch.long), None, None)

    @torch.inference_mode()
    def _next(self, tokens: Tensor, last: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Logits of what follows one token of each row (None: the last), [rows, vocabulary]; tokens [rows, tokens]."""
        rows = len(tokens)

        def of_last(hidden_states: Tensor, output_layer: Any, output_weight: Any, **unused: Any) -> Tensor:
            wanted = hidden_states[-1] if last is None else hidden_states[last.to(self.device), torch.arange(rows)]
            return output_layer(wanted.unsqueeze(0), weight=output_weight)[0][0]

        output = self._forward(tokens, cache, output_processor=of_last)
        logits = torch.empty(rows, self.config.vocab_size, dtype=torch.float32, device=self.device)
        if output is not None:
            logits = self._whole_vocabulary(output)
        return self._from_last_stage(logits)

    @torch.inference_mode()
    def likelihoods(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """How likely each token is after those before it; ranks call it together, as `prompts`.

        Args:
            tokens: [sequences, tokens], at least two of each; behind the end of a shorter one may stand anything.

        Returns:
            Log-probabilities of all tokens but the first, float32 [sequences, tokens - 1], and whether each was the
            likeliest, bool, likewise.
        """
        rows, length = tokens.shape
        output = self._forward(tokens[:, :-1], None)
        found = torch.empty(2, rows, length - 1, dtype=torch.float32, device=self.device)
        if output is not None:
            following = tokens[:, 1:].to(self.device)
            for row in range(rows):  # one at a time: the logits of all take much memory
                logits = self._whole_vocabulary(output[row])
                chosen = logits.gather(-1, following[row, :, None])[:, 0]
                found[0, row] = chosen - logits.logsumexp(-1)
                found[1, row] = logits.argmax(-1) == following[row]
        found = self._from_last_stage(found).cpu()
        return found[0], found[1].bool()

    def _forward(self, tokens: Tensor, cache: KeyValueCache | None, **named: Any) -> Tensor | None:
        """Tokens of every sequence; on the last stage what is made of them, else None."""
        rows, length = tokens.shape
        if not self._first:
            hidden = torch.empty(
                length, rows, self.config.hidden_size, dtype=self.config.params_dtype, device=self.device
            )
            torch.distributed.recv(hidden, group=self._group, group_src=self._group.rank() - 1)
            self.chunk.set_input_tensor(hidden)
        output = self.chunk(tokens.to(self.device), None, None, inference_context=cache, **named)
        if self._last:
            return output
        torch.distributed.send(output.contiguous(), group=self._group, group_dst=self._group.rank() + 1)
        return None

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits of this tensor-parallel rank, [..., its rows], as those of all tokens in fp32."""
        return gather_from_tensor_model_parallel_region(logits)[..., : self.config.vocab_size].float()

    def _from_last_stage(self, found: Tensor) -> Tensor:
        """What the pipeline's last stage has found, on all of them."""
        if self._group.size() > 1:
            found = found.contiguous()
            torch.distributed.broadcast(found, group=self._group, group_src=self._group.size() - 1)
        return found

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model, while this lasts."""
        found: list[Any] = [part for adapter in attach.adapters_of([self.chunk]) for part in adapter.parts()]
        for adapter in found:
            adapter.add_to = lambda output, *inputs: output
        try:
            yield
        finally:
            for adapter in found:
                del adapter.add_to

    def share(self, prompts: int) -> range:
        """The prompts that this data-parallel rank takes, by number."""
        return range(self.place, prompts, self.places)

    def gathered(self, tokens: list[int]) -> list[list[int]]:
        """The tokens of every data-parallel rank, by rank; all ranks call it together, with as many each."""
        group: Any = parallel_state.get_data_parallel_group()
        if group.size() == 1:
            return [tokens]
        mine = torch.tensor(tokens, device=self.device)
        everyone = mine.new_empty(group.size() * len(tokens))
        torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
        return everyone.view(-1, len(tokens)).tolist()

    def gathered_objects[T](self, value: T) -> list[T]:
        """A value of every data-parallel rank, by rank; slower than `gathered`. All ranks call it together."""
        group: Any = parallel_state.get_data_parallel_group()
        if group.size() == 1:
            return [value]
        everyone: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(everyone, value, group=group)
        return everyone


def no_numbers(what: str) -> CheckpointError:
    """What is said where a model's logits, or what is made of them, are NaN or infinite."""
    return CheckpointError(
        f"{what} are NaN or infinite. With --dtype fp16, use bf16 or fp32: fp16's range is too small for many models. "
        "Otherwise, the model's weights are damaged."
    )


def _end_tokens(context: Path) -> frozenset[int]:
    """What generation_config.json names, else config.json: one number or a list of them."""
    for name in ("generation_config.json", "config.json"):
        named = typed(read_json(context / name) or {}, _Ending, context / name, CheckpointError).get("eos_token_id")
        if named is not None:
            return frozenset(named if isinstance(named, list) else [named])
    return frozenset()
