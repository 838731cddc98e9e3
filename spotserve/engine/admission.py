"""Whether a request may come in, in whatever way its tokens are made. Pure."""

from collections.abc import Container, Sequence

from spotserve.core.errors import ContextTooLong, InvalidRequest
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request


def check_admissible(
    request: Request, emitted_token_ids: Sequence[int], *, model: ModelSpec, context_tokens: int, here: Container[str]
) -> None:
    """Checks a request that goes on after `emitted_token_ids`, against the model and the requests that are `here`.

    Raises:
        InvalidRequest: an id is not in the vocabulary, the request is already here, or has all its tokens.
        ContextTooLong: prompt and one more token do not fit the context.
    """
    size, prompt = model.vocabulary_size, request.prompt_token_ids
    if request.request_id in here:
        raise InvalidRequest(f"request {request.request_id} is already being served", code="duplicate_request")
    named = {"prompt": prompt, "logit_bias": request.sampling.logit_bias, "stop_token_ids": request.sampling.stop_token_ids}
    for param, token_ids in (*named.items(), ("prompt", emitted_token_ids)):
        outside = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if outside is not None:
            raise InvalidRequest(f"token id {outside} is not in the vocabulary of {size}", param=param)
    if len(prompt) + len(emitted_token_ids) + 1 > context_tokens:
        raise ContextTooLong(
            f"{len(prompt) + len(emitted_token_ids)} tokens leave no room in a context of {context_tokens}",
            param="prompt",
            code="context_length_exceeded",
        )
    if len(emitted_token_ids) >= request.sampling.max_tokens:
        raise InvalidRequest("all tokens of the request were already emitted", param="max_tokens")
