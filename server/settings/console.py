"""Owns the settings of the console."""

from pydantic import Field
from pydantic_settings import BaseSettings


class ConsoleSettings(BaseSettings):
    """The page at `/`; read as a part of `server.settings.model.Settings`."""

    console: bool = Field(True, description="serve the console, a page at `/` that shows and does what its key may")
