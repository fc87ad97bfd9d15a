"""The errors that callers meet, one class per cause.

Every class derives from `QwenLoraError` and from the built-in exception a caller would catch.
"""

from __future__ import annotations

__all__ = [
    "AdapterNameError",
    "AdapterWeightError",
    "BlockFactorsError",
    "BrokenPairError",
    "EnergyLossError",
    "LoraFileError",
    "LoraNotFoundError",
    "LoraReadError",
    "ModelStateError",
    "NonFiniteError",
    "NormsFileError",
    "NothingToApplyError",
    "NothingToFuseError",
    "OtherModelError",
    "OutputError",
    "PickleFileError",
    "QwenLoraError",
    "RankError",
    "ScheduleError",
    "ShapeMismatchError",
    "UnknownWeightError",
    "UnsupportedAdapterError",
    "UnsupportedModelError",
]


class QwenLoraError(Exception):
    """Base of all errors of this package."""


class BlockFactorsError(QwenLoraError, ValueError):
    """A text of factors by block has another form, or names blocks that a model lacks.

    Attributes:
        part: The part of the text that is at fault.
        position: Where that begins in the text, from 0.
    """

    def __init__(self, message: str, *, part: str = "", position: int = 0) -> None:
        """Take the message and what it is about."""
        super().__init__(message)
        self.part = part
        self.position = position


class ScheduleError(QwenLoraError, ValueError):
    """A text of a schedule has another form, or nothing tells how far sampling is.

    Attributes:
        part: The part of the text that is at fault; empty where it is not the text.
        position: Where that begins in the text, from 0.
    """

    def __init__(self, message: str, *, part: str = "", position: int = 0) -> None:
        """Take the message and what it is about."""
        super().__init__(message)
        self.part = part
        self.position = position


class LoraReadError(QwenLoraError, OSError):
    """A file cannot be opened or read, or changed while it was being read."""


class LoraNotFoundError(LoraReadError, FileNotFoundError):
    """There is no such file."""


class LoraFileError(QwenLoraError, ValueError):
    """A file is not a well-formed safetensors file, or its contents contradict each other."""


class PickleFileError(LoraFileError):
    """A file is a pickle, which can run code when loaded; only safetensors is read."""


class OtherModelError(QwenLoraError, ValueError):
    """A LoRA is for another model."""


class NothingToApplyError(QwenLoraError, ValueError):
    """Nothing of a LoRA can be applied to the model."""


class UnsupportedAdapterError(QwenLoraError, NotImplementedError):
    """Strict: a module's adapter, or a part of it, is not supported. Always: it is not known."""


class BrokenPairError(QwenLoraError, ValueError):
    """Strict: a module's tensors are incomplete or contradict each other."""


class ShapeMismatchError(QwenLoraError, ValueError):
    """Strict: a module's delta does not fit the model's module, or the model has none."""


class EnergyLossError(QwenLoraError, ValueError):
    """Strict: truncating a delta would lose more of its energy than is allowed."""


class RankError(QwenLoraError, ValueError):
    """A rank limit cannot be met."""


class NonFiniteError(QwenLoraError, ArithmeticError):
    """A composed tensor would hold NaN or infinity."""


class NormsFileError(QwenLoraError, ValueError):
    """A file of norms is none, or does not fit the model's weights."""


class AdapterNameError(QwenLoraError, ValueError):
    """A name of an adapter is not known, is taken, or is none."""


class AdapterWeightError(QwenLoraError, ValueError):
    """Weights do not fit the adapters, or a part of one cannot be carried out."""


class NothingToFuseError(QwenLoraError, NotImplementedError):
    """Composed LoRAs run inside the layers already: there is nothing to fuse them into."""


class OutputError(QwenLoraError, OSError):
    """A result cannot be written."""


class UnsupportedModelError(QwenLoraError, TypeError):
    """The model has no layers that LoRAs can be composed into, or is in a state that forbids it."""


class UnknownWeightError(QwenLoraError, TypeError):
    """A layer stores its weight in a form that is not known, and an adapter needs to know it."""


class ModelStateError(QwenLoraError, RuntimeError):
    """The model's layers are not as they were left: something else changed them."""
