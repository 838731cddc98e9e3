"""Weights in S3-compatible storage: `s3://bucket/prefix`, read by ranged requests into the cache of this machine.

Endpoint, region and credentials come from where the AWS libraries look for them: environment (AWS_ENDPOINT_URL for stores other
than Amazon's), `~/.aws`, the instance's own role. Without credentials requests are not signed, as public buckets allow.
Each object is pinned to the version that was listed when the model was opened (`If-Match`).
"""

import logging
import os
import random
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from spotserve.core.errors import ModelError
from spotserve.engine.files.cache_folder import KEEP_BYTES, CacheEntry, CacheFolder
from spotserve.engine.files.cached_file import CachedFile
from spotserve.engine.files.model_index import is_config_file, read_index
from spotserve.engine.files.opened_model import OpenedModel
from spotserve.engine.files.range_cache import CachedObject, RemoteObject
from spotserve.engine.files.tensor_files import TensorFiles

_log = logging.getLogger(__name__)

NUM_REQUESTS = 8
"""Ranged requests that run at once in one process."""
_CHUNK_BYTES = 2**18
_MAX_FAILURES = 6
_FIRST_PAUSE_S = 0.1
_CHANGED = frozenset({"PreconditionFailed", "412", "NoSuchKey", "404"})


class S3Folder:
    """The objects directly below one prefix, as they were when this was made.

    Raises:
        ModelError: the bucket cannot be listed, or there is nothing.
    """

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ModelError(f"{url}: expected s3://BUCKET/PREFIX")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        self._client = _client()
        self.objects = self._list()
        """By name below the prefix."""

    def read(self, name: str, span: range | None = None) -> Iterator[bytes]:
        """The bytes of `span` (None: all) of one object. A connection that breaks is picked up at the byte where it broke.

        Raises:
            ModelError: the object changed since it was listed, cannot be read, or the network stays broken.
        """
        known = self.objects[name]
        span = range(known.size_bytes) if span is None else span
        position, failures = span.start, 0
        while position < span.stop:
            begun_at = position
            wanted = f"bytes {position}-{span.stop - 1}/{known.size_bytes}"
            try:
                answer = self._client.get_object(
                    Bucket=self._bucket,
                    Key=self._prefix + name,
                    Range=f"bytes={position}-{span.stop - 1}",
                    IfMatch=known.etag,
                )
                if answer.get("ContentRange") != wanted:
                    raise ModelError(f"{known.url}: expected {wanted}, the server sends {answer.get('ContentRange')}")
                for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                    position += len(chunk)
                    yield chunk
            except ClientError as error:
                raise self._refused(known, error) from error
            except (HTTPClientError, IncompleteReadError) as error:
                failures = 1 if position - begun_at >= _CHUNK_BYTES else failures + 1
                if failures == _MAX_FAILURES:
                    raise ModelError(f"{known.url}: broke off at byte {position}, {failures} times: {error}") from error
                _log.warning("%s broke off at byte %d (%s): once more", known.url, position, error)
                time.sleep(_FIRST_PAUSE_S * 2**failures * random.uniform(0.5, 1))  # apart from other ranks' retries
            except BotoCoreError as error:
                raise ModelError(f"{known.url}: cannot be read: {error}") from error

    def content(self, name: str) -> bytes:
        """A small object as a whole; raises as `read`."""
        return b"".join(self.read(name))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _list(self) -> Mapping[str, RemoteObject]:
        objects = {}
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            ):
                for each in page.get("Contents", ()):
                    name = each["Key"].removeprefix(self._prefix)
                    objects[name] = RemoteObject(f"{self.url}/{name}", each["ETag"], each["Size"])
        except (BotoCoreError, ClientError) as error:
            raise ModelError(f"{self.url}: cannot be listed: {error}") from error
        if not objects:
            raise ModelError(f"{self.url}: no object directly below this prefix; expected config.json and safetensors")
        return objects

    def _refused(self, known: RemoteObject, error: ClientError) -> ModelError:
        if error.response.get("Error", {}).get("Code") in _CHANGED:
            return ModelError(
                f"{known.url}: changed or deleted while it was being loaded: expected version {known.etag}; load it again"
            )
        return ModelError(f"{known.url}: cannot be read: {error}")


def open_s3(url: str, cache: CacheFolder, wanted_names: Collection[str] | None = None) -> TensorFiles:
    """The model below `url`. Configuration and tokenizer are copied now, tensors when they are asked for.

    Raises:
        ModelError: it cannot be reached or read, or is no model in Hugging Face format with safetensors.
    """
    with ExitStack() as held:
        source = held.enter_context(closing(S3Folder(url)))
        if "config.json" not in source.objects:
            raise ModelError(f"{source.url}: no config.json; expected a model in Hugging Face format")
        threads = held.enter_context(ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="s3"))
        held.callback(cache.remove_unused, KEEP_BYTES)
        configs = held.enter_context(closing(_copy_texts(source, cache)))
        index = read_index(source.objects.keys(), lambda name: (configs.path / name).read_bytes(), source.url)
        index.check_present(source.objects.keys(), wanted_names)

        def open_file(name: str) -> CachedFile:
            remote = source.objects[name]
            with ExitStack() as opening:
                copy = opening.enter_context(closing(CachedObject(cache, remote, lambda span: source.read(name, span), threads)))
                file = CachedFile(remote, copy)
                opening.pop_all()
                return file

        return OpenedModel(configs.path, index, open_file, held.pop_all().close)


def _copy_texts(source: S3Folder, cache: CacheFolder) -> CacheEntry:
    """Configuration, tokenizer and index, as files in a folder of the cache."""
    texts = {name: each for name, each in source.objects.items() if is_config_file(name, each.size_bytes)}
    versions = (f"{name} {each.etag}" for name, each in sorted(texts.items()))

    def prepare(folder: Path) -> None:
        for name in texts:
            (folder / name).write_bytes(source.content(name))

    return cache.enter(("config", source.url, *versions), prepare)


def _client() -> Any:
    session = boto3.session.Session()
    other_store = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return session.client(
        "s3",
        config=Config(
            max_pool_connections=NUM_REQUESTS,
            retries={"mode": "standard", "total_max_attempts": _MAX_FAILURES},
            connect_timeout=10,
            read_timeout=30,
            signature_version=None if session.get_credentials() else UNSIGNED,
            s3={"addressing_style": "path" if other_store else "auto"},  # few others resolve a host name per bucket
        ),
    )
