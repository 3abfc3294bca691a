"""How a store is named, and what is said to whoever names it otherwise."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from adapters.errors import StoreLockedError, StoreUnusableError
from adapters.store import FolderStore, open_store
from adapters.store.address import is_shared, verify_store
from server.errors import StartError
from server.settings.model import Settings
from server.settings.paths import check_paths


@pytest.mark.parametrize("place", ["s3:/bucket/prefix", "file:relative", "s3:bucket", "gs:/x"])
def test_what_is_nearly_an_address_is_no_folder(place: str) -> None:
    """It would be a store in a folder of that name, which nobody shares."""
    with pytest.raises(StoreUnusableError, match=r"expected SCHEME://"):
        is_shared(place)
    with pytest.raises(ValidationError, match=r"expected SCHEME://"):
        Settings(adapter_store=place)


def test_a_shared_store_named_as_a_folder_is_told_its_address(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path / 'shared'}", tmp_path / "cache").close()
    said = f"servers share: name it by its address, file://{tmp_path}/shared"
    with pytest.raises(StoreUnusableError, match=said):
        FolderStore.open(tmp_path / "shared")
    (problem,) = verify_store(tmp_path / "shared")
    assert said in problem


def test_two_servers_with_one_cache_are_told_so_before_a_model_loads(tmp_path: Path) -> None:
    place, cache = f"file://{tmp_path / 'shared'}", tmp_path / "cache"
    store = open_store(place, cache)
    wanted = r"the cache .* is another server's, expected one for each: .* --adapter-cache; the store is shared"
    with pytest.raises(StoreLockedError, match=wanted):
        open_store(place, cache)
    with pytest.raises(StartError, match=f"--adapter-cache: {wanted}"):
        check_paths("org/model", Settings(adapter_store=place, adapter_cache=cache))
    store.close()
    check_paths("org/model", Settings(adapter_store=place, adapter_cache=cache))
