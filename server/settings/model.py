"""Owns every setting of our server, documented once; `server.settings.sources` makes the flags and docs/settings.md.

vLLM's own flags stay vLLM's. Invariant: settings that validate can be used together, and no message repeats a secret.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from adapters.errors import StoreUnusableError
from adapters.format.files import Limits
from adapters.store.address import is_shared
from perft.back_ends import BackEnd
from server.auth.keys import KeyRing, key_problem, labelled_keys
from server.settings.connections import ConnectionSettings
from server.settings.console import ConsoleSettings
from server.settings.key_files import SECRET_FILE, read_admin_key, read_api_keys
from server.settings.loading import LoadingSettings
from server.settings.sharing import SharingSettings

LogFormat = Literal["text", "json"]
ENVIRONMENT_PREFIX = "PERFT_"
FILE_ARGUMENT = "perft_config"
"""The argument of Settings that is not a setting: the path of the TOML file."""
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_STORE_DEFAULT = "`$XDG_DATA_HOME/perft/store`, else `~/.local/share/perft/store`"


def default_store() -> Path:
    """The folder of the store unless it is set."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "perft" / "store"


def _shown(default: str) -> dict[str, Any]:
    """The default as the documentation shows it."""
    return {"default": default}


class Settings(ConsoleSettings, LoadingSettings, SharingSettings, ConnectionSettings):
    """Named as in the TOML file; in the environment PERFT_ and capitals; flags --with-dashes (`api_keys`: --api-key).

    Read them with `server.settings.sources.load`, which also rejects unknown settings and explains every problem.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    # Keys and access
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="LABEL=KEY, a key for inference; the flag can be repeated, the environment variable takes several, "
        "separated by commas or as a JSON list; with none, inference needs no key",
    )
    api_key_file: Path | None = Field(
        None, description=f"a file with more API keys, one LABEL=KEY per line, # begins a comment; {SECRET_FILE}"
    )
    admin_key: SecretStr | None = Field(
        None,
        description="the key for every route that changes adapters; it has no rate limits; without one, those routes "
        "answer only this machine, and the server does not start on an address that others can reach",
    )
    admin_key_file: Path | None = Field(None, description=f"a file that holds only the admin key; {SECRET_FILE}")
    metrics_key: SecretStr | None = Field(
        None,
        description="the key for GET /metrics; the admin key works too; with neither, only this machine can read it, "
        "with any API key if there are some",
    )
    metrics_bind: str | None = Field(
        None,
        description="HOST:PORT of a separate listener for /metrics, which the main one then does not serve; it asks "
        "for no key: keep it on a private network; port 0 takes a free one, and says which",
    )

    # Adapters
    adapter_store: Path | str = Field(
        default_factory=default_store,
        description="the folder of every adapter, or an address that servers share: file:///PATH, s3://, gs://, az://",
        json_schema_extra=_shown(_STORE_DEFAULT),
    )
    allow_other_base: bool = Field(False, description="accept and serve adapters of other bases where their shapes fit")
    max_adapter_bytes: int = Field(
        Limits.max_weights_bytes, ge=1, description="bytes of an adapter's weights file; a larger upload is rejected"
    )
    max_adapters: int = Field(10_000, ge=1, description="adapter names in the store")
    max_versions: int = Field(1_000, ge=1, description="versions of one adapter in the store")
    max_uploads: int = Field(8, ge=1, description="uploads received at once; others wait, unread")
    max_store_bytes: int | None = Field(
        None, ge=1, description="bytes of all adapters in the store", json_schema_extra=_shown("the size of the disk")
    )

    # Memory
    pool_rows: int | None = Field(
        None,
        ge=1,
        description="rows of the device pool, which holds adapters",
        json_schema_extra=_shown("5 % of the device's memory"),
    )
    operator_backend: BackEnd = Field(
        "auto",
        description="what computes the adapters' part of a step: `numba` (CPU), `triton` (GPU) or `torch`, slower and "
        "always there; `auto` picks by device",
    )
    host_cache_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of packed adapters kept in host memory",
        json_schema_extra=_shown("a tenth of the machine's memory"),
    )

    # Limits of a key
    key_max_requests: int | None = Field(
        None,
        ge=1,
        description="inference requests of one key at once; each prompt and each of its `n` choices counts",
        json_schema_extra=_shown("no limit"),
    )
    key_tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="prompt and generated tokens of one key per minute",
        json_schema_extra=_shown("no limit"),
    )

    # Limits of one request
    max_body_bytes: int | None = Field(
        None,
        ge=1024,
        description="bytes of an inference request's body; a larger one is refused with 413",
        json_schema_extra=_shown("1 MiB and 64 bytes for each token of the model's length"),
    )
    max_sequences: int = Field(
        128, ge=1, le=16384, description="sequences that one request may ask for: its prompts times `n`"
    )

    # Structured outputs
    structured_max_bytes: int = Field(
        64 * 1024,
        ge=256,
        description="bytes of a request's structured-output spec: its schema, pattern, choices or grammar, with the "
        "schemas of tools that must be called",
    )
    structured_compile_s: float = Field(
        4.0,
        gt=0,
        description="seconds of CPU time that the compile of one spec may take; it is tried in a process of its own "
        "before the engine gets it",
    )
    structured_memory_bytes: int = Field(
        512 * 1024**2, ge=64 * 1024**2, description="bytes of memory that the compile of one spec may take"
    )

    # Time
    upload_timeout_s: float = Field(600.0, gt=0, description="seconds for the whole body of an upload")
    upload_idle_timeout_s: float = Field(30.0, gt=0, description="seconds without a byte after which an upload fails")
    engine_timeout_s: float = Field(
        60.0,
        gt=0,
        description="seconds without any answer of the engine after which requests end with 503 engine_unavailable, "
        "until it answers again; longer than its longest step",
    )
    load_timeout_s: float = Field(60.0, gt=0, description="seconds a request waits for its adapter to be loaded")
    drain_timeout_s: float = Field(
        300.0, ge=0, description="seconds a deleted version's running requests have to finish"
    )
    shutdown_timeout_s: float = Field(60.0, ge=0, description="seconds running requests have to finish after SIGTERM")

    # Logs and metrics
    audit_log: Path | None = Field(
        None,
        description="the file that records who changed what; outside the store",
        json_schema_extra=_shown("`ADAPTER_STORE.audit.jsonl`, beside the store"),
    )
    log_format: LogFormat = Field(
        "text", description="format of the access log, one line per request: `text` or `json`"
    )
    metrics_max_adapters: int = Field(
        500, ge=1, description="adapters with metrics under their own name; the others count as `_other`"
    )
    expert_sampling: int = Field(
        64, ge=0, description="count the tokens of each expert in every n-th engine step; 0: in none"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        file = init_settings.init_kwargs.pop(FILE_ARGUMENT, None)
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """Accept the environment's commas or JSON, and a TOML table of labels."""
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("found invalid JSON, expected a list of LABEL=KEY") from None
        if isinstance(value, str):
            return [item.strip() for item in value.split(",")] if value.strip() else []
        return [f"{label}={key}" for label, key in value.items()] if isinstance(value, dict) else value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, items: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        labelled_keys((f"entry {number}", item.get_secret_value()) for number, item in enumerate(items, start=1))
        return items

    @field_validator("admin_key", "metrics_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and (problem := key_problem(key.get_secret_value())):
            raise ValueError(problem)
        return key

    @field_validator("adapter_store", mode="before")
    @classmethod
    def _full_path_or_address(cls, place: object) -> object:
        return place if _is_shared(str(place)) else Path(str(place)).expanduser().absolute()

    @field_validator("api_key_file", "admin_key_file", "audit_log", "adapter_cache")
    @classmethod
    def _full_path(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("metrics_bind")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None:
            _address(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        problems: list[str] = []
        if isinstance(self.adapter_store, Path) and self.audit_path.is_relative_to(self.adapter_store):
            problems.append(
                f"audit_log: found {str(self.audit_path)!r}, which lies inside the store {str(self.adapter_store)!r}; "
                "expected a path outside it"
            )
        if self.admin_key is not None and self.admin_key_file is not None:
            problems.append("admin_key and admin_key_file: found both, expected one of them")
        if self.metrics_key is not None and self.metrics_bind is not None:
            problems.append(
                "metrics_key and metrics_bind: found both, expected one of them: a separate listener asks for no key; "
                "set metrics_bind on a private network, or metrics_key for /metrics on the main listener"
            )
        try:
            self.key_ring  # noqa: B018 (reads the files and compares the keys)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def key_ring(self) -> KeyRing:
        """The keys, with those of the files (read once). Raises ValueError for files and keys that cannot be used."""
        given = labelled_keys(("api_keys", key.get_secret_value()) for key in self.api_keys)
        from_file = [] if self.api_key_file is None else read_api_keys(self.api_key_file)
        admin = None if self.admin_key is None else self.admin_key.get_secret_value()
        if self.admin_key_file is not None:
            admin = read_admin_key(self.admin_key_file)
        metrics = None if self.metrics_key is None else self.metrics_key.get_secret_value()
        return KeyRing([*given, *from_file], admin, metrics)

    @property
    def audit_path(self) -> Path:
        """The path of the audit log: beside the store unless it is set; each server has its own."""
        beside = self.adapter_store if isinstance(self.adapter_store, Path) else self.adapter_cache
        return self.audit_log or beside.with_name(f"{beside.name}.audit.jsonl")

    @property
    def adapter_limits(self) -> Limits:
        """The operator's limits of one adapter."""
        return Limits(self.max_adapter_bytes, self.allow_other_base)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host (without brackets) and port of the listener for /metrics alone."""
        return None if self.metrics_bind is None else _address(self.metrics_bind)


def _is_shared(place: str) -> bool:
    try:
        return is_shared(place)
    except StoreUnusableError as error:
        raise ValueError(str(error)) from None


def _address(text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ValueError(
            f"found {text!r}, expected HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090; port 0: any free one"
        )
    return found["host"].strip("[]"), int(found["port"])
