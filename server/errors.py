"""Owns the domain errors of the server; the table in `api/error_responses` maps each one to an HTTP response.

Invariant: every `ServerError` has a row in that table (a test walks the tree), and none knows an HTTP status.

Exception
├── StartError                       the server refuses to start; the message is the reason
│   └── StartFailedError             it could not start
├── ServerDiedError                  a server that had started ended by itself; the message says why
└── ServerError                      a request cannot be served as asked
    ├── InvalidRequestError          a parameter or the body is invalid
    │   └── ContextLengthError       a text is longer than the model's context
    ├── EngineUnavailableError       the engine is starting, stopping or not answering
    ├── StoreUnreachableError        the store that servers share does not answer
    ├── InvalidKeyError              no API key, or an unknown one
    ├── ForbiddenError               a known caller without the right
    ├── RateLimitedError             a key's requests or tokens are used up
    ├── ModelNotFoundError           no model of that name, for this caller
    ├── AdapterNotFoundError         no adapter of that name, for this caller
    ├── VersionNotFoundError         no such version of the adapter
    ├── InvalidNameError             no adapter may have that name
    ├── NameConflictError            the base model has that name
    ├── ActiveChangedError           another version is active than the caller expected
    ├── VersionActiveError           the active version of several cannot be deleted
    ├── QuotaExceededError           too many adapters, versions or bytes
    ├── SourceNotFoundError          nothing is at the place that an adapter is to be loaded from
    ├── AuditLogError                a change cannot be recorded, so it is rejected
    ├── AdapterUnavailableError      a version cannot be loaded, or not in time
    ├── AdapterDeletedError          the version was deleted while the request ran or waited
    ├── AdapterOutputInvalidError    the adapter drove the logits to NaN or infinity
    ├── DeviceFullError              pinned adapters leave no room
    ├── ConnectionLimitError         a request is rejected before it is whole, with its connection
    │   ├── UrlTooLongError          the URL is longer than is read
    │   ├── HeadersTooLargeError     the headers are more, or larger, than are read
    │   ├── RequestTimeoutError      headers or body came too slowly
    │   ├── RequestTooLargeError     the body is larger than that of an inference request may be
    │   ├── UnsupportedEncodingError the body is compressed
    │   └── TooManyConnectionsError  too many connections are open, of this client or of all
    └── UploadError                  an upload is rejected while its body may still be arriving
        ├── MalformedUploadError     the body is not a valid form
        ├── InvalidUploadError       the files break the format
        ├── InvalidUploadNameError   the adapter's name cannot be read
        ├── UploadTooLargeError      over max_adapter_bytes
        ├── UploadEncodingError      the body is compressed as a whole
        ├── UploadTimeoutError       the body came too slowly
        └── UploadStorageFullError   the disk took no more of it
"""

from collections.abc import Sequence
from typing import ClassVar


class StartError(Exception):
    """The server refuses to start."""

    headline: ClassVar[str] = "refused to start"


class StartFailedError(StartError):
    """The server could not start, although nothing spoke against it."""

    headline = "failed to start"


class ServerDiedError(Exception):
    """A server that had started ended by itself."""


class ServerError(Exception):
    """A request cannot be served as asked.

    code: the error's stable name, in responses and metrics. param: the caller's field, where the raiser knows it.
    retry_after_s: seconds to wait before a retry (None: not known).
    """

    code: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after_s = message, param, retry_after_s


class InvalidRequestError(ServerError):
    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class EngineUnavailableError(ServerError):
    code = "engine_unavailable"


class StoreUnreachableError(ServerError):
    code = "store_unavailable"


class InvalidKeyError(ServerError):
    code = "invalid_api_key"


class ForbiddenError(ServerError):
    code = "forbidden"


class RateLimitedError(ServerError):
    code = "rate_limited"


class ModelNotFoundError(ServerError):
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        shown = model if len(model) <= 100 else model[:97] + "..."
        super().__init__(f"found no model named {shown!r} here; GET /v1/models lists the base and the adapters")


class AdapterNotFoundError(ServerError):
    code = "adapter_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"found no adapter named {name[:100]!r}; GET /v1/adapters lists them")


class VersionNotFoundError(ServerError):
    code = "version_not_found"

    def __init__(self, name: str, version: int, param: str | None = None) -> None:
        super().__init__(f"found no version {version} of {name!r}", param=param)


class InvalidNameError(ServerError):
    code = "invalid_name"


class NameConflictError(ServerError):
    code = "name_conflict"


class ActiveChangedError(ServerError):
    code = "active_changed"


class VersionActiveError(ServerError):
    code = "version_active"


class QuotaExceededError(ServerError):
    code = "quota_exceeded"


class SourceNotFoundError(ServerError):
    code = "not_found"


class AuditLogError(ServerError):
    code = "storage_full"


class AdapterUnavailableError(ServerError):
    code = "adapter_unavailable"


class AdapterDeletedError(ServerError):
    code = "adapter_deleted"


class AdapterOutputInvalidError(ServerError):
    code = "adapter_output_invalid"


class DeviceFullError(ServerError):
    code = "device_full"


class ConnectionLimitError(ServerError):
    """Rejected before the request is whole: the connection is closed, or the rest would keep coming."""


class UrlTooLongError(ConnectionLimitError):
    code = "url_too_long"


class HeadersTooLargeError(ConnectionLimitError):
    code = "headers_too_large"


class RequestTimeoutError(ConnectionLimitError):
    code = "request_timeout"


class RequestTooLargeError(ConnectionLimitError):
    code = "request_too_large"


class UnsupportedEncodingError(ConnectionLimitError):
    code = "unsupported_encoding"


class TooManyConnectionsError(ConnectionLimitError):
    code = "too_many_connections"


class UploadError(ServerError):
    """Rejected while the body may still be arriving: the connection is closed, or the rest would keep coming."""


class MalformedUploadError(UploadError):
    code = "invalid_request"


class InvalidUploadError(UploadError):
    code = "invalid_adapter"

    def __init__(self, violations: Sequence[str]) -> None:
        super().__init__("the upload breaks the adapter format")
        self.violations = tuple(violations)


class InvalidUploadNameError(UploadError):
    code = "invalid_name"


class UploadTooLargeError(UploadError):
    code = "adapter_too_large"


class UploadEncodingError(UploadError):
    code = "unsupported_encoding"


class UploadTimeoutError(UploadError):
    code = "upload_timeout"


class UploadStorageFullError(UploadError):
    code = "storage_full"
