"""Megatron's dispatcher of tokens to experts, without the work that one rank alone does in vain."""

from typing import Any

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, where all experts are on this rank: tokens are sorted by expert once.

    They are sorted before they are sent, and what arrives from several ranks has to be sorted again. From one rank it
    arrives in order, and Megatron's second sort copies all of it as it is: twice in the forward pass, twice in the
    backward pass.

    Source: Megatron-Core 0.19 `token_dispatcher.py`, `dispatch_postprocess` and `combine_preprocess`.
    """

    @classmethod
    def instead_of(cls, dispatcher: Any) -> Any:
        """It, in the place of a dispatcher that Megatron has built; that one, where there is more to do."""
        alone = dispatcher.ep_size == 1 and dispatcher.tp_size == 1
        if type(dispatcher) is not MoEAlltoAllTokenDispatcher or not alone or dispatcher.drop_and_pad:
            return dispatcher
        own = cls.__new__(cls)
        vars(own).update(vars(dispatcher))
        return own

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Any, Tensor]:
        """As Megatron's.

        Args:
            global_input_tokens: [t, h], by expert.
            global_probs: [t].

        Returns:
            The tokens, how many of them each expert has ([experts], on the host), and the probabilities.
        """
        for point in ("before_permutation_2", "before_finish"):
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """As Megatron's: [t, h], by expert."""
        return hidden_states
