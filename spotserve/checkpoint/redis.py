"""Progress in Redis 7 or later, for a cluster of machines. The only module that knows the Redis client.

A request is one string: a header (epoch, how it ended) and then its tokens, so that a commit appends in place. A batch is one
call of one script, which Redis runs without interruption. Every key carries its id as hash tag.

Redis itself forgets: every key expires `time_to_live_s` after it was last written. The bound on size is Redis' own as well:
run it with `maxmemory` and `maxmemory-policy volatile-ttl`, which evicts what was written longest ago first;
`store.max_bytes` is for SQLite. How much survives a crash of Redis is up to its `appendfsync`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from spotserve.checkpoint.codec import pack_row, unpack_value
from spotserve.checkpoint.redis_script import COMMIT, COMMIT_SHA1
from spotserve.checkpoint.store import Commit, CommitOutcome, Progress, Verdict
from spotserve.core.errors import ConfigError, StoreError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

_VERDICTS = (Verdict.OK, Verdict.GAP, Verdict.FENCED)


def key(kind: str, row_id: str) -> str:
    """Key of the call or request `row_id`."""
    return f"spotserve:{kind}:{{{row_id}}}"


class RedisStore:
    """`store.Store` at `url`: `redis://` or, with TLS, `rediss://`; user, password and database as in any Redis URL.

    With `?cluster=true` the URL names any node of a Redis cluster. Its keys live on different nodes, so a batch is then one
    call per request, in one pipeline per node; it is no longer all or nothing, which the rules do not need.
    """

    def __init__(self, url: str, *, time_to_live_s: float, timeout_s: float) -> None:
        """
        Raises:
            ConfigError: `url` is not a Redis URL.
        """
        self._display_url = _without_credentials(url)
        self._time_to_live_ms = max(1, round(time_to_live_s * 1000))
        self._timeout_s = timeout_s
        self._closed = False
        try:
            self._redis, self._clustered = _client(url, timeout_s)
        except ValueError as error:
            raise ConfigError(f"store.url: {error}") from error

    @property
    def display_url(self) -> str:
        """See `store.Store`."""
        return self._display_url

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        """See `store.ProgressStore`."""
        groups: dict[str, list[Commit]] = {}
        for commit in batch:
            groups.setdefault(self._group_of(commit), []).append(commit)
        answers = await self._guard(lambda: self._run_commits(list(groups.values())))
        outcomes = dict(zip(groups, map(iter, answers), strict=True))
        return [next(outcomes[self._group_of(commit)]) for commit in batch]

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        """See `store.ProgressStore`."""
        questions = [("GET", key("progress", request_id)) for request_id in request_ids]
        values = cast("list[bytes | None]", await self._guard(lambda: self._together(questions)))
        return {
            request_id: _unpack_progress(value) for request_id, value in zip(request_ids, values, strict=True) if value is not None
        }

    async def put_call(self, call_id: str, record: bytes) -> None:
        """See `store.CallStore`."""
        await self._guard(lambda: self._redis.set(key("call", call_id), record, px=self._time_to_live_ms))

    async def get_call(self, call_id: str) -> bytes | None:
        """See `store.CallStore`."""
        return cast("bytes | None", await self._guard(lambda: self._redis.get(key("call", call_id))))

    async def delete_call(self, call_id: str, request_ids: Sequence[str]) -> None:
        """See `store.CallStore`."""
        keys = [key("call", call_id), *(key("progress", request_id) for request_id in request_ids)]
        await self._guard(lambda: self._together([("UNLINK", each) for each in keys]))

    async def ping(self) -> None:
        """See `store.Store`."""
        await self._guard(self._redis.ping)

    async def close(self) -> None:
        """See `store.Store`."""
        if not self._closed:
            self._closed = True
            await self._redis.aclose()

    def _group_of(self, commit: Commit) -> str:
        """Commits of one group go into one call of the script."""
        return commit.request_id if self._clustered else ""

    async def _run_commits(self, groups: Sequence[Sequence[Commit]]) -> list[list[CommitOutcome]]:
        arguments = [_script_arguments(group, self._time_to_live_ms) for group in groups]
        try:
            answers = await self._together([("EVALSHA", COMMIT_SHA1, *each) for each in arguments])
        except NoScriptError:  # the first commit ever, or Redis was restarted, or another server took over
            answers = await self._together([("EVAL", COMMIT, *each) for each in arguments])
        return [_outcomes(group, cast("list[int]", answer)) for group, answer in zip(groups, answers, strict=True)]

    async def _together(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[object]:
        """The answers to `commands`, all sent at once."""
        if not commands:
            return []
        if len(commands) == 1:
            return [await self._redis.execute_command(*commands[0])]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[object] = await pipeline.execute()
            return answers

    async def _guard(self, call: Callable[[], Awaitable[Result]]) -> Result:
        if self._closed:
            raise StoreError(f"{self._display_url} is closed")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call()
        except TimeoutError as error:
            raise StoreError(f"{self._display_url} did not answer within {self._timeout_s:g} s") from error
        except (RedisError, RedisClusterException, OSError) as error:
            raise StoreError(f"{self._display_url}: {error}") from error


def _client(url: str, timeout_s: float) -> tuple[redis.asyncio.Redis | redis.asyncio.RedisCluster, bool]:
    """The client for `url`, and whether it speaks to a cluster. Connects at the first use."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    clustered = query.pop("cluster", "false") == "true"
    client = redis.asyncio.RedisCluster if clustered else redis.asyncio.Redis
    return client.from_url(
        parts._replace(query=urlencode(query)).geturl(),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        # Once more, at once, because a pooled connection may be that of a server that was restarted. Safe: everything
        # here may be said twice.
        retry=Retry(NoBackoff(), 1),
    ), clustered


def _script_arguments(group: Sequence[Commit], time_to_live_ms: int) -> tuple[str | bytes | int, ...]:
    rows = b"".join(
        pack_row(epoch=each.epoch, position=each.position, finish=each.finish_reason, token_ids=each.token_ids) for each in group
    )
    return (len(group), *(key("progress", each.request_id) for each in group), time_to_live_ms, rows)


def _outcomes(group: Sequence[Commit], answer: Sequence[int]) -> list[CommitOutcome]:
    numbers = iter(answer)
    return [
        CommitOutcome(commit.request_id, _VERDICTS[verdict], length, epoch)
        for commit, verdict, length, epoch in zip(group, numbers, numbers, numbers, strict=False)
    ]


def _unpack_progress(value: bytes) -> Progress:
    epoch, finish, token_ids = unpack_value(value)
    return Progress(epoch, token_ids, finish)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
