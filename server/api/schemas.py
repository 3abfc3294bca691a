"""Owns the JSON objects of the adapter routes (docs/api.md): one documented model each."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Tier = Literal["device", "host", "disk"]
VersionState = Literal["ready", "draining", "failed"]


class VersionObject(BaseModel):
    """One version of an adapter. Fields that PEFT LoRA adapters do not have (variant, ...) are null."""

    model_config = ConfigDict(from_attributes=True)

    version: int = Field(ge=1)
    id: str = Field(description="NAME@version: selects exactly this version as a request's `model`")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="the content's identity (docs/format.md)")
    state: VersionState
    reason: str | None = Field(None, description="why state is failed")
    peft_type: Literal["PERFT", "LORA"]
    variant: str | None
    expert_type: str | None
    num_experts: int | None
    top_k: int | None
    bottleneck: int | None
    size_bytes: int = Field(ge=0)
    rows: int = Field(ge=0, description="rows of the device pool it takes")
    created: int = Field(description="unix seconds")
    resident: Tier
    requests_running: int | None = Field(
        ge=0, description="requests of this version in the engine; null for an API key that shares the adapter"
    )
    last_used: int | None = Field(
        description="unix seconds; null if not used since the server started, or for an API key that shares the adapter"
    )
    description: str | None


class AdapterObject(BaseModel):
    """A name, its versions and which of them is active."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["adapter"] = "adapter"
    name: str
    active: int | None
    allowed_keys: list[str] | None
    pinned: bool
    versions: list[VersionObject]


class UploadedAdapter(AdapterObject):
    """The adapter after an upload of which something was ignored."""

    notes: list[str] = Field(description="what of the upload is not part of an adapter, and was ignored")


class AdapterList(BaseModel):
    """A page of adapters. `next` is the `after` of the following page of a list by name, else null."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["list"] = "list"
    data: list[AdapterObject]
    has_more: bool
    next: str | None
    total: int = Field(ge=0, description="how many adapters match, on all pages")


class AdapterPatch(BaseModel):
    """What PATCH changes; a field that is not given stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    active: int | None = Field(None, ge=1, lt=2**31, description="the version that the bare name selects")
    if_active: int | None = Field(None, ge=1, description="change only if this version is the active one now")
    allowed_keys: list[Label] | None = Field(
        None, max_length=1000, description="labels of keys that may select the adapter; null: all"
    )
    pinned: bool = Field(False, description="whether it stays on the device")


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str
    violations: list[str] | None = Field(None, description="every violation of the format (code invalid_adapter)")


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """Anthropic's error, with what OpenAI's has as well."""

    type: str
    message: str
    param: str | None
    code: str


class AnthropicErrorObject(BaseModel):
    """Anthropic's error object."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str | None
