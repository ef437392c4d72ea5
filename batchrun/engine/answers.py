"""Answers in progress: when each ends and why, and its text then."""

from __future__ import annotations

from batchrun.engine.constraints import ConstraintError, Constraints
from batchrun.engine.core import FinishReason, Sequence
from batchrun.engine.failures import not_finite, without_shape, without_text
from batchrun.engine.output import Answer, Specials
from batchrun.errors import PROCESS_ENDS
from batchrun.prompts.chat import Tokenizer


class Answers:
    """Decides after each token whether it ends the answer, and gives ended answers their text.

    Args:
        tokenizer: Turns tokens into text; None leaves answers without text.
        eos_ids: Tokens that end an answer unless its parameters ignore them.
        specials: Special tokens, hidden in texts.
        constraints: Knows which tokens constrained answers allow; needed only for these.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        specials: Specials,
        constraints: Constraints | None,
    ) -> None:
        self._tokenizer, self._eos_ids, self._specials = tokenizer, eos_ids, specials
        self._constraints = constraints
        self._texts: dict[Sequence, Answer] = {}

    def ended(self, sequence: Sequence, token: int, max_model_len: int) -> bool:
        """Whether a sequence ends with a token, which was just appended to it if there is one.

        It then has its reason, and its text or its error.

        Args:
            sequence: The sequence.
            token: Its last token; below 0 if none could be chosen.
            max_model_len: Maximum number of tokens of prompt and answer together.
        """
        try:
            if token < 0:
                self._fail_without_token(sequence)
            else:
                sequence.finish_reason = self._reason(sequence, token, max_model_len)
        except ConstraintError as error:
            without_shape(sequence, str(error))
        except PROCESS_ENDS:
            raise
        except BaseException as error:
            without_text(sequence, error)
        if sequence.finish_reason is None:
            return False
        self.forget(sequence)
        return True

    def _reason(self, sequence: Sequence, token: int, max_model_len: int) -> FinishReason | None:
        params = sequence.request.params
        length, reason = sequence.num_known_tokens, None
        stops = token in params.stop_token_ids or (token in self._eos_ids and not params.ignore_eos)
        if self._completes(sequence, token) or (
            stops and len(sequence.output_ids) >= params.min_tokens
        ):
            reason = FinishReason.STOP
        elif length >= sequence.most_tokens or length >= max_model_len:
            reason = FinishReason.LENGTH
        if self._tokenizer is None or (reason is None and not params.stop):
            return reason
        answer = self._texts.pop(sequence, None)
        if answer is None:
            prompt_ids = sequence.request.prompt_ids
            answer = Answer(self._tokenizer, prompt_ids, params.stop, self._specials)
            # A continued request starts late: it catches up as it went, since stop strings before
            # `min_tokens` were passed.
            before = sequence.output_ids[:-1]
            for ids in ([token] for token in before) if params.stop else [before]:
                answer.push(ids)
        cut = answer.push([token], last=reason is not None)
        if cut is not None and len(sequence.output_ids) >= params.min_tokens:
            sequence.text = answer.text[:cut]
            return FinishReason.STOP
        if reason is None:
            self._texts[sequence] = answer
        else:
            sequence.text = answer.text
        return reason

    def _completes(self, sequence: Sequence, token: int) -> bool:
        """Whether a constrained answer is complete with the token just appended."""
        if sequence.request.params.constraint is None:
            return False
        assert self._constraints is not None
        return self._constraints.took(sequence, token)

    def append_forced(self, sequence: Sequence, max_model_len: int) -> int:
        """Append the tokens that a sequence's constraint forces now, until one of them ends it.

        None are where penalties or log-probabilities depend on each token's logits: these are only
        likely drafts.

        Returns:
            How many were appended.
        """
        params, constraints = sequence.request.params, self._constraints
        if params.constraint is None or params.penalised or params.wants_logprobs:
            return 0
        before = len(sequence.output_ids)
        for token in constraints.forced(sequence) if constraints else ():
            sequence.output_ids.append(token)
            if self.ended(sequence, token, max_model_len):
                break
        return len(sequence.output_ids) - before

    def finish(self, leader: Sequence, reason: FinishReason) -> None:
        """End a beam search, whose leader has the answer's tokens."""
        leader.finish_reason = reason
        if self._tokenizer is None:
            return
        answer = Answer(self._tokenizer, leader.request.prompt_ids)
        try:
            answer.push(leader.output_ids, last=True)
        except PROCESS_ENDS:
            raise
        except BaseException as error:
            without_text(leader, error)
        else:
            leader.text = answer.text

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence in progress."""
        self._texts.pop(sequence, None)
        if self._constraints is not None:
            self._constraints.forget(sequence)

    def _fail_without_token(self, sequence: Sequence) -> None:
        stuck = self._constraints and self._constraints.problem(sequence)
        if stuck:
            without_shape(sequence, stuck)
        else:
            not_finite(sequence)
