"""Owns the routes that change what is there: activate, roll back, restrict, pin, delete.

Invariant: every change goes through the AdapterService.
"""

from server.api.adapters.parameters import NO_QUERY, Name, Number, adapter_routes, as_object, check_labels
from server.api.dependencies import AdapterServiceOf, CallerOf, ServicesOf
from server.api.openapi import ACCESS_ERRORS, PATCH_BODY, errors_of
from server.api.schemas import AdapterObject, AdapterPatch
from server.errors import AdapterUnavailableError, DeviceFullError, InvalidRequestError

router = adapter_routes()


@router.patch(
    "/v1/adapters/{name}",
    summary="Activate, roll back, restrict or pin",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 409, 413, 503, 507),
    openapi_extra=PATCH_BODY,
)
async def patch_adapter(name: Name, change: AdapterPatch, caller: CallerOf, services: ServicesOf) -> AdapterObject:
    """All that is given is changed at once, or nothing is; a version is on the host before it becomes active."""
    given = change.model_dump(include=change.model_fields_set)
    if not given:
        known = ", ".join(AdapterPatch.model_fields)
        raise InvalidRequestError(f"found nothing to change, expected at least one of {known}")
    if "if_active" in given and "active" not in given:
        message = "found if_active alone, expected active beside it: it is the condition of that change"
        raise InvalidRequestError(message, param="if_active")
    if change.allowed_keys:
        await services.following.fresh(name)
        services.registry.visible(name, caller)
        check_labels(change.allowed_keys, services.registry.record(name), services.keys.labels)
    try:
        return as_object(await services.adapters.patch(name, given, caller))
    except (DeviceFullError, AdapterUnavailableError) as error:
        error.param = error.param or ("active" if "active" in given else "pinned")
        raise


@router.delete(
    "/v1/adapters/{name}",
    status_code=202,
    summary="Delete an adapter",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 507),
)
async def delete_adapter(name: Name, caller: CallerOf, service: AdapterServiceOf) -> AdapterObject:
    """All versions and the name: nothing new is admitted from now on, running requests may finish."""
    return as_object(await service.delete(name, None, caller))


@router.delete(
    "/v1/adapters/{name}/versions/{version}",
    status_code=202,
    summary="Delete a version",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 409, 507),
)
async def delete_version(name: Name, number: Number, caller: CallerOf, service: AdapterServiceOf) -> AdapterObject:
    """One version: nothing new is admitted from now on, running requests may finish. Not the active one of several."""
    return as_object(await service.delete(name, number, caller))
