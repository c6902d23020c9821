"""A compiled source as bytes that notice damage: what the cache keeps and what a wheel carries.

Four parts with a newline between them: "dsv4 cubin 1", the hexadecimal SHA-256 of all that follows it, one line of
JSON, the cubin (deflated: a quarter of its size, and unpacked in milliseconds).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dsv4.kernels.figures import Figures

_MAGIC: Final = b"dsv4 cubin 1\n"
_HEAD: Final = len(_MAGIC) + 65


class Entry(NamedTuple):
    """file, architecture: what was compiled. digest: Source.digest. compiler: its version. functions: name -> figures.

    remarks: the compiler's warnings. cubin: the code.
    """

    file: str
    architecture: str
    digest: str
    compiler: str
    functions: Mapping[str, Figures]
    remarks: str
    cubin: bytes

    @property
    def kernels(self) -> dict[str, Figures]:
        """Those functions that can be launched."""
        return {name: of for name, of in self.functions.items() if of.registers is not None}


def pack(entry: Entry) -> bytes:
    """The bytes of an entry."""
    told = entry._asdict()
    cubin = zlib.compress(told.pop("cubin"))
    body = json.dumps(told).encode() + b"\n" + cubin
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(data: bytes) -> Entry:
    """The entry of these bytes; ValueError says what is wrong with them."""
    if not data.startswith(_MAGIC) or data[_HEAD - 1 : _HEAD] != b"\n":
        raise ValueError("no entry of this version")
    body = data[_HEAD:]
    if hashlib.sha256(body).hexdigest().encode() != data[len(_MAGIC) : _HEAD - 1]:
        raise ValueError("its checksum does not match")
    line, _, cubin = body.partition(b"\n")
    try:
        told = json.loads(line)
        functions = {name: _figures(*values) for name, values in told["functions"].items()}
        return Entry(**told | {"functions": functions}, cubin=zlib.decompress(cubin))
    except (KeyError, TypeError, zlib.error):
        raise ValueError("no entry of this version") from None


def _figures(*values: Any) -> Figures:
    found = Figures(*values)
    return found._replace(parameters=tuple(found.parameters))
