"""Files that say when requests came and how long they were: the formats that are read.

Rows without tokens get one and are counted. Clocks that start anywhere start at the first request.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from spotserve.replay.rows import Format, Options, Row, full_match
from spotserve.replay.trace import RequestTrace, TraceRequest

MAX_SEED = 2**64 - 1
MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hashes stands for (FAST'25)."""

_BURSTGPT = {"arrival": "timestamp", "prompt": "request tokens", "output": "response tokens"}


def _arrivals(
    located: Iterable[tuple[Row, TraceRequest]], name: str, *, assumed: tuple[str, ...] = (), block_tokens: int = 0
) -> RequestTrace:
    """The requests in order, those without tokens clamped to one token and counted."""
    requests: list[TraceRequest] = []
    clamped_rows = 0
    last_s = 0.0
    for row, request in located:
        if request.arrival_s < last_s:
            raise row.error(f"an arrival not before {last_s:g} s, that of the row above")
        last_s = request.arrival_s
        if request.prompt_tokens == 0 or request.output_tokens == 0:
            clamped_rows += 1
            request = TraceRequest(
                request.arrival_s,
                max(1, request.prompt_tokens),
                max(1, request.output_tokens),
                request.temperature,
                request.seed,
                request.prefix,
            )
        requests.append(request)
    return RequestTrace(tuple(requests), name, clamped_rows, prefix_block_tokens=block_tokens, assumed=assumed)


def _read_own(rows: Sequence[Row], options: Options) -> RequestTrace:
    del options
    columns = {name: index for index, name in enumerate(rows[0].fields)}
    block = re.fullmatch(r"prefix_(\d+)", rows[0].fields[-1])
    temperature, seed, width = columns.get("temperature"), columns.get("seed"), len(columns)

    def request(row: Row) -> TraceRequest:
        fields = row.columns(width)
        prefix: tuple[int, ...] = ()
        if block is not None and fields[-1]:
            prefix = tuple(row.count(each, "block", largest=MAX_SEED) for each in fields[-1].split())
        return TraceRequest(
            row.number(fields[0], "arrival_s"),
            row.count(fields[1], "prompt_tokens"),
            row.count(fields[2], "output_tokens"),
            row.number(fields[temperature], "temperature") if temperature is not None and fields[temperature] else None,
            row.count(fields[seed], "seed", largest=MAX_SEED) if seed is not None and fields[seed] else None,
            prefix,
        )

    block_tokens = int(block.group(1)) if block is not None and int(block.group(1)) < 2**31 else 0
    return _arrivals(((row, request(row)) for row in rows[1:]), "spotserve-requests", block_tokens=block_tokens)


def _read_azure(rows: Sequence[Row], options: Options) -> RequestTrace:
    """Azure's LLM inference traces of 2023 and 2024: seven decimals of a second, perhaps a UTC offset."""
    del options

    def stamp_s(row: Row, text: str) -> float:
        try:
            # datetime knows microseconds, the trace tenths of them
            stamp = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
            return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise row.error("a time stamp such as 2023-11-16 18:15:46.6805900 in column 1") from None

    def request(row: Row) -> TraceRequest:
        time, prompt, output = row.columns(3)
        after_s = round(stamp_s(row, time) - origin_s, 6)
        if after_s < 0:
            raise row.error("a time stamp not before that of the first row")
        return TraceRequest(after_s, row.count(prompt, "ContextTokens"), row.count(output, "GeneratedTokens"))

    origin_s = stamp_s(rows[1], rows[1].fields[0]) if len(rows) > 1 else 0.0
    assumed = ("time 0 is the first request",)
    return _arrivals(((row, request(row)) for row in rows[1:]), "azure", assumed=assumed)


def _read_mooncake(rows: Sequence[Row], options: Options) -> RequestTrace:
    """Mooncake (FAST'25): JSON lines; equal hashes are equal blocks of 512 tokens at the beginning of prompts."""
    del options
    expected = '{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]}'

    def request(row: Row) -> TraceRequest:
        try:
            found = json.loads(row.text)
        except (ValueError, RecursionError):
            raise row.error(expected) from None
        if not isinstance(found, dict) or not {"timestamp", "input_length", "output_length"} <= found.keys():
            raise row.error(expected)
        hashes = found.get("hash_ids", [])
        if not isinstance(hashes, list):
            raise row.error('a list of whole numbers as "hash_ids"')
        return TraceRequest(
            row.number(found["timestamp"], "timestamp") / 1000,
            row.count(found["input_length"], "input_length"),
            row.count(found["output_length"], "output_length"),
            prefix=tuple(row.count(each, "hash", largest=MAX_SEED) for each in hashes),
        )

    assumed = (f"one hash stands for {MOONCAKE_BLOCK_TOKENS} tokens",)
    return _arrivals(((row, request(row)) for row in rows), "mooncake", assumed=assumed, block_tokens=MOONCAKE_BLOCK_TOKENS)


def _read_burstgpt(rows: Sequence[Row], options: Options) -> RequestTrace:
    """BurstGPT: columns by name, since one of its files has two more in the middle. Seconds."""
    del options
    names = [name.strip('"').lower() for name in rows[0].fields]
    places = {what: names.index(name) for what, name in _BURSTGPT.items()}

    def request(row: Row) -> TraceRequest:
        fields = [field.strip('"') for field in row.columns(len(names))]
        counts = (_whole(fields[places[each]]) for each in ("prompt", "output"))
        prompt, output = (row.count(count, name) for count, name in zip(counts, ("Request tokens", "Response tokens"), strict=True))
        after_s = row.number(fields[places["arrival"]], "Timestamp") - origin_s
        if after_s < 0:
            raise row.error("a Timestamp not before that of the first row")
        return TraceRequest(after_s, prompt, output)

    first = [field.strip('"') for field in rows[1].columns(len(names))] if len(rows) > 1 else []
    origin_s = rows[1].number(first[places["arrival"]], "Timestamp") if first else 0.0
    return _arrivals(((row, request(row)) for row in rows[1:]), "burstgpt", assumed=("time 0 is the first request",))


def _whole(text: str) -> str:
    """Without the `.0` that some tables put behind whole numbers."""
    return text.removesuffix(".0")


def _read_queries(rows: Sequence[Row], options: Options) -> RequestTrace:
    """SpotServe's queries (ASPLOS'24, artifact): id, seconds, prompt tokens, where the prompt is in another file."""

    def request(row: Row) -> TraceRequest:
        fields = row.columns(4)
        return TraceRequest(row.number(fields[1], "arrival_s"), row.count(fields[2], "prompt_tokens"), options.output_tokens)

    assumed = (f"every answer has {options.output_tokens} tokens: the file does not say",)
    return _arrivals(((row, request(row)) for row in rows), "spotserve-queries", assumed=assumed)


def _read_vidur(rows: Sequence[Row], options: Options) -> RequestTrace:
    """Vidur's processed traces (MLSys'24): columns by name."""
    del options
    names = rows[0].fields
    places = [names.index(name) for name in ("arrived_at", "num_prefill_tokens", "num_decode_tokens")]

    def request(row: Row) -> TraceRequest:
        fields = row.columns(len(names))
        arrival, prompt, output = (fields[place] for place in places)
        return TraceRequest(
            row.number(arrival, "arrived_at"),
            row.count(_whole(prompt), "num_prefill_tokens"),
            row.count(_whole(output), "num_decode_tokens"),
        )

    return _arrivals(((row, request(row)) for row in rows[1:]), "vidur")


def _has(*names: str) -> Callable[[str], bool]:
    def matches(line: str) -> bool:
        found = {name.strip().strip('"').lower() for name in line.split(",")}
        return found.issuperset(names)

    return matches


REQUEST_FORMATS: tuple[Format[RequestTrace], ...] = (
    Format(
        "spotserve-requests",
        "arrival_s,prompt_tokens,output_tokens[,temperature][,seed][,prefix_TOKENS]",
        full_match(r"arrival_s,prompt_tokens,output_tokens(,temperature)?(,seed)?(,prefix_\d{1,9})?"),
        _read_own,
    ),
    Format(
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        full_match(r"TIMESTAMP\s*,\s*ContextTokens\s*,\s*GeneratedTokens"),
        _read_azure,
    ),
    Format("burstgpt", "Timestamp,..,Request tokens,Response tokens,..", _has(*_BURSTGPT.values()), _read_burstgpt),
    Format(
        "vidur",
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        _has("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
        _read_vidur,
    ),
    Format(
        "mooncake", '{"timestamp": ms, "input_length": .., "output_length": ..}', lambda line: line.startswith("{"), _read_mooncake
    ),
    Format("spotserve-queries", "id,arrival_s,prompt_tokens,offset", full_match(r"\d+,[^,]+,\d+,\d+"), _read_queries),
)
