"""An SBOM is the same wherever it is written."""

from __future__ import annotations

import json
import uuid

from sbom import portable


def document(folder):
    crate = f"path+{folder.as_uri()}/rust/py#qwenlora-py@0.1.0"
    own = {"bom-ref": crate, "description": "A × B"}
    whole = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": [own]}
    return json.dumps(whole, ensure_ascii=False).encode()


def test_two_places_make_one_text(tmp_path):
    first, second = tmp_path / "a", tmp_path / "a b" / "ü"
    texts = {portable(document(folder), folder) for folder in (first, second)}
    (text,) = texts
    assert b"path+file:///rust/py#qwenlora-py@0.1.0" in text
    assert "A × B".encode() in text


def test_the_serial_number_is_the_text_s(tmp_path):
    told = [json.loads(portable(document(tmp_path), tmp_path))]
    told.append(json.loads(portable(json.dumps(told[0]).encode(), tmp_path)))
    told.append(json.loads(portable(json.dumps(told[0] | {"version": 2}).encode(), tmp_path)))
    numbers = [own["serialNumber"] for own in told]
    assert numbers[0] == numbers[1] != numbers[2]
    assert uuid.UUID(numbers[0]).version == 5
