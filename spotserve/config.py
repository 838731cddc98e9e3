"""Every setting, one frozen section per process. Read once, in `cli`; no flag travels further than these values.

Order of precedence: command-line flag, `SPOTSERVE_*` environment variable (`SPOTSERVE_GATEWAY__PORT=9000`), the TOML file
named by `--config` or `SPOTSERVE_CONFIG`, the default below.
"""

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError, TomlConfigSettingsSource

from spotserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEMO_MODEL = Path(__file__).parent / "demo" / "models" / "target"
"""The small model that ships."""


class Section(BaseModel):
    """Base of all sections: frozen, and a misspelt name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Invariant = Literal["batch", "full"]
"""What logits do not depend on, to the last bit: `batch`: neighbours in the batch, the cut of prompts, drafts, the cache;
`full`: the number of stages and shards as well."""


class EngineSettings(Section):
    """How one replica computes."""

    kind: Literal["native", "openai"] = "native"
    """`native`: this project's engine; `openai`: a server with an OpenAI-compatible API at `url`, taken as it is."""
    url: str | None = None
    """Of the server, with `kind = "openai"`: `http://127.0.0.1:8001/v1`."""
    api_key: SecretStr | None = None
    """What that server wants as `Authorization: Bearer`."""
    model: str = str(DEMO_MODEL)
    """A local folder in Hugging Face format, a hub id, or `s3://BUCKET/PREFIX`."""
    tokenizer: str | None = None
    """A local folder or a hub id that has the tokenizer's files; None: they are with the model. Needed with `s3://`."""
    served_name: str | None = None
    """What clients call the model; None: the last part of `model`."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """What the engine computes in; weights in another dtype are converted."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What one rank computes on; `cuda`: the first GPU that its process sees, where `invariant` holds up to rounding."""
    max_batch: int = Field(32, ge=1)
    """Sequences that run at once."""
    max_step_tokens: int = Field(256, ge=16)
    """Tokens computed in one step, prompts and drafts included: longer prompts are cut into chunks."""
    block_tokens: int = Field(16, ge=1)
    """Tokens per block of the paged KV cache."""
    kv_tokens: int = Field(32_768, ge=64)
    """Tokens that the KV cache holds in all."""
    threads: int = Field(1, ge=1)
    """Compute threads per device."""
    invariant: Invariant = "batch"
    """What logits do not depend on, to the last bit."""
    quantization: Literal["none", "int8"] = "none"
    """`int8`: weights of linear layers as 8-bit integers with a scale per output, computed in `dtype`."""
    prefix_cache: bool = True
    """Whether the KV of prompts and answers is kept, as long as there is room, for requests that begin alike."""
    speculation: str = Field("adaptive", pattern=r"^(off|adaptive|smartspec-2024|(ngram|suffix|model|staged):[1-9][0-9]?)$")
    """`off`; `adaptive`: the system chooses who drafts and how much; `DRAFTER:K`: this drafter (ngram, suffix, model, staged), at
    most K tokens per sequence and step; `smartspec-2024`: SmartSpec's released rule, to compare with."""
    draft_model: str | None = None
    """A small model with the same tokenizer, which drafts: a local folder or a hub id. Needed by `model` and `staged`."""

    @property
    def drafts_with_model(self) -> bool:
        """Whether a draft model would be used."""
        return self.draft_model is not None and self.speculation.partition(":")[0] not in ("off", "ngram", "suffix")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.served_name is not None:
            return self.served_name
        return "spotserve-demo" if Path(self.model) == DEMO_MODEL else Path(self.model).name

    def for_worker(self) -> dict[str, object]:
        """As JSON values, the key in the clear: for the pipe to a worker, and for nothing that is kept or shown."""
        key = self.api_key.get_secret_value() if self.api_key is not None else None
        return {**self.model_dump(mode="json"), "api_key": key}

    @model_validator(mode="after")
    def _draft_model_is_given(self) -> Self:
        if self.draft_model is None and self.speculation.partition(":")[0] in ("model", "staged"):
            raise ValueError(f"speculation {self.speculation!r} needs draft_model (--draft-model MODEL)")
        return self

    @model_validator(mode="after")
    def _server_and_url_belong_together(self) -> Self:
        if (self.kind == "openai") is not (self.url is not None):
            raise ValueError(
                "kind 'openai' (--engine openai) and url (--engine-url URL) belong together: "
                f"kind is {self.kind!r}, url is {'not given' if self.url is None else 'given'}"
            )
        return self


class GatewaySettings(Section):
    """The OpenAI-compatible front."""

    host: str = "127.0.0.1"
    """Nothing listens beyond loopback unless asked."""
    port: int = Field(8000, ge=0, le=65535)
    """0: any free port."""
    api_key: str | None = None
    """What clients must send as `Authorization: Bearer`; None: anyone who reaches the port is served."""
    max_queued: int = Field(1024, ge=1)
    """Sequences beyond what the replicas run at once that may wait before new calls get 429."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """A larger request body gets 413."""
    detach_grace_s: float = Field(10.0, ge=0)
    """How long a streamed request goes on after its client left, for it to come back."""
    keep_alive_s: float = Field(10.0, gt=0)
    """Silence after which a stream carries a comment, so that proxies do not cut it."""


class ControllerSettings(Section):
    """Deciding."""

    host: str = "127.0.0.1"
    """Where the controller listens for workers and gateways."""
    port: int = Field(0, ge=0, le=65535)
    """Its port; 0: any free one."""
    planning: Literal["shape", "auto"] = "shape"
    """`shape`: replicas are of `pipeline` x `tensor`, as many as `data`; `auto`: the planner chooses, and mixes shapes."""
    data: int | None = Field(None, ge=1)
    """Replicas wanted; None: as many as the devices allow."""
    pipeline: int = Field(1, ge=1)
    """Stages of a replica (P)."""
    tensor: int = Field(1, ge=1)
    """Shards of a stage (M)."""
    use_idle: bool = True
    """With `auto`: whether devices beside the best plan get replicas, too, since machines that are there are paid for; false: they
    are left, to be returned."""
    ttft_s: float | None = Field(None, gt=0)
    """Limit of the time to the first token, at the 99th percentile; None: none. Limits guide the planner."""
    tpot_s: float | None = Field(None, gt=0)
    """Limit of the time per further token, at the 99th percentile."""
    e2e_s: float | None = Field(None, gt=0)
    """Limit of the time to the last token, at the 99th percentile."""
    rate_rps: float | None = Field(None, gt=0)
    """Requests per second to plan for; None: what comes is measured, and the next three are not asked."""
    prompt_tokens: int = Field(512, ge=1)
    """Length of their prompts."""
    output_tokens: int = Field(128, ge=1)
    """Length of their answers."""
    gap_cv: float = Field(1.0, ge=0)
    """How bursty they come: standard deviation of the time between two of them over its mean; 1: at random."""
    instances: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Instances to hold: the controller rents and returns them, and the settings below say which. `auto`: the fewest with which
    requests meet the limits or, without limits, are about as fast as with `max_instances`. None: the provider restocks what is
    taken."""
    max_instances: int = Field(64, ge=1)
    """Instances at most, spares included; one under notice does not count."""
    on_demand_floor: int = Field(0, ge=0)
    """So many of them are always on demand."""
    fall_back: bool = True
    """Whether on-demand instances stand in while no zone gives spot ones."""
    max_spares: int = Field(4, ge=0)
    """Spot instances beyond `instances` at most; how many follows from how often zones take them and how long starting takes."""
    shortage_share: float = Field(0.05, gt=0, lt=1)
    """Share of the time in which losses may leave less than `instances` while replacements start: spares are held for the rest."""
    return_s: float = Field(300.0, ge=0)
    """On-demand instances that stood in are kept for so long after spot ones have taken over."""
    scale_down_s: float = Field(1200.0, ge=0)
    """Spot instances are kept for so long after they became too many."""

    @model_validator(mode="after")
    def _the_maximum_is_enough(self) -> Self:
        if self.instances == "auto" and self.planning != "auto":
            raise ValueError("instances is auto, which asks the planner: set planning to auto as well")
        needed = max(1 if self.instances in (None, "auto") else int(self.instances), self.on_demand_floor)
        if self.max_instances < needed:
            raise ValueError(f"max_instances is {self.max_instances}, but instances and on_demand_floor ask for {needed}")
        return self


class WorkerSettings(Section):
    """One instance."""

    heartbeat_s: float = Field(0.25, gt=0)
    """Time between two heartbeats."""
    commit_interval_s: float = Field(0.02, ge=0)
    """Least time between two commits of a worker's progress; 0: one per engine step. What a sudden loss of worker and gateway
    together can cost is computing this much again."""
    rank_silence_s: float = Field(1.0, gt=0)
    """How long a rank may give no sign of life before its replica is given up. A rank that dies is noticed at once; this is for
    one that hangs."""
    orphan_s: float = Field(60.0, gt=0)
    """How long a worker without a controller goes on before it leaves."""
    keep_finished_s: float = Field(30.0, gt=0)
    """How long finished progress stays in memory for a gateway that comes back."""


class StoreSettings(Section):
    """Progress of requests."""

    url: str | None = None
    """`sqlite:///relative` or `sqlite:////absolute`; `redis://` or `rediss://` (`?cluster=true` for a Redis cluster); `none`.
    None: SQLite in the system's folder."""
    time_to_live_s: float = Field(3600.0, gt=0)
    """How long a request's progress is kept after its last commit."""
    max_bytes: int = Field(2**30, ge=2**20)
    """Oldest progress goes first beyond this. SQLite only: Redis has `maxmemory` with `maxmemory-policy volatile-ttl`."""
    timeout_s: float = Field(2.0, gt=0)
    """How long one call to the store may take."""


class LocalCloudSettings(Section):
    """The cloud that `spotserve up` plays on one machine."""

    instances: int = Field(2, ge=1, le=256)
    """Instances at the start."""
    devices: int = Field(1, ge=1, le=16)
    """Devices of each instance: rank processes that compute side by side."""
    device_memory_bytes: int | None = Field(None, ge=2**20)
    """What weights and KV of one device may take, for planning; None: an equal share of this machine's memory."""
    restock_s: float | None = Field(2.0, ge=0)
    """Time until a taken instance's place goes to a new one; None: never (a trace drives the fleet)."""
    zones: tuple[str, ...] = Field(("local-a", "local-b"), min_length=1)
    """Zones that instances are spread over, in turn."""
    spot_usd_per_hour: float = 1.9046
    """Price of a spot instance in reports: AWS g4dn.12xlarge as in the SpotServe paper (ASPLOS'24, section 6.1)."""
    on_demand_usd_per_hour: float = 3.912
    """Price of an on-demand instance in reports, from the same source."""


class Settings(BaseSettings):
    """All sections."""

    model_config = SettingsConfigDict(env_prefix="SPOTSERVE_", env_nested_delimiter="__", frozen=True, extra="forbid")

    engine: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    controller: ControllerSettings = ControllerSettings()
    worker: WorkerSettings = WorkerSettings()
    store: StoreSettings = StoreSettings()
    cloud: LocalCloudSettings = LocalCloudSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file."""
        path = os.environ.get("SPOTSERVE_CONFIG")
        if path and not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        file = (TomlConfigSettingsSource(settings_cls, Path(path)),) if path else ()
        return (init_settings, env_settings, *file)


def load_settings(**sections: dict[str, object]) -> Settings:
    """Settings from flags (`sections`: section -> name -> value, None = not given), environment and file.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names each one.
    """
    given = {name: kept for name, flags in sections.items() if (kept := {k: v for k, v in flags.items() if v is not None})}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}{_got(item)}" for item in error.errors())
        raise ConfigError(problems) from None  # the library's message quotes values, and a key may be one of them
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"SPOTSERVE_CONFIG={os.environ.get('SPOTSERVE_CONFIG')}: {error}") from error


def _got(problem: "ErrorDetails") -> str:
    """The offending value, unless it is a secret or may hold one."""
    value, name = problem["input"], problem["loc"][-1]
    return "" if name == "api_key" or isinstance(value, dict) else f" (got {value!r})"
