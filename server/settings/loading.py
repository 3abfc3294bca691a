"""Owns the setting that says from where requests may load adapters."""

import json
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from server.sources.place import Place, parse_allowed


class LoadingSettings(BaseSettings):
    """For control planes; without it their routes are not there."""

    adapter_sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="a place below which POST /v1/load_lora_adapter may load adapters: an absolute folder, file://, "
        "hf://OWNER/ or hf://OWNER/REPO, s3://BUCKET/PREFIX/ (gs://, az://); the flag can be repeated, the environment "
        "variable takes several, separated by commas or as a JSON list; with none, that route is not there",
    )

    @field_validator("adapter_sources", mode="before")
    @classmethod
    def _split_sources(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("found invalid JSON, expected a list of places") from None
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("adapter_sources")
    @classmethod
    def _check_sources(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        for place in places:
            parse_allowed(place)
        return places

    @cached_property
    def allowed_sources(self) -> tuple[Place, ...]:
        """The places, parsed."""
        return tuple(map(parse_allowed, self.adapter_sources))
