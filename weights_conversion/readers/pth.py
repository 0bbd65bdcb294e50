"""Reads torch files (.pth, .pt, .bin) of both formats without torch and without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weights_conversion.readers import formats
from weights_conversion.readers.stored import RefusedFileError, short
from weights_conversion.readers.torch_legacy import read_legacy
from weights_conversion.readers.torch_zip import read_zip

SAVE_AGAIN = "download it again, or save the state dict alone as safetensors"


def read_pth(path: str | Path) -> Any:
    """Reads a torch file into plain containers whose tensors are `StoredTensor`.

    Args:
      path: A file written by torch.save since 0.1.10.

    Returns:
      What was saved: dicts (also for OrderedDict), lists, tuples, numbers, strings, tensors.

    Raises:
      RefusedFileError: One line that says what is wrong; nothing of the file has been executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            legacy = formats.is_legacy_torch(file.read(formats.HEAD_BYTES))
            file.seek(0)
            return read_legacy(path, file) if legacy else read_zip(path, file)
    except RefusedFileError as error:
        raise RefusedFileError(
            f"{short(path.name)}: a torch file is a whole file of tensors, as torch.save writes "
            f"it; got a file of which {error}; {SAVE_AGAIN}"
        ) from None
