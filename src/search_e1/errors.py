"""Every error that the package raises on purpose.

::

    SearchE1Error
    ├── ConfigError      (ValueError)    a key, a flag or a combination of them
    ├── DataError        (ValueError)    a question, a passage or an artifact's content
    ├── ModelError       (ValueError)    a policy directory, its tokenizer, its context
    ├── RetrievalError   (RuntimeError)  the retriever did not answer, or its answer is invalid
    ├── EndpointError    (RuntimeError)  a model's endpoint did not answer, or its answer is invalid
    ├── RunError         (RuntimeError)  a run directory: locked, drifted, incomplete
    ├── NoLeadError      (RuntimeError)  the teacher has no lead, so distillation would not help
    ├── PreflightError   (RuntimeError)  the policy or the corpus gives the run nothing to learn from
    └── TrainingError    (RuntimeError)  training cannot continue, e.g. after a non-finite loss

A bad model output is data, not an error: see ``types.StopReason``. Messages are one line: what is wrong, where, and how to
fix it. The command line prints them unchanged and exits with status 2.
"""


class SearchE1Error(Exception):
    """Base of all errors that a user can fix."""


class ConfigError(SearchE1Error, ValueError):
    """A configuration key, flag or combination that cannot be used."""


class DataError(SearchE1Error, ValueError):
    """Questions, passages or stored artifacts that cannot be read; the message names the file and line."""


class ModelError(SearchE1Error, ValueError):
    """A policy that cannot be loaded, or that does not fit the task."""


class RetrievalError(SearchE1Error, RuntimeError):
    """Retrieval failed. Never turned into an empty observation."""


class EndpointError(SearchE1Error, RuntimeError):
    """A model's endpoint is down, refuses the request, or returns something other than a completion."""


class RunError(SearchE1Error, RuntimeError):
    """A run directory that is in use, belongs to another config, or lacks a stage."""


class NoLeadError(SearchE1Error, RuntimeError):
    """The privileged prompt does not make the policy better, so there is nothing to distill."""


class PreflightError(SearchE1Error, RuntimeError):
    """The policy or the corpus gives the run nothing to learn from."""


class TrainingError(SearchE1Error, RuntimeError):
    """Training reached a state from which it cannot continue."""
