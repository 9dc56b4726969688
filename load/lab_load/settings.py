"""Settings of the load tests, from environment variables. No other module of the package reads the environment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .shape import Shape

MAX_WORDS = 20_000_000  # of all questions of a run


class Settings(BaseSettings):
    """Each field is the environment variable `LOAD_<NAME>`. Lists are separated by commas, times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="LOAD_", env_ignore_empty=True, extra="ignore")

    host: str = Field("http://127.0.0.1:8080", description="Base URL of the target, usually the proxy.")
    api_key: SecretStr | None = Field(None, description="Key for the target.")
    model: str | None = Field(None, description="Model to use. Default: the first chat model that the target lists.")
    users: int = Field(8, ge=1, description="Users at once; each sends its next request when its answer is complete.")
    spawn_rate: float | None = Field(
        None, gt=0, le=1000, description="Users that start in each second. Default: 8, or all within 2 seconds."
    )
    seconds: int = Field(30, ge=1, description="Length of a run.")
    warmup_seconds: float = Field(0, ge=0, description="Warm-up after all users have started; figures leave it out.")
    requests: int = Field(2000, ge=1, le=1_000_000, description="Most requests of a run: lines of its workload file.")
    rate: float | None = Field(
        None, gt=0, le=10_000, description="Open loop: requests that start in each second, without waiting for answers."
    )
    burstiness: float = Field(
        1.0, ge=0, le=100, description="Open loop: squared variation coefficient of the gaps; 1: Poisson, 0: constant."
    )
    shape: Literal["constant", "ramp", "spike", "diurnal"] = Field(
        "constant", description="Open loop: how the rate changes over the run."
    )
    processes: int = Field(1, ge=1, le=64, description="Generator processes; their records are merged.")
    workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Generators elsewhere (`python -m lab_load worker`) that this process, the master, waits for; they "
        "send, it merges. 0: none.",
    )
    master_host: str | None = Field(None, description="Of a worker: name or address of its master.")
    master_port: int = Field(5557, ge=1, le=65535, description="Port at which the master listens for its workers.")
    cache: bool = Field(
        True, description="`false` sends `Cache-Control: no-store`: answers neither come from the cache nor are stored."
    )
    slo_ttft_seconds: float = Field(1.0, gt=0, description="Goodput: longest TTFT.")
    slo_tpot_seconds: float = Field(0.2, gt=0, description="Goodput: longest TPOT.")
    ttl_seconds: float | None = Field(
        None,
        gt=0,
        description="TTL of the target's cache, for `herd` and the expected hit ratio. Default: no limit.",
    )
    capacity: int | None = Field(
        None, ge=1, description="Entries that the target's cache holds, for the expected hit ratio. Default: no limit."
    )
    language: Literal["en", "ko", "both"] = Field("en", description="Language of the questions.")
    prefix_groups: int = Field(4, ge=1, le=1000, description="Number of shared system messages in a `prefix` run.")
    proxy_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="URLs of the proxy processes whose counters are compared. Default: LOAD_HOST."
    )
    proxy_counters: bool = Field(
        True,
        description="`false`: LOAD_HOST leads to several proxies, which are compared if LOAD_PROXY_URLS names each.",
    )
    model_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="URLs of the model services whose counters are compared. Default: none."
    )
    think_seconds: float = Field(0, ge=0, le=600, description="Time a user waits between two questions.")
    max_users: int = Field(256, ge=1, description="Most users; more are refused, also in the web page.")
    max_seconds: int = Field(3600, ge=1, description="Longest run; longer ones are refused, also in the web page.")
    answer_timeout_seconds: float = Field(120, gt=0, description="An answer that takes longer is a failure.")
    drain_seconds: int = Field(30, ge=0, description="Time for running answers to end after the end of a run.")
    prompt_words: int = Field(40, ge=1, le=10_000, description="Length of a question in words.")
    max_tokens: int = Field(64, ge=1, le=100_000, description="Longest answer in tokens.")
    prompts: int = Field(100, ge=1, le=1_000_000, description="Number of different questions in a `caching` run.")
    zipf_exponent: float = Field(
        1.0, ge=0, le=10, description="Exponent s of Zipf's law: question k has the weight k^-s; 0: all are equal."
    )
    seed: int = Field(1, ge=0, description="The same seed gives the same questions in the same order.")
    salt: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Word at the start of each question. Default: a new one for each run, so that the cache is cold.",
    )
    runs_dir: Path = Field(Path("runs"), description="Folder in which each run creates its own folder.")
    web_host: str = Field("127.0.0.1", description="Address that the web page and the API listen on.")
    admin_key: SecretStr | None = Field(
        None, description="Key for the API that starts runs. Default: none; then only callers on loopback are answered."
    )
    admin_key_file: Path | None = Field(None, description="File with that key. An empty file sets no key.")
    allow_anonymous: bool = Field(
        False,
        description="Allows the API to listen on other addresses than loopback without a key.",
    )
    api_port: int = Field(8090, ge=1, le=65535, description="Port of the API that starts runs.")
    port: int = Field(8089, ge=1, le=65535, description="Port of the web page.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names that browsers may use, besides loopback and `load`; `*`: any. Prevents DNS rebinding.",
    )

    @field_validator("allowed_hosts", "proxy_urls", "model_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().lower().rstrip("/") for part in value.split(",") if part.strip())
        return value

    @field_validator("proxy_urls", "model_urls")
    @classmethod
    def _http_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cls._http_url(each) for each in value)

    @field_validator("host")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or "@" in value or "?" in value:
            raise ValueError("must be an http:// or https:// URL without a user and without a query")
        return value.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _bounded(self) -> Settings:
        if self.users > self.max_users:
            raise ValueError(f"LOAD_USERS={self.users} is more than LOAD_MAX_USERS={self.max_users}")
        if self.seconds > self.max_seconds:
            raise ValueError(f"LOAD_SECONDS={self.seconds} is more than LOAD_MAX_SECONDS={self.max_seconds}")
        if self.workers and self.processes > 1:
            raise ValueError("LOAD_WORKERS and LOAD_PROCESSES are both set: a master sends nothing itself")
        if self.requests * self.prompt_words > MAX_WORDS:
            raise ValueError(f"LOAD_REQUESTS x LOAD_PROMPT_WORDS is more than {MAX_WORDS:,} words, too many for memory")
        return self

    @model_validator(mode="after")
    def _key_of_the_file(self) -> Settings:
        if self.admin_key_file is None:
            return self
        if self.admin_key is not None:
            raise ValueError("LOAD_ADMIN_KEY and LOAD_ADMIN_KEY_FILE are both set: keep one")
        try:
            key = self.admin_key_file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"LOAD_ADMIN_KEY_FILE cannot be read: {error}") from None
        self.admin_key, self.admin_key_file = (SecretStr(key) if key else None), None
        return self

    @property
    def generators(self) -> int:
        """Processes that send."""
        return self.workers or self.processes

    @property
    def longest_schedule(self) -> int:
        """Longest duration of a run's schedule in seconds; `herd` waits for the TTL twice."""
        return self.seconds + math.ceil(2 * ((self.ttl_seconds or 0) + 2) if self.rate is None else 0)

    @property
    def workload_shape(self) -> Shape:
        return Shape(self.seed, self.requests, self.users, self.prompt_words, self.max_tokens, self.language,
                     self.prompts, self.zipf_exponent, self.prefix_groups, self.ttl_seconds)  # fmt: skip


# Of each process of a distributed run its own; the master's others are its workers', too.
OWN = frozenset(
    {"api_key", "admin_key", "admin_key_file", "runs_dir", "web_host", "port", "api_port", "allowed_hosts",
     "master_host", "master_port"}
)  # fmt: skip
# Settings that the web page offers in addition to Locust's own fields (users, spawn rate, host, run time).
EDITABLE = ("model", "prompt_words", "max_tokens", "prompts", "zipf_exponent", "think_seconds", "seed", "salt")


def complaint(error: ValidationError) -> str:
    """The first error in one line that names its variable."""
    first = error.errors()[0]
    variable = "".join(f"LOAD_{str(part).upper()}: " for part in first["loc"][:1])
    return f"{variable}{first['msg'].removeprefix('Value error, ')}"
