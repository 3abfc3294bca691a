"""Owns the `args` of our application in a Ray Serve config file."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.hosting.prepare import prepare

FLAGS_KEY = "perft_flags"
"""Of LLMConfig.experimental_configs: the command line of `perft serve`."""
SECRET_FLAGS = ("--api-key", "--admin-key", "--metrics-key")
RAYS_FLAGS = ("--host", "--port", "--uds", "--ssl-", "--root-path", "--served-model-name")


class RayArguments(BaseModel):
    """What `server.ray_serve.application:build` is given.

    Keys and other secrets are not here: Ray's dashboard shows it. They come from the environment of the replicas
    (PERFT_ADMIN_KEY, PERFT_API_KEYS) or from files that settings name.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="the folder or the repository of the base model")
    name: str = Field(min_length=1, description="the name under which the base model is served")
    flags: list[str] = Field([], description="flags of `perft serve`: --adapter-store, --max-model-len, ...")
    replicas: int = Field(2, ge=1, le=1000, description="how many servers; or see `deployment`")
    device: Literal["gpu", "cpu"] = Field("gpu", description="what a replica's engine runs on")
    deployment: dict[str, Any] = Field(
        {}, description="options of Ray's deployment: autoscaling_config, ray_actor_options, max_ongoing_requests, ..."
    )
    llm: dict[str, Any] = Field({}, description="other fields of Ray's LLMConfig: accelerator_type, runtime_env, ...")
    stats_period_s: float = Field(2.0, ge=0.1, description="seconds between two reports of a replica to the routers")

    @field_validator("flags")
    @classmethod
    def _only_what_is_ours_to_say(cls, flags: list[str]) -> list[str]:
        for flag in flags:
            name = flag.partition("=")[0].replace("_", "-")
            if name in SECRET_FLAGS:
                raise ValueError(
                    f"found {name}, expected no secret: Ray's dashboard shows this file; set PERFT_"
                    f"{'API_KEYS' if name == '--api-key' else name[2:].upper().replace('-', '_')} where Ray runs"
                )
            if name.startswith(RAYS_FLAGS):
                raise ValueError(
                    f"found {name}, expected none: Ray Serve listens (http_options); `name` names the base"
                )
        return flags

    @field_validator("model")
    @classmethod
    def _full_path(cls, model: str) -> str:
        is_path = model.startswith(("/", "./", "../", "~"))
        return str(Path(model).expanduser().absolute()) if is_path else model

    @property
    def command_line(self) -> list[str]:
        """As `perft serve` has it."""
        return [self.model, "--served-model-name", self.name, *self.flags]


def prepared(command_line: Sequence[str]) -> Namespace:
    """The arguments of a server that Ray hosts. Raises StartError."""
    return prepare([*command_line, "--host", "0.0.0.0"])  # where Ray's replicas listen: an admin key is needed
