"""Makes the SBOM that maturin writes the same wherever it is written."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def portable(data: bytes, root: Path) -> bytes:
    """A CycloneDX document without the place of the repository, and with a serial number.

    Its own crates are named from the root of the repository. The number is made from the text, so
    that the same text has the same. GitHub attests no SBOM without one, and maturin leaves it out
    where builds are to be alike.
    """
    text = data.decode().replace(f"path+{root.as_uri()}/", "path+file:///")
    document = {name: value for name, value in json.loads(text).items() if name != "serialNumber"}
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document, sort_keys=True))
    # The kind of document comes first, for people.
    first = {name: document.pop(name) for name in ("bomFormat", "specVersion") if name in document}
    whole = {**first, "serialNumber": f"urn:uuid:{number}", **document}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
