"""One category's ``results.json``: the settings of its trainings, and what each method came to."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comet_examples.datasets import Sample
from comet_examples.training import ResumeError
from comet_meta.vision.files import replacing


class Results:
    """Results that are kept method by method, for one set of settings.

    Args:
        file: Where they are stored; read if it exists.
        settings: Everything that decides a method's outcome, as JSON can hold it (tuples are taken
            for lists).

    Attributes:
        settings: As given, in JSON's types.
        methods: Entries of the methods that are finished.
        lengths: Mean losses of held-out pictures by length of training, as text, where the length
            was chosen by these (:mod:`comet_examples.length`); empty otherwise.

    Raises:
        ResumeError: If the file holds results of other settings, or can't be read.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.methods: dict[str, Any] = {}
        self.lengths: dict[str, float] = {}
        if file.exists():
            self.methods, self.lengths = _stored(file, self.settings)

    def add(self, method: str, entry: Mapping[str, Any]) -> None:
        """Store a finished method.

        Args:
            method: Its name.
            entry: What it came to: ``"test"`` with the figures by name, perhaps ``"curation"``.
        """
        self.methods[method] = dict(entry)
        self.save()

    def save(self) -> None:
        """Write the file, atomically."""
        content = {"settings": self.settings, "methods": self.methods, "lengths": self.lengths}
        with replacing(self.file) as aside:
            aside.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def rows(self, methods: Iterable[str]) -> list[dict[str, str | float]]:
        """The lines of a table.

        Args:
            methods: Which, in this order.

        Returns:
            One line for each that is finished: category, method and figures.
        """
        return [
            self.row(method, self.methods[method]) for method in methods if method in self.methods
        ]

    def row(self, method: str, entry: Mapping[str, Any]) -> dict[str, str | float]:
        """One line of the table.

        Args:
            method: Its name.
            entry: As :meth:`add` takes it.

        Returns:
            Category, method and figures.
        """
        curation = {f"curation {k}": v for k, v in entry.get("curation", {}).items()}
        return {
            "category": self.settings["category"],
            "method": method,
            **entry["test"],
            **curation,
        }


def fingerprint(samples: Sequence[Sample]) -> str:
    """Names pictures in their order, with labels and masks.

    Args:
        samples: The pictures.

    Returns:
        Their number and a digest of labels and of each file's path, size and time of change.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.label}\n".encode())
        for path in filter(None, (sample.path, sample.mask)):
            status = path.stat()
            digest.update(os.fsencode(path.resolve()))  # names needn't be valid UTF-8
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{len(samples)} pictures, {digest.hexdigest()[:12]}"


def _stored(file: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The finished methods and the lengths of a file, if it is of the same settings."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["settings"]
        methods, lengths = dict(content["methods"]), dict(content.get("lengths", {}))
        changed = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"can't read {file} ({error}); give another --out, or remove it to start afresh"
        ) from error
    if changed:
        was = (f"{key} was {found.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise ResumeError(
            f"{file.parent} holds results of other settings: {', '.join(was)}; give another --out, "
            "or remove that folder to start afresh"
        )
    return methods, lengths
