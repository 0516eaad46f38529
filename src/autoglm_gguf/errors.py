"""Every error a user can meet, as one family.

This module knows what can go wrong and what to type next; it does not know how errors are shown
(``cli/errors.py`` maps classes to exit codes). Wrong *arguments* stay ``ValueError``/``TypeError``.

    AutoGLMError
    ├── CheckpointError          the published files are missing, broken, or not what they claim
    │   └── UnsupportedModelError    a sound checkpoint of a family we do not convert
    ├── HubError                 the hub, or the cache of what it gave, cannot deliver a checkpoint
    ├── GGUFError                a GGUF file is missing, broken, or lacks what is needed
    │   └── PairMismatchError        text GGUF and mmproj GGUF do not belong together
    ├── ConversionError          the conversion itself could not be done or written
    ├── ImageError               bytes that are no image, or an image the model cannot take
    ├── PromptError              messages that the chat template cannot render
    ├── ContextFullError         a request that cannot fit n_ctx
    ├── DoesNotFitError          a model too large for the memory budget, or for the machine
    ├── ActionParseError         an answer that is no action
    ├── SavedSessionError        a saved session that cannot be written, read, or used here
    ├── EngineError              llama.cpp failed while loading or running
    │   └── EngineBusyError          a stream of this model is still open
    ├── CloudError               a configured cloud model gave no answer
    ├── BenchError               a measurement that could not be made, saved, drawn or read back
    ├── VerificationError        a converted model lies outside its thresholds
    ├── EvaluationError          a text or a base file that a measurement cannot use or write
    ├── ServerError              a server that cannot listen where it was told to
    └── NativeLibraryError       llama-cpp-python is missing or not the pinned version
"""

from __future__ import annotations


class AutoGLMError(Exception):
    """Base of all errors of this package.

    Args:
        message: ``<thing>: <what is wrong> (<found>, <required>)``.
        hint: What to do or type next; empty if there is nothing to add.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class CheckpointError(AutoGLMError):
    """A published checkpoint is missing files, is truncated, or contradicts itself."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint whose architecture or tokenizer this package does not convert."""


class HubError(AutoGLMError):
    """A checkpoint that could not be had from the hub, or not whole.

    Args:
        message: See `AutoGLMError`.
        unreachable: The hub did not answer, which may pass; otherwise it answered no.
        hint: See `AutoGLMError`.
    """

    def __init__(self, message: str, *, unreachable: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.unreachable = unreachable


class GGUFError(AutoGLMError):
    """A GGUF file is missing, truncated, or lacks what the operation needs."""


class PairMismatchError(GGUFError):
    """A text GGUF and an mmproj GGUF that do not belong to the same model."""


class ConversionError(AutoGLMError):
    """A conversion that could not be carried out or written."""


class ImageError(AutoGLMError):
    """Data that is no image, or an image that this model cannot take."""


class PromptError(AutoGLMError):
    """Messages that the model's chat template cannot render."""


class ContextFullError(AutoGLMError):
    """A request whose prompt does not fit the context.

    Args:
        message: See `AutoGLMError`.
        n_prompt: KV cells the prompt needs (text tokens plus image tokens).
        n_ctx: KV cells the context has.
        hint: See `AutoGLMError`.
    """

    def __init__(self, message: str, *, n_prompt: int, n_ctx: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class DoesNotFitError(AutoGLMError):
    """A model that cannot be held under the memory budget, or in this machine's memory.

    Args:
        message: See `AutoGLMError`.
        budget_bytes: What was allowed; None for no bound.
        required_bytes: The least that would do.
        hint: See `AutoGLMError`.
    """

    def __init__(
        self, message: str, *, budget_bytes: int | None, required_bytes: int, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.budget_bytes = budget_bytes
        self.required_bytes = required_bytes


class ActionParseError(AutoGLMError):
    """An answer in which no action of the client's grammar was found.

    Args:
        message: See `AutoGLMError`.
        text: The whole answer.
        hint: See `AutoGLMError`.
    """

    def __init__(self, message: str, *, text: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.text = text


class SavedSessionError(AutoGLMError):
    """A saved session that cannot be written, is broken, or belongs to another model."""


class EngineError(AutoGLMError):
    """llama.cpp reported a failure; its last error lines are in the message."""


class EngineBusyError(EngineError):
    """The model is not free: this thread has a stream open, or was cancelled as it waited."""


class CloudError(AutoGLMError):
    """A configured cloud model that gave no answer: unreachable, refusing, or not understood.

    Args:
        message: See `AutoGLMError`; never a key.
        status: HTTP status of a refusal; None if it did not come to one.
        retry_after_s: Seconds for which it asked to be left alone.
        hint: See `AutoGLMError`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after_s = retry_after_s


class NativeLibraryError(AutoGLMError):
    """llama-cpp-python is missing, cannot be loaded, or is not the pinned version."""


class ServerError(AutoGLMError):
    """A server that cannot listen: the port is taken, or the host is not this machine."""


class BenchError(AutoGLMError):
    """A measurement that could not be made, saved, drawn or read back."""


class EvaluationError(AutoGLMError):
    """A text, transcripts or a file of base logits that a measurement cannot use or write."""


class VerificationError(AutoGLMError):
    """A converted model was compared with its original and lies outside its thresholds."""
