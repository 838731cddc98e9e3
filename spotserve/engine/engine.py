"""Token ids in, token ids out: one replica, as its worker's thread sees it.

The engine owns its sequences between `add` (or `import_sequence`) and their end (or `export_sequence`). The same request gives
the same tokens whatever runs beside it, however often it was evicted, and wherever it was resumed. Knows nothing of epochs,
clocks, peers and text. Single-threaded. Constructible after a fork, as long as nothing ran a torch operation before it.
"""

from collections.abc import Sequence as ReadOnly
from time import perf_counter

import torch

from spotserve.config import EngineSettings
from spotserve.core.errors import ContextTooLong, InvalidRequest
from spotserve.core.messages import SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.request import FinishReason, Request
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import slot_of
from spotserve.engine.blocks import BlockPool
from spotserve.engine.results import ExportedSequence, SequenceOutput, StepResult
from spotserve.engine.runner import Runner
from spotserve.engine.sampler import SampledToken
from spotserve.engine.scheduler import ScheduledSequence, Scheduler
from spotserve.engine.selfcheck import choose_forward
from spotserve.engine.sequence import Sequence, new_sequence
from spotserve.engine.weights import load_model
from spotserve.speculation.drafter import Drafter
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.goodput import GoodputRule
from spotserve.speculation.tree import DraftTree

_ADAPTIVE_DRAFT_TOKENS = 4
"""Most that `adaptive` drafts per sequence and step."""


class Engine:
    """One model, its cache, and the sequences in the making."""

    def __init__(self, settings: EngineSettings, *, drafter: Drafter | None = None) -> None:
        """Loads the model.

        Args:
            settings: the engine's section.
            drafter: guesses ahead in place of the one that `settings.speculation` names, with the same number of tokens.

        Raises:
            ModelError: it cannot be loaded or run.
        """
        torch.set_num_threads(settings.threads)
        self._dtype = settings.dtype
        with torch.inference_mode():
            model = load_model(settings)
            self.spec: ModelSpec = model.spec
            self._end_token_ids = model.end_token_ids
            num_blocks = max(1, settings.kv_tokens // settings.block_tokens)
            self._blocks = BlockPool(num_blocks=num_blocks, block_tokens=settings.block_tokens, first_block_id=1)
            self._context_tokens = min(model.spec.context_tokens, num_blocks * settings.block_tokens)
            device = next(model.module.parameters()).device
            self._cache = KvCache(
                model.spec, num_blocks=num_blocks + 1, block_tokens=settings.block_tokens, dtype=model.dtype, device=device
            )
            forward = choose_forward(model, block_tokens=settings.block_tokens)
            self._runner = Runner(model, cache=self._cache, forward=forward)
        self._scheduler = Scheduler(
            blocks=self._blocks,
            max_batch=settings.max_batch,
            max_step_tokens=settings.max_step_tokens,
            context_tokens=self._context_tokens,
        )
        named_drafter, self._draft_tokens = _drafter(settings.speculation)
        self._drafter = named_drafter if drafter is None else drafter
        self._goodput = GoodputRule(max_tokens=self._draft_tokens) if settings.speculation == "adaptive" else None
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission."""
        return self._scheduler.num_waiting

    @property
    def kv_tokens_total(self) -> int:
        """Tokens that the cache can hold."""
        return self._blocks.num_blocks * self._blocks.block_tokens

    @property
    def kv_tokens_used(self) -> int:
        """Tokens' worth of blocks that are held."""
        return self.kv_tokens_total - self._blocks.free_blocks * self._blocks.block_tokens

    def add(self, request: Request, *, emitted_token_ids: ReadOnly[int] = ()) -> None:
        """Takes a request; with `emitted_token_ids` it goes on after them and does not emit them again.

        Raises:
            InvalidRequest: an id is not in the vocabulary, or the request is already here.
            ContextTooLong: prompt and one more token do not fit the context.
        """
        self._check(request, emitted_token_ids)
        sequence = self._new_sequence(request, tuple(emitted_token_ids))
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forgets a request and frees its blocks. No-op when unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._drop(sequence)

    def step(self) -> StepResult:
        """Computes one step; `outputs` has every sequence that got tokens or ended."""
        started_s = perf_counter()
        if self._goodput is not None:
            self._draft_tokens = self._goodput.draft_tokens(num_sequences=self.num_running)
        schedule = self._scheduler.schedule(self._propose if self._drafter is not None and self._draft_tokens else None)
        prefill_tokens = sum(entry.num_tokens for entry in schedule.entries if entry.sequence.pending_tokens > 1)
        outputs: tuple[SequenceOutput, ...] = ()
        if schedule.entries:
            with torch.inference_mode():
                sampled = self._runner.run(schedule.entries)
            pairs = zip(schedule.entries, sampled, strict=True)
            outputs = tuple(self._apply(entry, tokens) for entry, tokens in pairs if self._advance(entry, tokens))
        step_s = perf_counter() - started_s
        if self._goodput is not None and schedule.entries and not prefill_tokens:
            self._goodput.observe_step(rows=schedule.num_tokens, step_s=step_s)
        return StepResult(
            outputs=outputs,
            num_prefill_tokens=prefill_tokens,
            num_decode_tokens=schedule.num_tokens - prefill_tokens,
            step_s=step_s,
        )

    def export_sequence(self, request_id: str) -> ExportedSequence | None:
        """Takes a sequence out, with its KV; None when unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        computed = sequence.computed_tokens
        slots = [slot_of(sequence.block_ids, position, self._blocks.block_tokens) for position in range(computed)]
        with torch.inference_mode():
            layers = (self._cache.read(layer, slots).cpu() for layer in range(self.spec.num_layers))
            kv = tuple(values.view(torch.uint8).numpy().tobytes() for values in layers)
        exported = ExportedSequence(
            request=sequence.request,
            output_token_ids=tuple(sequence.token_ids[len(sequence.request.prompt_token_ids) :]),
            computed_tokens=computed,
            kv=kv,
            dtype=self._dtype,
        )
        self._drop(sequence)
        return exported

    def import_sequence(self, exported: ExportedSequence) -> bool:
        """Goes on with another engine's sequence and computes nothing again.

        Returns:
            False when there is no room for it now, or its KV is not what this engine computes with: `add` it then.

        Raises:
            InvalidRequest: as `add`.
        """
        request, computed = exported.request, exported.computed_tokens
        self._check(request, exported.output_token_ids)
        layer_bytes = computed * self.spec.kv_bytes_per_token // self.spec.num_layers
        if exported.dtype != self._dtype or [len(layer) for layer in exported.kv] != [layer_bytes] * self.spec.num_layers:
            return False
        sequence = self._new_sequence(request, exported.output_token_ids)
        if not 0 < computed < len(sequence.token_ids) or not self._scheduler.adopt(sequence):
            return False
        slots = [slot_of(sequence.block_ids, position, self._blocks.block_tokens) for position in range(computed)]
        shape = (2, computed, self.spec.num_kv_heads, self.spec.head_size)
        with torch.inference_mode():
            for layer, kept in enumerate(exported.kv):
                values = torch.frombuffer(bytearray(kept), dtype=self._cache.layers[layer].dtype).view(shape)
                self._cache.write(layer, slots, values)
        sequence.recompute_until = 0
        sequence.advance(computed)
        self._sequences[request.request_id] = sequence
        return True

    def reports(self) -> tuple[SequenceReport, ...]:
        """Every sequence, as the controller needs to know it."""
        return tuple(
            SequenceReport(
                request_id=sequence.request_id,
                context_tokens=len(sequence.token_ids),
                computed_tokens=sequence.computed_tokens,
                remaining_tokens=min(sequence.remaining_tokens, self._context_tokens - len(sequence.token_ids)),
            )
            for sequence in self._scheduler.sequences()
        )

    def check_integrity(self) -> None:
        """Asserts that blocks and sequences are accounted for; cheap enough for every idle moment."""
        self._scheduler.check_integrity()
        assert {id(sequence) for sequence in self._scheduler.sequences()} == {id(s) for s in self._sequences.values()}

    def _check(self, request: Request, emitted_token_ids: ReadOnly[int]) -> None:
        size, prompt = self.spec.vocabulary_size, request.prompt_token_ids
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request {request.request_id} is already being served", code="duplicate_request")
        named = {"prompt": prompt, "logit_bias": request.sampling.logit_bias, "stop_token_ids": request.sampling.stop_token_ids}
        for param, token_ids in (*named.items(), ("prompt", emitted_token_ids)):
            outside = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
            if outside is not None:
                raise InvalidRequest(f"token id {outside} is not in the vocabulary of {size}", param=param)
        if len(prompt) + len(emitted_token_ids) + 1 > self._context_tokens:
            raise ContextTooLong(
                f"{len(prompt) + len(emitted_token_ids)} tokens leave no room in a context of {self._context_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        if len(emitted_token_ids) >= request.sampling.max_tokens:
            raise InvalidRequest("all tokens of the request were already emitted", param="max_tokens")

    def _new_sequence(self, request: Request, emitted_token_ids: tuple[int, ...]) -> Sequence:
        self._arrivals += 1
        return new_sequence(
            request,
            seniority=(request.arrival_s, self._arrivals),
            end_token_ids=self._end_token_ids,
            emitted_token_ids=emitted_token_ids,
        )

    def _propose(self, sequence: Sequence, max_tokens: int) -> DraftTree:
        assert self._drafter is not None
        return self._drafter.propose(sequence.request_id, sequence.token_ids, max_tokens=min(max_tokens, self._draft_tokens))

    def _advance(self, entry: ScheduledSequence, sampled: list[SampledToken]) -> bool:
        """Notes what was computed; True when there are new tokens."""
        entry.sequence.advance(entry.num_tokens)
        return bool(sampled)

    def _apply(self, entry: ScheduledSequence, sampled: list[SampledToken]) -> SequenceOutput:
        """Appends tokens up to the end of the sequence; what was accepted beyond a stop is trimmed."""
        sequence, sampling = entry.sequence, entry.sequence.request.sampling
        position = sequence.output_tokens
        finish_reason = None
        kept = 0
        for token in sampled:
            sequence.token_ids.append(token.token_id)
            kept += 1
            finish_reason = self._finish_reason(sequence, token.token_id)
            if finish_reason is not None:
                break
        sequence.advance(kept - 1)  # accepted draft tokens are in the cache; the last token never is
        tokens = sampled[:kept]
        accepted = min(kept, len(sampled) - 1)
        if self._goodput is not None and entry.draft:
            self._goodput.observe_draft(drafted=len(entry.draft), accepted=accepted)
        if finish_reason is None:
            self._scheduler.settle(sequence)
        else:
            self._drop(sequence)
        return SequenceOutput(
            request_id=sequence.request_id,
            position=position,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens if token.logprob) if sampling.logprobs is not None else None,
            gaps=tuple(token.gap for token in tokens if token.gap is not None) if sampling.gaps else None,
            finish_reason=finish_reason,
            recomputed_tokens=sequence.take_recomputed_tokens(),
            draft_tokens=len(entry.draft),
            accepted_tokens=accepted,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.stop_token_ids:
            return FinishReason.STOP
        if sequence.remaining_tokens <= 0 or len(sequence.token_ids) >= self._context_tokens:
            return FinishReason.LENGTH
        return None

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        if self._drafter is not None:
            self._drafter.forget(sequence.request_id)


def _drafter(speculation: str) -> tuple[Drafter | None, int]:
    """The drafter that the setting names, and how many tokens it may propose per step."""
    if speculation == "off":
        return None, 0
    if speculation == "adaptive":
        return NgramDrafter(), _ADAPTIVE_DRAFT_TOKENS
    _, _, draft_tokens = speculation.partition(":")
    return NgramDrafter(), int(draft_tokens)
