"""The manifest of an archive: what its shards hold, their sizes and sha256."""

from __future__ import annotations

from typing import Any

from etils import epath

from dinosae_jax.runtime import files, snapshots, untrusted

MANIFEST = "manifest.json"


def read_manifest(path: epath.Path, again: str = "the conversion") -> dict[str, Any]:
    """Reads a manifest file, which a stranger may have written.

    Raises:
      ValueError: it is not readable; the message says to run `again`.
    """
    way_out = f"{MANIFEST} is written at the very end, run {again} again, it resumes"
    if not path.is_file():
        raise ValueError(
            f"an archive needs a readable {MANIFEST}; got {path}, which is not there; {way_out}"
        )
    untrusted.check_inside(path.parent, path, way_out)
    return untrusted.read_json(path, way_out)


def check_form(folder: epath.Path, manifest: dict[str, Any], again: str) -> None:
    """Raises ValueError where a manifest lists no shards, or some outside its folder."""
    shards, names = manifest.get("shards"), manifest.get("label_names", [])
    way_out = f"run {again} again"
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise ValueError(
            f"a manifest lists shards by name, bytes and sha256; got another form of them in "
            f"{folder}; {way_out}"
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"a manifest lists label_names; got another form of them in {folder}; {way_out}"
        )
    for shard in shards:
        untrusted.inside(folder, shard["name"], way_out)


def _is_shard(entry: Any) -> bool:
    fields = {"name": str, "bytes": int, "sha256": str}
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in fields.items())


def is_whole(folder: epath.Path, shard: dict[str, Any]) -> bool:
    """Whether a shard exists and has the size that its manifest entry states."""
    path = folder / shard["name"]
    return path.is_file() and files.size(path) == shard["bytes"]


def check_shards(
    folder: epath.Path,
    manifest: dict[str, Any],
    *,
    sha256: bool = False,
    again: str = "the conversion",
) -> None:
    """Compares an archive's shards with its manifest, by size, and by content on request.

    The content of shards in a bucket is that of their copy, which reading them uses too.

    Raises:
      ValueError: a shard is missing or differs; the message names it.
    """
    check_form(folder, manifest, again)
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        if not is_whole(folder, shard):
            raise ValueError(
                f"an archive's shards must be as its manifest says; got {path}, which is missing "
                f"or has not its {shard['bytes']} bytes; run {again} again, which repairs it"
            )
    if not sha256:
        return
    found = files.file_sha256s(local_shards(folder, manifest))
    for shard, ours in zip(manifest["shards"], found, strict=True):
        if ours != shard["sha256"]:
            raise ValueError(
                "an archive's shards must be as its manifest says; got "
                f"{folder / shard['name']}, whose content has changed; remove that file and run "
                f"{again} again"
            )


def local_shards(folder: epath.Path, manifest: dict[str, Any]) -> list[epath.Path]:
    """An archive's shards as files of this machine: themselves, or copies of what a bucket has."""
    names = [shard["name"] for shard in manifest["shards"]]
    here = snapshots.local(folder, names)
    return [here / name for name in names]
