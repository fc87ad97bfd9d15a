"""What a LoRA file says of itself: title, author, trigger words, tags, from its metadata.

Metadata is anybody's text. Whatever it holds, reading it raises nothing and takes bounded time and
memory; what is of another form than its trainer would write is passed over.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwenlora.console import plain

__all__ = ["About"]

_MOST_TEXT = 200
"""Characters of an entry that are kept."""
_MOST_WORDS = 50
_MOST_TAGS = 20
_MOST_JSON = 16 << 20
"""Characters of a document that are parsed; tags of a thousand pictures take some 100 000."""
_MOST_COUNT = 10**12
_TITLE = ("modelspec.title", "ss_output_name", "name")
_AUTHOR = ("modelspec.author", "author")
_BASE_MODEL = ("ss_base_model_version", "base_model", "ss_sd_model_name", "baseModel")
_ARCHITECTURE = ("modelspec.architecture",)
_RESOLUTION = ("modelspec.resolution", "ss_resolution")
_DESCRIPTION = ("modelspec.description", "ss_training_comment", "description")
_LICENSE = ("modelspec.license", "license")
_TRIGGERS = (
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
    "trainedWords",
    "activation text",
)
_TAGS = "ss_tag_frequency"
_DATASETS = "ss_datasets"
_NONE = frozenset(("", "none", "null", "n/a", "undefined", "unknown"))
_SEPARATORS = re.compile(r"[,;\n]")
_LEAST_SHARE = 0.5
"""How often a tag is, beside the most frequent one, that stands in for unwritten trigger words."""
_MOST_STAND_INS = 5


@dataclass(frozen=True)
class About:
    """What a file says of itself; what it does not say is empty.

    Attributes:
        title: Its title.
        author: Who made it.
        base_model: The model that it was trained on, in its trainer's words.
        architecture: The model's architecture, as ModelSpec names it.
        resolution: Of the pictures that it was trained on.
        description: A description, or a comment.
        license: The terms of use.
        trigger_words: Words that call it up in a prompt, as its maker wrote them down.
        tags: The most frequent tags of its training pictures with their counts.
    """

    title: str = ""
    author: str = ""
    base_model: str = ""
    architecture: str = ""
    resolution: str = ""
    description: str = ""
    license: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> About:
        """Read a file's metadata."""
        return cls(
            title=_first(metadata, _TITLE),
            author=_first(metadata, _AUTHOR),
            base_model=_first(metadata, _BASE_MODEL),
            architecture=_first(metadata, _ARCHITECTURE),
            resolution=_first(metadata, _RESOLUTION).strip("()[] ").replace(", ", "x"),
            description=_first(metadata, _DESCRIPTION),
            license=_first(metadata, _LICENSE),
            trigger_words=_trigger_words(metadata),
            tags=_tags(metadata),
        )

    @property
    def prompt_words(self) -> str:
        """Words for a prompt, joined by commas: trigger words, else the tags in their place.

        Those are tags that at least half as many pictures have as the most frequent one, five at
        most.
        """
        return ", ".join(self.trigger_words or self._stand_ins())

    def lines(self) -> Iterator[str]:
        """Lines for a person; none for what is not said."""
        for field in ("title", "author", "base_model", "architecture", "resolution", "license"):
            if text := getattr(self, field):
                yield f"{field.replace('_', ' ')}: {text}"
        if self.trigger_words:
            yield f"trigger words: {', '.join(self.trigger_words)}"
        if self.tags:
            yield f"tags: {', '.join(f'{tag} ({count})' for tag, count in self.tags)}"
        if self.description:
            yield f"description: {self.description}"

    def _stand_ins(self) -> list[str]:
        least = _LEAST_SHARE * max((count for _, count in self.tags), default=0)
        return [tag for tag, count in self.tags[:_MOST_STAND_INS] if count >= least]


def _first(metadata: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next(filter(None, (_text(metadata.get(name)) for name in names)), "")


def _text(value: object) -> str:
    """A text on one line, of bounded length; "" for what is none, or says that there is none."""
    if not isinstance(value, str):
        return ""
    text = plain(" ".join(value[: 4 * _MOST_TEXT].split()))
    if text.lower() in _NONE:
        return ""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT].rstrip()}..."


def _trigger_words(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in _TRIGGERS:
        for word in _words(metadata.get(name)):
            found.setdefault(word)
            if len(found) == _MOST_WORDS:
                return tuple(found)
    return tuple(found)


def _words(value: object) -> Iterator[str]:
    """Words of a text with separators, or of a JSON list of such texts."""
    if not isinstance(value, str):
        return
    listed = _document(value) if value.lstrip()[:1] == "[" else None
    texts = listed if isinstance(listed, list) else [value]
    for text in texts[:_MOST_WORDS]:
        if isinstance(text, str):
            yield from filter(None, map(_text, _SEPARATORS.split(text[: 100 * _MOST_TEXT])))


def _tags(metadata: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """The most frequent tags over all folders of pictures, those of equal counts by name."""
    counts: Counter[str] = Counter()
    folders = list(_folders(metadata))
    for folder in folders:
        for tag, count in folder.items():
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count < _MOST_COUNT:
                counts[tag] += count
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TAGS]
    shown = ((_text(tag), count) for tag, count in ranked)
    return tuple((tag, count) for tag, count in shown if tag)


def _folders(metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Counts by tag, of each folder of pictures."""
    document = _document(metadata.get(_TAGS))
    if document is not None:
        yield from _counts(document)
        return
    datasets = _document(metadata.get(_DATASETS))
    for dataset in datasets if isinstance(datasets, list) else ():
        if isinstance(dataset, dict):
            yield from _counts(dataset.get("tag_frequency"))


def _counts(document: object) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield from (folder for folder in document.values() if isinstance(folder, dict))


def _document(value: object) -> Any:
    """What a JSON text holds; None where it is none, or a hostile one."""
    if not isinstance(value, str) or len(value) > _MOST_JSON:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
